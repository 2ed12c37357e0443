package gvisor_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"sync"
	"testing"
	"time"

	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/internal/sandboxtest"
	"soulbox.dev/soulbox/sandbox"
)

// TestHungStarts: the guest makes the start of programs hang: only their callers wait, and not for ever.
func TestHungStarts(t *testing.T) {
	t.Parallel() // it mostly waits
	_, c := newSandbox(t, sandbox.CreateOptions{})
	sandboxtest.Run(t, c, "mkfifo -m 755 /tmp/fifo; printf '#!/tmp/fifo\\n' > /tmp/hangs; chmod 755 /tmp/hangs")
	cat, err := c.Start(t.Context(), agent.StartRequest{Command: "cat", KeepStdin: true})
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	defer all.Wait()
	for _, req := range []agent.StartRequest{{}, {}, {Terminal: &agent.Terminal{}}, {TimeoutMS: 300}} {
		all.Go(func() {
			req.Args, req.WaitMS = []string{"/tmp/hangs"}, 60_000
			if s, err := c.Start(context.Background(), req); err != nil || s.Process.Signal != "SIGKILL" {
				t.Errorf("a start that hangs: got signal %q, %v", s.Process.Signal, err)
			}
		})
	}
	soon := func(what string, do func(context.Context) error) {
		t.Helper()
		ctx, stop := context.WithTimeout(t.Context(), 30*time.Second)
		defer stop()
		if err := do(ctx); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	for range 20 {
		soon("ping", c.Ping)
		if got := output(sandboxtest.Run(t, c, "echo alive")); got != "alive\n" {
			t.Fatalf("got %q", got)
		}
	}
	soon("end of input", func(ctx context.Context) error {
		_, err := c.Input(ctx, agent.InputRequest{Process: cat.Process.ID, Data: []byte("last"), EOF: true, WaitMS: 20_000,
			SettleMS: 20_000})
		return err
	})
	soon("end of a process that had input", func(ctx context.Context) error {
		s, err := c.Wait(ctx, agent.WaitRequest{Process: cat.Process.ID, WaitMS: 20_000, Window: agent.Window{Head: 100}})
		if err == nil && (s.Process.State != agent.StateExited || output(s) != "last") {
			t.Errorf("it is %s, and wrote %q", s.Process.State, output(s))
		}
		return err
	})
}

// TestStoppedStarts: a process that stops whatever it may stops children between fork and exec.
func TestStoppedStarts(t *testing.T) {
	_, c := newSandbox(t, sandbox.CreateOptions{})
	stopper, err := c.Start(t.Context(),
		agent.StartRequest{Command: `perl -e '$| = 1; print "on"; while (1) { kill "STOP", -1; select undef, undef, undef, 0.0001 }'`})
	if err != nil {
		t.Fatal(err)
	}
	sandboxtest.Eventually(t, "it stops", func() bool {
		s, err := c.Wait(t.Context(), agent.WaitRequest{Process: stopper.Process.ID, Window: agent.Window{Head: 10}})
		return err == nil && output(s) == "on"
	})
	var all sync.WaitGroup
	defer all.Wait()
	for range 20 {
		all.Go(func() {
			_, _ = c.Start(context.Background(), agent.StartRequest{Command: "/bin/true", WaitMS: 1, TimeoutMS: 5000})
		})
	}
	for range 20 {
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

// TestStartedAgain: if runsc fails once, as when the host lacks something for the moment, the boot succeeds. If it fails again, the boot
// fails.
func TestStartedAgain(t *testing.T) {
	runtime, host := newRuntime(t)
	tried, fails := 0, 1
	runtime.Fault = func(what string) error {
		if what != "start runsc" {
			return nil
		}
		if tried++; tried > fails {
			return nil
		}
		return &exec.ExitError{ProcessState: &os.ProcessState{}}
	}
	m, _ := bootIn(t, runtime, host)
	sandboxtest.Run(t, sandboxtest.Greet(t, m), "true")
	if tried != 2 {
		t.Errorf("it was tried %d times", tried)
	}
	tried, fails = 0, 10
	var exit *exec.ExitError
	if _, err := runtime.Boot(t.Context(), sandbox.Spec{ID: "sbagain", Dir: sandboxtest.Dir(t), Template: host,
		Limits: sandbox.DefaultLimits()}); !errors.As(err, &exit) || tried != 2 {
		t.Errorf("after %d tries: %v", tried, err)
	}
}
