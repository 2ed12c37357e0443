package agent

import (
	"errors"
	"fmt"
	"syscall"
)

// Causes that have no errno. They cross the pipe as a kind, so errors.Is also works on the host.
var (
	ErrNoProcess  = errors.New("no such process")
	ErrEnded      = errors.New("process has ended")
	ErrTagInUse   = errors.New("tag is in use by a running process")
	ErrNoUser     = errors.New("no such user")
	ErrNoSignal   = errors.New("no such signal")
	ErrStdin      = errors.New("stdin is closed")
	ErrInvalid    = errors.New("invalid request")
	ErrTooLarge   = errors.New("too large")
	ErrNotRegular = errors.New("not a regular file")
	ErrNotText    = errors.New("not a text file")
	ErrNoMatch    = errors.New("text does not occur in the file")
	ErrAmbiguous  = errors.New("text occurs more than once")
	ErrChanging   = errors.New("other programs keep changing the file")
	ErrCwd        = errors.New("no such working directory")
	ErrCommand    = errors.New("command line too long")
	ErrLimit      = errors.New("limit reached")
	ErrNoTerminal = errors.New("process has no terminal")
	ErrNoWatch    = errors.New("no such watch")
	ErrWatches    = errors.New("too many watches")
	// ErrLost means that the agent or the pipe to it is gone.
	ErrLost = errors.New("agent lost")
	// ErrVersion means that host and agent speak different protocols.
	ErrVersion = errors.New("protocol version mismatch")
)

// Kinds are the names by which the causes cross the pipe.
var Kinds = map[string]error{
	"no_process": ErrNoProcess, "ended": ErrEnded, "tag_in_use": ErrTagInUse, "no_user": ErrNoUser, "no_signal": ErrNoSignal,
	"stdin": ErrStdin, "invalid": ErrInvalid, "too_large": ErrTooLarge, "not_regular": ErrNotRegular, "not_text": ErrNotText,
	"no_match": ErrNoMatch, "ambiguous": ErrAmbiguous, "changing": ErrChanging, "cwd": ErrCwd, "limit": ErrLimit,
	"no_terminal": ErrNoTerminal, "command": ErrCommand,
	"no_watch": ErrNoWatch, "watches": ErrWatches,
}

// Error is an error of the guest as it crosses the pipe.
type Error struct {
	Kind    string        `json:"kind,omitempty"`
	Op      string        `json:"op,omitempty"`
	Path    string        `json:"path,omitempty" is:"name"`
	Errno   syscall.Errno `json:"errno,omitempty"`
	Message string        `json:"message"`
}

// Error returns the guest's own message.
func (e *Error) Error() string { return e.Message }

// Unwrap returns the errno and the kind, so that errors.Is works as if the error had occurred on the host.
func (e *Error) Unwrap() []error {
	var all []error
	if e.Errno != 0 {
		all = append(all, e.Errno)
	}
	if kind := Kinds[e.Kind]; kind != nil {
		all = append(all, kind)
	}
	return all
}

// Invalid returns an error that is ErrInvalid.
func Invalid(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, ErrInvalid)...)
}

// Clip cuts a text to n bytes, at a character boundary, and marks the cut with "…".
func Clip(s string, n int) string {
	if len(s) <= n {
		return s
	}
	return string(Whole([]byte(s[:n]))) + "…"
}
