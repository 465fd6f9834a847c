package rebuild_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/headstart-oci/headstart/internal/rebuild"
	"github.com/headstart-oci/headstart/internal/testenv"
)

// The test binary is also the build process (envChild says how it behaves) and a plugin
// that dies (envParent is the queue's directory).
const (
	envChild  = "HEADSTART_TEST_REBUILD_CHILD"
	envOut    = "HEADSTART_TEST_REBUILD_OUT"
	envParent = "HEADSTART_TEST_REBUILD_PARENT"
)

func TestMain(m *testing.M) {
	if mode := os.Getenv(envChild); mode != "" && len(os.Args) == 3 && os.Args[1] == "rebuild" {
		os.Exit(childMain(mode, os.Args[2]))
	}
	if dir := os.Getenv(envParent); dir != "" {
		os.Exit(parentMain(dir))
	}
	testenv.Main(m)
}

// child is the command of a build process with the given behaviour. What it "builds" is
// the file out/KEY; out/attempts gets a line at each start.
func child(mode, out string) rebuild.Command {
	return func(job string) *exec.Cmd {
		cmd := exec.Command("/proc/self/exe", "rebuild", job)
		cmd.Env = append(os.Environ(), envChild+"="+mode, envOut+"="+out)
		return cmd
	}
}

func childMain(mode, job string) int {
	out := os.Getenv(envOut)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	err := rebuild.RunChild(ctx, job, func(ctx context.Context, j rebuild.Job, temp string) (rebuild.Result, error) {
		attempt, err := logAttempt(out)
		if err != nil {
			return rebuild.Result{}, err
		}
		// Two builds at once would meet here.
		alone, err := os.OpenFile(filepath.Join(out, "alone"), os.O_CREATE|os.O_WRONLY, 0o600)
		if err != nil {
			return rebuild.Result{}, err
		}
		defer alone.Close()
		if err := syscall.Flock(int(alone.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
			return rebuild.Result{}, rebuild.Permanent(errors.New("another build is running"))
		}
		if err := os.WriteFile(filepath.Join(temp, "half"), []byte("half"), 0o600); err != nil {
			return rebuild.Result{}, err
		}
		return behave(ctx, mode, attempt, buildEnv{j, temp, out})
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, "build:", err)
		return 1
	}
	return 0
}

type buildEnv struct {
	job       rebuild.Job
	temp, out string
}

func behave(ctx context.Context, mode string, attempt int, e buildEnv) (rebuild.Result, error) {
	name, arg, _ := strings.Cut(mode, ":")
	switch name {
	case "fail":
		return rebuild.Result{}, errors.New("the registry said no")
	case "permanent":
		return rebuild.Result{}, rebuild.Permanent(errors.New("the image is no image"))
	case "crash":
		fmt.Fprintln(os.Stderr, "some line")
		fmt.Fprintln(os.Stderr, "out of luck")
		os.Exit(3)
	case "fail-first": // succeeds at attempt arg
		if n, _ := strconv.Atoi(arg); attempt < n {
			return rebuild.Result{}, fmt.Errorf("attempt %d", attempt)
		}
	case "slow": // takes arg
		d, _ := time.ParseDuration(arg)
		select {
		case <-time.After(d):
		case <-ctx.Done():
			return rebuild.Result{}, ctx.Err()
		}
	case "deaf": // heeds nothing
		signal.Ignore(syscall.SIGTERM)
		for {
			time.Sleep(time.Hour)
		}
	case "once-slow": // the first attempt never ends
		if attempt == 1 {
			<-ctx.Done()
			return rebuild.Result{}, ctx.Err()
		}
	case "fill": // needs space
		if err := os.WriteFile(filepath.Join(e.temp, "big"), make([]byte, 8<<20), 0o600); err != nil {
			return rebuild.Result{}, err
		}
	case "priority":
		text, err := priorities()
		if err != nil {
			return rebuild.Result{}, err
		}
		if err := os.WriteFile(filepath.Join(e.out, "priorities"), []byte(text), 0o600); err != nil {
			return rebuild.Result{}, err
		}
	}
	list, err := os.ReadFile(e.job.List)
	if err != nil {
		return rebuild.Result{}, err
	}
	half := filepath.Join(e.out, "half-"+e.job.Key)
	if err := os.WriteFile(half, append([]byte("whole "), list...), 0o600); err != nil {
		return rebuild.Result{}, err
	}
	if err := os.Rename(half, filepath.Join(e.out, e.job.Key)); err != nil {
		return rebuild.Result{}, err
	}
	return rebuild.Result{Manifest: "sha256:" + strings.Repeat("ab", 32), PrefetchBytes: 7}, nil
}

func logAttempt(out string) (int, error) {
	name := filepath.Join(out, "attempts")
	f, err := os.OpenFile(name, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return 0, err
	}
	if _, err := fmt.Fprintln(f, os.Getpid()); err != nil {
		return 0, err
	}
	if err := f.Close(); err != nil {
		return 0, err
	}
	data, err := os.ReadFile(name)
	return strings.Count(string(data), "\n"), err
}

// pids returns the build processes that were started.
func pids(t testing.TB, out string) []int {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(out, "attempts"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	var found []int
	for line := range strings.Lines(string(data)) {
		if n, err := strconv.Atoi(strings.TrimSpace(line)); err == nil {
			found = append(found, n)
		}
	}
	return found
}

// parentMain is a plugin: it works on the queue until it is killed.
func parentMain(dir string) int {
	if err := os.Unsetenv(envParent); err != nil {
		return 1
	}
	q, err := rebuild.Open(dir, rebuild.QueueOptions{Command: child(os.Getenv(envChild), os.Getenv(envOut))})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	q.Run(context.Background())
	return 0
}

// priorities lists the scheduling of every thread of this process.
func priorities() (string, error) {
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return "", err
	}
	var b strings.Builder
	for _, t := range tasks {
		stat, err := os.ReadFile("/proc/self/task/" + t.Name() + "/stat")
		if err != nil {
			return "", err
		}
		// After the command name: state is field 3, nice 19, policy 41. Source: proc(5).
		f := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
		tid, err := strconv.Atoi(t.Name())
		if err != nil {
			return "", err
		}
		io, _, errno := syscall.Syscall(syscall.SYS_IOPRIO_GET, 1, uintptr(tid), 0)
		if errno != 0 {
			return "", errno
		}
		fmt.Fprintf(&b, "nice %s policy %s io %d\n", f[16], f[38], io>>13)
	}
	oom, err := os.ReadFile("/proc/self/oom_score_adj")
	if err != nil {
		return "", err
	}
	return b.String() + "oom " + strings.TrimSpace(string(oom)), nil
}
