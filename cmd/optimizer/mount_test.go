package main

import (
	"regexp"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/headstart-oci/headstart/pkg/lazy"
)

// Every flag of mount arrives where it belongs.
func TestMountFlags(t *testing.T) {
	t.Parallel()
	elsewhere := map[string]bool{ // flags that are for the client, or for the daemon that it starts
		"state-dir": true, "run-dir": true, "wait": true, "output": true, "cache-limit": true, "cache-low": true, "cache-age": true, "help": true,
	}
	remote := lazy.Remote{
		PlainHTTP: true, HostsDir: "hosts", DockerConfig: "config.json", ContainerdAddress: "containerd.sock", Namespace: "ns", Proxy: "http://proxy:3128",
		RegistryFallback: true, Retries: 7, Stall: 5 * time.Second,
	}
	common := []string{
		"--plain-http", "--hosts-dir", "hosts", "--docker-config", "config.json", "--containerd-address", "containerd.sock", "--namespace", "ns",
		"--proxy", "http://proxy:3128", "--retries", "7", "--stall-timeout", "5s", "--platform", "linux/arm64", "--background", "full", "--share", "none",
		"--rate", "2KiB", "--no-prefetch", "--read-ahead", "64", "--driver", "fuse",
	}
	want := lazy.Request{
		Platform: "linux/arm64", Remote: remote, Background: "full", Share: "none", Rate: 2048, NoPrefetch: true, ReadAhead: 64, Driver: lazy.DriverFUSE,
	}
	image, loose := want, want
	image.Reference = "registry.example/nginx"
	loose.Bootstrap, loose.BlobDir = "image.boot", "blobs"
	for _, tt := range []struct {
		name string
		args []string
		want lazy.Request
	}{
		{"an image", append(common, "registry.example/nginx", "mnt"), image},
		{"loose files", append(common, "--bootstrap", "image.boot", "--blob-dir", "blobs", "mnt"), loose},
	} {
		o := &mountOptions{global: &global{}}
		cmd := o.command()
		if err := cmd.ParseFlags(tt.args); err != nil {
			t.Fatal(err)
		}
		got, dir, err := o.request(cmd, cmd.Flags().Args())
		if err != nil || dir != "mnt" {
			t.Fatalf("%s: request() = %q, %v, want mnt", tt.name, dir, err)
		}
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%s: the request differs (-want +got):\n%s", tt.name, diff)
		}
		for _, flag := range regexp.MustCompile(`(?m)^ +(?:-\w, )?--([a-z-]+)`).FindAllStringSubmatch(cmd.Flags().FlagUsages(), -1) {
			if name := flag[1]; tt.want.Bootstrap != "" && !cmd.Flags().Changed(name) && !elsewhere[name] {
				t.Errorf("--%s is tried by nobody", name)
			}
		}
	}
}
