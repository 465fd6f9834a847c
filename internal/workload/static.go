package workload

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"strconv"
)

// staticRecipe is one program and data whose layers use what layers can do: the second
// layer deletes, replaces, hides a directory and links into the first.
func staticRecipe(ctx context.Context) (*recipe, error) {
	inputs, err := programInputs(ctx, "touch")
	if err != nil {
		return nil, err
	}
	build := func(ctx context.Context, w *layoutWriter, scratch string) error {
		program, err := compile(ctx, "touch", scratch)
		if err != nil {
			return err
		}
		base, top := staticEntries(program)
		if err := w.layer("program", func(tw *tar.Writer) error { return writeEntries(tw, base) }); err != nil {
			return err
		}
		w.config.Config.Entrypoint = []string{"/bin/touch"}
		w.config.Config.Cmd = []string{"read", "/data/a", "open", "/data/opened", "map", "/data/mapped", "read", "/data/b"}
		return w.layer("data", func(tw *tar.Writer) error { return writeEntries(tw, top) })
	}
	return &recipe{
		name: Static, reference: "docker.io/headstart/static:1",
		inputs: append(inputs, "static 2"), build: build,
	}, nil
}

// staticEntries returns the two layers of the static image.
func staticEntries(program []byte) (base, top []entry) {
	text := func(seed byte, n int) []byte { return noise(uint64(seed), n) }
	dir := tar.Header{Typeflag: tar.TypeDir}
	base = []entry{
		{name: "bin/touch", mode: 0o755, data: program},
		{name: "etc/passwd", mode: 0o644, data: []byte("root:x:0:0:root:/:/bin/touch\n")},
		{name: "tmp/", mode: 0o1777, header: dir},
		{name: "data/a", mode: 0o644, data: text(1, 3<<20)},
		{name: "data/opened", mode: 0o644, data: text(2, 70000)},
		{name: "data/mapped", mode: 0o644, data: text(3, 200000)},
		{name: "data/never", mode: 0o644, data: text(4, 1<<20)},
		{name: "data/replaced", mode: 0o644, data: text(5, 4096)},
		{name: "data/deleted", mode: 0o644, data: text(6, 4096)},
		{name: "data/empty", mode: 0o600},
		{name: "hidden/inside", mode: 0o644, data: text(7, 100)},
		{name: "data/xattrs", mode: 0o640, data: text(8, 10), header: tar.Header{
			Uid: 12, Gid: 34, PAXRecords: map[string]string{"SCHILY.xattr.user.headstart": "value\x00with zero"},
		}},
		{name: "data/null", mode: 0o666, header: tar.Header{Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3}},
		{name: "data/fifo", mode: 0o600, header: tar.Header{Typeflag: tar.TypeFifo}},
		{name: "data/bytes-\xff\xfe", mode: 0o644, data: text(9, 5000)},
	}
	top = []entry{
		{name: "data/.wh.deleted", mode: 0o600},
		{name: "data/replaced", mode: 0o600, data: text(10, 9000)},
		{name: "data/b", mode: 0o644, data: text(11, 500000)},
		{name: "data/link", mode: 0o644, header: tar.Header{Typeflag: tar.TypeLink, Linkname: "data/b"}},
		{name: "data/symlink", mode: 0o777, header: tar.Header{Typeflag: tar.TypeSymlink, Linkname: "../data/b"}},
		{name: "hidden/", mode: 0o755, header: dir},
		{name: "hidden/.wh..wh..opq", mode: 0o600},
		{name: "hidden/outside", mode: 0o644, data: text(12, 100)},
	}
	return base, top
}

// burstRecipe is BurstFiles small files and the program that reads them.
func burstRecipe(ctx context.Context) (*recipe, error) {
	inputs, err := programInputs(ctx, "burst")
	if err != nil {
		return nil, err
	}
	build := func(ctx context.Context, w *layoutWriter, scratch string) error {
		program, err := compile(ctx, "burst", scratch)
		if err != nil {
			return err
		}
		w.config.Config.Entrypoint = []string{"/bin/burst"}
		w.config.Config.Cmd = []string{strconv.Itoa(BurstFiles)}
		return w.layer("burst", func(tw *tar.Writer) error {
			entries := make([]entry, 0, BurstFiles+1)
			entries = append(entries, entry{name: "bin/burst", mode: 0o755, data: program})
			for i := range BurstFiles {
				name := fmt.Sprintf("files/%03d/%05d", i/burstPerDir, i)
				text := fmt.Appendf(nil, "file %05d\n", i)
				entries = append(entries, entry{name: name, mode: 0o644, data: bytes.Repeat(text, 1+i%40)})
			}
			return writeEntries(tw, entries)
		})
	}
	return &recipe{
		name: Burst, reference: "docker.io/headstart/burst:1",
		inputs: append(inputs, fmt.Sprintf("burst 1 %d", BurstFiles)), build: build,
	}, nil
}

const burstPerDir = 200 // as in programs/burst

// noise returns n bytes, half of them random: what compresses about as programs do.
func noise(seed uint64, n int) []byte {
	r := rand.New(rand.NewPCG(seed, 1))
	data := make([]byte, n)
	for i := range data {
		if i%64 < 32 {
			data[i] = byte(r.Uint32() & 0xff)
		}
	}
	return data
}
