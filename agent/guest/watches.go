package guest

import (
	"context"
	"crypto/rand"
	"fmt"
	"os"
	"path"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"soulbox.dev/soulbox/agent"
)

const (
	maxWatches  = 64               // at the same time in one sandbox
	watchIdle   = 10 * time.Minute // a watch unread for longer may be ended for a new one
	watchGather = 2 * time.Millisecond
)

// watches are all watches of a sandbox, and by their ids those that outlast a call and the host that began them. It is safe for concurrent
// use.
type watches struct {
	known atomic.Int64 // size of the names that all watches remember
	dirs  atomic.Int64 // directories that they have

	mu   sync.Mutex
	open int
	byID map[string]*dirWatch
}

func newWatches() *watches { return &watches{byID: map[string]*dirWatch{}} }

// watchTree begins or reads a watch: it waits for an event up to the requested time.
func (s *Server) watchTree(ctx context.Context, r agent.TreeRequest) (agent.TreeResult, error) {
	w, err := s.watches.get(r.Watch)
	if r.Watch == "" {
		w, err = s.watches.keep(ctx, r)
	}
	if err != nil {
		return agent.TreeResult{}, err
	}
	if r.Close {
		s.watches.end(w)
		return agent.TreeResult{Watch: w.id, Events: []agent.TreeEvent{}, Gone: true}, nil
	}
	limit := r.Limit
	if limit <= 0 || limit > agent.MaxTreeBatch {
		limit = agent.MaxTreeBatch
	}
	ctx, cancel := context.WithTimeout(ctx, time.Duration(r.WaitMS)*time.Millisecond)
	defer cancel()
	return w.await(ctx, r.From, limit, watchGather)
}

// begin begins a watch, if there are not too many. The caller ends it. A path that cannot be watched costs no other watch its place.
func (s *watches) begin(ctx context.Context, r agent.TreeRequest, follow bool) (*dirWatch, error) {
	if err := checkPath("watch", r.Path); err != nil {
		return nil, err
	}
	if _, err := os.Stat(path.Clean(r.Path)); err != nil {
		return nil, err
	}
	if !s.admit() {
		return nil, fmt.Errorf("watch %s: there are %d watches already: %w", quoted(r.Path), maxWatches, agent.ErrWatches)
	}
	w, err := newDirWatch(ctx, r, follow, &s.known, &s.dirs)
	if err != nil {
		s.left()
	}
	return w, err
}

// admit counts a new watch. If there are too many, it ends the one that was unread for longest, if that is longer than watchIdle.
func (s *watches) admit() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.open < maxWatches {
		s.open++
		return true
	}
	var oldest *dirWatch
	for _, w := range s.byID {
		if oldest == nil || w.lastUse().Before(oldest.lastUse()) {
			oldest = w
		}
	}
	if oldest == nil || time.Since(oldest.lastUse()) < watchIdle {
		return false
	}
	delete(s.byID, oldest.id)
	return oldest.close() // the new one takes its place
}

// left undoes admit.
func (s *watches) left() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.open--
}

// keep begins a watch that outlasts the call.
func (s *watches) keep(ctx context.Context, r agent.TreeRequest) (*dirWatch, error) {
	w, err := s.begin(ctx, r, false)
	if err != nil {
		return nil, err
	}
	w.id = "w" + strings.ToLower(rand.Text()[:8]) // unique among all sandboxes, so that a cursor for another sandbox is refused
	s.mu.Lock()
	defer s.mu.Unlock()
	s.byID[w.id] = w
	return w, nil
}

func (s *watches) get(id string) (*dirWatch, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if w := s.byID[id]; w != nil {
		return w, nil
	}
	return nil, fmt.Errorf("watch %q: %w", agent.Clip(id, 40), agent.ErrNoWatch)
}

// end ends a watch, once.
func (s *watches) end(w *dirWatch) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if w.close() {
		delete(s.byID, w.id)
		s.open--
	}
}

// endAll ends the watches that outlast calls.
func (s *watches) endAll() {
	s.mu.Lock()
	var all []*dirWatch
	for _, w := range s.byID {
		all = append(all, w)
	}
	s.mu.Unlock()
	for _, w := range all {
		s.end(w)
	}
}
