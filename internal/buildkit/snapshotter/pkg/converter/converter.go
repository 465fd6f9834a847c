// Package converter stands in the place of nydus-snapshotter's package of this name, for builders whose sources are not to
// be touched: a replace directive puts this module in front, and they build with Headstart.
package converter

import "github.com/headstart-oci/headstart/pkg/builder/converter"

type (
	// Layer is ours.
	Layer = converter.Layer
	// PackOption is ours.
	PackOption = converter.PackOption
	// MergeOption is ours.
	MergeOption = converter.MergeOption
	// UnpackOption is ours.
	UnpackOption = converter.UnpackOption
)

// Names of media types and annotations.
const (
	MediaTypeNydusBlob            = converter.MediaTypeNydusBlob
	LayerAnnotationNydusBlob      = converter.LayerAnnotationNydusBlob
	LayerAnnotationNydusBootstrap = converter.LayerAnnotationNydusBootstrap
)

// Functions of the converter.
var (
	Pack   = converter.Pack
	Merge  = converter.Merge
	Unpack = converter.Unpack
)
