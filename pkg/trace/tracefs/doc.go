// Package tracefs records which pages of which files a set of processes touches, from
// the kernel's page cache tracepoints, through private instances of tracefs.
//
// Terms: an [FS] is one mount of tracefs, by default one that nobody else sees. An
// [Instance] is a set of ring buffers, one per CPU, with a process filter and events of its
// own; it is armed with the threads of a process and follows what they fork. A [Reader]
// yields its events in order of time. A [Pool] keeps instances ready, because making and
// removing one takes tens of milliseconds and arming a ready one less than one. An [Event]
// names an inode and pages, never a path.
//
//	fs, err := tracefs.Open()
//	…
//	in, err := fs.Create(tracefs.Options{})
//	r, err := in.Reader()
//	threads, err := tracefs.Threads(pid)
//	err = in.Arm(threads...)
//	for n, err := r.Read(events); err == nil; n, err = r.Read(events) { use(events[:n]) }
//
// What is seen: every read through the page cache ([Read], exact page ranges; but see below), every fault
// on a file mapping that the fault handler had to look up ([Fault]) and every window it
// mapped around one ([Around]), warm or cold. What is not: direct I/O, DAX, readahead(2) and
// posix_fadvise(2) (which touch no page on behalf of the program), and touches of pages that
// are mapped already.
//
// Of a read that has to wait for storage in its midst the kernel tells only what follows: [Gaps] finds the rest, and only with it are
// reads of a cold file complete. It knows of what this instance's threads had read ahead, not of pages that others had just asked for.
//
// From Linux 6.18 on a fault maps the whole of a large folio that lies in its window, which
// [Around] does not say: a [Widener] finds such folios, and only with it is what was faulted
// on and mapped around an upper bound. tmpfs has its own way to read and raises no [Read].
//
// Who is seen: the threads handed to [Instance.Arm], what they fork, clone, vfork or start
// by posix_spawn, whatever sessions or namespaces that enters; not a process that somebody
// else puts into the container's namespaces (kubectl exec, probes).
//
// Where execve(2) is called by a thread that is not its process' first, the kernel takes the
// process out of the filter (its first thread exits). [Reader] sees it and puts the process
// back; [Reader.Rejoined] counts that, because something may be missing in between.
//
// Limits: the initial PID namespace (the filter knows no other numbers), CAP_SYS_ADMIN or
// root's access to tracefs, CONFIG_FTRACE. The three page events came together in Linux 6.11;
// an older kernel has [Insert] alone: what was read into the page cache, read-ahead included,
// and nothing of what was there before.
package tracefs
