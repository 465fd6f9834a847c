package persist_test

import (
	"bytes"
	"fmt"
	"os"
	"strings"

	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/trace"
)

// Two runs of one workload make a profile; a builder gets what every run touched.
func ExampleMerge() {
	run := func(container string, paths ...string) *persist.Profile {
		l := &persist.List{Digest: "sha256:4c1d", Platform: "linux/amd64", Command: []string{"app"}, Container: container}
		for _, p := range paths {
			l.Accesses = append(l.Accesses, trace.Access{Path: p, How: trace.Opened})
		}
		p, err := persist.NewProfile(l)
		if err != nil {
			panic(err)
		}
		return p
	}
	all, err := persist.Merge(persist.MergeOptions{}, run("1", "/bin/app", "/etc/app.conf"), run("2", "/bin/app", "/tmp/once"))
	if err != nil {
		fmt.Println(err)
		return
	}
	for _, f := range all.Files(persist.Union) {
		fmt.Printf("%.0f%% %s\n", f.Weight*100, f.Path)
	}
	list := all.List(persist.Intersection)
	fmt.Println(len(list.Accesses), list.Verdict())
	// Output:
	// 100% /bin/app
	// 50% /etc/app.conf
	// 50% /tmp/once
	// 1 complete
}

// A list in any format is written as Nydus' JSON.
func ExampleReadAny() {
	l, err := persist.ReadAny(strings.NewReader("/usr/bin/app\n/etc/app.conf\n"))
	if err != nil {
		fmt.Println(err)
		return
	}
	if _, err := l.WriteJSON(os.Stdout); err != nil {
		fmt.Println(err)
	}
	// Output:
	// {"version":"v1","files":[
	// {"path":"/usr/bin/app"}
	// ,
	// {"path":"/etc/app.conf"}
	// ]}
}

// A list is one file of lines, and is read back as it was.
func ExampleList_WriteTo() {
	l := &persist.List{Engine: "fanotify+filemap", Grade: persist.GradeFaultAround, Trace: trace.Trace{Accesses: []trace.Access{{
		Path: "/bin/app", How: trace.Opened | trace.Executed, Size: 8192, Elapsed: 1000,
		Ranges: []trace.Range{{Offset: 0, Length: 4096, Elapsed: 1200, Certain: true}, {Offset: 4096, Length: 4096, Elapsed: 1200}},
	}}}}
	var b bytes.Buffer
	if _, err := l.WriteTo(&b); err != nil {
		fmt.Println(err)
		return
	}
	fmt.Print(strings.ReplaceAll(b.String(), "\t", " "))
	// Output:
	// headstart-access-list v2
	// engine fanotify+filemap
	// grade fault-around
	// verdict complete
	// accesses how elapsed_ns size pid command ranges path
	// o-x- 1000 8192 0  0+4096@1200!,4096+4096@1200 /bin/app
	// end 1 accesses 2 ranges 0 losses
}
