package guest

import (
	"context"
	"sync"

	"soulbox.dev/soulbox/agent"
)

// activity tells whether the sandbox is busy: whether it has processes that last, or the agent itself has work that lasts. It is safe for
// concurrent use; the zero value is not busy.
type activity struct {
	mu             sync.Mutex
	processes, own bool
	changed        chan struct{} // closed at the next change; nil if no caller waits for it
}

// update records what set sets. No two calls of set overlap.
func (a *activity) update(set func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	before := a.processes || a.own
	set()
	if before != (a.processes || a.own) && a.changed != nil {
		close(a.changed)
		a.changed = nil
	}
}

func (a *activity) now() (busy bool, changed <-chan struct{}) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.changed == nil {
		a.changed = make(chan struct{})
	}
	return a.processes || a.own, a.changed
}

func (s *Server) busy(ctx context.Context, r agent.BusyRequest) agent.BusyResult {
	for {
		busy, changed := s.activity.now()
		if r.Known == nil || busy != *r.Known {
			return agent.BusyResult{Busy: busy}
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return agent.BusyResult{Busy: busy}
		}
	}
}

// countProcesses counts the tasks of users, and records whether there are any.
func (s *Server) countProcesses() (tasks int64) {
	s.activity.update(func() {
		tasks = number(readFile(s.groups.tasks))
		s.activity.processes = tasks > 0
	})
	return tasks
}
