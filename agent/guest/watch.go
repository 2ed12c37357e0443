package guest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/fsnotify/fsnotify"
	"github.com/hashicorp/yamux"
	"soulbox.dev/soulbox/agent"
)

const (
	maxWatches = 64 // at the same time in one sandbox
	watchBatch = 10 * time.Millisecond
)

// serveWatch reports the changes in a directory, or of a file: for a file it watches the directory, since editors replace files. Behind a
// symlink it watches the real place, too. A directory that is removed is watched again as soon as that name exists again.
func (s *Server) serveWatch(ctx context.Context, stream *yamux.Stream, h agent.Header) {
	refuse := func(err error) { _ = agent.WriteMessage(stream, agent.Answer{Error: wireError(err)}) }
	if err := checkPath("watch", h.Path); err != nil {
		refuse(err)
		return
	}
	if s.watches.Add(1) > maxWatches {
		s.watches.Add(-1)
		refuse(fmt.Errorf("watch %s: there are %d watches already: %w", quoted(h.Path), maxWatches, agent.ErrWatches))
		return
	}
	defer s.watches.Add(-1)
	info, err := os.Stat(h.Path)
	if err != nil {
		refuse(err)
		return
	}
	w := &watcher{isDir: info.IsDir(), names: map[string]bool{}, dirs: map[string]bool{}}
	if w.Watcher, err = fsnotify.NewWatcher(); err != nil {
		refuse(err)
		return
	}
	defer w.Close()
	if err := w.begin(filepath.Clean(h.Path)); err != nil {
		refuse(&fs.PathError{Op: "watch", Path: h.Path, Err: err})
		return
	}
	if err := agent.WriteMessage(stream, agent.Answer{}); err != nil {
		return
	}
	ctx, cancel := untilClosed(ctx, stream)
	defer cancel()
	for {
		batch, ok := w.next(ctx)
		if !ok || agent.WriteMessage(stream, batch) != nil {
			return
		}
	}
}

// watcher watches one path under all its names.
type watcher struct {
	*fsnotify.Watcher
	isDir bool
	names map[string]bool // of the file, or of the directory whose entries count: the requested name, and where its symlinks lead
	dirs  map[string]bool // directories above it, in which only the next path element counts
}

// begin watches the path and the directories above it.
func (w *watcher) begin(path string) error {
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return err
	}
	for _, name := range []string{path, real} {
		w.names[name] = true
		if w.isDir {
			if err := w.Add(name); err != nil {
				return err
			}
		}
		for dir := filepath.Dir(name); ; dir = filepath.Dir(dir) {
			w.dirs[dir] = true
			if err := w.Add(dir); err != nil && dir == filepath.Dir(name) && !w.isDir {
				return err // without those further above, only changes of the directory itself are missed
			}
			if dir == filepath.Dir(dir) {
				break
			}
		}
	}
	return nil
}

// again watches a directory of this name that has come back, and what is below it by now.
func (w *watcher) again(name string) {
	for dir := range w.dirs {
		if dir == name || strings.HasPrefix(dir, name+"/") {
			_ = w.Add(dir) // an error means that it does not exist yet and comes later
		}
	}
	if w.isDir {
		for n := range w.names {
			if n == name || strings.HasPrefix(n, name+"/") {
				_ = w.Add(n) // as above
			}
		}
	}
}

// counts reports whether an event concerns the watched path (own) or a directory above it (above, which only says that something changed).
func (w *watcher) counts(e fsnotify.Event) (own, above bool) {
	if w.names[e.Name] || w.isDir && w.names[filepath.Dir(e.Name)] {
		return true, w.names[e.Name] && w.isDir && e.Has(fsnotify.Create)
	}
	return false, w.dirs[e.Name] && e.Has(fsnotify.Create|fsnotify.Remove|fsnotify.Rename)
}

// next waits for a change, then for watchBatch for more.
func (w *watcher) next(ctx context.Context) (b agent.WatchBatch, ok bool) {
	var full <-chan time.Time
	for {
		select {
		case <-ctx.Done():
			return b, false
		case <-full:
			return b, true
		case err, open := <-w.Errors:
			if !open {
				return b, false
			}
			b.Overflow = b.Overflow || errors.Is(err, fsnotify.ErrEventOverflow)
		case e, open := <-w.Events:
			if !open {
				return b, false
			}
			own, above := w.counts(e)
			if above && e.Has(fsnotify.Create) {
				w.again(e.Name)
				b.Overflow = true // what was created before the new watch is not known individually
			}
			b.Overflow = b.Overflow || above
			if own && !b.Overflow {
				if b.Overflow = len(b.Events) >= agent.MaxWatchEvents; !b.Overflow {
					b.Events = append(b.Events, agent.WatchEvent{Op: opName(e.Op), Path: e.Name})
				}
			}
		}
		if full == nil && (b.Overflow || len(b.Events) > 0) {
			full = time.After(watchBatch)
		}
	}
}

func opName(op fsnotify.Op) string {
	switch {
	case op.Has(fsnotify.Create):
		return "create"
	case op.Has(fsnotify.Remove):
		return "remove"
	case op.Has(fsnotify.Rename):
		return "rename"
	case op.Has(fsnotify.Write):
		return "write"
	}
	return "attrib"
}
