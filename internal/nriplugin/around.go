package nriplugin

import (
	"context"
	"errors"
	"os"
	"strings"
	"time"

	"github.com/containerd/nri/pkg/api"
	"go.uber.org/zap"

	"github.com/headstart-oci/headstart/internal/creation"
	"github.com/headstart-oci/headstart/internal/metrics"
	"github.com/headstart-oci/headstart/internal/readylog"
	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/trace"
)

// endReady is the end of a recording whose container said that it is ready; see [Config.ReadyLog].
const endReady = "ready"

// createdLimit bounds the look for what the runtime read.
const createdLimit = 2 * time.Second

// volumes returns the mounts that containerd's CRI plugin filled with what the image holds there.
// Source: getContainerRootDir and volumeMounts in containerd internal/cri/server; the directory
// is its root directory's containers/ID/volumes/NAME.
func volumes(ctr *api.Container) []creation.Volume {
	var found []creation.Volume
	for _, m := range ctr.GetMounts() {
		if strings.Contains(m.GetSource(), "/containers/"+ctr.GetId()+"/volumes/") {
			found = append(found, creation.Volume{Source: m.GetSource(), Destination: m.GetDestination()})
		}
	}
	return found
}

// created looks, beside the tracer's start, for what the runtime read to create the container: the
// hook holds the container meanwhile. The result waits no longer than createdLimit after that.
func (r *run) created(ctx context.Context) func() []trace.Access {
	look := r.settings.backend.Created
	if look == nil {
		return func() []trace.Access { return nil }
	}
	found := make(chan []trace.Access, 1)
	// Not one of the plugin's: a root on a filesystem that hangs must not keep it from ending.
	go func() {
		defer func() {
			if v := recover(); v != nil {
				found <- nil
			}
		}()
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), createdLimit)
		defer cancel()
		found <- look(ctx, creation.Options{PID: r.pid, Volumes: r.volumes, Before: r.began})
	}()
	return func() []trace.Access {
		t := time.NewTimer(createdLimit)
		defer t.Stop()
		select {
		case a := <-found:
			return a
		case <-t.C:
			return nil
		}
	}
}

// watchLog ends the recording at the line that says that the container is ready.
func (r *run) watchLog(ctx context.Context, log *zap.Logger) {
	<-r.released // containerd may hold the container's state until then
	ready, warns := r.until.pattern()
	for _, warn := range warns {
		ignored(log, r.name, warn)
	}
	if ready == nil || ctx.Err() != nil {
		return
	}
	err := errors.New("the runtime's address is not known")
	var path, line string
	if ask := r.settings.backend.LogPath; ask != nil {
		ctx, cancel := context.WithTimeout(ctx, resolveLimit)
		path, err = ask(ctx, r.id)
		cancel()
	}
	if err == nil {
		line, err = readylog.Wait(ctx, path, r.began, ready)
	}
	switch {
	case err == nil:
		log.Debug("the container is ready", zap.String("log", path), zap.String("line", clip(line)))
		r.stop(endReady)
	case ctx.Err() == nil:
		log.Warn("ready_log is not waited for: "+oneLine(err.Error()), zap.String("image", r.image))
	}
}

// count counts a run that was recorded.
func (r *run) count(l *persist.List, saved persist.Saved, err error) {
	m := r.plugin.o.Metrics
	switch {
	case err != nil && saved.Native == "":
		m.Run(metrics.Failed, l.Events)
	case l.Complete():
		m.Run(metrics.Complete, l.Events)
	default:
		m.Run(metrics.Incomplete, l.Events)
	}
	for _, x := range l.Losses {
		m.Loss(x.Reason, x.Count)
	}
	if saved.Native != "" {
		if info, err := os.Stat(saved.Native); err == nil {
			m.List(info.Size())
		}
	}
}
