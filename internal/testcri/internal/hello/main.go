// Command hello is what the tests of package testcri run in a container: it
// prints its arguments and the files that they name, or, as "hello sleep", waits
// for SIGTERM.
package main

import (
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
)

func main() {
	code, err := run(os.Args[1:])
	if err != nil {
		_, _ = fmt.Fprintln(os.Stderr, "hello:", err)
		code = 1
	}
	os.Exit(code)
}

func run(args []string) (code int, err error) {
	if len(args) == 1 && args[0] == "sleep" {
		end := make(chan os.Signal, 1)
		signal.Notify(end, syscall.SIGTERM)
		if _, err := fmt.Fprintln(os.Stdout, "ready"); err != nil {
			return 1, err
		}
		<-end
		return 7, nil
	}
	for _, a := range args {
		text := a
		if strings.HasPrefix(a, "/") {
			b, err := os.ReadFile(a)
			if err != nil {
				return 1, err
			}
			text = string(b)
		}
		if _, err := fmt.Fprintln(os.Stdout, text); err != nil {
			return 1, err
		}
	}
	return 0, nil
}
