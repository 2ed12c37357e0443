package sandbox

import (
	"fmt"
	"time"
)

// maxLog bounds the log of one sandbox, in entries; the oldest go first.
const maxLog = 500

// LogEntry is something that happened to a sandbox.
type LogEntry struct {
	Time    time.Time `json:"time"`
	Message string    `json:"message"`
}

// record adds to the log and tells those who wait for a change. s.mu is held.
func (s *Sandbox) record(format string, args ...any) {
	s.log = append(s.log, LogEntry{time.Now(), fmt.Sprintf(format, args...)})
	if len(s.log) > maxLog {
		s.log = append([]LogEntry(nil), s.log[len(s.log)-maxLog:]...)
	}
	if s.changed != nil {
		close(s.changed)
		s.changed = nil
	}
	if s.m.opts.Changed != nil {
		s.m.opts.Changed(s.info())
	}
}

// Logs tells what has happened to the sandbox, the oldest first.
func (s *Sandbox) Logs() []LogEntry {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]LogEntry(nil), s.log...)
}

// Changed is closed at the next change of what Info or Logs tell.
func (s *Sandbox) Changed() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.changed == nil {
		s.changed = make(chan struct{})
	}
	return s.changed
}
