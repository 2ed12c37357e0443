package guest

import (
	"slices"
	"sync"
	"time"

	"soulbox.dev/soulbox/agent"
)

// events keeps the latest events. It is safe for concurrent use.
type events struct {
	mu   sync.Mutex
	next int64         // number of the latest event; the first is 1
	last []agent.Event // at most 2*MaxEvents, so that not every add moves them
}

// add adds an event.
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

// since returns the kept events after a number.
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

// noteStart adds the start of a process to the events.
func (s *Server) noteStart(p *process) {
	s.events.add(agent.Event{Time: p.started, Kind: agent.EventStarted, Process: p.id, Tag: p.req.Tag, User: p.user.name})
}

// noteEnd adds the end of a process to the events.
func (s *Server) noteEnd(p *process) {
	p.mu.Lock()
	ended, status, cause := p.ended, p.status, p.cause
	p.mu.Unlock()
	code, signal := exitCode(status)
	s.events.add(agent.Event{Time: ended, Kind: agent.EventEnded, Process: p.id, Tag: p.req.Tag, ExitCode: code, Signal: signal,
		Cause:  cause,
		TookMS: ended.Sub(p.started).Milliseconds()})
}

// noteKill adds what was killed because of its memory to the events.
func (s *Server) noteKill(r agent.Relieved, limit int64) {
	s.events.add(agent.Event{
		Time: time.Now(), Kind: agent.EventKilled, Process: r.Process, Tag: r.Tag, Cause: agent.CauseOOM,
		Killed: r.Processes, Name: r.Name, Memory: r.Memory, Limit: limit,
	})
}
