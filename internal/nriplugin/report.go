package nriplugin

import (
	"fmt"
	"strings"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/headstart-oci/headstart/internal/rebuild"
	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/trace"
)

// recording sums up a run for the log and for the job.
func (r *run) recording(l *persist.List, saved persist.Saved) rebuild.Recording {
	rec := rebuild.Recording{
		Container: r.id, Name: r.name, Pod: r.pod, Namespace: r.namespace,
		Files: len(l.Accesses), Skipped: l.Skipped, Lost: lost(l.Losses),
		Duration: l.Duration, End: l.End, List: saved.Native,
	}
	for i := range l.Accesses {
		a := &l.Accesses[i]
		rec.Bytes += touched(a)
		if a.How&(trace.Read|trace.Executed) != 0 {
			rec.ReadFiles++
		}
	}
	return rec
}

// touched returns how many bytes of a file were touched at most.
func touched(a *trace.Access) int64 {
	if a.Ranges == nil {
		return a.Size
	}
	var n int64
	for _, r := range a.Ranges {
		n += r.Length
	}
	return n
}

// lost says in a few words what is missing; empty: nothing.
func lost(losses []trace.Loss) string {
	var parts []string
	for _, l := range losses {
		s := l.Reason
		if l.Count >= 0 {
			s = fmt.Sprintf("%s: %d", s, l.Count)
		} else {
			s += ": unknown number"
		}
		if l.Detail != "" {
			s += " (" + oneLine(l.Detail) + ")"
		}
		parts = append(parts, s)
	}
	return strings.Join(parts, "; ")
}

// report logs the one line of a run that was recorded. When a rebuild is queued, the line of
// its end says all of this again with what was built.
func (r *run) report(l *persist.List, rec rebuild.Recording, saved persist.Saved, outcome string, err error) {
	level := zapcore.InfoLevel
	if err != nil || rec.Lost != "" {
		level = zapcore.WarnLevel
	}
	image := rebuild.Image{Reference: l.Reference, Digest: l.Digest, Platform: l.Platform}
	fields := append(recorded(image, rec), zap.Int64("events", l.Events))
	if saved.Paths != "" {
		fields = append(fields, zap.String("paths", saved.Paths))
	}
	fields = append(fields, zap.String("rebuild", outcome))
	if err != nil {
		fields = append(fields, zap.Error(err))
	}
	r.settings.backend.Log.Log(level, "recorded "+sentence(image, rec)+"; rebuild "+outcome, fields...)
}

// LogBuilt logs the line of an image that was built: what was read, what was lost, what was
// built and where.
func LogBuilt(log *zap.Logger, j rebuild.Job, res rebuild.Result) {
	fields := append(recorded(j.Image, j.Recording),
		zap.String("target", res.Target), zap.String("manifest", res.Manifest), zap.String("source", res.Source),
		zap.Int("blobs", res.Blobs), zap.Int64("blob_bytes", res.BlobBytes), zap.Int64("source_bytes", res.SourceBytes),
		zap.String("prefetch_blob", res.PrefetchBlob), zap.Int64("prefetch_bytes", res.PrefetchBytes),
		zap.Int("prefetch_files", res.PrefetchFiles),
		zap.Duration("build_time", res.Duration), zap.Int("attempt", j.Attempts))
	log.Info(fmt.Sprintf("rebuilt %s; built %s with a prefetch blob of %s in %v",
		sentence(j.Image, j.Recording), res.Target, size(res.PrefetchBytes), res.Duration.Round(time.Millisecond)), fields...)
}

// LogFailed logs the line of a rebuild that was given up.
func LogFailed(log *zap.Logger, j rebuild.Job, f rebuild.Failure) {
	fields := append(recorded(j.Image, j.Recording),
		zap.String("target", j.Target), zap.Int("attempts", f.Attempts), zap.Bool("permanent", f.Permanent), zap.String("error", f.Error))
	log.Error("not rebuilt "+sentence(j.Image, j.Recording)+"; built nothing: "+oneLine(f.Error), fields...)
}

func sentence(i rebuild.Image, rec rebuild.Recording) string {
	missing := rec.Lost
	if missing == "" {
		missing = "nothing"
	}
	name := i.Reference
	if name == "" {
		name = "an image without a name"
	}
	return fmt.Sprintf("%s: read %d files (%s) in %v until %s; lost %s",
		name, rec.Files, size(rec.Bytes), rec.Duration.Round(time.Millisecond), rec.End, missing)
}

func recorded(i rebuild.Image, rec rebuild.Recording) []zap.Field {
	fields := []zap.Field{
		zap.String("image", i.Reference), zap.String("digest", i.Digest), zap.String("platform", i.Platform),
		zap.String("container", rec.Container),
	}
	for _, f := range []struct{ key, value string }{{"name", rec.Name}, {"pod", rec.Pod}, {"namespace", rec.Namespace}} {
		if f.value != "" {
			fields = append(fields, zap.String(f.key, f.value))
		}
	}
	return append(fields,
		zap.Int("files", rec.Files), zap.Int("files_read", rec.ReadFiles), zap.Int64("bytes", rec.Bytes),
		zap.Int64("skipped", rec.Skipped), zap.String("lost", rec.Lost), zap.Duration("duration", rec.Duration),
		zap.String("end", rec.End), zap.String("list", rec.List))
}

// verdict says what the queue decided, and why.
func verdict(d rebuild.Decision) string {
	switch d.Verdict {
	case rebuild.Queued, rebuild.Replaced:
		return string(d.Verdict) + " for " + d.Target
	case rebuild.AlreadyBuilt, rebuild.BuiltForAnother:
		if d.Result != nil {
			return string(d.Verdict) + ": " + d.Result.Target
		}
	case rebuild.Unchanged:
		if d.Result != nil {
			return fmt.Sprintf("%s, but for %.1f %% of it: %s", d.Verdict, 100*d.Lacks, d.Result.Target)
		}
	case rebuild.FailedBefore:
		if d.Failure != nil {
			return string(d.Verdict) + ": " + oneLine(d.Failure.Error)
		}
	default:
	}
	return string(d.Verdict)
}

// size renders bytes for people.
func size(n int64) string {
	const unit = 1024
	if n < unit {
		return fmt.Sprintf("%d B", n)
	}
	v, units := float64(n)/unit, "KMGTPE"
	for v >= unit && len(units) > 1 {
		v, units = v/unit, units[1:]
	}
	return fmt.Sprintf("%.1f %ciB", v, units[0])
}

func oneLine(s string) string { return strings.Join(strings.FieldsFunc(s, isControl), " ") }

func isControl(r rune) bool { return r < 0x20 || r == 0x7f }
