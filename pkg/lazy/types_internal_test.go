package lazy

import "testing"

func TestReadAhead(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		r        Request
		prefetch bool
		want     int
	}{
		{Request{}, true, DefaultReadAhead},
		{Request{}, false, NormalReadAhead},
		{Request{NoPrefetch: true}, true, NormalReadAhead},
		{Request{ReadAhead: 64}, true, 64},
		{Request{ReadAhead: 64}, false, 64},
		{Request{ReadAhead: -1}, false, 0},
	} {
		if got := c.r.readAhead(c.prefetch); got != c.want {
			t.Errorf("readAhead(%v) of %+v = %d, want %d", c.prefetch, c.r, got, c.want)
		}
	}
}
