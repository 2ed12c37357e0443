package template

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"soulbox.dev/soulbox/internal/durable"
)

// step is what a step of a build has made, as steps/KEY.json keeps it.
type step struct {
	Layer *Layer `json:"layer,omitempty"` // nil if no files changed
}

func (s *Store) remember(key string, st step) error {
	body, err := json.Marshal(st)
	if err != nil {
		return err
	}
	return s.writeText("steps", s.file("steps", key+".json"), body)
}

// lock keeps others, including other servers, from making the same thing at the same time. It waits until ctx ends.
func (s *Store) lock(ctx context.Context, kind, key string) (unlock func(), err error) {
	if err := s.makeKind(kind); err != nil {
		return nil, err
	}
	for {
		lock, err := durable.Lock(s.file(kind, lockPrefix+key), false)
		if err == nil && linked(lock) {
			return sync.OnceFunc(func() {
				_ = os.Remove(lock.Name())
				_ = lock.Close()
			}), nil
		}
		if err == nil { // the last holder has just removed the file
			if err := lock.Close(); err != nil {
				return nil, err
			}
			continue
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, err
		}
		select {
		case <-time.After(lockPoll):
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

const lockPoll = 20 * time.Millisecond

// Collect removes what no template, sandbox, snapshot or build needs, and what dead servers left half made.
func (s *Store) Collect() error { return s.collect(0) }

// collect is Collect; if that frees fewer than want bytes, it also removes files that only save time, the longest unused first.
func (s *Store) collect(want int64) error {
	gone, err := s.sweep(want)
	err = errors.Join(err, s.secure())
	for _, name := range gone { // takes long; nothing can find the files any more
		err = errors.Join(err, os.RemoveAll(name))
	}
	return err
}

// How long files that nothing needs are kept after their last use.
const (
	stepKept   = 7 * 24 * time.Hour // makes builds faster
	logKept    = 7 * 24 * time.Hour
	uploadKept = 24 * time.Hour // was sent for a build
	uploadSafe = time.Hour      // may be meant for a build that is about to begin
	// halfMadeKept is for half-made files of earlier versions, which have no locks.
	halfMadeKept = 24 * time.Hour
)

// spare is a file that nothing needs.
type spare struct {
	kind, name string
	used       time.Time // the last time
	due        bool      // to be removed now; others still make something faster
}

// sweep renames the files that are to be removed. It holds the collecting lock, so that no job declares a need meanwhile.
func (s *Store) sweep(want int64) (gone []string, err error) {
	if !exists(s.Dir) {
		return nil, nil
	}
	unlock, err := s.collecting(context.Background(), unix.LOCK_EX)
	if err != nil {
		return nil, err
	}
	defer unlock()
	needed, err := s.needed()
	if err != nil {
		return nil, err
	}
	var spares []spare
	for _, kind := range kinds {
		entries, rerr := os.ReadDir(s.file(kind, ""))
		if errors.Is(rerr, fs.ErrNotExist) {
			continue
		}
		err = errors.Join(err, rerr, s.tidy(kind, entries))
		for _, e := range entries {
			if sp, ok := s.unneeded(kind, e, needed); ok {
				spares = append(spares, sp)
			}
		}
	}
	slices.SortFunc(spares, func(a, b spare) int {
		if a.due != b.due {
			if a.due {
				return -1
			}
			return 1
		}
		return a.used.Compare(b.used)
	})
	for _, sp := range spares {
		if !sp.due && want <= 0 {
			break
		}
		file, to := s.file(sp.kind, sp.name), s.file(sp.kind, gonePrefix+rand.Text())
		freed, serr := sizeOf(file)
		if rerr := s.Durable.RenameVolatile(file, to); rerr != nil { // what a power cut brings back is as unneeded as before
			err = errors.Join(err, serr, rerr)
			continue
		}
		want -= freed
		gone = append(gone, to)
	}
	return gone, err
}

// unneeded reports whether nothing needs a file, and returns what is known of it.
func (s *Store) unneeded(kind string, e os.DirEntry, needed *needs) (spare, bool) {
	info, err := e.Info()
	if err != nil { // it is gone
		return spare{}, false
	}
	sp := spare{kind: kind, name: e.Name(), used: info.ModTime()}
	age := time.Since(sp.used)
	rel := filepath.Join(kind, strings.TrimSuffix(sp.name, verifiedSuffix))
	if strings.HasPrefix(sp.name, ".") {
		sp.due = age > halfMadeKept
		return sp, sp.due && !strings.HasPrefix(sp.name, tempPrefix) && !strings.HasPrefix(sp.name, lockPrefix)
	}
	switch kind {
	case "layers":
		sp.due = age > stepKept || !needed.steps[rel]
	case "images", "started":
		sp.due = true
		if needed.unknown || age < pinTime {
			return sp, false
		}
	case "steps":
		sp.due = age > stepKept
		return sp, sp.due
	case "builds":
		sp.due = age > logKept
		return sp, sp.due
	case "caches":
		sp.due = age > stepKept
	case "uploads":
		sp.due = age > uploadKept
		return sp, age > uploadSafe
	default: // names, and jobs, which tidy handles
		return sp, false
	}
	return sp, !needed.files[rel]
}

// needs are the files that are needed, by their paths below Dir.
type needs struct {
	files   map[string]bool // of templates, sandboxes, snapshots and jobs
	steps   map[string]bool // layers of steps
	unknown bool            // whether it is unknown what sandboxes and snapshots need
}

func (s *Store) needed() (*needs, error) {
	n := &needs{files: map[string]bool{}, steps: map[string]bool{}, unknown: s.InUse == nil}
	add := func(file string) {
		if rel, err := filepath.Rel(s.Dir, file); err == nil {
			n.files[rel] = true
		}
	}
	if !n.unknown {
		images, err := s.InUse()
		if err != nil {
			return nil, err
		}
		for id := range images {
			add(s.imageFile(id))
		}
	}
	err := s.each("names", func(name string) error {
		var m Manifest
		if err := readJSON(name, &m); err != nil {
			return err
		}
		add(s.imageFile(m.Image))
		for _, l := range m.Layers {
			add(s.layerFile(l.Digest))
		}
		if m.Started != nil {
			add(s.file("started", m.Started.Name))
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	err = s.each("steps", func(name string) error {
		var st step
		if readJSON(name, &st) == nil && st.Layer != nil { // a file that cannot be read counts as missing
			n.steps[filepath.Join("layers", filepath.Base(s.layerFile(st.Layer.Digest)))] = true
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return n, s.jobs(n)
}

// jobs adds what running jobs need.
func (s *Store) jobs(n *needs) error {
	entries, err := os.ReadDir(s.file(jobsKind, ""))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, e := range entries {
		name := s.file(jobsKind, e.Name())
		if abandoned(name) {
			continue
		}
		f, err := os.Open(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		lines := bufio.NewScanner(f)
		for lines.Scan() {
			n.files[lines.Text()] = true
		}
		if err := errors.Join(lines.Err(), f.Close()); err != nil {
			return err
		}
	}
	return nil
}

// secure restricts the files of the store to those who must read them. Earlier versions left images readable to everybody.
func (s *Store) secure() (err error) {
	for _, kind := range kinds {
		dir := s.file(kind, "")
		info, serr := os.Stat(dir)
		if errors.Is(serr, fs.ErrNotExist) {
			continue
		}
		if mode, ok := walkable[kind]; serr == nil && !ok {
			serr = os.Chmod(dir, 0o700)
		} else if serr == nil && info.Mode().Perm() != mode {
			serr = os.Chmod(dir, mode)
		}
		entries, rerr := os.ReadDir(dir)
		err = errors.Join(err, serr, rerr)
		for _, e := range entries {
			if serr := s.sealExisting(s.file(kind, e.Name()), kind == "images"); !errors.Is(serr, fs.ErrNotExist) {
				err = errors.Join(err, serr)
			}
		}
	}
	return err
}
