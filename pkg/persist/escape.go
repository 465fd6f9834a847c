package persist

import "strings"

const hexDigits = "0123456789abcdef"

// mustEscape reports whether a byte cannot stand for itself in a field: the backslash
// and the ASCII control bytes (newline, tab, carriage return, NUL, DEL, …). Every other
// byte, also one that is no UTF-8, is written as it is, so that grep finds the path.
func mustEscape(c byte) bool { return c < 0x20 || c == 0x7f || c == '\\' }

// appendEscaped appends s so that it holds no control byte. space says whether a space
// is escaped too: it is inside a field that a space ends.
func appendEscaped(b []byte, s string, space bool) []byte {
	for i := range len(s) {
		c := s[i]
		switch {
		case c == '\\':
			b = append(b, '\\', '\\')
		case c == '\n':
			b = append(b, '\\', 'n')
		case c == '\t':
			b = append(b, '\\', 't')
		case c == '\r':
			b = append(b, '\\', 'r')
		case mustEscape(c) || space && c == ' ':
			b = append(b, '\\', 'x', hexDigits[c>>4], hexDigits[c&15])
		default:
			b = append(b, c)
		}
	}
	return b
}

// unescape is the inverse of appendEscaped and accepts nothing else: each value has one
// spelling, so that a list that was read is written back byte for byte.
func unescape(s string, space bool) (string, error) {
	first := strings.IndexFunc(s, func(r rune) bool { return r < 0x20 || r == 0x7f || r == '\\' || space && r == ' ' })
	if first < 0 {
		return s, nil
	}
	out := append(make([]byte, 0, len(s)), s[:first]...)
	for i := first; i < len(s); i++ {
		c := s[i]
		if c != '\\' {
			if mustEscape(c) || space && c == ' ' {
				return "", invalidf("byte %#02x stands for itself, want it escaped", c)
			}
			out = append(out, c)
			continue
		}
		v, n, ok := unescapeOne(s[i:], space)
		if !ok {
			return "", invalidf("escape: got %s, want \\\\, \\n, \\t, \\r or \\x and two lower-case hex digits of a byte that needs it", clip(s[i:min(i+4, len(s))]))
		}
		out = append(out, v)
		i += n - 1
	}
	return string(out), nil
}

// unescapeOne decodes the escape that s begins with and returns its length.
func unescapeOne(s string, space bool) (c byte, n int, ok bool) {
	if len(s) < 2 {
		return 0, 0, false
	}
	switch s[1] {
	case '\\':
		return '\\', 2, true
	case 'n':
		return '\n', 2, true
	case 't':
		return '\t', 2, true
	case 'r':
		return '\r', 2, true
	case 'x':
	default:
		return 0, 0, false
	}
	if len(s) < 4 {
		return 0, 0, false
	}
	hi, lo := strings.IndexByte(hexDigits, s[2]), strings.IndexByte(hexDigits, s[3])
	if hi < 0 || lo < 0 {
		return 0, 0, false
	}
	c = byte(hi<<4 | lo) //nolint:gosec // hi and lo are indexes into 16 digits
	switch {
	case c == '\\' || c == '\n' || c == '\t' || c == '\r':
		return 0, 0, false // these have a shorter spelling
	case mustEscape(c), space && c == ' ':
		return c, 4, true
	}
	return 0, 0, false
}
