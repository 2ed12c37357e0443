package template

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	nothing "github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"soulbox.dev/soulbox/access"
	"soulbox.dev/soulbox/sandbox"
)

// Original is an image's description from its source. An image that is not changed is pushed exactly as it was pulled.
type Original struct {
	MediaType string `json:"media_type"`
	Manifest  []byte `json:"manifest"`
	Config    []byte `json:"config"`
}

// ErrPull means that an image cannot be pulled or pushed; the text says whether the name, the network or the credentials are the cause.
var ErrPull = errors.New("the registry does not give it")

var platform = v1.Platform{OS: "linux", Architecture: runtime.GOARCH}

// Puller returns the Puller for builds of owners other than the operator. It pulls from registries at public addresses, and from those in
// private.
func (s *Store) Puller(private []string) Puller {
	public := remote.DefaultTransport.(*http.Transport).Clone()
	public.Proxy = nil
	public.DialContext = (&net.Dialer{Timeout: 30 * time.Second, Control: sandbox.RefusePrivate}).DialContext
	return func(ctx context.Context, j *job, reference string) (Manifest, error) {
		ref, err := name.ParseReference(reference)
		if err == nil && slices.Contains(private, ref.Context().RegistryStr()) {
			return j.pull(ctx, reference, remote.DefaultTransport)
		}
		return j.pull(ctx, reference, public)
	}
}

// Puller pulls an image for a build.
type Puller func(ctx context.Context, j *job, reference string) (Manifest, error)

// Pull makes a template from an image of a registry, with the credentials of the server's user (~/.docker/config.json).
func (s *Store) Pull(ctx context.Context, m Manifest, reference string) (_ Manifest, err error) {
	if m.Name, err = CheckName(m.Name); err != nil {
		return m, err
	}
	j := s.begin(m.Owner)
	defer j.end()
	got, err := j.pull(ctx, reference, remote.DefaultTransport)
	if err != nil {
		return m, err
	}
	got.Name, got.Owner = m.Name, m.Owner
	return j.finish(ctx, got)
}

func (j *job) pull(ctx context.Context, reference string, by http.RoundTripper) (Manifest, error) {
	ref, err := name.ParseReference(reference)
	if err != nil {
		return Manifest{}, fmt.Errorf("image %q: it is not the name of an image: %w", clip(reference), sandbox.ErrInvalid)
	}
	img, err := remote.Image(ref, remote.WithContext(ctx), remote.WithAuthFromKeychain(authn.DefaultKeychain),
		remote.WithPlatform(platform), remote.WithTransport(by))
	if err != nil {
		return Manifest{}, pullError(ref, err)
	}
	m, err := j.take(ctx, img)
	if err != nil {
		return Manifest{}, pullError(ref, j.asNoSpace(err))
	}
	m.Parent = ref.Name()
	return m, nil
}

// pullError says why an image cannot be pulled or pushed.
func pullError(ref name.Reference, err error) error {
	var refused *transport.Error
	var lost net.Error
	switch {
	case errors.As(err, &refused) && (refused.StatusCode == http.StatusUnauthorized || refused.StatusCode == http.StatusForbidden):
		return fmt.Errorf("image %s: %s requires other credentials, or has no such image; log in with docker login: %w", ref,
			ref.Context().RegistryStr(), ErrPull)
	case errors.As(err, &refused) && refused.StatusCode == http.StatusNotFound:
		return fmt.Errorf("image %s: %s has no such image: %w", ref, ref.Context().RegistryStr(), ErrPull)
	case errors.Is(err, sandbox.ErrRefused):
		return fmt.Errorf("image %s: %s is in a private network; the operator names such registries by --templates-registries: %w", ref,
			ref.Context().RegistryStr(), ErrPull)
	case errors.As(err, &refused):
		return fmt.Errorf("image %s: %s answers with status %d: %w", ref, ref.Context().RegistryStr(), refused.StatusCode, ErrPull)
	case errors.As(err, &lost):
		return fmt.Errorf("image %s: %s cannot be reached: %w (%w)", ref, ref.Context().RegistryStr(), err, ErrPull)
	}
	return fmt.Errorf("image %s: %w", ref, err)
}

