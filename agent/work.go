package agent

import (
	"context"
	"sync"
)

// work is whether the sandbox is at work: whether it has processes that last. It is safe for concurrent use; the zero value is not at work.
type work struct {
	mu      sync.Mutex
	going   bool
	changed chan struct{} // closed at the next change; nil where nobody waits for it
}

func (w *work) set(going bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.going == going {
		return
	}
	w.going = going
	if w.changed != nil {
		close(w.changed)
		w.changed = nil
	}
}

func (w *work) is() (going bool, changed <-chan struct{}) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.changed == nil {
		w.changed = make(chan struct{})
	}
	return w.going, w.changed
}

// WorkRequest asks whether the sandbox is at work. With Known the answer comes when it is other than that.
type WorkRequest struct {
	Known *bool `json:"known,omitempty"`
}

// WorkResult is the answer; it may be what was known, where the machine is about to stand still.
type WorkResult struct {
	Going bool `json:"going"`
}

func (s *Server) atWork(ctx context.Context, r WorkRequest) WorkResult {
	for {
		going, changed := s.work.is()
		if r.Known == nil || going != *r.Known {
			return WorkResult{going}
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return WorkResult{going}
		}
	}
}

// lookForWork notes whether processes last.
func (s *Server) lookForWork() (tasks int64) {
	tasks = number(readFile(s.groups.tasks))
	s.work.set(tasks > 0)
	return tasks
}

// AtWork tells whether processes run in the sandbox that have lasted for some 10 ms; with known, it waits for a change of that. It is no use of the sandbox.
func (c *Client) AtWork(ctx context.Context, known *bool) (bool, error) {
	r, err := call[WorkResult](ctx, c, callWork, WorkRequest{Known: known})
	return r.Going, err
}
