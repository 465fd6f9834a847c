// Package fill gets the chunks of blobs into their cache files: those that a reader waits for first, those that a
// start is known to need next, the rest by policy.
//
// Five terms. A [Blob] is one blob of a mounted image: where its bytes come from (a [Source]) and where they
// go (a [Cache]). A unit is what must be fetched to have one chunk: the chunk itself, or the batch or gzip context
// that it is a part of. A demand is a unit that a reader waits for ([Blob.Ensure]). A window is a number of units that lie near
// each other and are fetched by one request. A [Run] is what a mount fetches by itself: the prefetch blob in one stream, the files of
// the prefetch table, the rest ([Background]).
//
//	s := fill.New(fill.Options{})
//	defer s.Close()
//	b, err := s.Open(cache, source, img.Blobs[0], img.BlobChunks(0))
//	run := s.Start(fill.Plan{Stream: b, Blobs: []*fill.Blob{b}})
//	err = b.Ensure(ctx, offset, n) // the range is in the cache, or the reason why it is not
//
// No byte reaches a cache that was not verified against its chunk's digest. A unit is fetched once, however many wait for it; a
// demand makes its own request where the stream will not bring the unit sooner. Memory is bounded by
// [Options].Memory, whatever the size of blobs.
package fill
