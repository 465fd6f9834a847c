// Command tools installs the pinned programs that this project is tested with
// and prints where they are.
//
//	go run ./internal/tools/cmd/tools install test
//	$(go run ./internal/tools/cmd/tools path golangci-lint) run ./...
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/headstart-oci/headstart/internal/tools"
)

const usage = `usage:
  tools install NAME…   install packages, programs or groups (all, demo, lint, test, bench)
  tools path NAME…      print where programs are, after installing what is missing
  tools list            print every package, its programs, and whether it is installed
`

var errUsage = errors.New("usage")

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	switch {
	case errors.Is(err, errUsage):
		os.Exit(2)
	case err != nil:
		_, _ = fmt.Fprintln(os.Stderr, "tools:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	store, err := tools.NewStore(tools.Options{Out: stderr})
	if err != nil {
		return err
	}
	switch {
	case len(args) == 1 && args[0] == "list":
		return list(store, stdout)
	case len(args) > 1 && args[0] == "install":
		return install(ctx, store, args[1:])
	case len(args) > 1 && args[0] == "path":
		for _, name := range args[1:] {
			path, err := store.Ensure(ctx, name)
			if err != nil {
				return err
			}
			if _, err := fmt.Fprintln(stdout, path); err != nil {
				return err
			}
		}
		return nil
	}
	if _, err := io.WriteString(stderr, usage); err != nil {
		return err
	}
	return errUsage
}

func list(store *tools.Store, stdout io.Writer) error {
	for _, p := range tools.Packages() {
		state := "missing"
		if store.Installed(p) {
			state = "installed"
		}
		if _, err := fmt.Fprintf(stdout, "%-9s  %-46s  %s\n", state, p, strings.Join(p.Binaries, " ")); err != nil {
			return err
		}
	}
	return nil
}

// install goes on after a package that cannot be had, so that one missing tool
// does not hide the others, and reports them all.
func install(ctx context.Context, store *tools.Store, names []string) error {
	var errs []error
	for _, name := range names {
		packages, ok := tools.Group(name)
		if !ok {
			p, ok := tools.Lookup(name)
			if !ok {
				return fmt.Errorf("%w: %q", tools.ErrUnknown, name)
			}
			packages = []tools.Package{p}
		}
		for _, p := range packages {
			if err := store.Install(ctx, p); err != nil {
				errs = append(errs, err)
			}
			if ctx.Err() != nil {
				return ctx.Err()
			}
		}
	}
	return errors.Join(errs...)
}
