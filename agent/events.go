package agent

import (
	"slices"
	"sync"
	"time"
)

// Kinds of events.
const (
	EventStarted = "started"
	EventEnded   = "ended"
	EventKilled  = "killed" // what a process has started, or some of it, by the memory guard
)

// maxEvents bounds the events that an agent keeps for its host to fetch; the oldest go first.
const maxEvents = 512

// Event is the start or the end of a process that a user asked for, or what was killed of it. It has no command line: there may be a secret
// in it.
type Event struct {
	Seq      int64     `json:"seq"`
	Time     time.Time `json:"time"`
	Kind     string    `json:"kind" max:"128"`
	Process  string    `json:"process" max:"128"`
	Tag      string    `json:"tag,omitempty" max:"128"`
	User     string    `json:"user,omitempty" max:"1024"`
	ExitCode int       `json:"exit_code,omitempty"`
	Signal   string    `json:"signal,omitempty" max:"128"`
	Cause    string    `json:"cause,omitempty" max:"128"` // as in Process
	TookMS   int64     `json:"took_ms,omitempty"`
	// Of EventKilled: how many processes, the largest one's name, what they took together, and the limit that was reached.
	Killed int    `json:"killed,omitempty"`
	Name   string `json:"name,omitempty" max:"128"`
	Memory int64  `json:"memory,omitempty"`
	Limit  int64  `json:"limit,omitempty"`
}

// events are the latest events. It is safe for concurrent use.
type events struct {
	mu   sync.Mutex
	next int64   // of the next one; the first is 1
	last []Event // at most twice maxEvents: they are not moved with each
}

// add notes an event.
func (e *events) add(ev Event) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.next++
	ev.Seq = e.next
	if len(e.last) == 2*maxEvents {
		e.last = e.last[:copy(e.last, e.last[maxEvents:])]
	}
	e.last = append(e.last, ev)
}

// since gives the events after a number.
func (e *events) since(seq int64) []Event {
	e.mu.Lock()
	defer e.mu.Unlock()
	latest := e.last[max(0, len(e.last)-maxEvents):]
	for i, ev := range latest {
		if ev.Seq > seq {
			return slices.Clone(latest[i:])
		}
	}
	return nil
}

// noteStart notes the start of a process.
func (s *Server) noteStart(p *process) {
	s.events.add(Event{Time: p.started, Kind: EventStarted, Process: p.id, Tag: p.req.Tag, User: p.user.name})
}

// noteEnd notes the end of a process.
func (s *Server) noteEnd(p *process) {
	p.mu.Lock()
	ended, status, cause := p.ended, p.status, p.cause
	p.mu.Unlock()
	code, signal := exitCode(status)
	s.events.add(Event{Time: ended, Kind: EventEnded, Process: p.id, Tag: p.req.Tag, ExitCode: code, Signal: signal, Cause: cause,
		TookMS: ended.Sub(p.started).Milliseconds()})
}

// noteKill notes what was killed for the memory that it took.
func (s *Server) noteKill(r Relieved, limit int64) {
	s.events.add(Event{
		Time: time.Now(), Kind: EventKilled, Process: r.Process, Tag: r.Tag, Cause: CauseOOM,
		Killed: r.Processes, Name: r.Name, Memory: r.Memory, Limit: limit,
	})
}
