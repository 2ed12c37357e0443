package gvisor_test

import (
	"strings"
	"sync"
	"testing"

	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/internal/sandboxtest"
	"soulbox.dev/soulbox/sandbox"
)

// TestOutOfMemory: many processes take memory at once: they are killed, the sandbox continues, and its log names them.
func TestOutOfMemory(t *testing.T) {
	sb, c := newSandbox(t, sandbox.CreateOptions{})
	goesOn := func(after string) {
		t.Helper()
		s, err := c.Start(t.Context(), agent.StartRequest{Command: "echo alive", WaitMS: 60_000, Window: agent.Window{Head: 100}})
		if err != nil || output(s) != "alive\n" || sb.Info().State != sandbox.Running {
			t.Fatalf("after %s: %v, %+v; the sandbox is %s: %s", after, err, s.Process, sb.Info().State, sb.Info().Cause)
		}
	}
	bystander, err := c.Start(t.Context(), agent.StartRequest{Command: "sleep 600"})
	if err != nil {
		t.Fatal(err)
	}
	s, err := c.Start(t.Context(), agent.StartRequest{WaitMS: 120_000,
		Command: `python3 -c "import multiprocessing as m; m.Pool(64).map(bytearray,[40<<20]*64)"`})
	if err != nil {
		t.Fatalf("a pool: %v; the sandbox is %s: %s", err, sb.Info().State, sb.Info().Cause)
	}
	if s.Process.Cause != agent.CauseOOM {
		t.Errorf("a pool: cause %q, exit %d, output %q", s.Process.Cause, s.Process.ExitCode, output(s))
	}
	goesOn("a pool")
	var all sync.WaitGroup
	for range 64 {
		all.Go(func() {
			if _, err := c.Start(t.Context(), agent.StartRequest{Command: "perl -e '$x = q(x) x (40 << 20); sleep 600'"}); err != nil {
				t.Errorf("%v; the sandbox is %s: %s", err, sb.Info().State, sb.Info().Cause)
			}
		})
	}
	all.Wait()
	sandboxtest.Eventually(t, "what is left of 64 commands has room", func() bool {
		list, err := c.List(t.Context(), agent.ListRequest{State: agent.StateExited})
		if err != nil {
			t.Fatalf("%v; the sandbox is %s: %s", err, sb.Info().State, sb.Info().Cause)
		}
		killed := 0
		for _, p := range list {
			if p.Cause == agent.CauseOOM {
				killed++
			}
		}
		return killed > 64/2
	})
	goesOn("64 commands")
	if s, err := c.Wait(t.Context(), agent.WaitRequest{Process: bystander.Process.ID}); err != nil ||
		s.Process.State != agent.StateRunning {
		t.Errorf("a bystander was killed: %+v, %v", s.Process, err)
	}
	sandboxtest.Eventually(t, "the log names what was killed", func() bool {
		page, err := sb.Logs(sandbox.LogQuery{Level: sandbox.LevelWarn, Text: "out of memory"})
		return err == nil && len(page.Entries) > 0 && strings.Contains(page.Entries[0].Message, "python3")
	})
}

// TestOnlyTheLargest: a process outgrows the limit again and again beside a small one, which survives.
func TestOnlyTheLargest(t *testing.T) {
	_, c := newSandbox(t, sandbox.CreateOptions{})
	small, err := c.Start(t.Context(), agent.StartRequest{Command: "perl -e '$| = 1; $x = q(x) x (60 << 20); print q(has it); sleep 600'"})
	if err != nil {
		t.Fatal(err)
	}
	sandboxtest.Eventually(t, "the small one has its memory", func() bool {
		s, err := c.Wait(t.Context(), agent.WaitRequest{Process: small.Process.ID, Window: agent.Window{Head: 100}})
		return err == nil && output(s) == "has it"
	})
	for range 5 {
		s, err := c.Start(t.Context(), agent.StartRequest{Command: "perl -e 'push @x, q(x) x (20 << 20) while 1'", WaitMS: 120_000})
		if err != nil || s.Process.Cause != agent.CauseOOM {
			t.Fatalf("the large one: cause %q, exit %d, %v", s.Process.Cause, s.Process.ExitCode, err)
		}
	}
	if s, err := c.Wait(t.Context(), agent.WaitRequest{Process: small.Process.ID}); err != nil || s.Process.State != agent.StateRunning {
		t.Errorf("the small one was killed, too: %+v, %v", s.Process, err)
	}
}
