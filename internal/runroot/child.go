package runroot

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// IsChild reports whether this process is a held process: main then calls [Child] and
// nothing else.
func IsChild() bool { return filepath.Base(os.Args[0]) == ChildName }

// The held process has one thread that matters, its first, from the beginning: what a thread gives up for the command (capabilities) it must
// still lack when it becomes the command, and where another one becomes it, the kernel gives that the first one's number only
// later, so that the pages of its first milliseconds are lost. Packages are initialised on the first; main may begin on another.
func init() {
	if IsChild() {
		runtime.LockOSThread()
	}
}

// Child is the held process: it puts the root in place, says so, waits for the release and
// becomes the command. It returns the exit status when it could not.
func Child() int {
	orders, answer := os.NewFile(3, "orders"), os.NewFile(4, "answer")
	unix.CloseOnExec(3)
	unix.CloseOnExec(4)
	in := bufio.NewReader(orders)
	path, s, err := prepare(in)
	if err != nil {
		_, _ = fmt.Fprintln(answer, strings.ReplaceAll(err.Error(), "\n", "; ")) // nobody else to tell
		return 127
	}
	if _, err := fmt.Fprintln(answer, answerReady); err != nil {
		return 127
	}
	if b, err := in.ReadByte(); err != nil || b != '\n' {
		return 127 // the one who started us is gone, or changed its mind
	}
	err = unix.Exec(path, s.Args, s.Env)
	fmt.Fprintf(os.Stderr, "%s: %v\n", s.Args[0], err)
	return 127
}

func prepare(in *bufio.Reader) (path string, s spec, err error) {
	line, err := in.ReadBytes('\n')
	if err != nil {
		return "", s, fmt.Errorf("read orders: %w", err)
	}
	if err := json.Unmarshal(line, &s); err != nil {
		return "", s, fmt.Errorf("read orders: %w", err)
	}
	if err := enterRoot(s); err != nil {
		return "", s, err
	}
	if s.Layers != nil {
		return becomeContainer(s)
	}
	if path, err = lookUp(s); err != nil {
		return "", s, err
	}
	if err := unix.Chdir(s.Dir); err != nil {
		return "", s, fmt.Errorf("working directory %s: %w", s.Dir, err)
	}
	if s.GID != 0 || s.UID != 0 {
		err = errors.Join(unix.Setgroups(nil), unix.Setresgid(s.GID, s.GID, s.GID), unix.Setresuid(s.UID, s.UID, s.UID))
	}
	return path, s, err
}

// enterRoot makes s.Root, or an overlay above it, the root of this mount namespace.
func enterRoot(s spec) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	root, err := mountRoot(s)
	if err != nil {
		return err
	}
	ours := s.Upper != "" || s.Layers != nil
	if ours {
		if err := hostFiles(root); err != nil {
			return err
		}
	}
	mounts, err := takeMounts(s, root)
	if err != nil {
		return err
	}
	if err := furnish(root, ours, s.NoNetwork); err != nil {
		return err
	}
	// The old root is put on top of the new one and taken away from there: no directory is needed for it.
	if err := unix.Chdir(root); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot_root to %s: %w", root, err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmount the old root: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return err
	}
	if s.NoNetwork {
		if err := loopback(); err != nil {
			return fmt.Errorf("bring up the loopback interface: %w", err)
		}
	}
	return mounts.attach()
}

func mountRoot(s spec) (string, error) {
	if s.Layers != nil {
		return mountImage(s)
	}
	if s.Upper == "" {
		if err := unix.Mount(s.Root, s.Root, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			return "", fmt.Errorf("bind %s: %w", s.Root, err)
		}
		return s.Root, nil
	}
	if err := unix.Mount("tmpfs", s.Upper, "tmpfs", 0, "mode=0755"); err != nil {
		return "", fmt.Errorf("mount a tmpfs on %s: %w", s.Upper, err)
	}
	upper, work, merged := s.Upper+"/upper", s.Upper+"/work", s.Upper+"/root"
	for _, d := range []string{upper, work, merged} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return "", err
		}
	}
	if err := copyOwner(s.Root, upper); err != nil {
		return "", err
	}
	options := "lowerdir=" + escapeOption(s.Root) + ",upperdir=" + escapeOption(upper) + ",workdir=" + escapeOption(work)
	if err := unix.Mount("overlay", merged, "overlay", 0, options); err != nil {
		return "", fmt.Errorf("mount an overlay above %s (try --in-place): %w", s.Root, err)
	}
	return merged, nil
}

// copyOwner gives the overlay's root the mode and owner that it has below.
func copyOwner(from, to string) error {
	var st unix.Stat_t
	if err := unix.Stat(from, &st); err != nil {
		return err
	}
	return errors.Join(unix.Chown(to, int(st.Uid), int(st.Gid)), unix.Chmod(to, st.Mode&0o7777))
}

