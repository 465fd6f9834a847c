// Package fanotify speaks to the kernel's fanotify(7): groups, marks, events, and
// probes for what the running kernel can do. It knows nothing of images or lists.
//
// Terms: a [Group] is one queue of events and the set of marks that feed it. A [Mark]
// names what is watched: an inode, a mount, or a whole filesystem. An [Event] is one
// kernel record, undigested; it carries an open descriptor of the file, which its
// receiver must close. A queue that could not grow reports [Overflow]: events are
// missing and nobody knows how many.
//
//	g, err := fanotify.New(fanotify.Options{})
//	…
//	err = g.Mark(fanotify.Mark{Kind: fanotify.Filesystem, Mask: fanotify.Open, Dir: rootFD})
//	events := make([]fanotify.Event, 32)
//	n, err := g.Read(events) // after poll(2) on g.FD()
//	for i := range events[:n] { use(&events[i]); events[i].Close() }
//
// Limits: Linux 5.0 or newer and CAP_SYS_ADMIN. In the mode used here the kernel
// reports regular files and directories only: a FIFO, a socket or a device is never
// opened on our behalf (fs/notify/fanotify/fanotify.c fanotify_group_event_mask).
// A mount mark misses what happens through other mounts of the same filesystem,
// such as the copies that unshare(CLONE_NEWNS) makes; a filesystem mark does not.
package fanotify
