package store

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"path/filepath"
	"strings"

	"github.com/headstart-oci/headstart/internal/atomicfile"
)

// PutBootstrap stores the size bytes of a bare bootstrap and returns the absolute path of the
// file and its digest in hexadecimal, by which it is known. A file that is there already
// with the right bytes stays as it is.
func (s *Store) PutBootstrap(r io.ReaderAt, size int64) (file, sum string, err error) {
	fail := func(err error) (string, string, error) {
		return "", "", fmt.Errorf("store bootstrap: %w", err)
	}
	h := sha256.New()
	if _, err := io.Copy(h, io.NewSectionReader(r, 0, size)); err != nil {
		return fail(err)
	}
	sum = hex.EncodeToString(h.Sum(nil))
	name := path.Join("bootstraps", sum)
	if !s.hasBootstrap(name, sum) {
		if err := atomicfile.Write(s.root, "bootstraps", name, 0o600, func(w io.Writer) error {
			_, err := io.Copy(w, io.NewSectionReader(r, 0, size))
			return err
		}); err != nil {
			return fail(err)
		}
		if !s.hasBootstrap(name, sum) {
			return fail(errors.New("its bytes changed while it was stored"))
		}
	}
	return filepath.Join(s.path, "bootstraps", sum), sum, nil
}

// Bootstrap returns the absolute path of the bootstrap with this digest after it has
// compared its bytes. fs.ErrNotExist when it is not there, or broken.
func (s *Store) Bootstrap(sum string) (string, error) {
	if len(sum) != sha256.Size*2 || strings.Trim(sum, "0123456789abcdef") != "" || !s.hasBootstrap(path.Join("bootstraps", sum), sum) {
		return "", fmt.Errorf("bootstrap %q: %w", sum, fs.ErrNotExist)
	}
	return filepath.Join(s.path, "bootstraps", sum), nil
}

func (s *Store) hasBootstrap(name, sum string) bool {
	f, err := s.root.Open(name)
	if err != nil {
		return false
	}
	h := sha256.New()
	_, err = io.Copy(h, f)
	return errors.Join(err, f.Close()) == nil && hex.EncodeToString(h.Sum(nil)) == sum
}

// RemoveBootstrap removes a bootstrap. A mount that has it goes on. It is no error when it
// is not there.
func (s *Store) RemoveBootstrap(sum string) error {
	return s.remove("bootstraps", sum)
}

// PutMount stores v, which describes a mount, as JSON under id: letters, digits, - and _.
func (s *Store) PutMount(id string, v any) error {
	p, err := json.MarshalIndent(v, "", "\t")
	if err != nil {
		return fmt.Errorf("store mount %s: %w", id, err)
	}
	name, err := mountName(id)
	if err != nil {
		return err
	}
	return atomicfile.Write(s.root, "mounts", name, 0o600, func(w io.Writer) error {
		_, err := w.Write(append(p, '\n'))
		return err
	})
}

// Mounts returns what [Store.PutMount] stored, by id. Files that are no JSON are left out and
// named in the error, which does not make the others wrong.
func (s *Store) Mounts() (map[string]json.RawMessage, error) {
	entries, err := fs.ReadDir(s.root.FS(), "mounts")
	if err != nil {
		return nil, err
	}
	out := map[string]json.RawMessage{}
	var errs []error
	for _, e := range entries {
		id, ok := strings.CutSuffix(e.Name(), ".json")
		if !ok || strings.HasPrefix(e.Name(), ".") {
			continue
		}
		p, err := s.root.ReadFile(path.Join("mounts", e.Name()))
		if err == nil && !json.Valid(p) {
			err = errors.New("no JSON")
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("mount %s: %w", id, err))
			continue
		}
		out[id] = p
	}
	return out, errors.Join(errs...)
}

// RemoveMount removes what is stored under id. It is no error when nothing is.
func (s *Store) RemoveMount(id string) error {
	if _, err := mountName(id); err != nil {
		return err
	}
	return s.remove("mounts", id+".json")
}

func mountName(id string) (string, error) {
	if id == "" || len(id) > 128 || strings.Trim(id, "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ-_") != "" {
		return "", fmt.Errorf("mount id %q, want letters, digits, - and _", id)
	}
	return path.Join("mounts", id+".json"), nil
}

func (s *Store) remove(dir, name string) error {
	if name == "" || strings.Contains(name, "/") {
		return fmt.Errorf("remove %q from %s: no name", name, dir)
	}
	err := s.root.Remove(path.Join(dir, name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return atomicfile.SyncDir(s.root, dir)
}
