// Package store keeps what lazy mounts have fetched: the state directory.
//
// Terms: the data file of a blob is its cache file, the blob's uncompressed address
// space, sparse, which EROFS takes as device. A block is 4096 bytes of it. A block is
// needed when a chunk covers it that some image's tree uses, and ready when the chunk's
// verified bytes are in the data file. A blob is complete when every needed block is
// ready. The ready bits that count are in a memfd, so that they outlive the process
// ([Blob.Descriptors]); a durable copy in the file "ready" follows, always after the data.
//
//	lock                     one daemon per directory (flock)
//	blobs/ID[.N]/data        the data file; grows with what is filled
//	blobs/ID[.N]/ready       durable ready bits
//	blobs/ID[.N]/chunks      the chunk table
//	bootstraps/SHA256        bare bootstraps
//	mounts/ID.json           what the daemon wrote about a mount
//
//	s, err := store.Open(dir, store.Options{})
//	b, err := s.OpenBlob(img.Blobs[i], img.BlobChunks(i))
//	… mark b.File(), then mount b.Path() …
//	missing, err := b.Missing(offset, length)
//	err = b.Put(missing[0], data)
//
// Fail closed: when everybody who kept the descriptors died, nobody guards the holes of
// data files that are mounted. [Open] then cuts those files to nothing, so that reads
// fail instead of giving zeros, and puts them aside.
package store
