package main

import (
	"errors"
	"fmt"
)

// aim is a figure that the project has set itself, and what was measured of it.
type aim struct {
	what      string
	got, most float64
}

// errMissed is returned with -check when an aim was missed.
var errMissed = errors.New("aims were missed")

// aim notes a figure that is to be most at most.
func (b *bench) aim(what string, got, most float64) {
	b.aims = append(b.aims, aim{what, got, most})
}

// verdict prints all aims, and returns errMissed when one was missed. Where the two sides of a ratio are the same program a noisy machine
// gives 0.97 to 1.04, so one miss by a few hundredths says little.
func (b *bench) verdict() error {
	if len(b.aims) == 0 {
		return nil
	}
	missed := 0
	fmt.Fprintf(b.out, "\n%-64s %10s %10s\n", "aims", "measured", "at most")
	for _, a := range b.aims {
		word := "met"
		if !(a.got <= a.most) { // NaN too
			word = "MISSED"
			missed++
		}
		fmt.Fprintf(b.out, "%-64s %10.3f %10.4g  %s\n", a.what, a.got, a.most, word)
	}
	if missed > 0 {
		return fmt.Errorf("%w: %d of %d", errMissed, missed, len(b.aims))
	}
	return nil
}
