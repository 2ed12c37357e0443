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

// payer is whose account is charged for what is done. The zero value is charged nothing.
type payer struct {
	accounts *access.Accounts
	owner    string
}

// wait takes some of a resource of the server as soon as the owner's account has it. It leaves the queue when ctx ends.
func (p payer) wait(ctx context.Context, r access.Resource, n int64) (free func(), err error) {
	return p.accounts.Wait(ctx, p.owner, r, n)
}

func (s *Store) payer(owner string) payer { return payer{s.Accounts, owner} }

// job is one piece of work on the store, such as a build or an import, and who pays for it.
type job struct {
	*Store
	payer
}

func (s *Store) begin(owner string) *job { return &job{s, s.payer(owner)} }

// image gives the EROFS file of layers, and makes it if it is missing. Those who need the same one at the same time wait for each other.
func (j *job) image(ctx context.Context, layers []Layer) (string, error) {
	id := chainID(layers)
	file := j.file("images", strings.TrimPrefix(id, "sha256:")+".erofs")
	if exists(file) {
		return file, touch(file)
	}
	free, err := j.wait(ctx, access.Merges, 1) // before the lock: whoever has that never waits for another one's account
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
		return file, touch(file)
	}
	return file, j.write(file, func(f *os.File) error { return j.assemble(ctx, f, layers) })
}

// assemble writes the image of layers, beginning with the largest part of it that is there.
func (j *job) assemble(ctx context.Context, f *os.File, layers []Layer) error {
	m := &merger{ctx: ctx, root: newRoot(), w: erofs.NewWriter(f)}
	have := len(layers) - 1
	for ; have > 0; have-- {
		base, err := erofs.Open(j.file("images", strings.TrimPrefix(chainID(layers[:have]), "sha256:")+".erofs"))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		m.root, err = base.Tree()
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
	if err := errors.Join(m.w.Finish(m.root), f.Chmod(0o644)); err != nil { // who runs sandboxes reads it
		return err
	}
	if j.UID != 0 {
		return f.Chown(j.UID, j.GID)
	}
	return nil
}

// applyLayer applies a layer, whose content must be what its digest says.
func (j *job) applyLayer(ctx context.Context, m *merger, l Layer) error {
	r, err := j.open(ctx, j.payer, l)
	if err != nil {
		return err
	}
	defer r.Close()
	sum := sha256.New()
	body := io.TeeReader(&untilDone{ctx, j.whileRoom(r)}, sum)
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
