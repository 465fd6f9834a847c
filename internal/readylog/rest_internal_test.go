package readylog

import (
	"context"
	"testing"
	"time"
)

// Matching takes a tenth of the time at most, in rests that are worth a timer, and nobody who is told to end waits for one.
func TestRest(t *testing.T) {
	var f follower
	began := time.Now()
	f.rest(t.Context(), restFrom/2)
	if f.spent != restFrom/2 {
		t.Errorf("after %v of matching %v count towards a rest", restFrom/2, f.spent)
	}
	f.rest(t.Context(), restFrom)
	if took, want := time.Since(began), restFactor*(restFrom+restFrom/2); f.spent != 0 || took < want {
		t.Errorf("rested for %v, want at least %v; %v count towards the next rest", took, want, f.spent)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	f.rest(ctx, 24*time.Hour)
}
