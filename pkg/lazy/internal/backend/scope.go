package backend

import (
	"strings"

	"github.com/headstart-oci/headstart/pkg/remote"
)

// Scopes of what is no registry's secret.
const (
	ScopePublic = "public" // share.ScopePublic
	ScopeLocal  = "local"  // share.ScopeLocal
)

// Scope names who can read what the blobs have: everybody who reaches the registry ([ScopePublic]), whoever may read this machine's files ([ScopeLocal]), or
// who has a namespace of containerd ("containerd:/run/containerd/containerd.sock/k8s.io"), or credentials for a repository, "registry.example/app". It is what opening the image took: after [Reopen] nobody knows yet, and it is empty.
func (b *Blobs) Scope() string {
	if b.src == nil {
		return ScopeLocal
	}
	a, ok := b.src.(remote.Accessor)
	if !ok || b.reopened {
		return ""
	}
	switch access := a.Access(); {
	case access.Repository == "" && access.Anonymous && access.Store != "":
		return strings.ToValidUTF8(access.Store, "?")
	case access.Repository == "" && access.Anonymous:
		return ScopeLocal
	case access.Repository == "":
		return "" // nobody knows
	case access.Anonymous:
		return ScopePublic
	default:
		return strings.ToValidUTF8(access.Repository, "?")
	}
}

// Own is Scope as far as the blobs' source has shown that it gives us what it has: others that came from there we could have had too. Where
// something stands in for a registry (containerd, with the registry to fall back to) it has not.
func (b *Blobs) Own() string {
	if a, ok := b.src.(remote.Accessor); ok && !a.Access().Shown {
		return ""
	}
	return b.Scope()
}

// Narrow returns scope, which [Blobs.Scope] returned, here or before [Reopen], or where that is [ScopePublic] and a secret was handed out since, the repository's:
// an endpoint may give everybody the manifest, and another one the blobs to those that it knows. It never widens.
func (b *Blobs) Narrow(scope string) string {
	if scope != ScopePublic {
		return scope
	}
	a, ok := b.src.(remote.Accessor)
	if !ok {
		return ""
	}
	access := a.Access()
	if access.Anonymous && access.Repository != "" {
		return scope
	}
	return strings.ToValidUTF8(access.Repository, "?")
}
