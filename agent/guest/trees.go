package guest

import (
	"context"
	"crypto/rand"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"soulbox.dev/soulbox/agent"
)

// trees are the watches that outlast a call and the host that began them. It is safe for concurrent use.
type trees struct {
	known atomic.Int64

	mu   sync.Mutex
	byID map[string]*tree
}

const (
	treeIdle   = 10 * time.Minute // a watch unread for longer may be ended for a new one
	treeGather = 2 * time.Millisecond
)

func newTrees() *trees { return &trees{byID: map[string]*tree{}} }

// watchTree begins or reads a watch: it waits for an event up to the requested time.
func (s *Server) watchTree(ctx context.Context, r agent.TreeRequest) (agent.TreeResult, error) {
	t, err := s.trees.find(r.Watch)
	if r.Watch == "" {
		t, err = s.trees.open(r, &s.watches)
	}
	if err != nil {
		return agent.TreeResult{}, err
	}
	if r.Close {
		s.trees.close(t, &s.watches)
		return agent.TreeResult{Watch: t.id, Events: []agent.TreeEvent{}, Gone: true}, nil
	}
	limit := r.Limit
	if limit <= 0 || limit > agent.MaxTreeBatch {
		limit = agent.MaxTreeBatch
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
			select { // related events arrive within a moment
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

// open begins a watch. It counts together with the watch streams.
func (s *trees) open(r agent.TreeRequest, watches *atomic.Int64) (*tree, error) {
	if watches.Add(1) > maxWatches && !s.evict(watches) {
		watches.Add(-1)
		return nil, fmt.Errorf("watch %s: there are %d watches already: %w", quoted(r.Path), maxWatches, agent.ErrWatches)
	}
	id := "w" + strings.ToLower(rand.Text()[:8]) // unique among all sandboxes, so that a cursor for another sandbox is refused
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

// evict ends the watch that was unread for longest, if that is longer than treeIdle.
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
	return nil, fmt.Errorf("watch %q: %w", agent.Clip(id, 40), agent.ErrNoWatch)
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
