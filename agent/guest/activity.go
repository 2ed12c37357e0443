package guest

import (
	"context"
	"sync"

	"soulbox.dev/soulbox/agent"
)

// work tells whether the sandbox is at work: whether it has processes that last, or the agent itself has work that lasts. It is safe for
// concurrent use; the zero value is not at work.
type work struct {
	mu            sync.Mutex
	tasks, labour bool
	changed       chan struct{} // closed at the next change; nil if no caller waits for it
}

// look records what find sets. No two calls of find overlap.
func (w *work) look(find func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	before := w.tasks || w.labour
	find()
	if before != (w.tasks || w.labour) && w.changed != nil {
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
	return w.tasks || w.labour, w.changed
}

func (s *Server) atWork(ctx context.Context, r agent.WorkRequest) agent.WorkResult {
	for {
		going, changed := s.work.is()
		if r.Known == nil || going != *r.Known {
			return agent.WorkResult{Going: going}
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return agent.WorkResult{Going: going}
		}
	}
}

// lookForTasks records whether there are processes.
func (s *Server) lookForTasks() (tasks int64) {
	s.work.look(func() {
		tasks = number(readFile(s.groups.tasks))
		s.work.tasks = tasks > 0
	})
	return tasks
}
