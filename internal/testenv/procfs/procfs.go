// Package procfs reads what proc(5) says about the processes and the mounts of
// this machine, as far as tests need it to find what was left behind.
package procfs

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// Process is a process at the moment it was read. A pid may mean another one
// later.
type Process struct {
	PID    int
	Parent int
	Group  int
	Zombie bool // has ended, and nobody has waited for it
}

// Processes returns the processes of this PID namespace, but the caller.
func Processes() ([]Process, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var all []Process
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		if p, ok := read(pid); ok {
			all = append(all, p)
		}
	}
	return all, nil
}

// read returns false for a process that is gone.
func read(pid int) (Process, bool) {
	p := Process{PID: pid}
	stat, err := os.ReadFile(p.file("stat"))
	if err != nil {
		return p, false
	}
	// After the name in parentheses, which may hold anything: state, parent, group.
	f := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	if len(f) < 3 {
		return p, false
	}
	p.Zombie = f[0] == "Z"
	p.Parent, err = strconv.Atoi(f[1])
	if err != nil {
		return p, false
	}
	p.Group, err = strconv.Atoi(f[2])
	return p, err == nil
}

func (p Process) file(name string) string {
	return filepath.Join("/proc", strconv.Itoa(p.PID), name)
}

// HasEnv says whether the process was started with the environment variable
// assignment, KEY=value.
func (p Process) HasEnv(assignment string) bool {
	env, err := os.ReadFile(p.file("environ"))
	return err == nil && slices.ContainsFunc(bytes.Split(env, []byte{0}), func(v []byte) bool {
		return string(v) == assignment
	})
}

// Program returns the path of the program that the process runs, or "".
func (p Process) Program() string {
	exe, err := os.Readlink(p.file("exe"))
	if err != nil {
		return ""
	}
	return strings.TrimSuffix(exe, " (deleted)")
}

// Below says whether the process is in a cgroup below name, in any hierarchy.
func (p Process) Below(cgroup string) bool {
	text, err := os.ReadFile(p.file("cgroup"))
	return err == nil && bytes.Contains(text, []byte(":"+cgroup+"/"))
}

// CommandLine returns the process's arguments, separated by spaces.
func (p Process) CommandLine() string {
	text, err := os.ReadFile(p.file("cmdline"))
	if err != nil || len(text) == 0 {
		return "(ended, not waited for)"
	}
	return strings.TrimSpace(strings.ReplaceAll(string(text), "\x00", " "))
}

// Mount is a line of the mount table.
type Mount struct {
	Point string // unescaped as far as spaces go
	Type  string
}

// Mounts returns the mounts of the calling thread's mount namespace, in the order
// of the kernel's table: a mount comes after what it is mounted on.
func Mounts() ([]Mount, error) {
	text, err := os.ReadFile("/proc/thread-self/mountinfo")
	if err != nil {
		return nil, err
	}
	var mounts []Mount
	for line := range strings.Lines(string(text)) {
		before, after, ok := strings.Cut(line, " - ")
		f := strings.Fields(before)
		if !ok || len(f) < 5 {
			continue
		}
		typ, _, _ := strings.Cut(after, " ")
		mounts = append(mounts, Mount{Point: strings.ReplaceAll(f[4], `\040`, " "), Type: typ})
	}
	return mounts, nil
}

// MountsBelow returns the mount points below dir, which must hold no symbolic
// link, in the order of [Mounts].
func MountsBelow(dir string) ([]string, error) {
	mounts, err := Mounts()
	if err != nil {
		return nil, err
	}
	var points []string
	for _, m := range mounts {
		if strings.HasPrefix(m.Point, dir+"/") {
			points = append(points, m.Point)
		}
	}
	return points, nil
}
