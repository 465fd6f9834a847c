// Package fuse serves Nydus images, RAFS v5 and v6, behind FUSE, from the same cache files that EROFS mounts read.
//
// Five terms. A [Tree] is the file tree of an image with a number for each inode, which is a pure function of the
// bootstrap: the kernel may keep numbers that an earlier process gave it. A connection is one superblock of the kernel,
// spoken to over a descriptor of /dev/fuse ([Open], [New]); it ends with its last mount, or when nobody has the
// descriptor any more, and then everything on it is ENOTCONN. A [Server] answers the requests of one connection. A
// request is pending from when the kernel hands it out until it is answered; a [Table] holds the pending ones in memory
// that survives the process, so that the next Server of the same connection answers what the last one left. An image's
// blobs are given as [Blob], which say what is there and fetch what is not.
//
//	dev, err := fuse.Open()
//	table, err := fuse.NewTable()
//	… keep dev and table.File() somewhere that outlives this process …
//	d, err := fuse.New(dev, fuse.Options{Source: "registry.example/app:v1"})
//	tree, err := fuse.NewTree(img)
//	s, err := fuse.NewServer(fuse.Config{Device: dev, Table: table, Tree: tree, Blobs: blobs})
//	go s.Run()
//	err = d.Identify()
//	… attach d.File() somewhere …
//
// Wire structs, directory entries and pipes are those of github.com/hanwen/go-fuse. Its server is not used: it begins
// every connection with INIT, which the kernel sends once, and forgets what it has read when it ends.
//
// Limits: Linux 5.4 (FUSE 7.31). Nothing can be written. A reader that waits for data cannot be
// interrupted, not even killed, before its data is there or given up: an error would reach those who share its page.
package fuse
