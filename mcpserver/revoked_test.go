package mcpserver_test

import (
	"context"
	"errors"
	"net/http"
	"testing"

	"soulbox.dev/soulbox/internal/sandboxtest"
	"soulbox.dev/soulbox/mcpserver"
)

// TestRevoked: when a key is no longer valid, what it began ends: calls, which yield and undo nothing, tasks, and sessions.
func TestRevoked(t *testing.T) {
	valid, revoke := context.WithCancel(t.Context())
	s := newSite(t, func(o *mcpserver.HTTPOptions) {
		o.Admission.Until = func(context.Context) context.Context { return valid }
	})
	session := s.client(false).Open(t)
	stateless := s.client(true)
	for _, c := range []*sandboxtest.MCP{session, stateless} {
		go func() { _, _ = c.Call(t.Context(), "block", nil) }() // the answer does not matter
		<-s.started
	}
	withTasks := s.client(true)
	withTasks.Capabilities = map[string]any{"extensions": map[string]any{mcpserver.TasksExtension: map[string]any{}}}
	if a, err := withTasks.Call(t.Context(), "slow", map[string]any{"ms": 600_000}); err != nil || a.Error != nil {
		t.Fatal(err, a)
	}
	<-s.started
	revoke()
	for range 3 {
		if cause := <-s.ended; cause == nil || errors.Is(cause, mcpserver.ErrCancelled) || errors.Is(cause, context.Canceled) {
			t.Error(cause)
		}
	}
	sandboxtest.Eventually(t, "the session is over", func() bool {
		a, err := session.Do(t.Context(), "tools/list", nil)
		return err == nil && a.Status == http.StatusNotFound
	})
}
