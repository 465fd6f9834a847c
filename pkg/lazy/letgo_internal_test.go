package lazy

import "testing"

// A data file is left with its mark when there may be mounts that need it: unknown ones, and those of its blob that are neither complete nor filled.
func TestStrangersAmong(t *testing.T) {
	t.Parallel()
	erofs := func(bdi string, final *Mount, failed string, blobs ...string) *mount {
		return &mount{rec: record{BDI: bdi, Blobs: blobs}, final: final, failed: failed}
	}
	d := &daemon{mounts: map[string]*mount{
		"complete": erofs("erofs-1", &Mount{}, "", "x"),
		"other":    erofs("erofs-2", nil, "", "y"),
		"lazy":     erofs("erofs-3", nil, "", "x"),
		"failed":   erofs("erofs-4", nil, "it is broken", "x"),
		"fuse":     {rec: record{BDI: "erofs-5", Driver: DriverFUSE}, final: &Mount{}},
	}}
	for bdi, want := range map[string]bool{"erofs-1": false, "erofs-2": false, "erofs-3": true, "erofs-4": true, "erofs-5": true, "erofs-6": true, "": false} {
		living := map[string]bool{"erofs-1": true, "erofs-2": true}
		if bdi != "" {
			living[bdi] = true
		}
		if got := d.strangersAmong(living, "x"); got != want {
			t.Errorf("with the superblock %q: strangers %t, want %t", bdi, got, want)
		}
	}
}
