// Package index knows which chunks are on this node: where the bytes of a digest are, in which cache and at which offset.
//
// Five terms. A [Key] is what a chunk is: its digest, who made that, and its size; images of both digesters live
// side by side. A [Place] is where such bytes are: a cache, by the name of its directory, and an offset in its data file. An [Entry] is
// a key at an offset of one cache. The index is a hint: whoever follows it verifies what is there, and has it
// forget what is not ([Index.Remove]). It is never the only record of anything: one that is missing, damaged or of another
// version is begun anew ([Index.Fresh]), and filled again from what caches say themselves.
//
//	x, err := index.Open(path, index.Options{})
//	defer x.Close()
//	err = x.Add("cache", entries, 42)
//	err = x.Lookup(keys, func(n int, at []index.Place) bool { …; return true })
//	err = x.RemoveCache(ctx, "cache") // before its data go
//
// It is one bbolt file. A call of Add is durable when it returns, and whole or not at all for each few thousand entries; after a
// crash there are no more entries than had been added, and what was removed stays so.
package index
