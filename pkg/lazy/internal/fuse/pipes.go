package fuse

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"time"

	"github.com/hanwen/go-fuse/v2/splice"
)

// pipes is the state of go-fuse's pool of pipes, which all servers of the process share.
var pipes struct {
	open atomic.Bool  // the pool has its null device
	used atomic.Int64 // when a pipe was taken or given back last, in ns since 1970; 0: the pool was emptied since
}

// OpenPipes has large answers of all servers go through pipes; without it they are copied. The pool opens the null device when the first pipe is given back
// and panics when it cannot, for which a process at its limit of descriptors must not be the reason. Call it when the process
// begins; an error says that there are no descriptors left.
func OpenPipes() error {
	if pipes.open.Load() {
		return nil
	}
	pipe, err := splice.Get()
	if err != nil {
		return fmt.Errorf("pipe: %w", err)
	}
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err == nil {
		err = null.Close()
	}
	if err != nil {
		splice.Drop(pipe)
		return fmt.Errorf("empty pipes: %w", err)
	}
	splice.Done(pipe)
	splice.ClearSplicePool()
	pipes.open.Store(true)
	return nil
}

// ClosePipes closes the pipes that wait for the next answer when none was taken for so long: as many as were in use at once stay else.
func ClosePipes(unused time.Duration) {
	if last := pipes.used.Load(); last != 0 && time.Now().UnixNano()-last >= int64(unused) && pipes.used.CompareAndSwap(last, 0) {
		splice.ClearSplicePool()
	}
}

var errNoPipes = errors.New("pipes are not in use")

// getPipe returns an empty pipe. The caller calls putPipe or splice.Drop.
func getPipe() (*splice.Pair, error) {
	if !pipes.open.Load() {
		return nil, errNoPipes
	}
	pipes.used.Store(time.Now().UnixNano())
	return splice.Get()
}

func putPipe(pipe *splice.Pair) {
	splice.Done(pipe)
	pipes.used.Store(time.Now().UnixNano())
}
