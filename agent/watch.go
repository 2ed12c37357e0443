package agent

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
)

const (
	maxWatches     = 64  // at once in one sandbox
	maxWatchEvents = 256 // in one message; more are said to be left out
	watchBatch     = 10 * time.Millisecond
)

// WatchEvent is a change of a file. Op is one of create, write, remove, rename (away) and attrib.
type WatchEvent struct {
	Op   string `json:"op"`
	Path string `json:"path"`
}

// WatchBatch is what has changed in a short time. Overflow says that there was more.
type WatchBatch struct {
	Events   []WatchEvent `json:"events,omitempty"`
	Overflow bool         `json:"overflow,omitempty"`
}

// serveWatch tells what changes in a directory, or of a file: then its directory is watched, since editors replace files.
func (s *Server) serveWatch(ctx context.Context, stream *yamux.Stream, h header) {
	refuse := func(err error) { _ = writeMessage(stream, answer{Error: wireError(err)}) }
	if err := checkPath("watch", h.Path); err != nil {
		refuse(err)
		return
	}
	if s.watches.Add(1) > maxWatches {
		s.watches.Add(-1)
		refuse(fmt.Errorf("watch %q: there are %d watches already: %w", h.Path, maxWatches, ErrLimit))
		return
	}
	defer s.watches.Add(-1)
	dir, only := filepath.Clean(h.Path), ""
	info, err := os.Stat(dir)
	if err != nil {
		refuse(err)
		return
	}
	if !info.IsDir() {
		only, dir = dir, filepath.Dir(dir)
	}
	w, err := fsnotify.NewWatcher()
	if err != nil {
		refuse(err)
		return
	}
	defer w.Close()
	if err := w.Add(dir); err != nil {
		refuse(&fs.PathError{Op: "watch", Path: h.Path, Err: err})
		return
	}
	if err := writeMessage(stream, answer{}); err != nil {
		return
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		discard(stream) // the host sends nothing: this returns when it closes
		cancel()
		_ = stream.SetWriteDeadline(time.Unix(1, 0))
	}()
	for {
		batch, ok := nextBatch(ctx, w, only)
		if !ok || writeMessage(stream, batch) != nil {
			return
		}
	}
}

// nextBatch waits for a change, and a moment for more.
func nextBatch(ctx context.Context, w *fsnotify.Watcher, only string) (b WatchBatch, ok bool) {
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
			if only != "" && e.Name != only {
				continue
			}
			if b.Overflow = b.Overflow || len(b.Events) >= maxWatchEvents; !b.Overflow {
				b.Events = append(b.Events, WatchEvent{Op: opName(e.Op), Path: strings.ToValidUTF8(e.Name, "\uFFFD")})
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
