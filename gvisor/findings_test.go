package gvisor_test

import (
	"errors"
	"strings"
	"syscall"
	"testing"
	"time"

	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/internal/sandboxtest"
	"soulbox.dev/soulbox/sandbox"
)

// newManager makes a real Manager whose sandboxes outlive it.
func newManager(t *testing.T, dir string, change func(*sandbox.Options)) *sandbox.Manager {
	t.Helper()
	runtime, _ := newRuntime(t)
	o := sandbox.Options{Dir: dir, Runtime: runtime, Templates: newStore(dir), Version: "test"}
	if change != nil {
		change(&o)
	}
	m, err := sandbox.NewManager(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return m
}

func signalAll(dir string, sig syscall.Signal) {
	for _, pid := range sandboxtest.Processes(dir) {
		_ = syscall.Kill(pid, sig) // it may have ended with another one
	}
}

func logged(t *testing.T, sb *sandbox.Sandbox, text string) bool {
	t.Helper()
	page, err := sb.Logs(sandbox.LogQuery{Text: text})
	if err != nil {
		t.Fatal(err)
	}
	return len(page.Entries) > 0
}

// TestStoppedFromOutside: a stopped sentry or gofer is reported, runs again when it is continued, and is saved if nothing continues it.
func TestStoppedFromOutside(t *testing.T) {
	dir := sandboxtest.Dir(t)
	m := newManager(t, dir, func(o *sandbox.Options) { o.ContainAfter = 3 * time.Second })
	sb, c := createIn(t, m, sandbox.CreateOptions{})
	var err error
	if _, err := c.Start(t.Context(), agent.StartRequest{Command: "sleep 600", Tag: "kept"}); err != nil {
		t.Fatal(err)
	}
	signalAll(dir, syscall.SIGSTOP)
	sandboxtest.Eventually(t, "it is reported", func() bool { return logged(t, sb, "was stopped from outside") })
	signalAll(dir, syscall.SIGCONT)
	sandboxtest.Run(t, c, "true")
	sandboxtest.Eventually(t, "it runs again", func() bool { return logged(t, sb, "were continued") })
	signalAll(dir, syscall.SIGSTOP)
	sandboxtest.Eventually(t, "it is saved", func() bool { return sb.Info().State == sandbox.Paused })
	if i := sb.Info(); !i.OnDisk || i.Cause != sandbox.CauseStopped.Error() {
		t.Fatalf("%+v", i)
	}
	if _, err := sb.Agent(t.Context(), "run in"); err == nil || !strings.Contains(err.Error(), sandbox.CauseStopped.Error()) {
		t.Fatal(err)
	}
	if err := sb.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	if c, err = sb.Agent(t.Context(), "test"); err != nil {
		t.Fatal(err)
	}
	if s, err := c.Wait(t.Context(), agent.WaitRequest{Process: "kept"}); err != nil || s.Process.State != agent.StateRunning {
		t.Fatal(s.Process.State, err)
	}
}

// TestKilledIsKept: what was saved of a sandbox whose sentry was killed is kept, and can be resumed with its memory or with its files
// alone.
func TestKilledIsKept(t *testing.T) {
	dir := sandboxtest.Dir(t)
	m := newManager(t, dir, nil)
	sb, c := createIn(t, m, sandbox.CreateOptions{})
	var err error
	sandboxtest.Run(t, c, "echo kept > file")
	if _, err := c.Start(t.Context(), agent.StartRequest{Command: "sleep 600", Tag: "kept"}); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(sb.Pause(t.Context(), sandbox.PauseOptions{ToDisk: true}), sb.Resume(t.Context())); err != nil {
		t.Fatal(err)
	}
	for _, filesOnly := range []bool{false, true} {
		if c, err = sb.Agent(t.Context(), "test"); err != nil {
			t.Fatal(err)
		}
		sandboxtest.Run(t, c, "echo later > later")
		signalAll(dir, syscall.SIGKILL)
		sandboxtest.Eventually(t, "it can be resumed", func() bool {
			again, err := m.Get("", sb.ID())
			if err == nil && again.Info().State == sandbox.Failed && again.Info().OnDisk && !again.Gone() {
				sb = again
				return true
			}
			return false
		})
		if err := sb.ResumeWith(t.Context(), sandbox.ResumeOptions{FilesOnly: filesOnly}); err != nil {
			t.Fatal(err)
		}
		if i := sb.Info(); i.State != sandbox.Running || !strings.Contains(i.Notice, "what came after that is missing") ||
			strings.Contains(i.Notice, "and its processes") != filesOnly {
			t.Fatalf("%+v", i)
		}
		if c, err = sb.Agent(t.Context(), "test"); err != nil {
			t.Fatal(err)
		}
		if s := sandboxtest.Run(t, c, "cat file; ls later 2>/dev/null"); output(s) != "kept\n" {
			t.Fatalf("%q", output(s))
		}
		s, err := c.Wait(t.Context(), agent.WaitRequest{Process: "kept"})
		if filesOnly != errors.Is(err, agent.ErrNoProcess) || !filesOnly && s.Process.State != agent.StateRunning {
			t.Fatal(s.Process.State, err)
		}
	}
}
