package convert

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/pkg/builder"
	"github.com/headstart-oci/headstart/pkg/remote"
)

// publish pushes the result, the name last. Where the source is an index, the target
// becomes that index with the image replaced.
func (r *optimizeRun) publish(ctx context.Context, res *builder.Optimized, report *reporter) error {
	if err := checkOptimized(res); err != nil {
		return fmt.Errorf("the optimized image contradicts itself and is not published: %w", err)
	}
	to, err := remote.OpenTarget(ctx, r.target, r.o.TargetRemote)
	if err != nil {
		return fmt.Errorf("open target %s: %w", r.target, err)
	}
	err = r.push(ctx, to, res, report)
	if cerr := to.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("publish %s: %w", r.target, err)
	}
	return nil
}

func (r *optimizeRun) push(ctx context.Context, to remote.Target, res *builder.Optimized, report *reporter) error {
	index := images.IsIndexType(r.img.Root.MediaType)
	how := remote.Publish
	if index {
		how = remote.PublishUnnamed
	}
	p, err := how(ctx, to, r.blobs(res),
		remote.Document{Descriptor: res.ConfigDescriptor, Data: res.Config},
		remote.Document{Descriptor: res.ManifestDescriptor, Data: res.Manifest},
		remote.PublishOptions{Progress: report.push})
	if err != nil {
		return err
	}
	r.sum.Uploaded, r.sum.UploadedBytes = p.Uploaded, p.UploadedBytes
	r.sum.Existed, r.sum.Mounted = p.Existed+p.Mounted, p.Mounted
	r.sum.TargetDigest = res.ManifestDescriptor.Digest
	if !index {
		return nil
	}
	w := &indexRewrite{run: r, to: to, old: r.img.Descriptor.Digest, new: res.ManifestDescriptor}
	doc, err := w.index(ctx, r.img.Root, 0)
	if err != nil {
		return err
	}
	r.sum.TargetDigest = doc.Descriptor.Digest
	return to.Tag(ctx, doc.Descriptor, doc.Data)
}

// indexRewrite replaces one manifest of an index, and brings all others to the target.
type indexRewrite struct {
	run *optimizeRun
	to  remote.Target
	old digest.Digest
	new ocispec.Descriptor
}

// index returns the rewritten index; the indexes in it are pushed.
func (w *indexRewrite) index(ctx context.Context, desc ocispec.Descriptor, depth int) (remote.Document, error) {
	if depth >= remote.MaxIndexDepth {
		return remote.Document{}, fmt.Errorf("%w: more than %d indexes inside each other", remote.ErrTooLarge, remote.MaxIndexDepth)
	}
	data, err := remote.ReadAll(ctx, w.run.src, desc, remote.MaxManifestSize)
	if err != nil {
		return remote.Document{}, err
	}
	var all map[string]json.RawMessage
	var entries []json.RawMessage
	if err := json.Unmarshal(data, &all); err != nil {
		return remote.Document{}, fmt.Errorf("%w: index %s: %w", remote.ErrInvalid, desc.Digest, err)
	}
	if err := json.Unmarshal(all["manifests"], &entries); err != nil {
		return remote.Document{}, fmt.Errorf("%w: index %s: manifests: %w", remote.ErrInvalid, desc.Digest, err)
	}
	kept := make([]json.RawMessage, 0, len(entries))
	changed := false
	for _, old := range entries {
		e, keep, err := w.entry(ctx, old, depth)
		if err != nil {
			return remote.Document{}, err
		}
		changed = changed || !keep || !bytes.Equal(e, old)
		if keep {
			kept = append(kept, e)
		}
	}
	if changed { // one that holds nothing of the image stays byte for byte
		if all["manifests"], err = json.Marshal(kept); err != nil {
			return remote.Document{}, err
		}
		if data, err = json.Marshal(all); err != nil {
			return remote.Document{}, err
		}
	}
	doc := remote.NewDocument(desc.MediaType, data)
	if depth > 0 {
		if _, err := w.to.Push(ctx, doc.Blob()); err != nil {
			return remote.Document{}, err
		}
	}
	return doc, nil
}

// entry returns what becomes of an entry of an index; all fields but digest and size stay.
func (w *indexRewrite) entry(ctx context.Context, raw json.RawMessage, depth int) (_ json.RawMessage, keep bool, err error) {
	var d ocispec.Descriptor
	if err := json.Unmarshal(raw, &d); err != nil {
		return nil, false, fmt.Errorf("%w: index entry: %w", remote.ErrInvalid, err)
	}
	switch {
	case d.Digest == w.old:
		raw, err = withContent(raw, w.new)
		return raw, true, err
	case d.Annotations["vnd.docker.reference.digest"] == w.old.String():
		// What attests to the old manifest says nothing of the new one.
		w.run.sum.Warnings = append(w.run.sum.Warnings, fmt.Sprintf("%s is left out of the index: it is about the image that was replaced", d.Digest))
		return nil, false, nil
	case images.IsIndexType(d.MediaType):
		doc, err := w.index(ctx, d, depth+1)
		if err != nil || doc.Descriptor.Digest == d.Digest {
			return raw, true, err
		}
		raw, err = withContent(raw, doc.Descriptor)
		return raw, true, err
	case w.run.samePlace():
		return raw, true, nil
	}
	if err := w.copy(ctx, d); err != nil {
		return nil, false, fmt.Errorf("copy %s of %s: %w", d.Digest, w.run.source, err)
	}
	return raw, true, nil
}

// copy brings an entry's content to the target. containerd's store may lack it, as it does when only
// one platform was pulled; then another containerd may lack it too.
func (w *indexRewrite) copy(ctx context.Context, d ocispec.Descriptor) error {
	r := w.run
	c := &indexRun{o: Options{Progress: r.o.Progress}, source: r.source, target: r.target, src: r.src, to: w.to}
	err := c.copy(ctx, d)
	if errors.Is(err, remote.ErrNotFound) && r.source.Kind == remote.KindContainerd && r.target.Kind == remote.KindContainerd {
		r.sum.Warnings = append(r.sum.Warnings, fmt.Sprintf("%s is in the index and not in containerd, before as after", d.Digest))
		return nil
	}
	r.sum.Uploaded += c.sum.Uploaded
	r.sum.UploadedBytes += c.sum.UploadedBytes
	r.sum.Existed += c.sum.Existed
	r.sum.Mounted += c.sum.Mounted
	return err
}

// withContent returns the descriptor raw with the digest and size of d, and without data of the old.
func withContent(raw json.RawMessage, d ocispec.Descriptor) (json.RawMessage, error) {
	var all map[string]json.RawMessage
	if err := json.Unmarshal(raw, &all); err != nil {
		return nil, err
	}
	all = maps.Clone(all)
	delete(all, "data")
	for name, v := range map[string]any{"digest": d.Digest, "size": d.Size} {
		text, err := json.Marshal(v)
		if err != nil {
			return nil, err
		}
		all[name] = text
	}
	return json.Marshal(all)
}