// escapeOption protects what separates overlay's options and lower directories.
func escapeOption(s string) string {
	return strings.NewReplacer(`\`, `\\`, `,`, `\,`, `:`, `\:`).Replace(s)
}

// furnish mounts what a command expects to find. Where root is the user's own directory
// (not ours to change), only what it has a place for.
func furnish(root string, ours, ownNetwork bool) error {
	type mount struct {
		source, dir, kind string
		flags             uintptr
		data              string
	}
	const safe = unix.MS_NOSUID | unix.MS_NOEXEC | unix.MS_NODEV
	mounted := map[string]bool{}
	sys := mount{"/sys", "sys", "", unix.MS_BIND, ""}
	if ownNetwork {
		sys = mount{"sysfs", "sys", "sysfs", safe | unix.MS_RDONLY, ""} // shows the interfaces of its mounter
	}
	for _, m := range []mount{
		{"proc", "proc", "proc", safe, ""},
		sys,
		{"tmpfs", "dev", "tmpfs", unix.MS_NOSUID, "mode=0755,size=64k"},
		{"devpts", "dev/pts", "devpts", unix.MS_NOSUID | unix.MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620"},
		{"tmpfs", "dev/shm", "tmpfs", safe, "mode=1777"},
	} {
		at := filepath.Join(root, m.dir)
		inside := filepath.Dir(m.dir) != "."
		if inside && !mounted[filepath.Dir(m.dir)] || !directory(at, ours || inside) {
			continue
		}
		if err := unix.Mount(m.source, at, m.kind, m.flags, m.data); err != nil {
			return fmt.Errorf("mount /%s: %w", m.dir, err)
		}
		mounted[m.dir] = true
		if m.source == "/sys" {
			// The flags of a bind mount are set by a remount; a refusal leaves it writable to root only.
			_ = unix.Mount("", at, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY|safe, "")
		}
	}
	if !mounted["dev"] {
		return nil
	}
	return devices(filepath.Join(root, "dev"))
}

// directory reports whether at is a directory, and none that a link leads to; with make
// it is made when it is missing.
func directory(at string, make bool) bool {
	if make {
		if err := os.Mkdir(at, 0o755); err == nil {
			return true
		}
	}
	info, err := os.Lstat(at)
	return err == nil && info.IsDir()
}

// hostFiles mounts the host's name resolution over the root's, as container runtimes do.
func hostFiles(root string) error {
	if !directory(filepath.Join(root, "etc"), true) {
		return nil
	}
	for _, name := range []string{"/etc/resolv.conf", "/etc/hosts"} {
		if _, err := os.Stat(name); err != nil {
			continue
		}
		at := filepath.Join(root, name)
		f, err := os.OpenFile(at, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
		if err == nil {
			err = f.Close()
		}
		if info, serr := os.Lstat(at); serr != nil || !info.Mode().IsRegular() {
			continue // a link, which is the image's business
		}
		if err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
		if err := unix.Mount(name, at, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("mount %s: %w", name, err)
		}
	}
	return nil
}

// devices fills the tmpfs on /dev.
func devices(dev string) error {
	for _, name := range []string{"null", "zero", "full", "random", "urandom", "tty"} {
		at := filepath.Join(dev, name)
		f, err := os.OpenFile(at, os.O_CREATE|os.O_WRONLY, 0o666)
		if err == nil {
			err = f.Close()
		}
		if err == nil {
			err = unix.Mount("/dev/"+name, at, "", unix.MS_BIND, "")
		}
		if err != nil {
			return fmt.Errorf("device /dev/%s: %w", name, err)
		}
	}
	var errs []error
	for name, to := range map[string]string{
		"ptmx": "pts/ptmx", "fd": "/proc/self/fd",
		"stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2",
	} {
		errs = append(errs, os.Symlink(to, filepath.Join(dev, name)))
	}
	return errors.Join(errs...)
}

// lookUp finds the command as a shell would, in the new root.
func lookUp(s spec) (string, error) {
	name := s.Args[0]
	if strings.Contains(name, "/") {
		if !filepath.IsAbs(name) {
			name = filepath.Join(s.Dir, name)
		}
		return name, executable(name)
	}
	for _, e := range s.Env {
		list, ok := strings.CutPrefix(e, "PATH=")
		if !ok {
			continue
		}
		for _, dir := range filepath.SplitList(list) {
			if !filepath.IsAbs(dir) {
				dir = filepath.Join(s.Dir, dir)
			}
			if path := filepath.Join(dir, name); filepath.IsAbs(path) && executable(path) == nil {
				return path, nil
			}
		}
	}
	return "", fmt.Errorf("command %s: not found in the root's PATH", name)
}

func executable(path string) error {
	info, err := os.Stat(path)
	switch {
	case err != nil:
		return fmt.Errorf("command: %w", err)
	case info.IsDir() || info.Mode()&0o111 == 0:
		return fmt.Errorf("command %s: not executable", path)
	}
	return nil
}
