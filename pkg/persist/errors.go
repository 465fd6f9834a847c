package persist

import (
	"errors"
	"fmt"
)

// Errors of this package, for errors.Is.
var (
	// ErrInvalid is returned when bytes are no access list, or a [List] holds what no
	// list can: a relative path, a negative size, a range without bytes.
	ErrInvalid = errors.New("invalid access list")
	// ErrUnsupported is returned for a list of a later major version.
	ErrUnsupported = errors.New("unsupported access list")
)

// lineError is a fault at a line of a list; lines count from 1.
type lineError struct {
	line int
	err  error
}

func (e *lineError) Error() string { return fmt.Sprintf("line %d: %v", e.line, e.err) }
func (e *lineError) Unwrap() error { return e.err }

// clip shortens untrusted text for an error.
func clip(s string) string {
	const most = 80
	if len(s) > most {
		s = s[:most] + "…"
	}
	return fmt.Sprintf("%q", s)
}

// clipAll shortens an argument vector for an error, each argument in quotes.
func clipAll(args []string) string {
	const most = 160
	s := fmt.Sprintf("%+q", args)
	if len(s) > most {
		s = s[:most] + "…"
	}
	return s
}

func invalidf(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrInvalid, fmt.Sprintf(format, args...))
}
