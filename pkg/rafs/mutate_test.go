package rafs_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// TestMutatedFixtures changes bootstraps of the real nydus-image, of both versions, in 10,000 ways (fewer with -short): each is
// refused with an error of a known class, or everything in it is walked and read in bounded time and memory.
func TestMutatedFixtures(t *testing.T) {
	names, err := filepath.Glob(filepath.Join(testenv.Fixtures(t), "nydus", "*"))
	must(t, err)
	if len(names) < 6 {
		t.Fatalf("%d fixtures", len(names))
	}
	total := 10_000
	if testing.Short() {
		total = 600
	}
	if raceEnabled {
		total = 150
	}
	for i, dir := range names {
		name := filepath.Base(dir)
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := loadFixture(t, name)
			m := &mutator{rand: rand.New(rand.NewPCG(uint64(i), 77)), good: s.bootstrap, places: metadataPlaces(s.bootstrap)}
			var slowest time.Duration
			accepted := 0
			for n := range total/len(names) + 1 {
				p := m.next()
				start := time.Now()
				ok, err := (&stored{bootstrap: p, blobs: s.blobs}).readAll(t.Context(), n%20 == 0)
				slowest = max(slowest, time.Since(start))
				if err != nil {
					t.Fatalf("mutation %d: %v", n, err)
				}
				if ok {
					accepted++
				}
			}
			t.Logf("%d of %d were readable; the slowest took %v", accepted, total/len(names)+1, slowest)
			if accepted == 0 || accepted > total/len(names) {
				t.Error("the mutations are too strong or too weak")
			}
		})
	}
}

// mutator makes changed copies of a bootstrap.
type mutator struct {
	rand   *rand.Rand
	good   []byte
	places []int
}

func (m *mutator) next() []byte {
	p := bytes.Clone(m.good)
	r := m.rand
	for range 1 + r.IntN(4) {
		at := m.places[r.IntN(len(m.places))]
		from := m.places[r.IntN(len(m.places))]
		word := p[at&^7:][:8]
		switch r.IntN(9) {
		case 0:
			p[at] ^= 1 << r.UintN(8)
		case 1:
			p[at] = byte(r.Uint32())
		case 2:
			binary.LittleEndian.PutUint64(word, ^uint64(0)>>r.UintN(64))
		case 3:
			binary.LittleEndian.PutUint32(word[r.IntN(2)*4:], r.Uint32()>>r.UintN(32))
		case 4: // one field over another
			copy(word, p[from&^7:][:8])
		case 5: // a whole record over another
			n := []int{12, 32, 64, 80, 128, 256}[r.IntN(6)]
			copy(p[at&^7:], bytes.Clone(p[from&^7:][:min(n, len(p)-from&^7)]))
		case 6:
			n := min(1+r.IntN(4096), len(p)-at)
			clear(p[at : at+n])
		case 7: // a neighbour's value
			binary.LittleEndian.PutUint32(word, binary.LittleEndian.Uint32(word)+uint32(r.IntN(5))-2)
		default:
			if r.IntN(8) == 0 {
				p = p[:at&^7]
				return p
			}
			p[at]++
		}
	}
	return p
}

// metadataPlaces are bytes worth changing: those of the tables twenty times, as they are few.
func metadataPlaces(p []byte) []int {
	places := interestingPlaces(p)
	for range 20 {
		for i := range min(2048, len(p)) {
			if p[i] != 0 || i < 96 {
				places = append(places, i)
			}
		}
	}
	return places
}

// readAll opens and checks an image and reads all files, with their data where asked for. It reports whether the image opens; the error
// is about what must not happen, whatever the bytes.
func (s *stored) readAll(ctx context.Context, data bool) (ok bool, err error) {
	known := func(err error) error {
		if err == nil || errors.Is(err, rafs.ErrInvalid) || errors.Is(err, rafs.ErrUnsupported) || errors.Is(err, rafs.ErrDigest) {
			return nil
		}
		return err
	}
	if _, err := rafs.Inspect(bytes.NewReader(s.bootstrap), int64(len(s.bootstrap))); known(err) != nil {
		return false, err
	}
	img, err := rafs.Open(bytes.NewReader(s.bootstrap), int64(len(s.bootstrap)))
	if err != nil {
		if img != nil {
			return false, errors.Join(errors.New("an image beside an error"), err)
		}
		return false, known(err)
	}
	// What opens can be checked, and has at most so many faults as it was asked for.
	_, checkErr := rafs.Check(ctx, bytes.NewReader(s.bootstrap), int64(len(s.bootstrap)), nil, rafs.CheckOptions{MaxFaults: 5})
	if count(checkErr) > 5 {
		return true, checkErr
	}
	fsys := img.FS(s.reader)
	var read uint64
	err = img.Walk(func(_ string, ino *rafs.Inode) error {
		if ino.IsRegular() && data && ino.Size < 64<<20 && read < 64<<20 {
			read += ino.Size
			_ = fsys.CopyFile(ctx, discard{}, ino) // must end; what it says of changed chunks is its matter
		}
		return nil
	})
	if err != nil {
		return true, err
	}
	_, _ = rafs.WriteBootstrap(discard{}, img)
	return true, nil
}

// TestMutationsBoundMemory opens bootstraps whose counts claim as much as their fields can say.
func TestMutationsBoundMemory(t *testing.T) {
	for _, name := range allFixtures {
		good := loadFixture(t, name).bootstrap
		var before, after runtime.MemStats
		start, end := 0, 96 // the superblock
		if good[0] == 0 {
			start, end = 1024, 1024+128+256+128 // superblocks and the first device slot
		}
		for at := start; at < end; at += 4 {
			p := bytes.Clone(good)
			binary.LittleEndian.PutUint32(p[at:], 0xffff_fff8)
			runtime.ReadMemStats(&before)
			_, err := rafs.Open(bytes.NewReader(p), int64(len(p)))
			runtime.ReadMemStats(&after)
			if used := after.TotalAlloc - before.TotalAlloc; used > 32<<20 {
				t.Errorf("%s: the word at %d: Open takes %d bytes (%v)", name, at, used, err)
			}
		}
	}
}
