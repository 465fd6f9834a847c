package tracefs_test

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/headstart-oci/headstart/pkg/trace/tracefs"
)

// Records which pages this process reads and faults on until stop is closed.
func Example() {
	record := func(stop <-chan struct{}) error {
		fs, err := tracefs.Open()
		if err != nil {
			return err // says what is missing
		}
		defer fs.Close()
		in, err := fs.Create(tracefs.Options{})
		if err != nil {
			return err
		}
		defer in.Close()
		r, err := in.Reader()
		if err != nil {
			return err
		}
		defer r.Close()
		threads, err := tracefs.Threads(os.Getpid())
		if err != nil {
			return err
		}
		if err := in.Arm(threads...); err != nil {
			return err
		}
		go func() {
			<-stop
			r.Stop()
		}()
		events := make([]tracefs.Event, 1024)
		for {
			n, err := r.Read(events)
			for _, e := range events[:n] {
				fmt.Println(e.Kind, e.Major(), e.Minor(), e.Inode, e.First, e.Last)
			}
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				return err
			}
		}
		lost, err := in.Lost()
		fmt.Println("lost", lost.Total())
		return err
	}
	_ = record
}
