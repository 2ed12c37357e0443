package gvisor_test

import (
	"testing"
	"time"

	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/internal/sandboxtest"
	"soulbox.dev/soulbox/sandbox"
)

// TestPauseInTimeLimit: a command with a time limit is paused for longer than that, in memory and on disk: it is not killed for that, but
// still when its limit is reached.
func TestPauseInTimeLimit(t *testing.T) {
	t.Parallel() // it mostly waits
	sb, _ := newSandbox(t, sandbox.CreateOptions{})
	const limit = 5000
	for _, o := range []sandbox.PauseOptions{{}, {ToDisk: true}} {
		client := func() *agent.Client {
			t.Helper()
			c, err := sb.Agent(t.Context(), "test")
			if err != nil {
				t.Fatal(err)
			}
			return c
		}
		start := func(command string) string {
			t.Helper()
			s, err := client().Start(t.Context(), agent.StartRequest{Command: command, TimeoutMS: limit, KeepStdin: true})
			if err != nil {
				t.Fatal(err)
			}
			return s.Process.ID
		}
		ends, hangs := start("read line; echo $line"), start("sleep 600")
		if err := sb.Pause(t.Context(), o); err != nil {
			t.Fatal(err)
		}
		time.Sleep(limit*time.Millisecond + time.Second) // longer than the limit: nothing is waited for
		if err := sb.Resume(t.Context()); err != nil {
			t.Fatal(err)
		}
		if _, err := client().Input(t.Context(), agent.InputRequest{Process: ends, Data: []byte("ended\n")}); err != nil {
			t.Errorf("%+v: write to the process: %v", o, err)
		}
		sandboxtest.Eventually(t, "the processes end", func() bool {
			a, err := client().Wait(t.Context(), agent.WaitRequest{Process: ends, Window: agent.Window{Head: 100}})
			if err != nil || a.Process.State == agent.StateRunning {
				return false
			}
			if a.Process.Cause != "" || output(a) != "ended\n" {
				t.Fatalf("%+v: it ended by %q with output %q", o, a.Process.Cause, output(a))
			}
			b, err := client().Wait(t.Context(), agent.WaitRequest{Process: hangs})
			return err == nil && b.Process.State == agent.StateExited && b.Process.Cause == agent.CauseTimeout
		})
	}
}
