package main

import (
	"bytes"
	"errors"
	"math"
	"strings"
	"testing"
)

func TestVerdict(t *testing.T) {
	var out bytes.Buffer
	b := &bench{out: &out}
	if err := b.verdict(); err != nil || out.Len() != 0 {
		t.Errorf("no aims: %v, %q", err, out.String())
	}
	b.aim("met", 0.5, 0.5)
	if err := b.verdict(); err != nil || !strings.Contains(out.String(), "met") || strings.Contains(out.String(), "MISSED") {
		t.Errorf("an aim that was met: %v, %q", err, out.String())
	}
	b.aim("above", 0.51, 0.5)
	b.aim("nothing", math.NaN(), 1)
	out.Reset()
	if err := b.verdict(); !errors.Is(err, errMissed) || strings.Count(out.String(), "MISSED") != 2 || !strings.Contains(err.Error(), "2 of 3") {
		t.Errorf("two that were missed: %v, %q", err, out.String())
	}
}
