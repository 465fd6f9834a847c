package e2e_test

import (
	"debug/elf"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/trace"
	"github.com/headstart-oci/headstart/pkg/trace/tracefs"
)

// awaitPages waits until the plugin, whoever launched it, has an instance for its first container: until then lists
// are of whole files, or begin as such.
func (u *setup) awaitPages(t *testing.T) {
	t.Helper()
	if !pageEvents(t) {
		return
	}
	eventually(t, "the plugin's trace instances", func() error {
		launched := processesOf(t, filepath.Join(u.host.PluginDir(), pluginFile), "")
		for _, pid := range append(launched, processesOf(t, u.host.plugin, "")...) {
			// One is there before it is ready; with the second the first is.
			if n := instancesOf(t, pid); n > 1 {
				return nil
			}
		}
		return errors.New("fewer than two")
	})
}

// pageEvents reports whether this kernel tells pages.
func pageEvents(t *testing.T) bool {
	t.Helper()
	fs, err := tracefs.Open()
	if err == nil {
		_, err = fs.Probe(0)
		must(t, fs.Close())
	}
	if err != nil && os.Getenv("REQUIRE_KERNEL") == "1" {
		t.Fatalf("REQUIRE_KERNEL=1, and the kernel lacks page events: %v", err)
	}
	return err == nil
}

// instancesOf counts the trace instances of a process.
func instancesOf(t *testing.T, pid int) (n int) {
	t.Helper()
	dir := t.TempDir()
	testenv.MountNamespace(t, func() error {
		if err := unix.Mount("tracefs", dir, "tracefs", 0, ""); err != nil {
			return err
		}
		found, err := filepath.Glob(filepath.Join(dir, "instances", fmt.Sprintf("%s%d-*", tracefs.Prefix, pid)))
		n = len(found)
		return errors.Join(err, unix.Unmount(dir, unix.MNT_DETACH))
	})
	return n
}

// testRanges holds that a list was made from page events, where the kernel has them: the comparisons with strace would
// accept one of whole files.
func testRanges(t *testing.T, l *persist.List) {
	engine := snapshotters()[0].engine
	if !pageEvents(t) {
		t.Skip("the kernel lacks page events")
	}
	if l.Engine != engine || l.Grade != trace.GradeFaultAround {
		t.Errorf("list by %s of grade %s, want %s, %s", l.Engine, l.Grade, engine, trace.GradeFaultAround)
	}
	ranges, listed, whole := 0, int64(0), int64(0)
	for _, a := range l.Accesses {
		ranges += len(a.Ranges)
		whole += a.Size
		for _, r := range a.Ranges {
			listed += r.Length
		}
		if a.Ranges == nil && a.How&trace.Runtime == 0 {
			t.Errorf("%s counts as a whole", a.Path)
		}
	}
	if ranges == 0 {
		t.Error("no file has ranges")
	}
	t.Logf("%.1f MB of the %.1f MB that its files have", float64(listed)/1e6, float64(whole)/1e6)
	// Programs map libraries as a whole, and strace sees no more than that; a start uses a part of them.
	if whole > 10<<20 && listed*10 > whole*9 {
		t.Errorf("%d bytes of the %d that its files have are listed, want less", listed, whole)
	}
}

// load adds what the kernel itself reads and maps of the files that were executed, which no call shows: the beginning of each, and
// the segments of ELF files. Their content is below root.
func (s *straced) load(root string) error {
	const head = 256 // include/uapi/linux/binfmts.h BINPRM_BUF_SIZE
	for path, how := range s.touched {
		if how&trace.Executed == 0 {
			continue
		}
		s.mapped[path] = append(s.mapped[path], extent{0, head})
		file, err := elf.Open(filepath.Join(root, path))
		if _, script := errors.AsType[*elf.FormatError](err); script {
			continue
		}
		if err != nil {
			return err
		}
		for _, p := range file.Progs {
			if p.Filesz > 0 && (p.Type == elf.PT_LOAD || p.Type == elf.PT_INTERP || p.Type == elf.PT_GNU_PROPERTY) {
				s.mapped[path] = append(s.mapped[path], extent{int64(p.Off), int64(p.Off + p.Filesz)})
			}
		}
		if err := file.Close(); err != nil {
			return err
		}
	}
	return nil
}

// tooMuch returns one line for each file of a list of ranges that has pages in it which were neither read nor in a
// mapping, or that counts as a whole. What is mapped around a fault is in the mapping too (mm/memory.c do_fault_around), and what
// the kernel reads ahead is nobody's touch.
func tooMuch(list *persist.List, want *straced) (faults []string) {
	if list.Grade == trace.GradeFile {
		return nil
	}
	page := int64(os.Getpagesize())
	for _, a := range list.Accesses {
		if a.Ranges == nil {
			if a.How&trace.Runtime == 0 {
				faults = append(faults, "counted as a whole: "+a.Path)
			}
			continue
		}
		may := map[int64]bool{}
		for _, all := range [][]extent{want.reads[a.Path], want.mapped[a.Path]} {
			for _, e := range all {
				for p := e.from / page; p*page < e.to; p++ {
					may[p] = true
				}
			}
		}
		extra := 0
		for _, r := range a.Ranges {
			for p := r.Offset / page; p*page < r.Offset+r.Length; p++ {
				if !may[p] {
					extra++
				}
			}
		}
		if extra > 0 {
			faults = append(faults, fmt.Sprintf("of the pages listed %d were neither read nor mapped: %s", extra, a.Path))
		}
	}
	return faults
}

// unsure returns ranges none of which is certain.
func unsure(ranges []trace.Range) []trace.Range {
	var all []trace.Range
	for _, r := range ranges {
		r.Certain = false
		all = append(all, r)
	}
	return all
}

// TestLoad holds that what the kernel maps of a program counts, and nothing of a script but its beginning.
func TestLoad(t *testing.T) {
	t.Parallel()
	exe, err := os.Executable()
	must(t, err)
	root := t.TempDir()
	must(t, os.WriteFile(filepath.Join(root, "script"), []byte("#!/bin/sh\n"+strings.Repeat("#", 10_000)), 0o755))
	must(t, os.Symlink(exe, filepath.Join(root, "program")))
	s := newStraced()
	s.touched["/script"], s.touched["/program"], s.touched["/read"] = trace.Executed, trace.Executed, trace.Read
	must(t, s.load(root))
	info, err := os.Stat(exe)
	must(t, err)
	// A Go program's symbols are in no segment.
	if n := bytesOf(map[string][]extent{"": s.mapped["/program"]}); n <= info.Size()/4 || n >= info.Size() {
		t.Errorf("%d of the program's %d bytes are mapped", n, info.Size())
	}
	if n := bytesOf(map[string][]extent{"": s.mapped["/script"]}); n != 256 || len(s.mapped["/read"]) > 0 {
		t.Errorf("mapped %v, want the beginning of the script", s.mapped)
	}
}
