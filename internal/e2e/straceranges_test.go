package e2e_test

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/trace"
)

// extent is the bytes [from, to) of a file.
type extent struct{ from, to int64 }

// straced is what strace says of the files below a root, by path.
type straced struct {
	touched
	reads  map[string][]extent // what every way of reading returned
	mapped map[string][]extent // what mmap made visible

	processes map[string]descriptors // by pid
	children  map[string]birth
}

// description is what fork(2) and dup(2) share: an open file and its position.
type description struct {
	path string // as the kernel names it
	at   int64
}

type descriptors map[string]*description // by number

// birth says where the descriptors of a process come from.
type birth struct {
	parent string
	shared bool // with the parent, as threads do
}

func newStraced() *straced {
	return &straced{
		touched: touched{}, reads: map[string][]extent{}, mapped: map[string][]extent{},
		processes: map[string]descriptors{}, children: map[string]birth{},
	}
}

const pathAt = `<((?:[^<>\\]|\\.)*)>`

var (
	calledFork = regexp.MustCompile(`^(\d+)\b`)
	onFile     = regexp.MustCompile(`^(\d+)` + pathAt)
	lastNumber = regexp.MustCompile(`, (-?\d+)$`)
	nextToLast = regexp.MustCompile(`, (-?\d+), [^,]*$`)
	atPointer  = regexp.MustCompile(`^\d+` + pathAt + `, (?:NULL|\[(\d+)\])`)
	mapping    = regexp.MustCompile(`^[^,]+, (\d+), .*, \d+` + pathAt + `, (0x[0-9a-f]+|0)$`)
)

// born notes a call that makes a process; a child may be heard of before the call that made it ends.
func (s *straced) born(pid, name, args, result string) {
	switch name {
	case "clone", "clone3", "fork", "vfork":
		if m := calledFork.FindString(result); m != "" {
			s.children[m] = birth{parent: pid, shared: strings.Contains(args, "CLONE_FILES")}
		}
	}
}

// of returns the descriptors of a process.
func (s *straced) of(pid string) descriptors {
	if d, ok := s.processes[pid]; ok {
		return d
	}
	d := descriptors{}
	if b, ok := s.children[pid]; ok {
		if from := s.of(b.parent); b.shared {
			d = from
		} else {
			maps.Copy(d, from)
		}
	}
	s.processes[pid] = d
	return d
}

// position follows one finished call of a process: which descriptors there are, where they stand, and which
// bytes of files below root they gave.
func (s *straced) position(pid, name, args, result, root string) error {
	d := s.of(pid)
	m := onFile.FindStringSubmatch(args)
	switch name {
	case "open", "openat", "openat2", "creat":
		if r := onFile.FindStringSubmatch(result); r != nil {
			d[r[1]] = &description{path: r[2]}
		}
	case "close":
		if m != nil && strings.HasPrefix(result, "0") {
			delete(d, m[1])
		}
	case "dup", "dup2", "dup3", "fcntl":
		r := onFile.FindStringSubmatch(result)
		if r != nil && m != nil && (name != "fcntl" || strings.Contains(args, "F_DUPFD")) {
			d[r[1]] = d[m[1]]
		}
	case "lseek":
		if m != nil && d[m[1]] != nil && !strings.HasPrefix(result, "-1") {
			at, err := strconv.ParseInt(result, 10, 64)
			d[m[1]].at = at
			return err
		}
	case "mmap":
		return s.maps(args, result, root)
	case "read", "readv", "pread64", "preadv", "preadv2", "sendfile", "copy_file_range", "splice":
		return s.reading(d, name, args, result, root)
	}
	return nil
}

func (s *straced) maps(args, result, root string) error {
	m := mapping.FindStringSubmatch(args)
	if m == nil || strings.HasPrefix(result, "-1") {
		return nil
	}
	path, ok := below(root, []string{"", m[2]})
	if !ok {
		return nil
	}
	n, err := strconv.ParseInt(m[1], 10, 64)
	at, aerr := strconv.ParseInt(m[3], 0, 64)
	if err == nil && n > 0 {
		s.mapped[path] = append(s.mapped[path], extent{at, at + n})
	}
	return errors.Join(err, aerr)
}

