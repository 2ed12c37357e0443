package sandboxtest

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/sandbox"
)

// Suite is what every Runtime must pass, so that what holds on the Fake holds on runsc.
func Suite(t *testing.T, runtime sandbox.Runtime, template sandbox.Template, limits sandbox.Limits) {
	s := suite{runtime, template, limits}
	t.Run("boot and run", s.bootAndRun)
	t.Run("attach", s.attach)
	t.Run("pause and resume", s.pause)
	t.Run("attach to a frozen one", s.attachFrozen)
	t.Run("checkpoint and resume", s.checkpointAndResume)
	t.Run("checkpoint and boot from it", s.checkpoint)
	t.Run("checkpoint of files", s.checkpointFiles)
	t.Run("destroy twice", s.destroyTwice)
	t.Run("reap what a dead server left", s.reap)
	t.Run("reap nothing", s.reapNothing)
	t.Run("cancelled boot", s.cancelledBoot)
	t.Run("usage", s.usage)
}

type suite struct {
	runtime  sandbox.Runtime
	template sandbox.Template
	limits   sandbox.Limits
}

func (s suite) spec(t *testing.T) sandbox.Spec {
	t.Helper()
	dir := filepath.Join(Dir(t), "machine")
	if err := os.Mkdir(dir, 0o711); err != nil {
		t.Fatal(err)
	}
	return sandbox.Spec{ID: "sbtest", Dir: dir, Template: s.template, Limits: s.limits}
}

func (s suite) boot(t *testing.T) (sandbox.Machine, *agent.Client, sandbox.Spec) {
	t.Helper()
	spec := s.spec(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	m, err := s.runtime.Boot(ctx, spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Destroy(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return m, Greet(t, m), spec
}

// Greet connects a client to a machine's pipe.
func Greet(t *testing.T, m sandbox.Machine) *agent.Client {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	client, err := agent.NewClient(ctx, m.Pipe(), "test")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close() })
	return client
}

// Run runs a shell command to its end and returns its snapshot.
func Run(t *testing.T, c *agent.Client, command string) agent.Snapshot {
	t.Helper()
	return RunAs(t, c, "", command)
}

// RunAs is Run as another user.
func RunAs(t *testing.T, c *agent.Client, user, command string) agent.Snapshot {
	t.Helper()
	snap, err := c.Start(t.Context(), agent.StartRequest{Command: command, User: user, WaitMS: 50_000,
		Window: agent.Window{Head: 30_000, Tail: 30_000}})
	if err != nil {
		t.Fatalf("%s: %v", command, err)
	}
	if snap.Process.State != agent.StateExited {
		t.Fatalf("%s: still running", command)
	}
	return snap
}

func (s suite) bootAndRun(t *testing.T) {
	_, c, _ := s.boot(t)
	snap := Run(t, c, "echo hello")
	if string(snap.Output.Head) != "hello\n" || snap.Process.ExitCode != 0 {
		t.Fatalf("got %q, %d", snap.Output.Head, snap.Process.ExitCode)
	}
}

func (s suite) attach(t *testing.T) {
	_, first, spec := s.boot(t)
	snap, err := first.Start(t.Context(), agent.StartRequest{Command: "echo before; sleep 600", Tag: "kept"})
	if err != nil {
		t.Fatal(err)
	}
	boot := first.Boot()
	_ = first.Close()
	again, err := s.runtime.Attach(t.Context(), spec.Dir)
	if err != nil {
		t.Fatal(err)
	}
	second := Greet(t, again)
	if second.Boot() != boot {
		t.Fatalf("another agent answers: %s, not %s", second.Boot(), boot)
	}
	Eventually(t, "the output from before is there", func() bool {
		got, err := second.Wait(t.Context(), agent.WaitRequest{Process: "kept", Window: agent.Window{Head: 100}})
		if err != nil || got.Process.ID != snap.Process.ID || got.Process.State != agent.StateRunning {
			t.Fatal(got, err)
		}
		return string(got.Output.Head) == "before\n"
	})
}

func (s suite) pause(t *testing.T) {
	m, c, _ := s.boot(t)
	if err := m.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := c.List(ctx, agent.ListRequest{}); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("a paused machine answered: %v", err)
	}
	if err := m.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	Run(t, c, "true")
}

func (s suite) attachFrozen(t *testing.T) {
	m, first, spec := s.boot(t)
	if err := m.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	_ = first.Close()
	again, err := s.runtime.Attach(t.Context(), spec.Dir)
	if err != nil {
		t.Fatal(err)
	}
	Run(t, Greet(t, again), "true")
	if _, err := s.runtime.Attach(t.Context(), Dir(t)); !errors.Is(err, sandbox.ErrNoMachine) {
		t.Fatalf("attach to nothing: %v", err)
	}
}

