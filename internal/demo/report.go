package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/nydusimage"
	"github.com/headstart-oci/headstart/internal/tools"
	"github.com/headstart-oci/headstart/pkg/rafs"
	"github.com/headstart-oci/headstart/pkg/trace"
)

// check has the rebuilt image judged: by our own check, and by fsck.erofs over its
// blobs' data where that is installed.
func (d *demo) check(ctx context.Context, p product) error {
	d.say("check the rebuilt image: optimizer check %s", p.result.Target)
	cmd := exec.CommandContext(ctx, d.optimizer, "check", "--quiet", p.result.Target)
	cmd.Stdout, cmd.Stderr = d.log, d.log
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("optimizer check: %w", err)
	}
	store, err := tools.NewStore(tools.Options{})
	if err != nil {
		return err
	}
	fsck, err := store.Path("fsck.erofs")
	if errors.Is(err, tools.ErrMissing) {
		d.say("fsck.erofs is not installed: not asked")
		return nil
	}
	if err != nil {
		return err
	}
	return d.fsck(ctx, fsck, p)
}

// fsck gives fsck.erofs the bootstrap with the expanded data of every blob.
func (d *demo) fsck(ctx context.Context, fsck string, p product) (err error) {
	img, err := nydusimage.Open(ctx, p.result.Target, nydusimage.Options{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, img.Close()) }()
	dir, err := os.MkdirTemp(d.dir, "fsck-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	var args []string
	for i := range img.RAFS.Blobs {
		device := filepath.Join(dir, fmt.Sprint("device-", i))
		if err := expand(ctx, img, i, device); err != nil {
			return fmt.Errorf("expand blob %d: %w", i, err)
		}
		args = append(args, "--device="+device)
	}
	r, size := img.Bootstrap()
	bootstrap := filepath.Join(dir, "bootstrap")
	data := make([]byte, size)
	if _, err := r.ReadAt(data, 0); err != nil {
		return fmt.Errorf("read bootstrap: %w", err)
	}
	if err := os.WriteFile(bootstrap, data, 0o600); err != nil {
		return err
	}
	d.say("check it with fsck.erofs, %d device files", len(args))
	if out, err := exec.CommandContext(ctx, fsck, append(args, bootstrap)...).CombinedOutput(); err != nil {
		return fmt.Errorf("fsck.erofs: %w: %s", err, strings.TrimSpace(string(out)))
	}
	return nil
}

func expand(ctx context.Context, img *nydusimage.Image, index int, device string) (err error) {
	b := img.RAFS.Blobs[index]
	in, err := img.OpenBlob(ctx, b)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, in.Close()) }()
	r, err := rafs.OpenBlob(in, b)
	if err != nil {
		return err
	}
	out, err := os.OpenFile(device, os.O_CREATE|os.O_WRONLY|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	err = img.RAFS.ExpandBlob(ctx, index, r, out)
	return errors.Join(err, out.Close())
}

// content counts the regular files of the rebuilt image and their bytes.
func content(ctx context.Context, target string) (files int, bytes int64, err error) {
	img, err := nydusimage.Open(ctx, target, nydusimage.Options{})
	if err != nil {
		return 0, 0, err
	}
	defer func() { err = errors.Join(err, img.Close()) }()
	seen := map[*rafs.Inode]bool{}
	err = img.RAFS.Walk(func(_ string, ino *rafs.Inode) error {
		if ino.Mode&unix.S_IFMT == unix.S_IFREG && !seen[ino] {
			seen[ino] = true
			files++
			bytes += int64(min(ino.Size, 1<<62))
		}
		return nil
	})
	return files, bytes, err
}

// measured are the runs: without the plugin, the one that was recorded first, and those in turn.
type measured struct{ before, first, unrecorded, recorded figures }

// table prints what was measured.
func (d *demo) table(ctx context.Context, m measured, p product) error {
	files, bytes, err := content(ctx, p.result.Target)
	if err != nil {
		return err
	}
	var touched, read int64
	readFiles := 0
	for _, a := range p.list.Accesses {
		touched += a.Size
		if a.How&(trace.Read|trace.Executed) != 0 {
			readFiles++
			read += a.Size
		}
	}
	var lost int64
	for _, l := range p.list.Losses {
		lost += max(1, l.Count)
	}
	w := tabwriter.NewWriter(d.out, 0, 0, 2, ' ', 0)
	row := func(name, format string, a ...any) { fmt.Fprintf(w, "  %s\t%s\n", name, fmt.Sprintf(format, a...)) }
	fmt.Fprintln(w)
	row("image, as it was", "%.1f MB stored, %d layers; %d files, %.1f MB", mega(d.size), len(d.manifest.Layers), files, mega(bytes))
	row("image, rebuilt", "%.1f MB stored in blobs, of which %.1f MB prefetch blob", mega(p.result.BlobBytes), mega(p.result.PrefetchBytes))
	row("files touched", "%d (%.1f %%), %.1f MB", len(p.list.Accesses), percent(int64(len(p.list.Accesses)), int64(files)), mega(touched))
	row("of them read", "%d, %.1f MB", readFiles, mega(read))
	row("prefetch blob", "%.1f MB stored: %.1f %% of the image as it was", mega(p.result.PrefetchBytes), percent(p.result.PrefetchBytes, d.size))
	row("events", "%d, lost %d", p.list.Events, lost)
	row("start of the container", "%s not recorded, %s recorded (medians of %d, in turn; without the plugin %s)",
		ms(median(m.unrecorded.start)), ms(median(m.recorded.start)), len(m.recorded.start), ms(median(m.before.start)))
	if !d.endless {
		row("start to end", "%s not recorded, %s recorded (the same; without the plugin %s, the run that was recorded first %s)",
			ms(median(m.unrecorded.total)), ms(median(m.recorded.total)), ms(median(m.before.total)), ms(median(m.first.total)))
	}
	row("rebuild", "%.1f s at the lowest priority", p.result.Duration.Seconds())
	row("access list", "%s", p.path)
	row("rebuilt image", "%s", p.result.Target)
	fmt.Fprintln(w)
	return w.Flush()
}

func percent(part, whole int64) float64 {
	if whole <= 0 {
		return 0
	}
	return 100 * float64(part) / float64(whole)
}

func ms(d time.Duration) string { return fmt.Sprintf("%.0f ms", float64(d.Microseconds())/1000) }
