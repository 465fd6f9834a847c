package e2e_test

import (
	"os"
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/headstart-oci/headstart/internal/testcri"
	"github.com/headstart-oci/headstart/internal/testenv"
)

// TestPods runs one image in pods that share more or less with the host than usual.
func TestPods(t *testing.T) {
	img := layersImage(t)
	h := newHost(t)
	u := h.newSetup(t, settings{"rebuild.enabled": "false", "start_deadline": `"900ms"`})
	u.drop(t)
	must(t, h.Import(t.Context(), layersRef, img))
	u.awaitPages(t)
	for _, tt := range []struct {
		name string
		pod  testcri.PodOptions
		with testcri.ContainerOptions
		long bool
	}{
		{name: "users of its own", pod: testcri.PodOptions{Users: &runtimeapi.IDMapping{HostId: 1 << 20, ContainerId: 0, Length: 1 << 16}}},
		{name: "processes of the host, privileged", pod: testcri.PodOptions{HostPID: true, Privileged: true}, with: testcri.ContainerOptions{Privileged: true}, long: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.long && testing.Short() {
				t.Skip("one container more")
			}
			p, err := h.RunPod(t.Context(), tt.pod)
			must(t, err)
			tt.with.Image, tt.with.Args = layersRef, layersArgs
			r := h.runIn(t, p, tt.with)
			if r.exit != 0 {
				t.Fatalf("exit code %d: %s%s", r.exit, r.out, r.errOut)
			}
			l := u.list(t, r.id)
			judgeLayersList(t, l, snapshotters()[0], layersWant)
			if l.Digest == "" {
				t.Error("the list does not name the image's digest")
			}
		})
	}
	t.Run("a name that moves", func(t *testing.T) { testMovedName(t, u) })
}

// testMovedName gives the image's name to another one between a container's creation and its start: its list is not one of that image.
func testMovedName(t *testing.T, u *setup) {
	pod := u.host.pod(t)
	old, err := pod.Create(t.Context(), testcri.ContainerOptions{Image: layersRef, Name: "old", Args: layersArgs})
	must(t, err)
	img, err := testcri.StaticImage(testenv.Command(t, "./internal/tracer/testdata/workload"), map[string][]byte{"/other": []byte("other")})
	must(t, err)
	must(t, u.host.Import(t.Context(), layersRef, img))
	digest, err := img.Digest()
	must(t, err)
	took, err := old.Start(t.Context())
	must(t, err)
	if l := u.list(t, finish(t, old, took).id); l.Digest != "" || l.Reference != layersRef {
		t.Errorf("the list is of %s, digest %q; want no digest: the name is another image's", l.Reference, l.Digest)
	}
	r := u.host.runIn(t, pod, testcri.ContainerOptions{Image: layersRef, Name: "new", Args: []string{"read", "/other"}})
	if l := u.list(t, r.id); l.Digest != digest.String() {
		t.Errorf("the list of the next container is of digest %q, want %s", l.Digest, digest)
	}
}

// TestUnprivilegedPlugin runs the plugin with less than it wants: the container runs all the same, and one line of its
// log says what is missing.
func TestUnprivilegedPlugin(t *testing.T) {
	if testing.Short() {
		t.Skip("runs containerd")
	}
	setpriv := testenv.Tool(t, "setpriv")
	img := layersImage(t)
	h := newHost(t)
	must(t, h.Import(t.Context(), layersRef, img))
	pod := h.pod(t)
	for _, tt := range []struct {
		name, without string
		want          string // in the log, once; empty: it records
	}{
		{"without CAP_SYS_ADMIN", "-sys_admin", "containers will not be recorded: it takes CAP_SYS_ADMIN"},
		{"without what is spared", "-perfmon,-bpf,-syslog,-sys_nice,-net_admin,-mknod,-dac_read_search", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			u := h.newSetup(t, settings{"rebuild.enabled": "false", "start_deadline": `"900ms"`})
			p := u.start(t, setpriv, "--bounding-set="+tt.without)
			o := testcri.ContainerOptions{Image: layersRef, Name: strings.ReplaceAll(tt.name, " ", "-"), Args: layersArgs}
			if tt.want == "" {
				u.awaitPages(t)
			}
			r := h.runIn(t, pod, o)
			if r.exit != 0 {
				t.Fatalf("exit code %d: %s%s", r.exit, r.out, r.errOut)
			}
			if tt.want == "" {
				judgeLayersList(t, u.list(t, r.id), snapshotters()[0], layersWant)
				p.quit(t)
				return
			}
			u.expectLog(t, "not recorded: tracer lacks privileges")
			p.quit(t)
			said, err := os.ReadFile(u.log + ".stderr")
			must(t, err)
			if n := strings.Count(string(said), tt.want); n != 1 {
				t.Errorf("%d lines say %q, want one:\n%s", n, tt.want, said)
			}
		})
	}
}
