package agent

import (
	"context"
	"crypto/rand"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// TreeRequest begins, reads or ends a watch that outlasts the call.
type TreeRequest struct {
	// Path and what follows begin one: of a directory, or of one file. Ignore are globs of names, or of paths below it.
	Path      string   `json:"path,omitempty"`
	Recursive bool     `json:"recursive,omitempty"`
	Ignore    []string `json:"ignore,omitempty"`
	// Watch names one that was begun, From is the number of the first event to read: those that are kept can be read again.
	Watch string `json:"watch,omitempty"`
	From  int64  `json:"from,omitempty"`
	Close bool   `json:"close,omitempty"`
	// Limit bounds the events, WaitMS the wait for the first one.
	Limit  int   `json:"limit,omitempty"`
	WaitMS int64 `json:"wait_ms,omitempty"`
}

// TreeEvent is a change in a watched tree: create, write, remove, rename (From is where it was), save (a file was replaced by a rename,
// From is what by, if that was in the tree) or attrib.
type TreeEvent struct {
	Op   string `json:"op"`
	Path string `json:"path"`
	From string `json:"from,omitempty"`
	Dir  bool   `json:"dir,omitempty"`
	// Whole says of create and save that a call of the host has written the file, which got its name when it was whole: there is no write
	// to tell of.
	Whole bool `json:"whole,omitempty"`
}

// TreeResult is what a watch has to tell.
type TreeResult struct {
	Watch  string      `json:"watch"`
	Events []TreeEvent `json:"events" max:"2000"`
	Next   int64       `json:"next"`           // the first event that is not in it
	More   bool        `json:"more,omitempty"` // there are some already
	// Lost says that events are missing: because there were too many, or the reader was too slow. What is there must be looked at anew.
	Lost bool `json:"lost,omitempty"`
	// Gone says that what is watched does not exist any more.
	Gone bool `json:"gone,omitempty"`
}

// trees are the watches that outlast the calls and the hosts that ask for them. It is safe for concurrent use.
type trees struct {
	known atomic.Int64

	mu   sync.Mutex
	byID map[string]*tree
}

const (
	treeIdle     = 10 * time.Minute // after which a watch that nobody reads makes room
	treeGather   = 2 * time.Millisecond
	maxTreeBatch = 2000
)

func newTrees() *trees { return &trees{byID: map[string]*tree{}} }

// watchTree begins a watch, or reads one: then it waits for an event as long as asked.
func (s *Server) watchTree(ctx context.Context, r TreeRequest) (TreeResult, error) {
	t, err := s.trees.find(r.Watch)
	if r.Watch == "" {
		t, err = s.trees.open(r, &s.watches)
	}
	if err != nil {
		return TreeResult{}, err
	}
	if r.Close {
		s.trees.close(t, &s.watches)
		return TreeResult{Watch: t.id, Events: []TreeEvent{}, Gone: true}, nil
	}
	limit := r.Limit
	if limit <= 0 || limit > maxTreeBatch {
		limit = maxTreeBatch
	}
	timer := time.NewTimer(time.Duration(r.WaitMS) * time.Millisecond)
	defer timer.Stop()
	for waited := r.WaitMS <= 0; ; {
		result, changed, err := t.read(r.From, limit)
		if err != nil || waited || len(result.Events) > 0 || result.Lost || result.Gone {
			return result, err
		}
		select {
		case <-changed:
			select { // what belongs together comes within a moment
			case <-time.After(treeGather):
			case <-ctx.Done():
			}
		case <-timer.C:
			waited = true
		case <-ctx.Done():
			waited = true
		}
	}
}

// open makes a watch. It counts with the streams that watch.
func (s *trees) open(r TreeRequest, watches *atomic.Int64) (*tree, error) {
	if watches.Add(1) > maxWatches && !s.evict(watches) {
		watches.Add(-1)
		return nil, fmt.Errorf("watch %s: there are %d watches already: %w", quoted(r.Path), maxWatches, ErrWatches)
	}
	id := "w" + strings.ToLower(rand.Text()[:8]) // no other sandbox' watch has it: a cursor that goes to the wrong one is refused
	t, err := openTree(id, r, &s.known)
	if err != nil {
		watches.Add(-1)
		return nil, err
	}
	s.mu.Lock()
	s.byID[id] = t
	s.mu.Unlock()
	return t, nil
}

// evict ends the watch that nobody has read for longest, if that is long enough.
func (s *trees) evict(watches *atomic.Int64) bool {
	s.mu.Lock()
	var oldest *tree
	var used time.Time
	for _, t := range s.byID {
		t.mu.Lock()
		at := t.used
		t.mu.Unlock()
		if oldest == nil || at.Before(used) {
			oldest, used = t, at
		}
	}
	s.mu.Unlock()
	if oldest == nil || time.Since(used) < treeIdle {
		return false
	}
	s.close(oldest, watches)
	return true
}

func (s *trees) find(id string) (*tree, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if t := s.byID[id]; t != nil {
		return t, nil
	}
	return nil, fmt.Errorf("watch %q: %w", clip(id, 40), ErrNoWatch)
}

// close ends a watch, once.
func (s *trees) close(t *tree, watches *atomic.Int64) {
	s.mu.Lock()
	_, open := s.byID[t.id]
	delete(s.byID, t.id)
	s.mu.Unlock()
	if open {
		watches.Add(-1)
		t.close()
	}
}

// closeAll is for tests.
func (s *trees) closeAll(watches *atomic.Int64) {
	s.mu.Lock()
	var all []*tree
	for _, t := range s.byID {
		all = append(all, t)
	}
	s.mu.Unlock()
	for _, t := range all {
		s.close(t, watches)
	}
}
