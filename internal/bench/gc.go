package main

import (
	"context"
	"fmt"
	"os/exec"
	"regexp"
)

var gcMetric = regexp.MustCompile(`([0-9.]+) (look-µs|remove-µs)`)

// benchGC prints what the collector costs: it runs the benchmark of a package that is internal to another one. That it removes nothing that is in use, beside
// mounts that are held and read, is TestCollectHeld of pkg/lazy with SOAK=1.
func benchGC(ctx context.Context, b *bench) error {
	out, err := exec.CommandContext(ctx, "go", "test", "./pkg/lazy/internal/share", "-run", "^$", "-bench", "^BenchmarkCollect$", "-benchtime", fmt.Sprint(b.runs, "x"), "-timeout", "20m").CombinedOutput()
	if err != nil {
		return fmt.Errorf("benchmark of the collector: %w: %s", err, tail(out))
	}
	found := gcMetric.FindAllStringSubmatch(string(out), -1)
	if len(found) != 2 {
		return fmt.Errorf("benchmark of the collector says %d figures, want 2: %s", len(found), tail(out))
	}
	fmt.Fprintf(b.out, "\nthe collector, for each of 100 cache files of 100 chunks that nobody uses (%d runs)\n", b.runs)
	for _, f := range found {
		what := map[string]string{"look-µs": "a look that removes nothing", "remove-µs": "its removal, durable, with its entries in the index"}[f[2]]
		fmt.Fprintf(b.out, "%-52s %10s µs\n", what, f[1])
	}
	return nil
}
