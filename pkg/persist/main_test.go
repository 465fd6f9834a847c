package persist_test

import (
	"testing"
	"time"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/trace"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// awkward is a list with every field set and values that need escaping.
func awkward() *persist.List {
	return &persist.List{
		Reference: "docker.io/library/nginx:1.27",
		Digest:    "sha256:4c1d000000000000000000000000000000000000000000000000000000000000",
		Platform:  "linux/arm64/v8",
		Container: "0123abc", Name: "web", Pod: "web-7c5d", Namespace: "default",
		Command: []string{"/docker-entrypoint.sh", "", "-g", "daemon off;", "two\nlines\x00\x7f\\"},
		Engine:  "fanotify+filemap", Grade: persist.GradeFaultAround,
		Started:  time.Date(2026, 11, 21, 0, 41, 0, 123456789, time.UTC),
		Duration: 2500 * time.Millisecond,
		End:      "exit",
		Trace: trace.Trace{
			Accesses: []trace.Access{
				{Path: "/", How: trace.Opened},
				{Path: "/docker-entrypoint.sh", How: trace.Opened | trace.Read | trace.Executed, Size: 1620, Elapsed: 1500 * time.Nanosecond, PID: 4242, Command: "docker-entrypoi"},
				{Path: "/usr/lib/with space\tand\nnewline\\n", How: trace.Read, Size: 1 << 40, Elapsed: time.Hour, PID: 1<<31 - 1, Command: "a b\tc"},
				{Path: "/bytes/\xff\xfe\x80", Command: "-"},
				{Path: "/ümlaut/日本\u2028\u0085", How: trace.Executed, Ranges: []trace.Range{
					{Offset: 8192, Length: 4096, Elapsed: 77, Certain: true},
					{Offset: 0, Length: 4096, Elapsed: 78},
					{Offset: 1 << 62, Length: 1<<62 - 1, Certain: true},
				}},
				{Path: "/cr\r\nlf", How: trace.Opened, Ranges: []trace.Range{{Offset: 7, Length: 1}}},
				{Path: "/never/touched", How: trace.Opened, Size: 12, Ranges: []trace.Range{}},
				{Path: "/etc/passwd", How: trace.Runtime, Size: 900},
			},
			Processes: []trace.Process{{PID: 4242, Command: "docker-entrypoi"}, {PID: 1<<31 - 1, Parent: 4242, Command: "a b\tc"}, {PID: 5, Parent: 4242}},
			Losses: []trace.Loss{
				{Reason: "overflow", Count: -1, Detail: "the queue overflowed, twice"},
				{Reason: "odd reason\n", Count: 0},
			},
			Skipped: 3, Events: 1201,
		},
	}
}
