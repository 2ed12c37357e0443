package sandbox

import (
	"errors"
	"fmt"
	"time"
)

// Sentinels of the domain; faces map them to their own kinds of errors.
var (
	ErrNotFound     = errors.New("no such sandbox")
	ErrNoTemplate   = errors.New("no such template")
	ErrInvalid      = errors.New("invalid request")
	ErrNoRoom       = errors.New("no room")
	ErrTooMany      = errors.New("too many sandboxes")
	ErrClosed       = errors.New("server is shutting down")
	ErrNoDisk       = errors.New("no room on disk")
	ErrNoSnapshot   = errors.New("no such snapshot")
	ErrBusySnapshot = errors.New("the snapshot is in use")
	ErrSnapshot     = errors.New("there is a snapshot of that name")
	// ErrUnfit means that the sandbox's agent has a version that this server does not speak.
	ErrUnfit = errors.New("it was made by a version of SoulBox that this server is not compatible with")
	// ErrNoMachine is returned by a Runtime that finds nothing of a machine.
	ErrNoMachine = errors.New("no machine runs there")
	// ErrPutOff means that this server could not yet take over a sandbox of a dead server.
	ErrPutOff = errors.New("this server could not take it over yet, leaves it as it is, and tries again")
	// ErrDamaged means that a checkpoint's bytes are not those that were saved.
	ErrDamaged = errors.New("what was saved is damaged")
	// ErrState is what every StateError matches.
	ErrState = errors.New("wrong state")
	// ErrTooMuch is ErrNoRoom of a request that no other sandbox's end makes room for.
	ErrTooMuch = fmt.Errorf("more than there is: %w", ErrNoRoom)
)

// Cause says why a sandbox ended or is paused, in words for its users.
type Cause string

// The causes that the domain itself knows. When a boot fails, its error is the cause.
const (
	CauseKilled   Cause = "killed by request"
	CauseTimeout  Cause = "its life time was over"
	CauseShutdown Cause = "its server has ended"
	CauseLost     Cause = "agent lost"
	CauseSilent   Cause = "its agent did not answer"
	CauseIdle     Cause = "it was not used for as long as it may be idle"
	// CauseForgotten means that the sandbox stayed paused for longer than a paused sandbox is kept.
	CauseForgotten Cause = "it was paused for longer than a paused sandbox is kept"
	// CauseReclaimed means that the sandbox was ended because others needed its room on disk and the operator allows that.
	CauseReclaimed Cause = "it had been paused on disk for the longest time, and its room was needed"
	CauseRequest   Cause = "by request"
	CauseDied      Cause = "its server died while it ran, and it was not set to outlive its server"
	CauseHalfMade  Cause = "its server died while it was made"
	// CauseStopped means that the sandbox's processes were stopped from outside for too long.
	CauseStopped Cause = "its processes were stopped from outside and not continued"
	CauseGone    Cause = "it was gone when a server came back to it: the host had restarted, or its runtime had crashed"
)

// Error implements error.
func (c Cause) Error() string { return string(c) }

// StateError says that a sandbox is not in the state that a verb needs.
type StateError struct {
	ID    string
	Verb  string
	State State
	Cause string    // why it is in that state, if it has ended or is paused
	At    time.Time // since when
	Wakes bool      // any call resumes it
	Saved bool      // it has failed, and Resume starts it from what was saved
}

// Error names the sandbox, the verb, the state and the cause.
func (e *StateError) Error() string {
	text := fmt.Sprintf("cannot %s sandbox %s: it is %s", e.Verb, e.ID, e.State)
	if e.Cause != "" {
		text += fmt.Sprintf(" since %s (%s)", e.At.UTC().Format(time.RFC3339), e.Cause)
	}
	return text
}

// Is makes errors.Is(err, ErrState) true.
func (e *StateError) Is(target error) bool { return target == ErrState }
