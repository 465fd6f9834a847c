package rafs

import (
	"crypto/sha256"
	"fmt"
	"hash"

	"github.com/zeebo/blake3"
)

// String returns the name that [ParseVersion] reads.
func (v Version) String() string { return fmt.Sprintf("%d", uint8(v.orDefault())) }

// orDefault gives the zero value its meaning.
func (v Version) orDefault() Version {
	if v == 0 {
		return V6
	}
	return v
}

// ParseVersion reads "5" or "6"; anything else is an error.
func ParseVersion(s string) (Version, error) {
	switch s {
	case "5":
		return V5, nil
	case "6":
		return V6, nil
	}
	return 0, fmt.Errorf("unknown RAFS version %q: want 5 or 6", s)
}

// String returns the name that [ParseCompressor] reads, or "compressor(N)".
func (c Compressor) String() string {
	switch c {
	case CompressorNone:
		return "none"
	case CompressorLZ4:
		return "lz4"
	case CompressorGzip:
		return "gzip"
	case CompressorZstd:
		return "zstd"
	}
	return fmt.Sprintf("compressor(%d)", uint32(c))
}

// ParseCompressor reads "none", "lz4" (or "lz4_block"), "gzip" or "zstd"; anything else is an error.
func ParseCompressor(s string) (Compressor, error) {
	switch s {
	case "none":
		return CompressorNone, nil
	case "lz4", "lz4_block":
		return CompressorLZ4, nil
	case "gzip":
		return CompressorGzip, nil
	case "zstd":
		return CompressorZstd, nil
	}
	return 0, fmt.Errorf("unknown compressor %q: want none, lz4, gzip or zstd", s)
}

// MarshalText makes compressors read as names in JSON.
func (c Compressor) MarshalText() ([]byte, error) { return []byte(c.String()), nil }

// String returns the name that [ParseDigester] reads, or "digester(N)".
func (d Digester) String() string {
	switch d {
	case DigesterBLAKE3:
		return "blake3"
	case DigesterSHA256:
		return "sha256"
	}
	return fmt.Sprintf("digester(%d)", uint32(d))
}

// ParseDigester reads "blake3" or "sha256"; anything else is an error.
func ParseDigester(s string) (Digester, error) {
	switch s {
	case "blake3":
		return DigesterBLAKE3, nil
	case "sha256":
		return DigesterSHA256, nil
	}
	return 0, fmt.Errorf("unknown digester %q: want blake3 or sha256", s)
}

// MarshalText makes digesters read as names in JSON.
func (d Digester) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// Sum returns the digest of p. An unknown digester counts as BLAKE3; constructors
// and [Open] let none through. Safe for concurrent use.
func (d Digester) Sum(p []byte) Digest {
	if d == DigesterSHA256 {
		return sha256.Sum256(p)
	}
	return blake3.Sum256(p)
}

// hash returns a running digest.
func (d Digester) hash() hash.Hash {
	if d == DigesterSHA256 {
		return sha256.New()
	}
	return blake3.New()
}

// String returns the 64 hexadecimal digits.
func (d Digest) String() string { return fmt.Sprintf("%x", d[:]) }

// MarshalText makes digests read as hexadecimal digits in JSON.
func (d Digest) MarshalText() ([]byte, error) { return []byte(d.String()), nil }
