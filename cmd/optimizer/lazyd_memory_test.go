package main

import (
	"bufio"
	"fmt"
	"os"
	"strings"
	"testing"
)

// mappedProgram returns how much of the program is mapped without being writable and resident, in KiB.
func mappedProgram(t *testing.T) (sum int) {
	t.Helper()
	name, err := os.Readlink("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	}()
	program := false
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		var kib int
		if fields := strings.Fields(lines.Text()); len(fields) > 4 && strings.Contains(fields[0], "-") {
			program = strings.HasSuffix(lines.Text(), name) && !strings.Contains(fields[1], "w")
		} else if n, _ := fmt.Sscanf(lines.Text(), "Rss: %d kB", &kib); n == 1 && program {
			sum += kib
		}
	}
	if err := lines.Err(); err != nil {
		t.Fatal(err)
	}
	return sum
}

func TestForgetProgram(t *testing.T) {
	before := mappedProgram(t)
	if err := forgetProgram(); err != nil {
		t.Fatal(err)
	}
	if after := mappedProgram(t); after >= before {
		t.Errorf("%d KiB of the program are in memory, %d before; want less", after, before)
	}
}
