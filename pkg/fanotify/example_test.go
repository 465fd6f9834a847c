package fanotify_test

import (
	"errors"
	"fmt"
	"log"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/fanotify"
)

// Print what happens to the files of one filesystem, through whichever mount.
func ExampleGroup() {
	g, err := fanotify.New(fanotify.Options{})
	if err != nil {
		log.Print(err) // CAP_SYS_ADMIN is missing
		return
	}
	defer func() { _ = g.Close() }()
	err = g.Mark(fanotify.Mark{Kind: fanotify.Filesystem, Mask: fanotify.Open | fanotify.Access, Dir: unix.AT_FDCWD, Path: "/srv"})
	if err != nil {
		log.Print(err)
		return
	}
	events := make([]fanotify.Event, 32) // so many files are open at once
	for {
		n, err := g.Read(events)
		if errors.Is(err, fanotify.ErrEmpty) {
			return // or poll(2) on g.FD()
		}
		if err != nil {
			log.Print(err)
			return
		}
		for i := range events[:n] {
			fmt.Println(events[i].Mask, events[i].PID)
			if err := events[i].Close(); err != nil {
				log.Print(err)
			}
		}
	}
}
