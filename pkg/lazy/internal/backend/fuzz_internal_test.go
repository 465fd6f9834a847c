package backend

import (
	"encoding/json"
	"errors"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/headstart-oci/headstart/pkg/lazy/internal/fill"
)

// FuzzOrigin reads any bytes as an origin. One that is taken is the same after it was kept, and names files of its directory only.
func FuzzOrigin(f *testing.F) {
	id := strings.Repeat("0123456789abcdef", 4)
	f.Add([]byte(`{"reference":"registry.test/a:b","digest":"sha256:`+id+`","blobs":[{"data":{"id":"`+id+`","size":5},"meta":{"id":"`+id+`","size":6}}],"prefetch":0}`), false)
	f.Add([]byte(`{"blob_dir":"/blobs","blobs":[{"data":{"id":"blob"}},{"data":{"id":"b2","size":1}}],"prefetch":-1}`), true)
	f.Add([]byte(`{"blob_dir":"/blobs","blobs":[{"data":{"id":"../blob"}},{"data":{"id":".."}}],"prefetch":-1}`), true)
	f.Add([]byte(`{"blob_dir":"blobs","blobs":[],"prefetch":0}`), true)
	f.Add([]byte(`null`), true)
	f.Fuzz(func(t *testing.T, p []byte, loose bool) {
		var o, again Origin
		if json.Unmarshal(p, &o) != nil {
			return
		}
		if err := o.check(loose); err != nil {
			if !errors.Is(err, ErrInvalid) {
				t.Errorf("check: %v", err)
			}
			return
		}
		kept, err := json.Marshal(o)
		if err == nil {
			err = json.Unmarshal(kept, &again)
		}
		if err != nil || !reflect.DeepEqual(again, o) {
			t.Fatalf("kept %+v is %+v, %v", o, again, err)
		}
		b := Blobs{origin: o}
		for n := range o.Blobs {
			source, ok := b.Blob(n).(*looseBlob)
			if !ok {
				t.Fatalf("blob %d is no file", n)
			}
			for _, meta := range []bool{false, true} {
				file := source.files.file(fill.Request{Meta: meta})
				if path := filepath.Join("/blobs", file.ID); filepath.Dir(path) != "/blobs" {
					t.Errorf("blob %d is %s", n, path)
				}
				if err := file.descriptor().Digest.Validate(); !loose && err != nil {
					t.Errorf("blob %d: %v", n, err)
				}
			}
		}
	})
}
