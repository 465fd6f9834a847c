package converter

import (
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/pkg/builder"
)

// What image builders name. Source: nydus-snapshotter pkg/converter/constant.go.
const (
	MediaTypeNydusBlob        = builder.MediaTypeBlob
	ManifestConfigNydus       = "application/vnd.nydus.image.config.v1+json" // unknown to clients that are to leave the image alone
	ManifestArtifactTypeNydus = "application/vnd.nydus.image.manifest.v1+json"
	ManifestOSFeatureNydus    = "nydus.remoteimage.v1"
	ManifestNydusCache        = "containerd.io/snapshot/nydus-cache" // on manifests that keep blobs for later conversions
	BootstrapFileNameInLayer  = "image/image.boot"

	LayerAnnotationNydusBlob             = builder.AnnotationBlob
	LayerAnnotationNydusBootstrap        = builder.AnnotationBootstrap
	LayerAnnotationFSVersion             = builder.AnnotationFSVersion
	LayerAnnotationNydusSourceDigest     = builder.AnnotationSourceDigest
	LayerAnnotationNydusTargetDigest     = "containerd.io/snapshot/nydus-target-digest" // label of a layer in a store: the blob that was made of it
	LayerAnnotationNydusRefLayer         = "containerd.io/snapshot/nydus-ref"           // on a blob: the layer that its chunks are in
	LayerAnnotationNydusBlobDigest       = "containerd.io/snapshot/nydus-blob-digest"
	LayerAnnotationNydusBlobSize         = "containerd.io/snapshot/nydus-blob-size"
	LayerAnnotationNydusSourceChainID    = "containerd.io/snapshot/nydus-source-chainid"
	LayerAnnotationNydusEncryptedBlob    = "containerd.io/snapshot/nydus-encrypted-blob"
	LayerAnnotationNydusReferenceBlobIDs = "containerd.io/snapshot/nydus-reference-blob-ids"

	LayerAnnotationUncompressed = "containerd.io/uncompressed" // a layer's diff ID, from LayerConvertFunc to ConvertHookFunc
)

// IsNydusBlob reports whether desc is marked as a blob of a Nydus image.
func IsNydusBlob(desc ocispec.Descriptor) bool {
	_, ok := desc.Annotations[LayerAnnotationNydusBlob]
	return ok
}

// IsNydusBootstrap reports whether desc is marked as the bootstrap of a Nydus image.
func IsNydusBootstrap(desc ocispec.Descriptor) bool {
	_, ok := desc.Annotations[LayerAnnotationNydusBootstrap]
	return ok
}
