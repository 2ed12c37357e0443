package envd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"syscall"
	"testing"

	"connectrpc.com/connect"

	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/sandbox"
)

// TestCodes: errors get the codes from which clients make their own errors (docs/protocol.md), however they are wrapped; an error that has
// a code keeps it.
func TestCodes(t *testing.T) {
	for err, want := range map[error]connect.Code{
		fs.ErrNotExist: connect.CodeNotFound, agent.ErrNoProcess: connect.CodeNotFound, agent.ErrNoUser: connect.CodeUnauthenticated,
		agent.ErrInvalid: connect.CodeInvalidArgument,
		syscall.ENOTDIR:  connect.CodeInvalidArgument, syscall.ENOSPC: connect.CodeResourceExhausted,
		agent.ErrWatches: connect.CodeResourceExhausted, agent.ErrLimit: connect.CodeResourceExhausted,
		&sandbox.StateError{}: connect.CodeUnavailable, sandbox.ErrClosed: connect.CodeUnavailable, agent.ErrLost: connect.CodeUnavailable,
		context.DeadlineExceeded: connect.CodeDeadlineExceeded, syscall.EACCES: connect.CodePermissionDenied,
		fs.ErrExist: connect.CodeAlreadyExists, errors.New("else"): connect.CodeInternal,
		connect.NewError(connect.CodeDataLoss, fs.ErrNotExist): connect.CodeDataLoss,
	} {
		if got := connect.CodeOf(rpcError(fmt.Errorf("in vain: %w", err))); got != want {
			t.Errorf("%v is %s, want %s", err, got, want)
		}
	}
	if rpcError(nil) != nil {
		t.Error("nothing is an error")
	}
}

// TestEncoding: a client that accepts only gzip gets it, and one that accepts no available encoding gets an error (RFC 9110, 12.5.3).
func TestEncoding(t *testing.T) {
	for accept, want := range map[string][2]bool{
		"": {false, true}, "gzip": {true, true}, "gzip, deflate, br": {false, true}, "identity": {false, true}, "*": {false, true},
		"gzip;q=1, identity;q=0.5": {true, true},
		"identity;q=0, gzip":       {true, true}, "br, identity;q=0": {false, false}, "*;q=0": {false, false}, "gzip;q=0": {false, true},
		"br;q=x, ;;;": {false, true},
	} {
		var values []string
		if accept != "" {
			values = []string{accept}
		}
		if zip, ok := encoding(values); zip != want[0] || ok != want[1] {
			t.Errorf("%q: %v %v", accept, zip, ok)
		}
	}
}
