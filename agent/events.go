package agent

import (
	"time"
)

// Kinds of events.
const (
	EventStarted = "started"
	EventEnded   = "ended"
	EventKilled  = "killed" // what a process has started, or some of it, by the memory guard
)

// MaxEvents bounds the events that an agent keeps for its host to fetch; the oldest go first.
const MaxEvents = 512

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