// take stores the layers of an image.
func (j *job) take(ctx context.Context, img v1.Image) (Manifest, error) {
	config, err := img.ConfigFile()
	if err != nil {
		return Manifest{}, err
	}
	if config.Architecture != "" && config.Architecture != runtime.GOARCH || config.OS != "" && config.OS != "linux" {
		return Manifest{}, fmt.Errorf("it is for %s/%s, but this machine is linux/%s: %w", config.OS, config.Architecture, runtime.GOARCH,
			sandbox.ErrInvalid)
	}
	layers, err := img.Layers()
	if err != nil {
		return Manifest{}, err
	}
	if len(layers) > maxLayers {
		return Manifest{}, fmt.Errorf("%w: it has %d layers, at most %d are possible", ErrLayer, len(layers), maxLayers)
	}
	m := Manifest{Config: config.Config}
	for _, l := range layers {
		if ctx.Err() != nil {
			return m, context.Cause(ctx)
		}
		kept, err := j.takeLayer(ctx, l)
		if err != nil {
			return m, err
		}
		m.Layers = append(m.Layers, kept)
	}
	o := &Original{}
	if o.Manifest, err = img.RawManifest(); err == nil {
		o.Config, err = img.RawConfigFile()
	}
	if err != nil {
		return m, err
	}
	kind, err := img.MediaType()
	o.MediaType = string(kind)
	m.Original = o
	file, ierr := j.image(ctx, m.Layers)
	if err := errors.Join(err, ierr); err != nil {
		return m, err
	}
	m.Image = chainID(m.Layers)
	m.DefaultUser, err = defaultUser(file, m.Config.User)
	return m, err
}

// maxLayers bounds the layers of an image.
const maxLayers = 256

// takeLayer stores a layer unchanged and checks its digest.
func (j *job) takeLayer(ctx context.Context, l v1.Layer) (Layer, error) {
	digest, err := l.Digest()
	if err != nil {
		return Layer{}, err
	}
	diff, err := l.DiffID()
	if err != nil {
		return Layer{}, err
	}
	kind, err := l.MediaType()
	if err != nil {
		return Layer{}, err
	}
	size, err := l.Size()
	if err != nil {
		return Layer{}, err
	}
	kept := Layer{Digest: digest.String(), DiffID: diff.String(), Size: size, MediaType: string(kind)}
	if digest.Algorithm != "sha256" || diff.Algorithm != "sha256" || size > maxImage {
		return kept, fmt.Errorf("%w: %s of %d bytes", ErrLayer, digest, size)
	}
	file := j.layerFile(kept.Digest)
	if err := j.need(ctx, file); err != nil {
		return kept, err
	}
	if exists(file) {
		return kept, errors.Join(touch(file), j.verifyLayer(ctx, kept))
	}
	from, err := l.Compressed()
	if err != nil {
		return kept, err
	}
	defer from.Close()
	if err := j.ensureSpace(size); err != nil {
		return kept, err
	}
	err = j.write(ctx, "layers", func(f *os.File) (string, error) {
		sum := sha256.New()
		if _, err := io.Copy(io.MultiWriter(f, sum), io.LimitReader(j.whileSpace(from), size+1)); err != nil {
			return "", err
		}
		if got := digestOf(sum); got != kept.Digest {
			return "", fmt.Errorf("%w: it came as %s, not %s", ErrLayer, got, kept.Digest)
		}
		return file, nil
	})
	if err != nil {
		return kept, err
	}
	return kept, j.verifyLayer(ctx, kept)
}

// verifiedSuffix ends the name of a file that holds the digest of a layer's content, which is computed once.
const verifiedSuffix = ".diff"

// verifyLayer checks that the content of a layer matches its DiffID, because images are stored under the IDs of their layers' content.
func (j *job) verifyLayer(ctx context.Context, l Layer) error {
	known := j.layerFile(l.Digest) + verifiedSuffix
	got, err := os.ReadFile(known)
	if err != nil { // also if the layer was never verified
		free, err := j.wait(ctx, access.Work, 1)
		if err != nil {
			return err
		}
		defer free()
		r, err := j.open(ctx, j.payer, l)
		if err != nil {
			return err
		}
		defer r.Close()
		sum := sha256.New()
		if _, err := io.Copy(sum, atMost(&untilDone{ctx, r}, maxImage)); err != nil {
			return err
		}
		got = []byte(digestOf(sum))
		if err := j.writeText("layers", known, got); err != nil {
			return err
		}
	}
	if string(got) != l.DiffID {
		return fmt.Errorf("%w: its content is %s, not %s", ErrLayer, got, l.DiffID)
	}
	return nil
}

// fileLayer presents a layer of the store to go-containerregistry.
type fileLayer struct {
	s *Store
	l Layer
}

// Digest implements v1.Layer.
func (f fileLayer) Digest() (v1.Hash, error) { return v1.NewHash(f.l.Digest) }

// DiffID implements v1.Layer.
func (f fileLayer) DiffID() (v1.Hash, error) { return v1.NewHash(f.l.DiffID) }

// Compressed implements v1.Layer.
func (f fileLayer) Compressed() (io.ReadCloser, error) { return os.Open(f.s.layerFile(f.l.Digest)) }

// Uncompressed implements v1.Layer.
func (f fileLayer) Uncompressed() (io.ReadCloser, error) {
	return f.s.open(context.Background(), payer{}, f.l)
}

// Size implements v1.Layer.
func (f fileLayer) Size() (int64, error) { return f.l.Size, nil }

// MediaType implements v1.Layer.
func (f fileLayer) MediaType() (types.MediaType, error) { return types.MediaType(f.l.MediaType), nil }

// original is an image as it was pulled.
type original struct {
	s *Store
	m Manifest
}

