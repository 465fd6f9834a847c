package lazy_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/lazy"
)

// misdeed is what a registry does.
type misdeed struct {
	name  string
	fault fault
	does  func(*badRegistry) // in place of fault
	eio   bool               // of what passes: reads may fail
	half  bool               // of what lasts: so much is right that no read may fail
	short bool               // part of short runs
}

// passing are what a registry does now and then.
func passing() []misdeed {
	return []misdeed{
		{name: "429", fault: every(2, says(http.StatusTooManyRequests)), short: true},
		{name: "429, later", fault: every(101, says(http.StatusTooManyRequests, "Retry-After", "1"))},
		{name: "500", fault: every(2, says(http.StatusInternalServerError))},
		{name: "truncated", fault: every(2, changed(truncated))},
		{name: "closed at once", fault: every(2, closedAtOnce)},
		{name: "closed mid-body", fault: every(2, closedMidBody), short: true},
		{name: "late", fault: every(1, late)},
		{name: "range ignored", fault: every(1, func(w http.ResponseWriter, _ *http.Request, blob []byte) { _, _ = w.Write(blob) })},
		{name: "token expires", does: func(r *badRegistry) {
			r.set(func(_ http.ResponseWriter, _ *http.Request, n int, _ []byte) bool {
				if n%5 == 0 {
					r.expire(false) // for the next one
				}
				return false
			})
		}, short: true},
		// Twice wrong in a row is an error of that read.
		{name: "flipped bits", fault: every(2, changed(flipped)), eio: true, short: true},
		{name: "zeros", fault: every(3, changed(zeroed)), eio: true},
		{name: "another range", fault: every(3, anotherRange), eio: true},
	}
}

// lasting are what a registry does until somebody mends it.
func lasting() []misdeed {
	return []misdeed{
		{name: "403", fault: every(1, says(http.StatusForbidden))},
		{name: "404", fault: every(1, says(http.StatusNotFound))},
		{name: "429 for long", fault: every(1, says(http.StatusTooManyRequests, "Retry-After", "3600"))},
		{name: "500", fault: every(1, says(http.StatusInternalServerError)), short: true},
		{name: "truncated", fault: every(1, changed(truncated)), half: true},
		{name: "empty", fault: every(1, changed(emptied))},
		{name: "closed at once", fault: every(1, closedAtOnce)},
		{name: "closed mid-body", fault: every(1, closedMidBody), half: true},
		{name: "flipped bits", fault: every(1, changed(flipped)), short: true},
		{name: "zeros", fault: every(1, changed(zeroed))},
		{name: "another range", fault: every(1, anotherRange)},
		{name: "nonsense", fault: every(1, func(w http.ResponseWriter, _ *http.Request, _ []byte) { _, _ = w.Write([]byte("<html>")) })},
		{name: "silent", does: func(r *badRegistry) { r.set(every(1, r.silent)) }, short: true},
		{name: "stuck mid-body", does: func(r *badRegistry) { r.set(every(1, r.stuck)) }, half: true},
		{name: "401", does: func(r *badRegistry) { r.expire(true) }, short: true},
	}
}

// matrix is a mount of the zoo from a registry that misbehaves.
type matrix struct {
	*box
	t        *testing.T
	registry *badRegistry
	tree     tree
	dir      string
}

func newMatrix(t *testing.T, b *box, limit string) *matrix {
	t.Helper()
	m := &matrix{box: b, t: t, dir: b.mountpoint("mnt"), registry: newBadRegistry(t, strings.TrimPrefix(layout(t).Reference, "oci:"))}
	m.command("--limit", limit)
	m.tree = treeOf(t, b.mount(m.dir, layout(t)).Dir)
	m.forget()
	return m
}

// forget unmounts and has all that is local removed.
func (m *matrix) forget() {
	m.t.Helper()
	m.unmount(m.dir)
	eventually(m.t, func() string {
		if left, err := filepath.Glob(filepath.Join(m.state, "blobs", "*")); err != nil || len(left) > 0 {
			_, err2 := m.client.CollectCache(m.t.Context(), &lazy.CachePolicy{Limit: 1})
			return fmt.Sprintf("%d caches are left, %v", len(left), errors.Join(err, err2))
		}
		return ""
	})
}

