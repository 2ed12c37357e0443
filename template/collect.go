package template

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"maps"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"soulbox.dev/soulbox/sandbox"
)

// step is what a step has made, as steps/KEY.json keeps it.
type step struct {
	Layer *Layer `json:"layer,omitempty"` // nil has changed no files
}

// known gives a step that was carried out before.
func (s *Store) known(key string) (step, bool) {
	var st step
	file := s.file("steps", key+".json")
	if err := readJSON(file, &st); err != nil {
		return st, false // as good as none
	}
	if st.Layer != nil && touch(s.layerFile(st.Layer.Digest)) != nil {
		return st, false
	}
	return st, touch(file) == nil
}

func (s *Store) remember(key string, st step) error {
	body, err := json.Marshal(st)
	if err != nil {
		return err
	}
	return s.writeText(s.file("steps", key+".json"), body)
}

// lock keeps two from making the same thing at the same time, those of other servers too. It waits as long as ctx lasts.
func (s *Store) lock(ctx context.Context, kind, key string) (unlock func(), err error) {
	if err := os.MkdirAll(s.file(kind, ""), 0o711); err != nil {
		return nil, err
	}
	for {
		lock, err := sandbox.LockFile(s.file(kind, ".lock-"+key), false)
		if err == nil {
			return sync.OnceFunc(func() {
				_ = os.Remove(lock.Name()) // who waits for it may make the same thing again, which does no harm
				_ = lock.Close()
			}), nil
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

// Collect removes what no template, sandbox, snapshot or build needs any more.
func (s *Store) Collect() error {
	if s.InUse == nil {
		return nil
	}
	images, err := s.InUse()
	if err != nil {
		return err
	}
	images, layers, started := maps.Clone(images), map[string]bool{}, map[string]bool{}
	if images == nil {
		images = map[string]bool{}
	}
	err = s.each("names", func(name string) error {
		var m Manifest
		if err := readJSON(name, &m); err != nil {
			return err
		}
		images[m.Image] = true
		for _, l := range m.Layers {
			layers[l.Digest] = true
		}
		if m.Started != nil {
			started[m.Started.Name] = true
		}
		return nil
	})
	if err != nil {
		return err
	}
	return errors.Join(
		s.sweep("steps", stepKept, func(string) bool { return false }),
		s.sweep("layers", stepKept, func(name string) bool { return layers["sha256:"+strings.TrimSuffix(name, verifiedSuffix)] }),
		s.sweep("images", imageKept, func(name string) bool { return images["sha256:"+strings.TrimSuffix(name, ".erofs")] }),
		s.sweep("started", imageKept, func(name string) bool { return started[name] }),
		s.sweep("caches", stepKept, func(string) bool { return false }),
		s.sweep("builds", logKept, func(string) bool { return false }),
		s.sweep("uploads", uploadKept, func(string) bool { return false }),
	)
}

// How long what is not needed is kept after it was last used. Whoever is about to need it has touched it.
const (
	stepKept  = 7 * 24 * time.Hour
	imageKept = time.Hour
	logKept   = 7 * 24 * time.Hour
	// uploadKept is of files that were sent for a build.
	uploadKept = 24 * time.Hour
	// halfMadeKept is longer than any of it takes.
	halfMadeKept = 24 * time.Hour
)

// sweep removes files that nobody has used for a while, and what dead builds have left half made.
func (s *Store) sweep(kind string, whole time.Duration, needed func(name string) bool) error {
	entries, err := os.ReadDir(s.file(kind, ""))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for _, e := range entries {
		kept := whole
		info, ierr := e.Info()
		if strings.HasPrefix(e.Name(), ".") {
			kept = min(kept, halfMadeKept)
		}
		if ierr != nil || time.Since(info.ModTime()) < kept || needed(e.Name()) {
			continue
		}
		err = errors.Join(err, os.RemoveAll(s.file(kind, e.Name())))
	}
	return err
}