// reading notes the bytes that a call returned of a file below root.
func (s *straced) reading(d descriptors, name, args, result, root string) error {
	n, err := strconv.ParseInt(result, 10, 64)
	if err != nil || n <= 0 {
		return nil //nolint:nilerr // an error, "?" of a process that was killed, or the end of the file
	}
	if name == "sendfile" {
		_, args, _ = strings.Cut(args, ", ")
	}
	m := onFile.FindStringSubmatch(args)
	if m == nil {
		return nil
	}
	path, ours := below(root, []string{"", m[2]})
	var given []string // the offset that the call gives
	switch name {
	case "pread64", "preadv":
		given = lastNumber.FindStringSubmatch(args)
	case "preadv2":
		given = nextToLast.FindStringSubmatch(args)
	case "sendfile", "copy_file_range", "splice":
		if given = atPointer.FindStringSubmatch(args); given != nil {
			given = given[1:]
		}
	}
	at := int64(-1)
	if given != nil && given[1] != "" {
		if at, err = strconv.ParseInt(given[1], 10, 64); err != nil {
			return err
		}
	}
	if at < 0 {
		f := d[m[1]]
		if f == nil || f.path != m[2] {
			if ours {
				return fmt.Errorf("the position of descriptor %s of %s is not known", m[1], path)
			}
			return nil
		}
		at = f.at
		f.at += n
	}
	if ours {
		s.reads[path] = append(s.reads[path], extent{at, at + n})
	}
	return nil
}

// paths returns every path that was heard of.
func (s *straced) paths() []string {
	all := slices.Collect(maps.Keys(s.touched))
	return slices.AppendSeq(slices.AppendSeq(all, maps.Keys(s.reads)), maps.Keys(s.mapped))
}

// leaveOut forgets a path.
func (s *straced) leaveOut(path string) {
	delete(s.touched, path)
	delete(s.reads, path)
	delete(s.mapped, path)
}

// bytesOf returns how many bytes the extents of all files hold, those that are in several once.
func bytesOf(all map[string][]extent) (sum int64) {
	for _, list := range all {
		sorted := slices.SortedFunc(slices.Values(list), func(a, b extent) int { return int(a.from - b.from) })
		end := int64(0)
		for _, e := range sorted {
			sum += max(0, e.to-max(e.from, end))
			end = max(end, e.to)
		}
	}
	return sum
}

// passedOver reports whether a page that is listed and not certain may be one of which the kernel says nothing: such lead up to one
// that was read. See [tracefs.Gaps].
func passedOver(page int64, listed, certain map[int64]bool) bool {
	for listed[page] && !certain[page] {
		page++
	}
	return certain[page]
}

// rangeFaults returns one line for each file of which bytes were read that the list lacks, or does not call
// certain, page by page, and for each that was mapped and is not listed.
func rangeFaults(list *persist.List, want *straced) (faults []string) {
	page := int64(os.Getpagesize())
	byPath := map[string]trace.Access{}
	for _, a := range list.Accesses {
		byPath[a.Path] = a
	}
	for path, reads := range want.reads {
		a, ok := byPath[path]
		if !ok || a.Ranges == nil {
			if !ok {
				faults = append(faults, "read and not listed: "+path)
			}
			continue // all of it counts; tooMuch says whether it may
		}
		listed, certain := map[int64]bool{}, map[int64]bool{}
		for _, r := range a.Ranges {
			for p := r.Offset / page; p*page < r.Offset+r.Length; p++ {
				listed[p] = true
				certain[p] = certain[p] || r.Certain
			}
		}
		missing, unsure, passed, all := 0, 0, 0, 0
		for _, e := range reads {
			for p := e.from / page; p*page < e.to; p++ {
				all++
				switch {
				case !listed[p]:
					missing++
				case certain[p]:
				case passedOver(p, listed, certain):
					passed++
				default:
					unsure++
				}
			}
		}
		if passed > all/2 {
			unsure += passed // the kernel is not that silent
		}
		if missing+unsure > 0 {
			faults = append(faults, fmt.Sprintf("of the pages read %d are not listed and %d not certain: %s", missing, unsure, path))
		}
	}
	for path := range want.mapped {
		if _, ok := byPath[path]; !ok {
			faults = append(faults, "mapped and not listed: "+path)
		}
	}
	faults = append(faults, tooMuch(list, want)...)
	slices.Sort(faults)
	return faults
}

