// Package converter gives package builder the shape that image builders call: the functions
// that BuildKit and containerd's image converter use of nydus-snapshotter's package of this name,
// without a nydus-image program. A builder changes its import and drops BuilderPath.
//
//   - [Pack] turns a layer's tar into a blob while it is written;
//   - [Merge] turns the blobs of an image into its bootstrap;
//   - [Unpack] turns a blob back into the layer's tar;
//   - [LayerConvertFunc] and [ConvertHookFunc] plug both into containerd's images/converter.
//
// An example:
//
//	convert := converter.IndexConvertFuncWithHook(
//		nydus.LayerConvertFunc(nydus.PackOption{}), true, platforms.Default(),
//		converter.ConvertHooks{PostConvertHook: nydus.ConvertHookFunc(nydus.MergeOption{})})
//	desc, err := convert(ctx, contentStore, image)
//
// A builder whose sources are not to be touched can be built with a replace directive for
// github.com/containerd/nydus-snapshotter: internal/buildkit does that with BuildKit.
//
// Blobs that the real nydus-image has packed can be merged and unpacked, and the other way round.
// RAFS v5 and v6, and references to the original layers (OCIRef). Limit: no encryption. Options
// that only a program needs (BuilderPath, Stream) are accepted and have no effect. Every other option works or is refused with
// ErrUnsupported.
package converter
