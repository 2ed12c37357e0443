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
	ErrClosed     = errors.New("server is shutting down")
	// ErrState is behind every StateError.
	ErrState = errors.New("wrong state")
)

// Causes of a sandbox' end.
var (
	CauseKilled   = errors.New("killed by request")
	CauseTimeout  = errors.New("its life time was over")
	CauseShutdown = errors.New("its server has ended")
	CauseLost     = errors.New("agent lost")
)

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
