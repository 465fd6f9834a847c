package rafs

import (
	"encoding/hex"
	"fmt"
)

// UnmarshalText reads what MarshalText writes.
func (c *Compressor) UnmarshalText(text []byte) (err error) {
	*c, err = ParseCompressor(string(text))
	return err
}

// UnmarshalText reads what MarshalText writes.
func (d *Digester) UnmarshalText(text []byte) (err error) {
	*d, err = ParseDigester(string(text))
	return err
}

// UnmarshalText reads 64 hexadecimal digits.
func (d *Digest) UnmarshalText(text []byte) error {
	if len(text) != hex.EncodedLen(len(d)) {
		return fmt.Errorf("digest of %d characters, want %d", len(text), hex.EncodedLen(len(d)))
	}
	_, err := hex.Decode(d[:], text)
	return err
}
