package lazy

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"
)

// What is busy for a moment is tried again; what stays busy, or fails otherwise, is an error.
func TestWhileBusy(t *testing.T) {
	other := errors.New("another error")
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	for name, tc := range map[string]struct {
		ctx   context.Context
		limit time.Duration
		errs  []error // of one call after the other; then nil
		calls int
		want  error
	}{
		"free":  {t.Context(), time.Hour, nil, 1, nil},
		"soon":  {t.Context(), time.Hour, []error{fmt.Errorf("a child: %w", ErrBusy), ErrBusy}, 3, nil},
		"busy":  {t.Context(), -time.Second, []error{ErrBusy}, 1, ErrBusy},
		"ended": {ended, time.Hour, []error{ErrBusy}, 1, ErrBusy},
		"other": {t.Context(), time.Hour, []error{other}, 1, other},
	} {
		calls := 0
		err := whileBusy(tc.ctx, time.Now().Add(tc.limit), func() (err error) {
			if calls < len(tc.errs) {
				err = tc.errs[calls]
			}
			calls++
			return err
		})
		if !errors.Is(err, tc.want) || calls != tc.calls {
			t.Errorf("%s: %v after %d calls, want %v after %d", name, err, calls, tc.want, tc.calls)
		}
	}
}
