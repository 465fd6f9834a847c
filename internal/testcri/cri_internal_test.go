package testcri

import "testing"

func TestParseLog(t *testing.T) {
	const text = "2026-01-02T03:04:05.6Z stdout F one\n" +
		"2026-01-02T03:04:05.6Z stderr F bad\n" +
		"2026-01-02T03:04:05.6Z stdout P two, \n" +
		"2026-01-02T03:04:05.6Z stdout F and  spaces\n" +
		"2026-01-02T03:04:05.6Z stdout F \n" +
		"cut off"
	stdout, stderr := parseLog([]byte(text))
	if want := "one\ntwo, and  spaces\n\n"; string(stdout) != want {
		t.Errorf("parseLog: stdout %q, want %q", stdout, want)
	}
	if want := "bad\n"; string(stderr) != want {
		t.Errorf("parseLog: stderr %q, want %q", stderr, want)
	}
}
