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
)

// payer is the owner whose account is charged for work. The zero value charges nothing.
type payer struct {
	accounts *access.Accounts
	owner    string
}

// wait takes n units of a server's resource as soon as the owner's account has them. It leaves the queue when ctx ends.
func (p payer) wait(ctx context.Context, r access.Resource, n int64) (free func(), err error) {
	return p.accounts.Wait(ctx, p.owner, r, n)
}

func (s *Store) payer(owner string) payer { return payer{s.Accounts, owner} }

// job is one piece of work on the store, such as a build or an import. It knows which owner pays and what it needs while it runs; no
// server's Collect removes that. It is not for concurrent use.
type job struct {
	*Store
	payer
	needs *os.File // lines of names below Dir; its lock says that the job is running
}

// jobsKind is the directory in which jobs record what they need.
const jobsKind = "jobs"

// begin begins a job. The caller ends it.
func (s *Store) begin(owner string) *job { return &job{Store: s, payer: s.payer(owner)} }

// end ends the job. If its file cannot be removed, tidy removes it later, as its lock is free.
func (j *job) end() {
	if j.needs != nil {
		_ = os.Remove(j.needs.Name())
		_ = j.needs.Close()
		j.needs = nil
	}
}

// need protects files from Collect, whether they exist already or not.
func (j *job) need(ctx context.Context, files ...string) error {
	unlock, err := j.collecting(ctx, unix.LOCK_SH)
	if err != nil {
		return err
	}
	defer unlock()
	return j.note(files...)
}

// note is need for a caller that holds the collecting lock.
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

// needLayers is need for layers.
func (j *job) needLayers(ctx context.Context, layers []Layer) error {
	var files []string
	for _, l := range layers {
		files = append(files, j.layerFile(l.Digest))
	}
	return j.need(ctx, files...)
}

// write is Store.write for a file that the job needs from the moment it has its name.
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
		return j.Durable.Rename(temp, name)
	})
}

// known returns a step that was run before, and reports whether there is one.
func (j *job) known(ctx context.Context, key string) (step, bool, error) {
	var st step
	unlock, err := j.collecting(ctx, unix.LOCK_SH)
	if err != nil {
		return st, false, err
	}
	defer unlock()
	file := j.file("steps", key+".json")
	if err := readJSON(file, &st); err != nil {
		return st, false, nil //nolint:nilerr // an unreadable step counts as missing
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

// pin protects a file for a while, in which a caller begins to use it, and reports whether the file exists.
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

// pinTime is how long pin protects: by then a sandbox that boots has declared what it needs (Manager.Images).
const pinTime = 10 * time.Minute

// unpin marks a new file as one that no caller is beginning to use.
func unpin(f *os.File) error {
	then := time.Now().Add(-pinTime)
	return os.Chtimes(f.Name(), then, then)
}
