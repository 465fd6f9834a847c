// Package profiles keeps profiles beside the images they are of: as OCI artifacts whose subject is
// the image's manifest, in the same repository, layout or containerd.
//
//	pushed, err := profiles.Push(ctx, "registry.example/app:v1", profile, profiles.Options{})
//	found, err := profiles.Pull(ctx, "registry.example/app:v1-optimized", profiles.Options{})
//
// An image made from another one, by convert or optimize, finds the profiles of that too, as
// far as they are in the same place: its annotations name what it was made from.
package profiles

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/internal/convert"
	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/remote"
)

// What a profile is called in a registry.
const (
	ArtifactType = "application/vnd.headstart.profile.v1"
	MediaType    = "application/vnd.headstart.profile.v1+text" // of its only layer, docs/format-profile.md

	AnnotationPlatform = "io.headstart.profile.platform" // "os/arch[/variant]"
	AnnotationRuns     = "io.headstart.profile.runs"     // how many runs it holds
	AnnotationEngine   = "io.headstart.profile.engine"   // what recorded the first of them
	AnnotationGrade    = "io.headstart.profile.grade"    // how exact the first of them is
)

var (
	// ErrForeign is returned by Push for a profile that is of another image or platform.
	ErrForeign = errors.New("profile of another image")

	// ErrNone is returned by Pull when no profile of the image is there.
	ErrNone = errors.New("no profile")
)

// Options says which image of an index is meant and how it is reached.
type Options struct {
	Platform string // "os/arch[/variant]"; empty: this machine's
	Remote   remote.Options
	// Foreign lets Push push a profile whose lists name another image or platform.
	Foreign bool
}

// Pushed tells what Push did.
type Pushed struct {
	Image    string        `json:"image"`   // canonical reference
	Subject  digest.Digest `json:"subject"` // the manifest that the profile is about
	Platform string        `json:"platform"`
	Digest   digest.Digest `json:"digest"` // of the artifact
	Runs     int           `json:"runs"`
}

// Found is what Pull found.
type Found struct {
	Image     string
	Profile   *persist.Profile // all runs, merged
	Artifacts int              // how many profiles were merged
	Skipped   []string         // what was there and is no profile of the image, a line each
	Mixed     error            // not nil: the runs are of several commands, or name several of the image's digests
}

// place is an image with all that may be asked about it.
type place struct {
	ref  remote.Reference
	imgs []remote.Image // the plain one and the Nydus one, as far as there are both
}

// open finds the image of a platform.
func open(ctx context.Context, name string, o Options) (p place, src remote.Source, err error) {
	if p.ref, err = remote.Parse(name); err != nil {
		return p, nil, err
	}
	if src, err = remote.OpenSource(ctx, p.ref, o.Remote); err != nil {
		return p, nil, fmt.Errorf("open %s: %w", p.ref, err)
	}
	plain, err := remote.Select(ctx, src, o.Platform)
	if err == nil {
		p.imgs = append(p.imgs, plain)
	}
	if err == nil || errors.Is(err, remote.ErrPlatform) {
		nydus, nerr := remote.SelectNydus(ctx, src, o.Platform)
		if nerr == nil && !slices.ContainsFunc(p.imgs, func(i remote.Image) bool { return i.Descriptor.Digest == nydus.Descriptor.Digest }) {
			p.imgs = append(p.imgs, nydus)
		}
	}
	if len(p.imgs) == 0 {
		return p, nil, errors.Join(fmt.Errorf("%s: %w", p.ref, err), src.Close())
	}
	return p, src, nil
}

// identities returns the digests that profiles of the image may be about.
func (p place) identities() []digest.Digest {
	var out []digest.Digest
	for _, img := range p.imgs {
		for _, d := range convert.Identities(img) {
			if !slices.Contains(out, d) {
				out = append(out, d)
			}
		}
	}
	return out
}

// foreign returns why a list is not of the image with these identities; nil when it is.
func (p place) foreign(l *persist.List, ids []digest.Digest) error {
	if l.Digest != "" && !slices.Contains(ids, digest.Digest(l.Digest)) {
		return fmt.Errorf("%w: a run is of image %s, this is %s", ErrForeign, l.Digest, ids[0])
	}
	if l.Platform == "" {
		return nil
	}
	of, err := platforms.Parse(l.Platform)
	if err != nil {
		return fmt.Errorf("%w: a run is of platform %.100q", ErrForeign, l.Platform)
	}
	if here := p.imgs[0].Descriptor.Platform; here != nil && !platforms.Only(*here).Match(of) {
		return fmt.Errorf("%w: a run is of platform %s, this is %s", ErrForeign, l.Platform, platforms.FormatAll(*here))
	}
	return nil
}

// Push puts a profile beside the image that name names. Its lists must be of the image, by digest and
// platform where they say one; else it is [ErrForeign]. The same profile pushed again is there once.
func Push(ctx context.Context, name string, profile *persist.Profile, o Options) (Pushed, error) {
	if len(profile.Runs) == 0 {
		return Pushed{}, fmt.Errorf("%w: profile without runs", persist.ErrInvalid)
	}
	p, src, err := open(ctx, name, o)
	if err != nil {
		return Pushed{}, err
	}
	img, err := p.subject(profile, o.Foreign)
	if err = errors.Join(err, src.Close()); err != nil {
		return Pushed{}, fmt.Errorf("%s: %w", p.ref, err)
	}
	var text bytes.Buffer
	if _, err := profile.WriteTo(&text); err != nil {
		return Pushed{}, err
	}
	first := profile.Runs[0].List
	platform := convert.PlatformOf(img)
	annotations := map[string]string{
		AnnotationPlatform: platform, AnnotationRuns: strconv.Itoa(len(profile.Runs)),
		AnnotationEngine: first.Engine, AnnotationGrade: first.Grade,
	}
	if !first.Started.IsZero() { // of the profile, so that the same one is the same artifact
		annotations[ocispec.AnnotationCreated] = first.Started.UTC().Format(time.RFC3339)
	}
	desc, err := remote.PushReferrer(ctx, p.ref, o.Remote, img.Descriptor, remote.Artifact{
		Type: ArtifactType, Layers: []remote.Document{remote.NewDocument(MediaType, text.Bytes())}, Annotations: annotations,
	})
	if err != nil {
		return Pushed{}, err
	}
	return Pushed{Image: p.ref.String(), Subject: img.Descriptor.Digest, Platform: platform, Digest: desc.Digest, Runs: len(profile.Runs)}, nil
}

