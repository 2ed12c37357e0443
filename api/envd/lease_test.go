package envd

import (
	"errors"
	"net/http"
	"testing"

	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/api/client"
	"soulbox.dev/soulbox/internal/sandboxtest"
	"soulbox.dev/soulbox/sandbox"
)

// TestLeaseOfGoneFollower: a process whose last follower is gone is killed, also if the first sign of that was an error of sending.
func TestLeaseOfGoneFollower(t *testing.T) {
	sb, err := newManager(t).Create(t.Context(), sandbox.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	c, err := sb.Agent(t.Context(), "test")
	if err != nil {
		t.Fatal(err)
	}
	began, err := c.Start(t.Context(), agent.StartRequest{Args: []string{"sleep", "600"}})
	if err != nil {
		t.Fatal(err)
	}
	var all leases
	p := &scope{Target: Target{Sandbox: sb}, client: c}
	all.follow(p, began.Process.ID, http.Header{client.LingerHeader: {"1"}})(errors.New("broken pipe"))
	sandboxtest.Eventually(t, "it is killed", func() bool {
		s, err := c.Wait(t.Context(), agent.WaitRequest{Process: began.Process.ID})
		return err == nil && s.Process.State != agent.StateRunning
	})
}
