// Package builder turns the layers of an OCI image and an access list into a RAFS v6
// image: one blob per layer that has data, one prefetch blob that holds what the list
// names in the order it was read, and one bootstrap of the merged tree.
//
// The model in five terms:
//
//   - a [Source] is an image to convert: its config and its layers as stored bytes;
//   - a layer is read once, verified against its descriptor and its diff ID, and cut into
//     chunks; its blob depends on the layer's stored bytes and on the [Options], on nothing else;
//   - the layers' trees are merged as containerd's overlay snapshots would be;
//   - the prefetch blob holds copies of chunks; the merged tree points at the copies;
//   - a [Result] is files in a temporary directory with their OCI descriptors, verified
//     by reading them back (see Options.VerifyData); nothing is left behind when [Convert] fails.
//
// An example:
//
//	o := builder.DefaultOptions()
//	o.List = list // nil: an image without a prefetch blob
//	res, err := builder.Convert(ctx, src, o)
//	if err != nil {
//		return err
//	}
//	defer res.Close()
//	// push res.Blobs, res.Bootstrap, res.Config, then res.Manifest
//
// The output is a function of the input: neither the number of workers nor the time nor
// the machine changes a byte. Memory is bounded by workers × chunk size plus the metadata
// of the files; layer data only streams through. Limits: 254 blobs (a format limit),
// [MaxEntries] tar entries in a layer, [rafs.MaxChunks] chunks in one.
package builder
