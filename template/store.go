package template

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"

	"soulbox.dev/soulbox/access"
	"soulbox.dev/soulbox/internal/durable"
	"soulbox.dev/soulbox/sandbox"
)

// Store keeps templates. It is safe for concurrent use, also by several servers.
type Store struct {
	Dir string // made if missing
	// UID and GID are the user and group that sandboxes run as and see as root; they get access to what sandboxes boot from. Zero means the
	// server's user.
	UID, GID int
	// InUse returns the IDs of the images that sandboxes and snapshots need. If it is nil, no image is collected.
	InUse func() (map[string]bool, error)

	// Accounts are charged for the work of owners; nil sets no bounds.
	Accounts *access.Accounts
	// Budget is how many bytes of disk the whole store may take; default a tenth of the disk, at least 4 and at most 20 GB.
	Budget int64
	Log    *slog.Logger // default none
	// Durable changes the files. Its Fault is for tests.
	Durable durable.Disk

	mu   sync.Mutex
	root string // of the host template, once it is made
}

var _ sandbox.Templates = (*Store)(nil)

// Manifest is a template.
type Manifest struct {
	Name  string `json:"name"`
	Owner string `json:"owner,omitempty"` // "" is the operator, whose templates everybody sees
	// Image identifies all layers together: the chain ID of the OCI image specification, which is also the name of the EROFS file.
	Image    string          `json:"image"`
	Layers   []Layer         `json:"layers"`
	Config   v1.Config       `json:"config"`
	Limits   sandbox.Limits  `json:"limits"`           // of sandboxes that ask for none; zero values are the server's
	Protect  sandbox.Protect `json:"protect,omitzero"` // as Limits
	StartCmd string          `json:"start_cmd,omitempty"`
	ReadyCmd string          `json:"ready_cmd,omitempty"`
	Started  *Started        `json:"started,omitempty"` // nil without StartCmd, or if the sandbox cannot be saved
	Parent   string          `json:"parent,omitempty"`  // what it was made from
	Build    string          `json:"build,omitempty"`   // the id of the build that made it
	Created  time.Time       `json:"created"`
	Size     int64           `json:"size"` // of the image on disk, in bytes
	// DefaultUser is the user of processes that name none; empty means "user".
	DefaultUser string `json:"default_user,omitempty"`
	// Original is set for an image that came from elsewhere and was not changed.
	Original *Original `json:"original,omitempty"`
}

// Started is a saved sandbox of a template whose StartCmd runs and is ready. New sandboxes of the template begin from it.
type Started struct {
	Name    string         `json:"name"` // of its directory
	Limits  sandbox.Limits `json:"limits"`
	Network bool           `json:"network,omitempty"`
}

// Layer is a set of changed files, as a compressed tar.
type Layer struct {
	Digest    string `json:"digest"`  // of the file, as "sha256:…"
	DiffID    string `json:"diff_id"` // of the tar in it
	Size      int64  `json:"size"`    // of the file, in bytes
	MediaType string `json:"media_type"`
	CreatedBy string `json:"created_by,omitempty"`
}

