package template

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	"soulbox.dev/soulbox/access"
	"soulbox.dev/soulbox/internal/erofs"
)

// image returns the EROFS file of layers and makes it if it is missing. Jobs that need the same image at the same time wait for each other.
func (j *job) image(ctx context.Context, layers []Layer) (string, error) {
	id := chainID(layers)
	file := j.imageFile(id)
	if err := errors.Join(j.need(ctx, file), j.needLayers(ctx, layers)); err != nil {
		return "", err
	}
	if exists(file) {
		return file, j.sealExisting(file, true)
	}
	free, err := j.wait(ctx, access.Merges, 1) // before the lock: its holder never waits for another owner's account
	if err != nil {
		return "", err
	}
	defer free()
	unlock, err := j.lock(ctx, "images", id[7:])
	if err != nil {
		return "", err
	}
	defer unlock()
	if exists(file) {
		return file, nil
	}
	return file, j.asNoSpace(j.write(ctx, "images", func(f *os.File) (string, error) { return file, j.assemble(ctx, f, layers) }))
}

// imageFile returns the path of the image of a chain ID.
func (s *Store) imageFile(id string) string {
	return s.file("images", strings.TrimPrefix(id, "sha256:")+".erofs")
}

// assemble writes the image of layers. It begins with the image of the most layers that exists.
func (j *job) assemble(ctx context.Context, f *os.File, layers []Layer) error {
	m := &merger{ctx: ctx, root: newRoot(), w: erofs.NewWriter(f)}
	have := len(layers) - 1
	for ; have > 0; have-- {
		base, err := erofs.Open(j.imageFile(chainID(layers[:have])))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		m.root, err = base.Tree()
		if err == nil {
			err = j.ensureSpaceOn(base, layers[have:])
		}
		if err == nil {
			err = m.w.Base(ctx, base)
		}
		if err := errors.Join(err, base.Close()); err != nil {
			return err
		}
		break
	}
	for _, l := range layers[max(have, 0):] {
		if err := j.applyLayer(ctx, m, l); err != nil {
			return fmt.Errorf("layer %s: %w", l.Digest, err)
		}
	}
	return errors.Join(m.w.Finish(m.root), j.seal(f, true), unpin(f))
}

// ensureSpaceOn makes space for an image that is built on top of another.
func (s *Store) ensureSpaceOn(base *erofs.Image, layers []Layer) error {
	needed, err := base.Used()
	if err != nil {
		return err
	}
	for _, l := range layers {
		needed += l.Size
	}
	return s.ensureSpace(needed)
}

// applyLayer applies a layer and checks that its content matches its digest.
func (j *job) applyLayer(ctx context.Context, m *merger, l Layer) error {
	r, err := j.open(ctx, j.payer, l)
	if err != nil {
		return err
	}
	defer r.Close()
	sum := sha256.New()
	body := io.TeeReader(&untilDone{ctx, j.whileSpace(r)}, sum)
	if err := m.apply(body); err != nil {
		return err
	}
	if _, err := io.Copy(io.Discard, io.LimitReader(body, 1<<20)); err != nil { // what follows the end of the tar
		return err
	}
	if got := digestOf(sum); got != l.DiffID {
		return fmt.Errorf("%w: its content is %s, not %s", ErrLayer, got, l.DiffID)
	}
	return nil
}
