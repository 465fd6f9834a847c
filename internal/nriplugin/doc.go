// Package nriplugin is the NRI plugin: it starts a trace of every container that starts,
// keeps what the container read as an access list, and queues a rebuild of the image.
//
// The model: a [Plugin] holds one run per container id. A run begins in the StartContainer
// hook, which only waits for the tracer to be ready, bounded by a deadline; everything
// else of a run happens in its own goroutine: resolving the image, waiting for the end,
// saving the list, queueing the rebuild. [Serve] connects a Plugin to containerd.
//
// Tracing fails open. No hook returns an error, blocks on a disk, a process or a peer, or
// outlives [DefaultHookLimit]: a watchdog ends the plugin then, because containerd fails
// the container's start when a hook takes 2 s, and goes on when the plugin is gone.
// Only a bad configuration is an error that containerd sees, from Configure.
package nriplugin
