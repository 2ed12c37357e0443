package template

import (
	"archive/tar"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strconv"
	"strings"

	"github.com/moby/buildkit/frontend/dockerfile/instructions"

	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/internal/erofs"
)

// mounts are the mounts of a RUN while it runs.
type mounts struct {
	s    *stageRun
	env  map[string]string
	undo []func(context.Context) error
	// caches are the directories of the caches that are in the sandbox already, by key.
	caches map[string]string
}

// lockCaches locks the caches of a RUN for this build, each once and in a fixed order, so that two builds never deadlock.
func (m *mounts) lockCaches(ctx context.Context, all []*instructions.Mount) error {
	keys := map[string]bool{}
	for _, want := range all {
		if want.Type == instructions.MountTypeCache {
			keys[m.cacheKey(want)] = true
		}
	}
	for _, key := range sortedKeys(keys) {
		unlock, err := m.s.Store.lock(ctx, "caches", key)
		if err != nil {
			return err
		}
		m.undo = append(m.undo, func(context.Context) error { unlock(); return nil })
	}
	return nil
}

func (m *mounts) cacheKey(want *instructions.Mount) string {
	return hashOf(m.s.req.Owner, cmp.Or(want.CacheID, path.Clean(m.s.absolute(want.Target))))
}

// secretID returns the name of a mount's secret.
func secretID(want *instructions.Mount) string {
	return cmp.Or(want.CacheID, want.Source, path.Base(want.Target))
}

// mount makes all mounts of a RUN. The caller calls end even after an error, to undo the mounts made so far.
func (s *stageRun) mount(ctx context.Context, c *instructions.RunCommand) (*mounts, error) {
	m := &mounts{s: s, env: map[string]string{}, caches: map[string]string{}}
	if err := m.lockCaches(ctx, instructions.GetMounts(c)); err != nil {
		return m, err
	}
	for i, want := range instructions.GetMounts(c) {
		if err := m.add(ctx, want, path.Join(agent.BuildDir, "m"+strconv.Itoa(i))); err != nil {
			return m, fmt.Errorf("--mount=type=%s: %w", want.Type, err)
		}
	}
	return m, nil
}

// end undoes the mounts, the last one first, and keeps the content of the caches.
func (m *mounts) end(ctx context.Context) (err error) {
	for len(m.undo) > 0 {
		last := len(m.undo) - 1
		err = errors.Join(err, m.undo[last](ctx))
		m.undo = m.undo[:last]
	}
	return err
}

func (m *mounts) add(ctx context.Context, want *instructions.Mount, dir string) error {
	target := m.s.absolute(want.Target)
	switch want.Type {
	case instructions.MountTypeTmpfs:
		return m.on(ctx, agent.MountRequest{Target: target, Size: want.SizeLimit})
	case instructions.MountTypeBind:
		n, files, err := m.s.bindSource(ctx, want)
		if err != nil {
			return err
		}
		if err := m.fill(ctx, dir, packer{files: files, mode: -1}, n); err != nil {
			return err
		}
		return m.on(ctx, agent.MountRequest{Target: target, Source: dir, ReadOnly: want.ReadOnly})
	case instructions.MountTypeCache:
		return m.cache(ctx, want, dir, target)
	case instructions.MountTypeSecret:
		return m.secret(ctx, want, dir)
	}
	return fmt.Errorf("it is not supported")
}

// on is show for a source that exists for this mount alone: end also removes it.
func (m *mounts) on(ctx context.Context, r agent.MountRequest) error {
	if r.Source != "" {
		m.undo = append(m.undo, func(ctx context.Context) error {
			return m.s.client.Remove(ctx, agent.PathRequest{Path: r.Source, Recursive: true})
		})
	}
	return m.show(ctx, r)
}

// show mounts, and records how to undo that.
func (m *mounts) show(ctx context.Context, r agent.MountRequest) error {
	made, err := m.s.client.Mount(ctx, r)
	if err != nil {
		return err
	}
	m.undo = append(m.undo, func(ctx context.Context) error {
		_, err := m.s.client.Mount(ctx, agent.MountRequest{Target: r.Target, Unmount: true, Remove: made.Made})
		return err
	})
	return nil
}

