package agent

import (
	"time"
)

// Kinds of events.
const (
	EventStarted = "started"
	EventEnded   = "ended"
	EventKilled  = "killed" // the memory guard has killed all or some of what a process started
)

// MaxEvents bounds the events that an agent keeps for its host to fetch; the oldest are dropped first.
const MaxEvents = 512

// Event is the start or the end of a process that a user asked for, or a kill by the memory guard. It has no command line, which may
// contain a secret.
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
	// For EventKilled: the number of processes, the name of the largest one, their memory together, and the limit that was reached.
	Killed int    `json:"killed,omitempty"`
	Name   string `json:"name,omitempty" max:"128"`
	Memory int64  `json:"memory,omitempty"`
	Limit  int64  `json:"limit,omitempty"`
}
