// Package remote reads container images from where they are and writes them to where they
// are wanted: a registry, an OCI image layout directory, an OCI archive (a tar of a layout),
// or a containerd content store.
//
// Five terms. A [Reference] names an image in one of those places. A [Source] gives bytes by
// descriptor, verified; a [Target] takes them. An [Image] is what [Select] found: one
// platform's manifest with its config and layers. [Publish] writes a whole image so that its
// name never points at something incomplete.
//
//	ref, err := remote.Parse("docker.io/library/nginx:latest")
//	src, err := remote.OpenSource(ctx, ref, remote.Options{})
//	defer src.Close()
//	img, err := remote.Select(ctx, src, "linux/amd64")
//	rc, err := src.Fetch(ctx, img.Layers[0].Descriptor) // verified when it ends
//
// Everything read is bounded by its descriptor's size and hashed on the way; bytes that
// differ are [ErrDigest], at the end of the stream. Manifests and configs are held in memory
// and bounded by [MaxManifestSize] and [MaxConfigSize]; layers are streamed.
//
// The package knows no image format beyond manifests: it does not look into layers.
package remote