// bindSource finds what a bind mount shows.
func (s *stageRun) bindSource(ctx context.Context, want *instructions.Mount) (*erofs.Node, *Files, error) {
	files, err := s.files(ctx, want.From)
	if err != nil {
		return nil, nil, err
	}
	n, err := walk(files.root, want.Source, true, nil)
	if err != nil {
		return nil, nil, fmt.Errorf("%q: %w%s", want.Source, noFile(err), files.near(splitPath(want.Source)))
	}
	return n, files, nil
}

// fill writes a tree to a directory, or a file, of the sandbox.
func (m *mounts) fill(ctx context.Context, name string, p packer, n *erofs.Node) error {
	return streamed(p, func(p packer) error { return p.add(name, n) }, func(r io.Reader) error { return m.s.client.Unpack(ctx, "/", r) })
}

// cache mounts a directory that is kept from build to build. One build at a time uses it.
func (m *mounts) cache(ctx context.Context, want *instructions.Mount, dir, target string) error {
	key := m.cacheKey(want)
	if there := m.caches[key]; there != "" { // a second mount of the same cache
		return m.show(ctx, agent.MountRequest{Target: target, Source: there, ReadOnly: want.ReadOnly})
	}
	m.caches[key] = dir
	file := m.s.Store.file("caches", key)
	first := &erofs.Node{Mode: 0o040755, Children: map[string]*erofs.Node{}}
	if want.Mode != nil {
		first.Mode = 0o040000 | uint16(*want.Mode&0o7777)
	}
	if want.UID != nil {
		first.UID = uint32(*want.UID)
	}
	if want.GID != nil {
		first.GID = uint32(*want.GID)
	}
	if err := m.fill(ctx, dir, packer{mode: -1}, first); err != nil {
		return err
	}
	if f, err := os.Open(file); err == nil {
		plain, err := decompress(ctx, m.s.job.payer, f, mediaGzip)
		if err != nil {
			return errors.Join(err, f.Close())
		}
		if err := errors.Join(m.s.client.Unpack(ctx, dir, plain), plain.Close()); err != nil {
			return err
		}
	} else if !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := m.on(ctx, agent.MountRequest{Target: target, Source: dir, ReadOnly: want.ReadOnly}); err != nil {
		return err
	}
	if want.ReadOnly {
		return nil
	}
	m.undo = append(m.undo, func(ctx context.Context) error { // before it is unmounted and removed
		r, err := m.s.client.Pack(ctx, dir)
		if err != nil {
			return err
		}
		defer r.Close()
		limit := m.s.sb.Info().Limits.Disk + layerSlack
		return m.s.Store.write("caches", file, func(f *os.File) error {
			return compress(f,
				atMost(m.s.Store.whileSpace(r), limit))
		})
	})
	return nil
}

// secret mounts a file that only the RUN sees, or sets a variable.
func (m *mounts) secret(ctx context.Context, want *instructions.Mount, dir string) error {
	id := secretID(want)
	value, ok := m.s.req.Secrets[id]
	if !ok { // runCommand has refused a missing secret that is required
		return nil
	}
	if want.Env != nil {
		m.env[cmp.Or(*want.Env, id)] = string(value)
		if want.Target == "" {
			return nil
		}
	}
	h := &tar.Header{Typeflag: tar.TypeReg, Name: strings.TrimPrefix(dir, "/"), Mode: 0o400, Size: int64(len(value))}
	if want.Mode != nil {
		h.Mode = int64(*want.Mode & 0o777)
	}
	if want.UID != nil {
		h.Uid = int(*want.UID)
	}
	if want.GID != nil {
		h.Gid = int(*want.GID)
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := w.WriteHeader(h); err != nil {
		return err
	}
	if _, err := w.Write(value); err != nil {
		return err
	}
	if err := w.Close(); err != nil {
		return err
	}
	if err := m.s.client.Unpack(ctx, "/", &b); err != nil {
		return err
	}
	return m.on(ctx, agent.MountRequest{Target: m.s.absolute(cmp.Or(want.Target, "/run/secrets/"+id)), Source: dir, ReadOnly: true})
}