func (s suite) checkpointAndResume(t *testing.T) {
	m, c, spec := s.boot(t)
	for _, o := range []sandbox.CheckpointOptions{{Resume: true}, {Resume: true, FilesOnly: true}} {
		dir := spec.Dir + "-saved"
		err := m.Checkpoint(t.Context(), dir, o)
		if o.FilesOnly && s.limits.DiskInMemory {
			if !errors.Is(err, sandbox.ErrInvalid) {
				t.Fatal(err)
			}
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		if err := m.Checkpoint(t.Context(), dir, o); !errors.Is(err, os.ErrExist) {
			t.Fatalf("over another: %v", err)
		}
		Run(t, c, "true")
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
	}
}

// checkpoint: the processes, what they wrote, and the agent's own memory are restored in a machine in another directory.
func (s suite) checkpoint(t *testing.T) {
	m, c, spec := s.boot(t)
	if _, err := c.Start(t.Context(), agent.StartRequest{Command: "echo before; read -r line; echo $line", Tag: "kept",
		KeepStdin: true}); err != nil {
		t.Fatal(err)
	}
	Eventually(t, "it has begun", func() bool {
		got, err := c.Wait(t.Context(), agent.WaitRequest{Process: "kept", Window: agent.Window{Head: 100}})
		return err == nil && string(got.Output.Head) == "before\n"
	})
	dir := spec.Dir + "-saved"
	if err := m.Checkpoint(t.Context(), dir, sandbox.CheckpointOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := m.Destroy(t.Context()); err != nil {
		t.Fatal(err)
	}
	<-c.Done()
	next := s.spec(t)
	next.From = dir
	again, err := s.runtime.Boot(t.Context(), next)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := again.Destroy(context.Background()); err != nil {
			t.Error(err)
		}
	})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	c, err = agent.Rejoin(ctx, again.Pipe(), "test")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	if _, err := c.WriteStdin(t.Context(), "kept", []byte("after\n"), true); err != nil {
		t.Fatal(err)
	}
	got, err := c.Wait(t.Context(), agent.WaitRequest{Process: "kept", WaitMS: 30_000, Window: agent.Window{Head: 100}})
	if err != nil || string(got.Output.Head) != "before\nafter\n" {
		t.Fatalf("%q %v", got.Output.Head, err)
	}
}

func (s suite) checkpointFiles(t *testing.T) {
	if s.limits.DiskInMemory {
		return // the files are part of the memory
	}
	m, c, spec := s.boot(t)
	Run(t, c, "echo kept > file")
	dir := spec.Dir + "-saved"
	if err := m.Checkpoint(t.Context(), dir, sandbox.CheckpointOptions{FilesOnly: true}); err != nil {
		t.Fatal(err)
	}
	if err := m.Destroy(t.Context()); err != nil {
		t.Fatal(err)
	}
	spec.From = dir // in the same directory as before
	again, err := s.runtime.Boot(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := again.Destroy(context.Background()); err != nil {
			t.Error(err)
		}
	})
	snap := Run(t, Greet(t, again), "cat file")
	if string(snap.Output.Head) != "kept\n" {
		t.Fatalf("%q", snap.Output.Head)
	}
}

func (s suite) destroyTwice(t *testing.T) {
	m, c, _ := s.boot(t)
	for range 2 {
		if err := m.Destroy(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	<-c.Done()
	if _, err := c.List(t.Context(), agent.ListRequest{}); !errors.Is(err, agent.ErrLost) {
		t.Fatalf("a call after the end: %v", err)
	}
}

func (s suite) reap(t *testing.T) {
	_, c, spec := s.boot(t)
	for range 2 {
		if err := s.runtime.Reap(t.Context(), spec.Dir); err != nil {
			t.Fatal(err)
		}
	}
	<-c.Done()
	if left := Processes(spec.Dir); len(left) > 0 {
		t.Fatalf("processes are left: %v", left)
	}
	if err := os.RemoveAll(spec.Dir); err != nil {
		t.Fatal(err)
	}
}

func (s suite) reapNothing(t *testing.T) {
	if err := s.runtime.Reap(t.Context(), Dir(t)); err != nil {
		t.Fatal(err)
	}
}

func (s suite) cancelledBoot(t *testing.T) {
	spec := s.spec(t)
	why := errors.New("changed my mind")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(why)
	m, err := s.runtime.Boot(ctx, spec)
	if err == nil { // Boot may have been faster
		if err := m.Destroy(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if left := Processes(spec.Dir); len(left) > 0 {
		t.Fatalf("processes are left: %v", left)
	}
}

func (s suite) usage(t *testing.T) {
	m, _, _ := s.boot(t)
	u, err := m.Usage(t.Context())
	if err != nil || u.Memory <= 0 {
		t.Fatal(u, err)
	}
}
