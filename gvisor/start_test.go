package gvisor_test

import (
	"context"
	"sync"
	"testing"
	"time"

	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/internal/sandboxtest"
	"soulbox.dev/soulbox/sandbox"
)

// TestHungStarts has programs whose start does not come to its end, as the guest wants: their callers may wait, nobody else.
func TestHungStarts(t *testing.T) {
	_, c := newSandbox(t, sandbox.CreateOptions{})
	sandboxtest.Run(t, c, "mkfifo -m 755 /tmp/fifo; printf '#!/tmp/fifo\\n' > /tmp/hangs; chmod 755 /tmp/hangs")
	hung, cancel := context.WithCancel(t.Context())
	var all sync.WaitGroup
	defer all.Wait()
	defer cancel()
	for range 4 {
		all.Go(func() { _, _ = c.Start(hung, agent.StartRequest{Command: "/tmp/hangs", WaitMS: 1000}) })
	}
	// What stops everything that a user may stop meets children between fork and exec.
	stopper, err := c.Start(t.Context(), agent.StartRequest{Command: `perl -e 'while (1) { kill "STOP", -1; select undef, undef, undef, 0.001 }'`})
	if err != nil {
		t.Fatal(err)
	}
	for range 4 {
		all.Go(func() { _, _ = c.Start(hung, agent.StartRequest{Command: "/bin/true", WaitMS: 1000}) })
	}
	for range 50 {
		ctx, stop := context.WithTimeout(t.Context(), 30*time.Second)
		err := c.Ping(ctx)
		stop()
		if err != nil {
			t.Fatal(err)
		}
	}
	if _, err := c.Kill(t.Context(), stopper.Process.ID); err != nil {
		t.Fatal(err)
	}
	if got := output(sandboxtest.Run(t, c, "echo alive")); got != "alive\n" {
		t.Errorf("got %q", got)
	}
}
