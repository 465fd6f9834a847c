// Package watch answers the kernel's events of files that are about to be read: the
// data files of lazy mounts.
//
// Terms: an event waits until it is answered; its reader sleeps meanwhile. It is pending
// from the moment this process has read it. The [Table] of pending events is memory that another
// process keeps, as the group's descriptor is, so that a daemon that dies loses none:
// the kernel writes events right into it, and matches answers to events by the number
// that the event's descriptor had in the process that read it, whoever answers and
// whether or not that process lives.
//
//	w, err := watch.New(watch.Config{Group: g, Table: t, Ensure: ensure})
//	err = w.Add(blob)     // before EROFS opens blob.Path()
//	go w.Run(ctx)
//	err = w.Settle(blob)  // when it is complete: no events any more
//	err = w.Remove(blob)  // when no mount has it any more
//
// A process that takes over makes a Watcher of the kept group and table, adds all blobs,
// and calls Run, which goes on with what was pending. Until somebody does, readers wait.
//
// Fail closed: an event is allowed when what it asks for is ready, and in no other case.
// Only when nobody has the group any more the kernel lets everybody pass.
package watch
