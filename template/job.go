package template

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"soulbox.dev/soulbox/access"
	"soulbox.dev/soulbox/internal/durable"
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

// job is one piece of work on the store, such as a build or an import: who pays for it, and what it needs while it goes on, which no
// server's Collect removes. It is not for concurrent use.
type job struct {
	*Store
	payer
	needs *os.File // lines of names below Dir; its lock says that the job goes on
}

// jobsKind is where jobs say what they need.
const jobsKind = "jobs"

// begin begins a job, which is to be ended.
func (s *Store) begin(owner string) *job { return &job{Store: s, payer: s.payer(owner)} }

// end ends the job. A file that cannot be removed is tidied up later, as its lock is free.
func (j *job) end() {
	if j.needs != nil {
		_ = os.Remove(j.needs.Name())
		_ = j.needs.Close()
		j.needs = nil
	}
}

// need keeps files, whether they are there already or not.
func (j *job) need(ctx context.Context, files ...string) error {
	unlock, err := j.collecting(ctx, unix.LOCK_SH)
	if err != nil {
		return err
	}
	defer unlock()
	return j.note(files...)
}

// note is need of one who has the lock of collecting.
func (j *job) note(files ...string) (err error) {
	if j.needs == nil {
		if j.needs, err = j.temp(jobsKind); err != nil {
			return err
		}
	}
	var lines strings.Builder
	for _, f := range files {
		rel, err := filepath.Rel(j.Dir, f)
		if err != nil {
			return err
		}
		lines.WriteString(rel + "\n")
	}
	_, err = j.needs.WriteString(lines.String())
	return err
}

// needLayers is need of layers.
func (j *job) needLayers(ctx context.Context, layers []Layer) error {
	var files []string
	for _, l := range layers {
		files = append(files, j.layerFile(l.Digest))
	}
	return j.need(ctx, files...)
}

// write is Store.write of a file that the job needs from the moment that it has its name.
func (j *job) write(ctx context.Context, kind string, fill func(*os.File) (name string, err error)) error {
	return j.writeNamed(kind, fill, func(temp, name string) error {
		unlock, err := j.collecting(ctx, unix.LOCK_SH)
		if err != nil {
			return err
		}
		defer unlock()
		if err := j.note(name); err != nil {
			return err
		}
		return durable.Disk{}.Rename(temp, name)
	})
}

// known gives a step that was carried out before.
func (j *job) known(ctx context.Context, key string) (step, bool, error) {
	var st step
	unlock, err := j.collecting(ctx, unix.LOCK_SH)
	if err != nil {
		return st, false, err
	}
	defer unlock()
	file := j.file("steps", key+".json")
	if err := readJSON(file, &st); err != nil {
		return st, false, nil //nolint:nilerr // as good as none
	}
	if st.Layer != nil {
		if touch(j.layerFile(st.Layer.Digest)) != nil {
			return st, false, nil
		}
		if err := j.note(j.layerFile(st.Layer.Digest)); err != nil {
			return st, false, err
		}
	}
	return st, touch(file) == nil, nil
}

// pin keeps a file for a while in which somebody begins to use it, and says whether it is there.
func (s *Store) pin(ctx context.Context, name string) (bool, error) {
	unlock, err := s.collecting(ctx, unix.LOCK_SH)
	if err != nil {
		return false, err
	}
	defer unlock()
	err = touch(name)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// pinned is how long that is: whoever boots a sandbox has said by then what it needs (Manager.Images).
const pinned = 10 * time.Minute

// unpin has a file that is made count as one that nobody begins to use.
func unpin(f *os.File) error {
	then := time.Now().Add(-pinned)
	return os.Chtimes(f.Name(), then, then)
}
