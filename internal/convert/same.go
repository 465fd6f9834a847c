package convert

import (
	"cmp"
	"fmt"
	"os"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/pkg/remote"
)

// checkApart refuses a target that would replace the source, however the two are spelled.
// found is what the source resolved to, and tells the name of a layout's entry that was found
// without one. An archive is written as a whole, so there the file alone decides.
func checkApart(o Options, source, target remote.Reference, found ocispec.Descriptor) error {
	same := false
	switch {
	case source.Kind != target.Kind:
	case source.Kind == remote.KindArchive:
		same = sameFile(source.Path, target.Path)
	case source.Kind == remote.KindLayout:
		same = found.Annotations[ocispec.AnnotationRefName] == target.Tag && sameFile(source.Path, target.Path)
	case source.Kind == remote.KindContainerd:
		source.Namespace = cmp.Or(source.Namespace, o.SourceRemote.Namespace, remote.DefaultNamespace)
		target.Namespace = cmp.Or(target.Namespace, o.TargetRemote.Namespace, remote.DefaultNamespace)
		same = source == target
	}
	if same {
		return fmt.Errorf("target %s: it is the source, and would replace it", target)
	}
	return nil
}

// sameFile reports whether both paths lead to one existing file or directory.
func sameFile(a, b string) bool {
	x, err := os.Stat(a)
	if err != nil {
		return false
	}
	y, err := os.Stat(b)
	return err == nil && os.SameFile(x, y)
}
