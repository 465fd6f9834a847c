package main

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/headstart-oci/headstart/internal/runroot"
	"github.com/headstart-oci/headstart/internal/testenv"
)

func TestMain(m *testing.M) {
	testscript.Main(testenv.Checked(m), map[string]func(){
		"optimizer":       main,
		runroot.ChildName: main,
	})
}

func TestScripts(t *testing.T) {
	t.Parallel()
	fixtures, err := filepath.Abs(testenv.Fixtures(t))
	if err != nil {
		t.Fatal(err)
	}
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(e *testscript.Env) error {
			e.Setenv("FIXTURES", fixtures)
			return nil
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"status":  status,
			"cmptree": cmpTree,
		},
		Condition: func(cond string) (bool, error) {
			if cond == "root" {
				return os.Geteuid() == 0, nil
			}
			_, err := exec.LookPath(cond)
			return err == nil, nil
		},
	})
}

// status N PROGRAM ARG... runs a program, whose exit status must be N. Its output can be
// looked at as that of exec.
func status(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: status N PROGRAM [ARG...]")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	err = ts.Exec(args[1], args[2:]...)
	got := 0
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		got = exit.ExitCode()
	} else {
		ts.Check(err)
	}
	if got != want {
		ts.Fatalf("%s: exit status %d, want %d", strings.Join(args[1:], " "), got, want)
	}
}

// cmptree DIR compares a tree with the one that the fixtures mean.
func cmpTree(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: cmptree DIR")
	}
	fixtures := ts.Getenv("FIXTURES")
	ts.Check(ts.Exec("python3", filepath.Join(fixtures, "cmp_tree.py"), ts.MkAbs(args[0]), filepath.Join(fixtures, "expected.json")))
}
