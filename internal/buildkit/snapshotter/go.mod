module github.com/containerd/nydus-snapshotter

go 1.26.6

require github.com/headstart-oci/headstart v0.0.0