// TestRangeFaults holds that comparison to account.
func TestRangeFaults(t *testing.T) {
	t.Parallel()
	page := int64(os.Getpagesize())
	want := newStraced()
	want.reads["/a"] = []extent{{page - 1, page + 1}, {5 * page, 5*page + 1}}
	want.mapped["/b"] = []extent{{page + 1, page + 2}}
	good := []trace.Range{{Length: 2 * page, Certain: true}, {Offset: 5 * page, Length: 10, Certain: true}}
	none := []trace.Range{}
	for name, test := range map[string]struct {
		list  []trace.Access
		fault string
	}{
		"equal":     {[]trace.Access{{Path: "/a", Ranges: good}, {Path: "/b", Ranges: []trace.Range{{Offset: page, Length: page}}}}, ""},
		"whole":     {[]trace.Access{{Path: "/a"}, {Path: "/b", Ranges: none}}, "counted as a whole: /a"},
		"runtime":   {[]trace.Access{{Path: "/a", How: trace.Read | trace.Runtime}, {Path: "/b", Ranges: none}}, ""},
		"unlisted":  {[]trace.Access{{Path: "/b", Ranges: none}}, "read and not listed: /a"},
		"unmapped":  {[]trace.Access{{Path: "/a", Ranges: good}}, "mapped and not listed: /b"},
		"missing":   {[]trace.Access{{Path: "/a", Ranges: good[:1]}, {Path: "/b", Ranges: none}}, "of the pages read 1 are not listed and 0 not certain: /a"},
		"empty":     {[]trace.Access{{Path: "/a", Ranges: none}, {Path: "/b", Ranges: none}}, "of the pages read 3 are not listed and 0 not certain: /a"},
		"uncertain": {[]trace.Access{{Path: "/a", Ranges: unsure(good)}, {Path: "/b", Ranges: none}}, "of the pages read 0 are not listed and 3 not certain: /a"},
		"passed over": {[]trace.Access{
			{Path: "/a", Ranges: []trace.Range{{Length: page}, {Offset: page, Length: page, Certain: true}, {Offset: 5 * page, Length: page}}}, {Path: "/b", Ranges: none},
		}, "of the pages read 0 are not listed and 1 not certain: /a"},
		"too much": {
			[]trace.Access{{Path: "/a", Ranges: append(good, trace.Range{Offset: 2 * page, Length: page + 1})}, {Path: "/b", Ranges: []trace.Range{{Length: 2 * page}}}},
			"of the pages listed 1 were neither read nor mapped: /b\nof the pages listed 2 were neither read nor mapped: /a",
		},
	} {
		l := &persist.List{Grade: trace.GradeFaultAround, Trace: trace.Trace{Accesses: test.list}}
		if got := strings.Join(rangeFaults(l, want), "\n"); got != test.fault {
			t.Errorf("%s: rangeFaults = %q, want %q", name, got, test.fault)
		}
	}
	whole := &persist.List{Grade: trace.GradeFile, Trace: trace.Trace{Accesses: []trace.Access{{Path: "/a"}, {Path: "/b"}}}}
	if got := rangeFaults(whole, want); len(got) > 0 {
		t.Errorf("a list of whole files: rangeFaults = %q", got)
	}
}

