package fill

import (
	"cmp"
	"context"
	"errors"
	"io"
	"time"

	"go.uber.org/zap"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

// Errors of this package; others are those of the source, of [rafs] and of the cache.
var (
	// ErrClosed: the blob or the scheduler was closed while somebody waited.
	ErrClosed = errors.New("closed")

	// ErrRange: no chunk of the image is in the range.
	ErrRange = errors.New("no chunk in the range")
)

// Source gives the stored bytes of a blob. It is safe for concurrent use.
type Source interface {
	// Range returns r.Length bytes. They need not be right. The caller closes the stream; ctx ends it.
	Range(ctx context.Context, r Request) (io.ReadCloser, error)
	// Retry says what to do about an error of Range or of a stream of it, which may be io.ErrUnexpectedEOF.
	Retry(err error) Retry
}

// Request is a range of a blob file.
type Request struct {
	Offset, Length int64
	Stream         bool // of a blob that is read front to back: what is missing of it
	Meta           bool // of the file that holds the blob's table, where that is another one
	Suspect        bool // what came last time was not right: a source that knows another place asks that
}

// Retry is what to do about an error.
type Retry struct {
	Again bool          // the same request may succeed later; else it is not repeated
	After time.Duration // but not before this
	Most  int           // nor more often than this; 0: as long as somebody waits
}

// Cache is where the chunks of a blob go. It is safe for concurrent use. It must not call back.
type Cache interface {
	// Ready reports whether chunk c is in the cache.
	Ready(c rafs.Chunk) bool
	// Put takes the verified bytes of c; p is not kept.
	Put(c rafs.Chunk, p []byte) error
}

// Options configures a [Scheduler]; the zero value is the default.
type Options struct {
	// Limit is how long a reader waits for a source that is down, or that sends next to nothing; 0: 60 s.
	Limit time.Duration
	// Requests is how many requests of demands run at once; 0: 8.
	Requests int
	// Memory bounds the bytes of chunks that are being fetched and decompressed, with half of it for demands and what is read ahead, and no more than half of either for one
	// [Share]; 0: 16 MiB. A single chunk may be larger.
	Memory int64
	// Near is how many stored bytes that nobody wants are fetched to make one request of two; 0: 64 KiB,
	// negative: none.
	Near int64
	// Ahead is how many stored bytes a demand's request has at least, where chunks that are missing follow or lie before it; 0:
	// 128 KiB, negative: none. Requests that follow each other in a blob get longer, up to 1 MiB, and then one is made before a
	// reader comes to it; those near others get up to 512 KiB: what a start reads lies together.
	Ahead int64
	// Backoff is how long is waited before a request is repeated; doubled each time, at most 8 times this; 0: 250 ms.
	Backoff time.Duration
	// Idle is how long there is no demand before [BackgroundIdle] goes on; 0: 1 s.
	Idle time.Duration
	// Log gets retries and corrupt chunks; nil: nothing is logged.
	Log *zap.Logger
}

const (
	// window bounds the stored bytes of a request: 4 MiB take a third of a second at 100 Mbit/s.
	maxWindow = 4 << 20
	// maxAhead is how far a request goes that follows others.
	maxAhead = 1 << 20
	// maxCrowd is how far a request goes that lies near others, and crowd how many bytes of a blob file are near. Measured by replaying
	// lists of starts: for python with numpy and flask 85 requests in place of 134, and 10 % more bytes.
	maxCrowd = 512 << 10
	crowd    = 1 << 20
	// prefetchRequests is how many windows of a prefetch table are fetched at once.
	prefetchRequests = 2
)

func (o Options) settle() Options {
	o.Limit = cmp.Or(o.Limit, time.Minute)
	o.Requests = cmp.Or(o.Requests, 8)
	o.Memory = cmp.Or(o.Memory, 16<<20)
	o.Near = max(0, cmp.Or(o.Near, 64<<10))
	o.Ahead = max(0, cmp.Or(o.Ahead, 128<<10))
	o.Backoff = cmp.Or(o.Backoff, 250*time.Millisecond)
	o.Idle = cmp.Or(o.Idle, time.Second)
	if o.Log == nil {
		o.Log = zap.NewNop()
	}
	return o
}

// Class is why something is fetched.
type Class uint8

// The classes, in the order in which they go first.
const (
	Demand     Class = iota // a reader waits for it
	Prefetch                // a start is known to need it: the prefetch blob
	Table                   // a start is known to need some of it: the files of the prefetch table
	Ahead                   // a reader that reads front to back will come to it
	Rest                    // by policy
	numClasses = iota
)

// String returns the class in lower case.
func (c Class) String() string {
	switch c {
	case Demand:
		return "demand"
	case Prefetch:
		return "prefetch"
	case Table:
		return "table"
	case Ahead:
		return "read-ahead"
	case Rest:
		return "background"
	default:
		return "unknown"
	}
}