var namePattern = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,62}(:[a-zA-Z0-9_][a-zA-Z0-9._-]{0,62})?$`)

// CheckName returns a name in the form in which it is stored: "name" or "name:tag"; the tag "latest" is dropped.
func CheckName(name string) (string, error) {
	plain := strings.TrimSuffix(name, ":latest")
	if !namePattern.MatchString(plain) || strings.HasPrefix(plain, "sha256:") {
		return "", fmt.Errorf("template %q: a name is 1 to 63 lower-case letters, digits or . _ - and begins with a letter or digit; a "+
			"tag may follow a colon: %w", clip(name), sandbox.ErrInvalid)
	}
	if plain == HostName {
		return "", fmt.Errorf("template %q: the name is that of this machine's own template: %w", name, sandbox.ErrInvalid)
	}
	return plain, nil
}

func (s *Store) file(kind, name string) string { return filepath.Join(s.Dir, kind, name) }

func (s *Store) nameFile(owner, name string) string {
	sum := sha256.Sum256([]byte(owner + "\x00" + name))
	return s.file("names", hex.EncodeToString(sum[:20])+".json")
}

// Get returns a template that an owner sees: the owner's, or the operator's of that name.
func (s *Store) Get(owner, name string) (Manifest, error) {
	plain, err := CheckName(name)
	if err != nil {
		return Manifest{}, fmt.Errorf("template %q: %w", clip(name), sandbox.ErrNoTemplate)
	}
	for _, o := range slices.Compact([]string{owner, ""}) {
		var m Manifest
		err := readJSON(s.nameFile(o, plain), &m)
		if err == nil {
			return m, nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return Manifest{}, fmt.Errorf("template %q: %w", name, err)
		}
	}
	return Manifest{}, fmt.Errorf("template %q: %w", name, sandbox.ErrNoTemplate)
}

// Template implements sandbox.Templates. The default is "base" if it has been built, otherwise the host's programs.
func (s *Store) Template(ctx context.Context, owner, name string) (sandbox.Template, error) {
	if id, ok := strings.CutPrefix(name, "sha256:"); ok {
		file, there := s.imageFile(id), false
		var err error
		if isHex(id) {
			there, err = s.pin(ctx, file)
		}
		if !there && err == nil {
			err = fmt.Errorf("the image %s that it needs is gone: %w", clip(name), sandbox.ErrNoTemplate)
		}
		return sandbox.Template{Name: name, ID: name, Image: file}, err
	}
	if name == HostName {
		return s.host()
	}
	m, err := s.Get(owner, cmp.Or(name, BaseName))
	if errors.Is(err, sandbox.ErrNoTemplate) && name == "" {
		return s.host()
	}
	if err != nil {
		return sandbox.Template{}, err
	}
	file := s.imageFile(chainID(m.Layers))
	there, err := s.pin(ctx, file)
	if err == nil && !there {
		j := s.begin(owner)
		defer j.end()
		if file, err = j.image(ctx, m.Layers); err == nil {
			_, err = s.pin(ctx, file)
		}
	}
	if err != nil {
		return sandbox.Template{}, fmt.Errorf("template %q: %w", name, err)
	}
	return s.template(ctx, m, file), nil
}

// BaseName is the name of the default template, once it is built.
const BaseName = "base"

func (s *Store) template(ctx context.Context, m Manifest, image string) sandbox.Template {
	t := sandbox.Template{Name: m.Name, ID: m.Image, Image: image, Env: map[string]string{}, User: m.DefaultUser, Cwd: m.Config.WorkingDir,
		Limits: m.Limits, Protect: m.Protect}
	for _, kv := range m.Config.Env {
		k, v, _ := strings.Cut(kv, "=")
		t.Env[k] = v
	}
	if m.StartCmd != "" {
		t.Start = &sandbox.StartCommand{Command: m.StartCmd, Ready: m.ReadyCmd}
		if m.Started != nil { // it is gone if another build of that name has let it be collected
			saved := s.file("started", m.Started.Name)
			if there, err := s.pin(ctx, saved); err == nil && there {
				t.Start.Saved, t.Start.Limits, t.Start.Network = saved, m.Started.Limits, m.Started.Network
			}
		}
	}
	return t
}

// Import makes a template from a tar of a whole file system, which may be compressed.
func (s *Store) Import(ctx context.Context, m Manifest, from io.Reader) (_ Manifest, err error) {
	if m.Name, err = CheckName(m.Name); err != nil {
		return m, err
	}
	j := s.begin(m.Owner)
	defer j.end()
	return j.importTar(ctx, m, from)
}

func (j *job) importTar(ctx context.Context, m Manifest, from io.Reader) (Manifest, error) {
	plain, err := uncompressed(ctx, j.payer, from)
	if err != nil {
		return m, fmt.Errorf("import: %w", err)
	}
	l, err := j.newLayer(ctx, plain, maxImage, "import")
	if err = errors.Join(err, plain.Close()); err != nil { // before the image is made: a job that has a decoder must never wait for a merge
		return m, fmt.Errorf("import: %w", j.asNoSpace(err))
	}
	m.Layers = []Layer{l}
	return j.finish(ctx, m)
}

// finish makes the image of a template that has its layers, and stores the template under its name.
func (j *job) finish(ctx context.Context, m Manifest) (Manifest, error) {
	m, err := j.prepare(ctx, m)
	if err != nil {
		return m, err
	}
	return m, j.Put(m)
}

// prepare makes the image of a template that has its layers, and fills in what follows from it.
func (j *job) prepare(ctx context.Context, m Manifest) (Manifest, error) {
	file, err := j.image(ctx, m.Layers)
	if err != nil {
		return m, err
	}
	m.Image, m.Created = chainID(m.Layers), time.Now().UTC()
	if m.Size, err = size(file); err != nil {
		return m, err
	}
	if m.DefaultUser, err = defaultUser(file, m.Config.User); err != nil {
		return m, err
	}
	if h := m.Config.Healthcheck; m.ReadyCmd == "" && h != nil && len(h.Test) > 1 {
		m.ReadyCmd = healthCommand(h.Test)
	}
	if ctx.Err() != nil {
		return m, context.Cause(ctx)
	}
	return m, nil
}

// List returns the templates that an owner sees, sorted by name.
func (s *Store) List(owner string) ([]Manifest, error) {
	var all []Manifest
	err := s.each("names", func(name string) error {
		var m Manifest
		if err := readJSON(name, &m); err != nil {
			return err
		}
		if m.Owner == owner || m.Owner == "" {
			all = append(all, m)
		}
		return nil
	})
	slices.SortFunc(all, func(a, b Manifest) int { return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.Owner, b.Owner)) })
	return all, err
}

// each calls do for every finished file of a kind. It skips files that are removed meanwhile.
func (s *Store) each(kind string, do func(name string) error) error {
	entries, err := os.ReadDir(filepath.Join(s.Dir, kind))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), ".") {
			continue
		}
		if err := do(s.file(kind, e.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return err
}

// Put stores a template under its name, in place of the one that had it.
func (s *Store) Put(m Manifest) error {
	body, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	unlock, err := s.collecting(context.Background(), unix.LOCK_SH)
	if err != nil {
		return err
	}
	defer unlock()
	for _, l := range m.Layers {
		if !exists(s.layerFile(l.Digest)) {
			return fmt.Errorf("template %q: it was deleted meanwhile: %w", m.Name, sandbox.ErrNoTemplate)
		}
	}
	return s.asNoSpace(s.writeText("names", s.nameFile(m.Owner, m.Name), body)) // even making the temporary file may fail
}

// Copy stores a template that an owner sees under another name, as the owner's. Both share their layers, which are stored once.
func (s *Store) Copy(owner, name, to string) (Manifest, error) {
	m, err := s.Get(owner, name)
	if err != nil {
		return m, err
	}
	if m.Name, err = CheckName(to); err != nil {
		return m, err
	}
	m.Owner = owner
	return m, s.Put(m)
}

// Delete removes the name of an owner's own template, and what only that template needed. What sandboxes and snapshots need of it stays
// until they are gone.
func (s *Store) Delete(owner, name string) error {
	plain, err := CheckName(name)
	if err != nil {
		return fmt.Errorf("template %q: %w", clip(name), sandbox.ErrNoTemplate)
	}
	err = os.Remove(s.nameFile(owner, plain))
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("template %q: %w", clip(name), sandbox.ErrNoTemplate)
	}
	if err == nil {
		s.collectNow()
	}
	return err
}

// collectNow collects what has just become useless. If it fails, the next collection does the rest.
func (s *Store) collectNow() {
	if err := s.Collect(); err != nil && s.Log != nil {
		s.Log.Error("collect what builds have left", "error", err)
	}
}

// write makes a file that is complete when it gets its name. Only the server's user can read it.
func (s *Store) write(kind, name string, fill func(*os.File) error) error {
	return s.writeNamed(kind, func(f *os.File) (string, error) { return name, fill(f) }, s.Durable.Rename)
}

// writeNamed is write for a file whose name follows from its content; place renames it by s.Durable. It is not durable.Disk.Make, since
// others must see by a lock that the temporary file's maker lives, and may not collect the file between its name and its use.
func (s *Store) writeNamed(kind string, fill func(*os.File) (name string, err error), place func(temp, name string) error) (err error) {
	f, err := s.temp(kind)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			if _, ferr := s.Durable.Step("remove", f.Name(), 0); ferr == nil { // otherwise tidy removes it
				err = errors.Join(err, os.Remove(f.Name()))
			}
		}
		err = errors.Join(err, f.Close()) // it is locked until here
	}()
	name, err := fill(f)
	if err := errors.Join(err, f.Sync()); err != nil {
		return s.asNoSpace(err) // before the file is removed, while it still takes up the disk
	}
	return place(f.Name(), name)
}

// writeText is write for a text.
func (s *Store) writeText(kind, name string, text []byte) error {
	return s.write(kind, name, func(f *os.File) error {
		return s.Durable.Write(f, text)
	})
}

func readJSON(name string, v any) error {
	body, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(body, v); err != nil {
		return fmt.Errorf("read %s: %w", name, err)
	}
	return nil
}

func exists(name string) bool {
	_, err := os.Stat(name)
	return err == nil
}

// touch marks a file as used now, so that it is not collected for a while.
func touch(name string) error {
	now := time.Now()
	return os.Chtimes(name, now, now)
}

func isHex(s string) bool { return len(s) == 64 && strings.Trim(s, "0123456789abcdef") == "" }

// chainID identifies layers on top of each other (OCI image specification, configuration). Without layers it is the hash of nothing.
func chainID(layers []Layer) string {
	sum := sha256.Sum256(nil)
	chain := "sha256:" + hex.EncodeToString(sum[:])
	for i, l := range layers {
		if i == 0 {
			chain = l.DiffID
			continue
		}
		sum := sha256.Sum256([]byte(chain + " " + l.DiffID))
		chain = "sha256:" + hex.EncodeToString(sum[:])
	}
	return chain
}

// size returns the disk space of a file in bytes.
func size(name string) (int64, error) {
	var st unix.Stat_t
	err := unix.Stat(name, &st)
	return st.Blocks * 512, err
}