// TestStraceRanges follows descriptors through the ways in which they are made, moved and shared.
func TestStraceRanges(t *testing.T) {
	t.Parallel()
	log := strings.ReplaceAll(`1 chroot("ROOT")   = 0
1 openat(AT_FDCWD</>, "/a", O_RDONLY) = 3<ROOT/a>
1 read(3<ROOT/a>, ""..., 832) = 832
1 read(3<ROOT/a>, ""..., 832) = 8
1 lseek(3<ROOT/a>, 5000, SEEK_SET) = 5000
1 dup(3<ROOT/a>) = 4<ROOT/a>
1 vfork( <unfinished ...>
2 readv(4<ROOT/a>, [{iov_base=""..., iov_len=10}, {iov_base=""..., iov_len=10}], 2) = 20
2 close(4<ROOT/a>) = 0
2 fcntl(3<ROOT/a>, F_DUPFD_CLOEXEC, 10) = 10<ROOT/a>
1 <... vfork resumed>) = 2
1 read(4<ROOT/a>, ""..., 5) = 5
1 pread64(3<ROOT/a>, ""..., 7, 90000) = 7
1 preadv(3<ROOT/a>, [{iov_base=""..., iov_len=10}], 1, 91000) = 10
1 preadv2(3<ROOT/a>, [{iov_base=""..., iov_len=10}], 1, 92000, 0) = 10
1 preadv2(3<ROOT/a>, [{iov_base=""..., iov_len=10}], 1, -1, RWF_NOWAIT) = 10
1 sendfile(7<socket:[1]>, 3<ROOT/a>, [100000] => [100009], 9) = 9
1 sendfile(7<socket:[1]>, 3<ROOT/a>, NULL, 9) = 9
1 splice(3<ROOT/a>, [101000] => [101001], 8<pipe:[2]>, NULL, 1, 0) = 1
1 copy_file_range(3<ROOT/a>, NULL, 9</host>, [0] => [2], 2, 0) = 2
1 clone3({flags=CLONE_VM|CLONE_FS|CLONE_FILES|CLONE_SIGHAND|CLONE_THREAD}, 88) = 3
3 openat(AT_FDCWD</>, "/b", O_RDONLY) = 5<ROOT/b>
1 read(5<ROOT/b>, ""..., 3) = 3
1 mmap(NULL, 8192, PROT_READ, MAP_PRIVATE|MAP_DENYWRITE, 5<ROOT/b>, 0x2000) = 0x7f0000000000
1 mmap(NULL, 8192, PROT_READ, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0) = 0x7f0000000000
1 mmap(NULL, 8192, PROT_READ, MAP_PRIVATE, 9</host>, 0) = 0x7f0000000000
`, "ROOT", "/root")
	got, err := straceLog(strings.NewReader(log), "/root")
	if err != nil {
		t.Fatal(err)
	}
	wantReads := map[string][]extent{
		"/a": {
			{0, 832},
			{832, 840},
			{5000, 5020},
			{5020, 5025},
			{90000, 90007},
			{91000, 91010},
			{92000, 92010},
			{5025, 5035},
			{100000, 100009},
			{5035, 5044},
			{101000, 101001},
			{5044, 5046},
		},
		"/b": {{0, 3}},
	}
	comparer := cmp.AllowUnexported(extent{})
	if diff := cmp.Diff(wantReads, got.reads, comparer); diff != "" {
		t.Errorf("reads (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(map[string][]extent{"/b": {{0x2000, 0x4000}}}, got.mapped, comparer); diff != "" {
		t.Errorf("mapped (-want +got):\n%s", diff)
	}
	if n := bytesOf(map[string][]extent{"/x": {{5, 10}, {0, 7}, {20, 21}, {6, 8}}}); n != 11 {
		t.Errorf("bytes = %d, want 11", n)
	}
	if _, err := straceLog(strings.NewReader("1 chroot(\"/root\") = 0\n1 read(3</root/a>, \"\"..., 8) = 8\n"), "/root"); err == nil {
		t.Error("a read at an unknown position is no error")
	}
}
