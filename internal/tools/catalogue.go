package tools

import "slices"

// kind says how a package is obtained.
type kind int

const (
	goInstall  kind = iota // go install source…@version
	goScratch              // go build in a module made for it, for what go install refuses
	cargoCrate             // cargo install source@version --locked
	debian                 // apt-get install source…
)

// Package is a set of programs that are installed together.
type Package struct {
	Name     string   // as typed by a person and as the cache directory is called
	Version  string   // pinned; empty for Debian packages, which the distribution pins
	Binaries []string // programs it brings, by file name
	Needs    []string // packages that its build needs
	Slow     bool     // takes minutes to build: never installed from within a test

	kind   kind
	source []string // import paths, a crate, or Debian packages
}

// String returns name@version, which is also the name of the package's cache directory.
func (p Package) String() string {
	if p.Version == "" {
		return p.Name
	}
	return p.Name + "@" + p.Version
}

// Packages returns every package this project knows, in the order of a full
// installation.
func Packages() []Package {
	const containerd = "github.com/containerd/containerd/v2/cmd/"
	return []Package{
		{Name: "gcc", Binaries: []string{"gcc"}, kind: debian, source: []string{"gcc", "libc6-dev"}},
		{Name: "gzip", Binaries: []string{"gzip"}, kind: debian, source: []string{"gzip"}},
		{Name: "xz", Binaries: []string{"xz"}, kind: debian, source: []string{"xz-utils"}},
		{Name: "zstd", Binaries: []string{"zstd"}, kind: debian, source: []string{"zstd"}},
		{Name: "erofs-utils", Binaries: []string{"fsck.erofs", "dump.erofs", "mkfs.erofs"}, kind: debian, source: []string{"erofs-utils"}},
		{Name: "btrfs-progs", Binaries: []string{"btrfs", "mkfs.btrfs"}, kind: debian, source: []string{"btrfs-progs"}},
		{Name: "xfsprogs", Binaries: []string{"mkfs.xfs"}, kind: debian, source: []string{"xfsprogs"}},
		{Name: "util-linux", Binaries: []string{"setpriv"}, kind: debian, source: []string{"util-linux"}},
		{Name: "python3", Binaries: []string{"python3"}, kind: debian, source: []string{"python3"}},
		{Name: "strace", Binaries: []string{"strace"}, kind: debian, source: []string{"strace"}},
		{Name: "debootstrap", Binaries: []string{"debootstrap"}, kind: debian, source: []string{"debootstrap", "ca-certificates"}},
		{Name: "tar", Binaries: []string{"tar"}, kind: debian, source: []string{"tar"}},
		{Name: "chromium", Binaries: []string{"chromium"}, kind: debian, source: []string{"chromium"}},
		{Name: "hyperfine", Binaries: []string{"hyperfine"}, kind: debian, source: []string{"hyperfine"}},
		{
			Name: "containerd", Version: "v2.4.2", kind: goInstall,
			Binaries: []string{"containerd", "containerd-shim-runc-v2", "ctr"},
			source:   []string{containerd + "containerd", containerd + "containerd-shim-runc-v2", containerd + "ctr"},
		},
		{
			Name: "runc", Version: "v1.4.3", kind: goScratch, Needs: []string{"gcc"},
			Binaries: []string{"runc"}, source: []string{"github.com/opencontainers/runc"},
		},
		{
			Name: "registry", Version: "v3.1.2", kind: goInstall,
			Binaries: []string{"registry"}, source: []string{"github.com/distribution/distribution/v3/cmd/registry"},
		},
		{
			Name: "golangci-lint", Version: "v2.15.0", kind: goInstall,
			Binaries: []string{"golangci-lint"}, source: []string{"github.com/golangci/golangci-lint/v2/cmd/golangci-lint"},
		},
		{
			Name: "benchstat", Version: "v0.0.0-20260908200009-22c9c6c9d4da", kind: goInstall,
			Binaries: []string{"benchstat"}, source: []string{"golang.org/x/perf/cmd/benchstat"},
		},
		{Name: "cargo", Binaries: []string{"cargo"}, kind: debian, source: []string{"cargo"}},
		{Name: "cmake", Binaries: []string{"cmake", "make"}, kind: debian, source: []string{"cmake", "make"}},
		{
			Name: "nydus-rs", Version: "2.2.0", kind: cargoCrate, Slow: true, Needs: []string{"gcc", "cmake", "cargo"},
			Binaries: []string{"nydus-image", "nydusd"}, source: []string{"nydus-rs"},
		},
	}
}

// Groups returns the names of the sets that the Makefile asks for.
func Groups() []string { return []string{"all", "demo", "lint", "test", "bench"} }

// Lookup returns the package called name, or the one that brings a program
// called name.
func Lookup(name string) (Package, bool) {
	for _, p := range Packages() {
		if p.Name == name || slices.Contains(p.Binaries, name) {
			return p, true
		}
	}
	return Package{}, false
}

// Group returns the packages of the set called name, in order of installation,
// and false when there is no such set.
func Group(name string) ([]Package, bool) {
	demo := []string{"erofs-utils", "gcc", "containerd", "runc"}
	test := append([]string{"gzip", "xz", "zstd", "tar", "chromium", "btrfs-progs", "xfsprogs", "util-linux", "python3", "strace", "debootstrap", "registry", "nydus-rs"}, demo...)
	var want []string
	switch name {
	case "all":
		return Packages(), true
	case "demo":
		want = demo
	case "test":
		want = test
	case "lint":
		want = []string{"golangci-lint"}
	case "bench":
		want = append([]string{"hyperfine", "benchstat"}, test...)
	default:
		return nil, false
	}
	all := Packages()
	return slices.DeleteFunc(all, func(p Package) bool { return !slices.Contains(want, p.Name) }), true
}