// subject chooses the image that the profile is about: the one that its lists name, else the
// plain one.
func (p place) subject(profile *persist.Profile, anyway bool) (remote.Image, error) {
	var first error
	for _, img := range p.imgs {
		one := place{ref: p.ref, imgs: []remote.Image{img}}
		err := error(nil)
		for _, r := range profile.Runs {
			if err = one.foreign(r.List, one.identities()); err != nil {
				break
			}
		}
		if err == nil {
			return img, nil
		}
		if first == nil {
			first = err
		}
	}
	if anyway {
		return p.imgs[0], nil
	}
	return remote.Image{}, first
}

// Pull finds the profiles of the image that name names, and of those that it was made from, and
// merges them. What is there and is damaged, or of another image or platform, is skipped and
// told. [ErrNone] when nothing is left.
func Pull(ctx context.Context, name string, o Options) (Found, error) {
	p, src, err := open(ctx, name, o)
	if err != nil {
		return Found{}, err
	}
	f := Found{Image: p.ref.String(), Profile: &persist.Profile{}}
	err = f.gather(ctx, p, src, o)
	if cerr := src.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return Found{}, err
	}
	// The image may be kept in containerd and its profiles in its registry.
	if reg, ok := p.ref.Registry(); ok && p.ref.Kind == remote.KindContainerd && o.Remote.RegistryFallback {
		if err := f.elsewhere(ctx, p, reg, o); err != nil {
			if ctx.Err() != nil {
				return Found{}, err
			}
			f.skip("profiles in the registry: %v", err)
		}
	}
	if f.Artifacts == 0 {
		text := ""
		if len(f.Skipped) > 0 {
			text = ": " + strings.Join(f.Skipped, "; ")
		}
		return Found{}, fmt.Errorf("%s: %w of it or of what it was made from%s", p.ref, ErrNone, text)
	}
	f.Mixed = f.Profile.Mixed()
	return f, nil
}

func (f *Found) skip(format string, args ...any) {
	f.Skipped = append(f.Skipped, fmt.Sprintf(format, args...))
}

func (f *Found) elsewhere(ctx context.Context, p place, ref remote.Reference, o Options) error {
	src, err := remote.OpenSource(ctx, ref, o.Remote)
	if err != nil {
		return err
	}
	p.ref = ref
	return errors.Join(f.gather(ctx, p, src, o), src.Close())
}

// maxArtifacts bounds how many profiles of one image are read: many more than a profile has runs.
const maxArtifacts = 8 * persist.MaxRuns

// gather merges what is kept in one place.
func (f *Found) gather(ctx context.Context, p place, src remote.Source, o Options) error {
	ids := p.identities()
	read := 0
	for _, id := range ids {
		list, err := remote.ListReferrers(ctx, p.ref, o.Remote, id, ArtifactType)
		if errors.Is(err, remote.ErrUnsupported) {
			f.skip("%v", err)
			continue
		}
		if err != nil {
			return err
		}
		for _, d := range list {
			if read++; read > maxArtifacts {
				f.skip("%s and those after it: more than %d profiles", d.Digest, maxArtifacts)
				return nil
			}
			profile, err := p.read(ctx, src, d, id, ids)
			if err != nil {
				if ctx.Err() != nil || errors.Is(err, remote.ErrUnavailable) || errors.Is(err, remote.ErrStalled) || errors.Is(err, remote.ErrUnauthorized) {
					return err // nothing is wrong with it
				}
				if !errors.Is(err, errOtherType) {
					f.skip("%s: %v", d.Digest, err)
				}
				continue
			}
			if f.Profile, err = persist.Merge(persist.MergeOptions{Mixed: true}, f.Profile, profile); err != nil {
				return err
			}
			f.Artifacts++
		}
	}
	return nil
}

// errOtherType means that an artifact is no profile, and says so.
var errOtherType = errors.New("artifact of another type")

// read reads one artifact.
func (p place) read(ctx context.Context, src remote.Source, d ocispec.Descriptor, subject digest.Digest, ids []digest.Digest) (*persist.Profile, error) {
	m, err := remote.ReadArtifact(ctx, src, d, subject)
	if err != nil {
		return nil, err
	}
	if m.ArtifactType != ArtifactType {
		return nil, errOtherType
	}
	if len(m.Layers) != 1 || m.Layers[0].MediaType != MediaType {
		return nil, fmt.Errorf("%w: %d layers, want one %s", remote.ErrInvalid, len(m.Layers), MediaType)
	}
	data, err := remote.ReadAll(ctx, src, m.Layers[0], persist.MaxProfileSize)
	if err != nil {
		return nil, err
	}
	profile, err := persist.ReadAnyProfile(bytes.NewReader(data))
	if err != nil {
		return nil, err
	}
	for _, r := range profile.Runs {
		if err := p.foreign(r.List, ids); err != nil {
			return nil, err
		}
	}
	if len(profile.Runs) == 0 {
		return nil, fmt.Errorf("%w: no runs", persist.ErrInvalid)
	}
	return profile, nil
}
