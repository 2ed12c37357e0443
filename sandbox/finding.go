package sandbox

import (
	"errors"
	"fmt"
)

// Finding is what is known of a machine. Whoever asks for one decides by it, and by nothing else, whether a sandbox goes on.
type Finding int

// The findings.
const (
	// Well is a machine of which nothing bad is known.
	Well Finding = iota
	// Unknown is one that could not be asked about: the host had no descriptors, no memory, no time. It is no verdict: it is asked again.
	Unknown
	// Over is one that takes more than it may, is stopped, or whose agent is silent. It is paused, with its files.
	Over
	// Gone is one whose processes do not exist. It alone ends a sandbox at once.
	Gone
)

// FindingOf tells what an error of Machine.Check, Runtime.Attach or the ping says of a machine. Over and Gone are said in so many words
// (OverError, ErrNoMachine); whatever else fails is Unknown.
func FindingOf(err error) Finding {
	var over *OverError
	switch {
	case err == nil:
		return Well
	case errors.Is(err, ErrNoMachine):
		return Gone
	case errors.As(err, &over):
		return Over
	}
	return Unknown
}

// Kind is in what a machine is over its bounds.
type Kind string

// The kinds.
const (
	OverMemory  Kind = "memory"  // what the sentry holds for the guest
	OverKernel  Kind = "kernel"  // what the sentry takes for itself, for files and other objects of the guest
	OverStopped Kind = "stopped" // a process of the machine was stopped from outside
	OverSilent  Kind = "silent"  // the agent does not answer
)

// OverError says in what a machine is over its bounds.
type OverError struct {
	Kind        Kind
	Used, Limit int64  // bytes, for OverMemory and OverKernel
	Detail      string // what it took that for, if that is known, such as "150,000 open files"
}

// Error tells the finding as the owner reads it.
func (e *OverError) Error() string {
	detail := ""
	if e.Detail != "" {
		detail = " for " + e.Detail
	}
	switch e.Kind {
	case OverMemory:
		return fmt.Sprintf("it took %d MB of memory%s, limit %d MB", e.Used>>20, detail, e.Limit>>20)
	case OverKernel:
		return fmt.Sprintf("its kernel took %d MB%s, limit %d MB", e.Used>>20, detail, e.Limit>>20)
	case OverStopped:
		return "a process of its runtime was stopped"
	}
	return string(CauseSilent)
}
