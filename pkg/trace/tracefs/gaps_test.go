package tracefs_test

import (
	"context"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/trace/tracefs"
)

const slowPages = 6

// slowFile is a file whose first pages are there at once, the others late.
type slowFile struct {
	fs.Inode
	late int64 // the first late page
}

func (f *slowFile) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.Mode, out.Size = syscall.S_IFREG|0o444, uint64(slowPages*os.Getpagesize())
	return 0
}

func (f *slowFile) Open(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	return nil, 0, 0
}

func (f *slowFile) Read(_ context.Context, _ fs.FileHandle, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	if off/int64(os.Getpagesize()) >= f.late {
		time.Sleep(100 * time.Millisecond)
	}
	return fuse.ReadResultData(dest), 0
}

// mountSlow mounts slowFiles, each below the name that its number of the first late page is, the kernel reading a page at a time.
func mountSlow(t *testing.T) string {
	t.Helper()
	testenv.Root(t)
	dir := t.TempDir()
	root := &fs.Inode{}
	o := fs.Options{MountOptions: fuse.MountOptions{DirectMountStrict: true, DisableSplice: true, Options: []string{"max_read=4096"}}}
	o.OnAdd = func(ctx context.Context) {
		for i := range slowPages {
			n := &slowFile{late: int64(i)}
			root.AddChild(string(rune('0'+i)), root.NewPersistentInode(ctx, n, fs.StableAttr{Mode: syscall.S_IFREG, Ino: uint64(100 + i)}), false)
		}
	}
	s, err := fs.Mount(dir, root, &o)
	testenv.Kernel(t, "FUSE", err)
	t.Cleanup(func() {
		if err := s.Unmount(); err != nil {
			t.Error(err)
		}
		s.Wait()
	})
	return dir
}

// TestGapsOfKernel reads files of which some pages come at once and the rest is late, in one call each. Whatever the kernel says of
// such a read, the events and the gaps before them are the pages that were read, also where one of them was read already, or cached before.
func TestGapsOfKernel(t *testing.T) {
	in := create(t, open(t), tracefs.Options{})
	dir := mountSlow(t)
	passed := 0
	for name, island := range map[string]func(f *os.File, recorded bool) error{
		"cold": func(*os.File, bool) error { return nil },
		"one page was read": func(f *os.File, recorded bool) error {
			if !recorded {
				return nil
			}
			_, err := f.ReadAt(make([]byte, 1), 2*int64(os.Getpagesize()))
			return err
		},
		"one page was cached": func(f *os.File, recorded bool) error {
			if recorded {
				return nil
			}
			_, err := f.ReadAt(make([]byte, 1), 2*int64(os.Getpagesize()))
			return err
		},
	} {
		for late := range uint64(slowPages) {
			f, err := os.Open(filepath.Join(dir, string(rune('0'+late))))
			if err != nil {
				t.Fatal(err)
			}
			if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_RANDOM); err != nil {
				t.Fatal(err)
			}
			if err := island(f, false); err != nil {
				t.Fatal(err)
			}
			events := traced(t, in, func() error {
				if err := island(f, true); err != nil {
					return err
				}
				_, err := f.Read(make([]byte, slowPages*os.Getpagesize()))
				return err
			})
			if err := f.Close(); err != nil {
				t.Error(err)
			}
			said := of(events, tracefs.Read, 100+late, slowPages)
			all := withGaps(events, in.Spec(), 100+late)
			passed += slowPages - len(said)
			if want := span(0, slowPages-1); !all.within(want) || !want.within(all) {
				t.Errorf("%s, late from page %d on: pages %v, want the file's %d; events %+v", name, late, all, slowPages, events)
			}
		}
	}
	t.Logf("the kernel passed over %d pages of %d", passed, 3*slowPages*slowPages)
}

// withGaps returns the pages of an inode that events and the gaps before them name.
func withGaps(events []tracefs.Event, spec tracefs.Spec, inode uint64) pages {
	all := of(events, tracefs.Read, inode, slowPages)
	gaps := tracefs.Gaps{Waits: spec.Events.Has(tracefs.Wait)}
	for i := range events {
		if gap, ok := gaps.Note(&events[i]); ok && events[i].Inode == inode {
			for p := gap.First; p <= gap.Last; p++ {
				all[p] = true
			}
		}
	}
	return all
}
