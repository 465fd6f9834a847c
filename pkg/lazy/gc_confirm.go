package lazy

import (
	"context"
	"time"

	"go.uber.org/zap"
)

// confirmPause is how long it takes at most until somebody looks for claims of a blob that was opened.
const confirmPause = 500 * time.Millisecond

// confirmLoop compares with their digests what blobs claim to have and nobody has read yet, so that mounts get complete. It takes half
// of one processor at most: readers confirm what they want by themselves.
func (d *daemon) confirmLoop(ctx context.Context) {
	tick := time.NewTimer(confirmPause)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		mounts := d.all()
		began, more := time.Now(), false
		for _, m := range mounts {
			for _, b := range d.blobsOf(m) {
				left, err := b.confirm(ctx)
				if err != nil && ctx.Err() == nil {
					d.log.Error("confirm what a cache file has", zap.Error(err))
					continue
				}
				more = more || left
			}
		}
		if more {
			tick.Reset(time.Since(began))
		} else {
			tick.Reset(confirmPause)
			continue
		}
		d.look()
	}
}

// confirm confirms a part of what the blob claims, and reports whether there is more.
func (b *blob) confirm(ctx context.Context) (more bool, err error) {
	if b.st.Claimed() == 0 {
		return false, nil
	}
	b.syncMu.Lock()
	defer b.syncMu.Unlock()
	if b.closed {
		return false, nil
	}
	return b.st.ConfirmSome(ctx)
}