// readers have parallel readers read part of the tree's files; every read is right or EIO, and ends.
func (m *matrix) readers(n, part int) (right, failed int) {
	m.t.Helper()
	var rights, fails atomic.Int64
	var group sync.WaitGroup
	for i := range n {
		group.Go(func() {
			order := rand.New(rand.NewPCG(uint64(i), 1)).Perm(len(m.tree.names))
			for _, at := range order[:len(order)/part] {
				name := m.tree.names[at]
				switch p, err := os.ReadFile(filepath.Join(m.dir, name)); {
				case errors.Is(err, unix.EIO):
					fails.Add(1)
				case err != nil:
					m.t.Errorf("read: %v, want EIO or nothing", err)
				case sha256.Sum256(p) != m.tree.sums[name]:
					m.t.Errorf("%s has wrong bytes", name)
				default:
					rights.Add(1)
				}
			}
		})
	}
	done := make(chan struct{})
	go func() { group.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(3 * time.Minute):
		m.t.Fatalf("readers hang: %s", waiting(m.t, m.box.status().PID))
	}
	return int(rights.Load()), int(fails.Load())
}

// run does one misdeed under parallel readers and mends it: with nothing mounted anew everything is right, nothing waits, and all of it gets local.
func (m *matrix) run(bad misdeed, background string, readers, part int) (right, failed int, stats lazy.Stats) {
	m.t.Helper()
	m.registry.set(nil)
	before := m.mount(m.dir, m.registry.request(background))
	if bad.does != nil {
		bad.does(m.registry)
	} else {
		m.registry.set(bad.fault)
	}
	right, failed = m.readers(readers, part)
	stats = m.at(m.dir).Stats
	if m.registry.misbehaved() == 0 {
		m.t.Error("the registry did nothing wrong: nothing was shown")
	}
	m.registry.set(nil)
	eventually(m.t, func() string { // an answer that is on its way for what nobody waits for is wrong still
		if _, again := m.readers(2, 1); again != 0 {
			return fmt.Sprintf("%d reads fail after the registry was mended", again)
		}
		return ""
	})
	compare(m.t, m.dir)
	m.quiet()
	ctx, cancel := context.WithTimeout(m.t.Context(), time.Minute)
	defer cancel()
	if after, err := m.client.Wait(ctx, before.Device); err != nil || after.State != lazy.StateComplete || after.Local != before.Total {
		m.t.Errorf("Wait() = %+v, %v, want complete with %d bytes", after, err, before.Total)
	}
	m.forget()
	return right, failed, stats
}

// Whatever a registry does now and then, reads by way of a mount are right; what is wrong twice in a row may fail a read and never gives a
// wrong byte.
func TestBadRegistryPasses(t *testing.T) { mostlyEROFS(t, testBadRegistryPasses) }

func testBadRegistryPasses(t *testing.T, b *box) {
	m := newMatrix(t, b, "30s")
	for i, bad := range passing() {
		if testing.Short() && !bad.short {
			continue
		}
		t.Run(bad.name, func(t *testing.T) {
			m.t, m.box.t = t, t
			right, failed, _ := m.run(bad, []string{"none", "full"}[i%2], 4, 1)
			t.Logf("%d reads are right, %d failed", right, failed)
			if failed != 0 && !bad.eio {
				t.Errorf("%d reads failed", failed)
			}
		})
	}
	m.t, m.box.t = t, t
}

// What a registry does for good makes reads fail and gives no wrong byte, and the mount is whole when it ends.
func TestBadRegistryLasts(t *testing.T) { mostlyEROFS(t, testBadRegistryLasts) }

func testBadRegistryLasts(t *testing.T, b *box) {
	m := newMatrix(t, b, "1s")
	for _, bad := range lasting() {
		if testing.Short() && !bad.short {
			continue
		}
		t.Run(bad.name, func(t *testing.T) {
			m.t, m.box.t = t, t
			right, failed, stats := m.run(bad, "none", 8, max(1, len(m.tree.names)/4))
			t.Logf("%d reads are right, %d failed, %d waited, %d units were corrupt", right, failed, stats.Waits, stats.Corrupt)
			if failed == 0 && !bad.half {
				t.Error("no read failed: nothing was shown")
			}
			if wrong := bad.name == "flipped bits" || bad.name == "zeros"; wrong && stats.Corrupt == 0 {
				t.Error("nothing was corrupt: nothing was shown")
			}
		})
	}
	m.t, m.box.t = t, t
}
