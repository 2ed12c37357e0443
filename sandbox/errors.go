package sandbox

import (
	"errors"
	"fmt"
	"time"
)

// Sentinels of the domain; faces map them to their own kinds of errors.
var (
	ErrNotFound   = errors.New("no such sandbox")
	ErrNoTemplate = errors.New("no such template")
	ErrInvalid    = errors.New("invalid request")
	ErrNoRoom     = errors.New("no room")
	ErrTooMany    = errors.New("too many sandboxes")
	ErrClosed     = errors.New("server is shutting down")
	// ErrState is behind every StateError.
	ErrState = errors.New("wrong state")
)

// Cause is why a sandbox has ended, as its users are told.
type Cause string

// The causes that the domain itself knows; a failed boot has its error as cause.
const (
	CauseKilled   Cause = "killed by request"
	CauseTimeout  Cause = "its life time was over"
	CauseShutdown Cause = "its server has ended"
	CauseLost     Cause = "agent lost"
	CauseSilent   Cause = "its agent did not answer"
)

// Error implements error.
func (c Cause) Error() string { return string(c) }

// StateError says that a sandbox is not in the state that a verb needs.
type StateError struct {
	ID    string
	Verb  string
	State State
	Cause string    // why it is in that state, for the ended ones
	At    time.Time // since when
}

// Error names sandbox, verb, state and cause.
func (e *StateError) Error() string {
	text := fmt.Sprintf("cannot %s sandbox %s: it is %s", e.Verb, e.ID, e.State)
	if e.Cause != "" {
		text += fmt.Sprintf(" since %s (%s)", e.At.UTC().Format(time.RFC3339), e.Cause)
	}
	return text
}

// Is makes errors.Is(err, ErrState) true.
func (e *StateError) Is(target error) bool { return target == ErrState }
