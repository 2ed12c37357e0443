package guest

import (
	"slices"
	"sync"
	"time"

	"soulbox.dev/soulbox/agent"
)

// events are the latest events. It is safe for concurrent use.
type events struct {
	mu   sync.Mutex
	next int64         // of the next one; the first is 1
	last []agent.Event // at most twice maxEvents: they are not moved with each
}

// add notes an event.
func (e *events) add(ev agent.Event) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.next++
	ev.Seq = e.next
	if len(e.last) == 2*agent.MaxEvents {
		e.last = e.last[:copy(e.last, e.last[agent.MaxEvents:])]
	}
	e.last = append(e.last, ev)
}

// since gives the events after a number.
func (e *events) since(seq int64) []agent.Event {
	e.mu.Lock()
	defer e.mu.Unlock()
	latest := e.last[max(0, len(e.last)-agent.MaxEvents):]
	for i, ev := range latest {
		if ev.Seq > seq {
			return slices.Clone(latest[i:])
		}
	}
	return nil
}

// noteStart notes the start of a process.
func (s *Server) noteStart(p *process) {
	s.events.add(agent.Event{Time: p.started, Kind: agent.EventStarted, Process: p.id, Tag: p.req.Tag, User: p.user.name})
}

// noteEnd notes the end of a process.
func (s *Server) noteEnd(p *process) {
	p.mu.Lock()
	ended, status, cause := p.ended, p.status, p.cause
	p.mu.Unlock()
	code, signal := exitCode(status)
	s.events.add(agent.Event{Time: ended, Kind: agent.EventEnded, Process: p.id, Tag: p.req.Tag, ExitCode: code, Signal: signal,
		Cause:  cause,
		TookMS: ended.Sub(p.started).Milliseconds()})
}

// noteKill notes what was killed for the memory that it took.
func (s *Server) noteKill(r agent.Relieved, limit int64) {
	s.events.add(agent.Event{
		Time: time.Now(), Kind: agent.EventKilled, Process: r.Process, Tag: r.Tag, Cause: agent.CauseOOM,
		Killed: r.Processes, Name: r.Name, Memory: r.Memory, Limit: limit,
	})
}