// RawConfigFile implements partial.CompressedImageCore.
func (o original) RawConfigFile() ([]byte, error) { return o.m.Original.Config, nil }

// RawManifest implements partial.CompressedImageCore.
func (o original) RawManifest() ([]byte, error) { return o.m.Original.Manifest, nil }

// MediaType implements partial.CompressedImageCore.
func (o original) MediaType() (types.MediaType, error) {
	return types.MediaType(o.m.Original.MediaType), nil
}

// LayerByDigest implements partial.CompressedImageCore.
func (o original) LayerByDigest(h v1.Hash) (partial.CompressedLayer, error) {
	for _, l := range o.m.Layers {
		if l.Digest == h.String() {
			return fileLayer{o.s, l}, nil
		}
	}
	return nil, fmt.Errorf("layer %s: %w", h, os.ErrNotExist)
}

// oci returns a template as an OCI image. The same template always gives the same image.
func (s *Store) oci(m Manifest) (v1.Image, error) {
	if m.Original != nil {
		return partial.CompressedToImage(original{s, m})
	}
	img := mutate.ConfigMediaType(mutate.MediaType(nothing.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	var adds []mutate.Addendum
	for _, l := range m.Layers {
		adds = append(adds, mutate.Addendum{Layer: fileLayer{s, l}, History: v1.History{CreatedBy: l.CreatedBy},
			MediaType: types.MediaType(l.MediaType)})
	}
	img, err := mutate.Append(img, adds...)
	if err != nil {
		return nil, err
	}
	config, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	config = config.DeepCopy()
	config.Architecture, config.OS, config.Config, config.Created = platform.Architecture, platform.OS, m.Config, v1.Time{Time: m.Created}
	return mutate.ConfigFile(img, config)
}

// Push pushes a template to a registry and returns its digest there.
func (s *Store) Push(ctx context.Context, m Manifest, reference string) (string, error) {
	ref, err := name.ParseReference(reference)
	if err != nil {
		return "", fmt.Errorf("image %q: it is not the name of an image: %w", clip(reference), sandbox.ErrInvalid)
	}
	img, err := s.oci(m)
	if err != nil {
		return "", err
	}
	if err := remote.Write(ref, img, remote.WithContext(ctx), remote.WithAuthFromKeychain(authn.DefaultKeychain)); err != nil {
		return "", pullError(ref, err)
	}
	digest, err := img.Digest()
	return digest.String(), err
}

// Export writes a template as an OCI layout into a new directory, or as an archive like those of docker save if the name ends in .tar.
func (s *Store) Export(m Manifest, to string) error {
	img, err := s.oci(m)
	if err != nil {
		return err
	}
	if filepath.Ext(to) == ".tar" {
		tag, err := name.NewTag(m.Name)
		if err != nil {
			return err
		}
		return tarball.WriteToFile(to, tag, img)
	}
	if exists(to) {
		return fmt.Errorf("export: %s exists already", to)
	}
	p, err := layout.Write(to, nothing.Index)
	if err != nil {
		return err
	}
	return p.AppendImage(img, layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": m.Name}))
}

// ImportFile makes a template from a file that Export has written, or from a tar of a whole file system.
func (s *Store) ImportFile(ctx context.Context, m Manifest, from string) (_ Manifest, err error) {
	if m.Name, err = CheckName(m.Name); err != nil {
		return m, err
	}
	j := s.begin(m.Owner)
	defer j.end()
	img, err := readImage(from)
	if err != nil {
		return m, fmt.Errorf("import %s: %w", from, err)
	}
	if img == nil {
		f, err := os.Open(from)
		if err != nil {
			return m, err
		}
		defer f.Close()
		return j.importTar(ctx, m, f)
	}
	got, err := j.take(ctx, img)
	if err != nil {
		return m, fmt.Errorf("import %s: %w", from, err)
	}
	got.Name, got.Owner, got.Parent = m.Name, m.Owner, cmp.Or(m.Parent, filepath.Base(from))
	return j.finish(ctx, got)
}

// readImage opens an OCI layout or an archive of docker save. It returns nil for a file that is neither.
func readImage(from string) (v1.Image, error) {
	info, err := os.Stat(from)
	if err != nil {
		return nil, err
	}
	if !info.IsDir() {
		if _, err := tarball.LoadManifest(func() (io.ReadCloser, error) { return os.Open(from) }); err != nil {
			return nil, nil //nolint:nilerr // it may still be a tar of a file system
		}
		return tarball.ImageFromPath(from, nil)
	}
	index, err := layout.ImageIndexFromPath(from)
	if err != nil {
		return nil, err
	}
	list, err := index.IndexManifest()
	if err != nil {
		return nil, err
	}
	for _, d := range list.Manifests {
		if d.MediaType.IsImage() && (d.Platform == nil || d.Platform.Satisfies(platform)) {
			return index.Image(d.Digest)
		}
	}
	return nil, fmt.Errorf("it has no image of linux/%s: %w", runtime.GOARCH, sandbox.ErrInvalid)
}
