// Command burst reads the files /files/DDD/NNNNN as fast as it can, with bare system
// calls and several threads, and says how many it read and how long that took.
package main

import (
	"fmt"
	"os"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const perDir = 200 // files of one directory, as the image is made

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: burst COUNT")
		os.Exit(2)
	}
	count, err := strconv.ParseInt(os.Args[1], 10, 32)
	if err != nil {
		fmt.Fprintln(os.Stderr, "burst:", err)
		os.Exit(2)
	}
	start := time.Now()
	var next, bytes, bad atomic.Int64
	var wg sync.WaitGroup
	for range runtime.NumCPU() {
		wg.Go(func() {
			buf := make([]byte, 64<<10)
			for {
				i := next.Add(1) - 1
				if i >= count {
					return
				}
				n, err := read(fmt.Sprintf("/files/%03d/%05d", i/perDir, i), buf)
				if err != nil {
					bad.Add(1)
				}
				bytes.Add(int64(n))
			}
		})
	}
	wg.Wait()
	fmt.Fprintf(os.Stdout, "files %d bytes %d errors %d seconds %.3f\n",
		count, bytes.Load(), bad.Load(), time.Since(start).Seconds())
	if bad.Load() > 0 {
		os.Exit(1)
	}
}

func read(name string, buf []byte) (int, error) {
	fd, err := syscall.Open(name, syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	n, err := syscall.Read(fd, buf)
	if err2 := syscall.Close(fd); err == nil {
		err = err2
	}
	return n, err
}
