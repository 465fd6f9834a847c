package remote

import "errors"

// Error classes; every error of the package that concerns one wraps it.
var (
	// ErrInvalid: a malformed reference, layout, archive, manifest or config.
	ErrInvalid = errors.New("invalid")

	// ErrUnsupported: well-formed, and of a kind that is not read (schema 1 manifests,
	// compressed archives, unknown media types).
	ErrUnsupported = errors.New("unsupported")

	// ErrDigest: bytes do not have the digest or the size of their descriptor.
	ErrDigest = errors.New("digest mismatch")

	// ErrTooLarge: a document is larger than the package reads into memory.
	ErrTooLarge = errors.New("too large")

	// ErrNotFound: the image, manifest or blob is not there.
	ErrNotFound = errors.New("not found")

	// ErrPlatform: the image has no manifest for the platform asked for.
	ErrPlatform = errors.New("no matching platform")

	// ErrUnauthorized: the registry refused for lack of (valid) credentials: 401 or 403.
	ErrUnauthorized = errors.New("unauthorized")

	// ErrUnavailable: the registry could not be reached, or kept failing (429, 5xx) until
	// the retries were used up.
	ErrUnavailable = errors.New("unavailable")

	// ErrStalled: the registry stopped answering: no response, or no byte of progress, for
	// longer than [Timeouts] allow.
	ErrStalled = errors.New("stalled")

	// ErrRange: a range lies outside of the blob.
	ErrRange = errors.New("range outside of the blob")
)
