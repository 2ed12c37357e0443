package sandbox

import (
	"errors"
	"fmt"
)

// Finding is what is known about a machine. What is found out about a machine decides about its
// sandbox by a Finding alone.
type Finding int

// The findings.
const (
	// Well means that nothing bad is known about the machine.
	Well Finding = iota
	// Unknown means that the host could not be asked: it had no descriptors, memory or time. It is not a verdict; the host is asked again.
	Unknown
	// Over means that the machine takes more than it may, is stopped, or has a silent agent. The sandbox is paused, with its files.
	Over
	// Gone means that the machine's processes do not exist. Only this finding ends a sandbox at once.
	Gone
)

// FindingOf says what an error of Machine.Check, Runtime.Attach or a ping means for the machine. Only OverError means Over and only
// ErrNoMachine means Gone; every other error is Unknown.
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

// OverKind is the bound that a machine exceeds, or what else is wrong with it.
type OverKind string

// The kinds.
const (
	OverMemory  OverKind = "memory"  // what the sentry holds for the guest
	OverKernel  OverKind = "kernel"  // what the sentry uses itself, for the guest's files and other objects
	OverStopped OverKind = "stopped" // a process of the machine was stopped from outside
	OverSilent  OverKind = "silent"  // the agent does not respond
)

// OverError says which bound a machine exceeds.
type OverError struct {
	Kind        OverKind
	Used, Limit int64  // bytes, for OverMemory and OverKernel
	Detail      string // what the memory is used for, if that is known, such as "150,000 open files"
}

// Error describes the finding in words for the owner.
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
