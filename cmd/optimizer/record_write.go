package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/headstart-oci/headstart/internal/atomicfile"
	"github.com/headstart-oci/headstart/internal/tracer"
	"github.com/headstart-oci/headstart/pkg/persist"
)

// writer returns what writes l in the format that was asked for; it returns how many
// paths the format cannot hold.
func (o *recordOptions) writer(l *persist.List) (func(w io.Writer) (int, error), error) {
	switch o.format {
	case "native":
		return func(w io.Writer) (int, error) { _, err := l.WriteTo(w); return 0, err }, nil
	case "paths":
		return l.WritePaths, nil
	case "csv":
		return func(w io.Writer) (int, error) { return l.WriteCSV(w, o.readable) }, nil
	case "json":
		return l.WriteJSON, nil
	}
	return nil, fmt.Errorf("got %q, want native, paths, csv or json", o.format)
}

func (o *recordOptions) write(l *persist.List) error {
	if o.output == "" {
		return o.keep(l)
	}
	write, err := o.writer(l)
	if err != nil {
		return err
	}
	var omitted int
	fill := func(w io.Writer) (err error) {
		omitted, err = write(w)
		return err
	}
	if o.output == "-" {
		err = fill(o.out)
	} else {
		err = writeFile(o.output, fill)
	}
	if err == nil && omitted > 0 {
		o.warn("%d paths were left out: the format %s cannot hold them", omitted, o.format)
	}
	return err
}

// tryOutput returns why the list could not be put where it is to go, before anything is recorded.
func (o *recordOptions) tryOutput() error {
	switch o.output {
	case "-":
		return nil
	case "":
		s, err := persist.OpenStore(o.store)
		if err != nil {
			return err
		}
		return s.Close()
	}
	if info, err := os.Stat(o.output); err == nil && info.IsDir() {
		return fmt.Errorf("--output %s: got a directory, want a file", o.output)
	}
	root, _, _, err := openPlace(o.output)
	if err == nil && root != nil {
		err = errors.Join(atomicfile.Try(root, "."), root.Close())
	}
	if err != nil {
		return fmt.Errorf("--output %s: %w", o.output, err)
	}
	return nil
}

// keep puts the list where the plugin keeps lists.
func (o *recordOptions) keep(l *persist.List) (err error) {
	s, err := persist.OpenStore(o.store)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	saved, err := s.Save(l, persist.SaveOptions{Readable: o.readable, Overwrite: o.image != "", Partial: o.image == "", Timeout: o.timeout})
	if err != nil {
		return err
	}
	o.note("list: %s", saved.Native)
	if saved.Paths == "" && l.Reference != "" && o.image == "" {
		o.note("lists named after %s stay as they are, if there are any: this one misses the container's start", l.Reference)
	}
	return nil
}

// server returns the path of the optimizer-server program.
func (o *recordOptions) server() (string, error) {
	const name = "optimizer-server"
	if strings.ContainsRune(o.serverPath, filepath.Separator) {
		return filepath.Abs(o.serverPath) // the tracer does not run in this directory
	}
	if o.serverPath != "" {
		return o.serverPath, nil
	}
	if self, err := os.Executable(); err == nil {
		if beside := filepath.Join(filepath.Dir(self), name); isExecutable(beside) {
			return beside, nil
		}
	}
	path, err := exec.LookPath(name)
	if err != nil {
		return "", fmt.Errorf("%w; name it by --server-path", err)
	}
	return path, nil
}

func isExecutable(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0
}

// errTracerDied is returned after the list was written: only some formats can say in the
// list itself that it is incomplete.
var errTracerDied = errors.New("the tracer died before the recording ended; the list was written and is incomplete")

// finish writes the list and says what is in it.
func (o *recordOptions) finish(l *persist.List) error {
	if o.output == "" || o.format == "native" {
		l = l.Fit() // with its loss, where that leaves something out
	}
	if err := o.write(l); err != nil {
		return err
	}
	o.summarize(l)
	if l.End == tracer.EndKilled {
		return errTracerDied
	}
	return nil
}

func (o *recordOptions) summarize(l *persist.List) {
	o.note("%d files in %s, ended by %s; %d touches of other things were left out", len(l.Accesses), l.Duration.Round(time.Millisecond), l.End, l.Skipped)
	for _, x := range l.Losses {
		o.warn("the list is incomplete: %s (%d): %s", x.Reason, x.Count, x.Detail)
	}
}
