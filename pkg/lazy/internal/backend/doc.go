// Package backend reads what a lazy mount needs of an image from where the image is: a registry, an OCI layout or archive,
// containerd, or loose files.
//
// [Open] finds an image by its reference and gives its bootstrap and its blobs. An [Origin] is what has to be
// kept to read the blobs again without asking for anything else: it has no secrets, and opening it needs no network.
//
//	img, err := backend.Open(ctx, "registry.example/app:v1", backend.Options{})
//	defer img.Close()
//	src := img.Blob(0) // a fill.Source
//	keep(img.Origin)   // later: backend.Reopen(origin, options)
//
// Nothing that a source gives is verified here but manifests, configs and bootstraps: chunks are, by who has their digests.
package backend
