package gvisor_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/gvisor"
	"soulbox.dev/soulbox/internal/sandboxtest"
	"soulbox.dev/soulbox/sandbox"
)

// TestForkWhileBusy: data on its way to a sandbox's agent during a save does not disturb the sessions with its copies.
func TestForkWhileBusy(t *testing.T) {
	sb, client := newSandbox(t, sandbox.CreateOptions{Limits: sandbox.Limits{Memory: 128 << 20}})
	ctx, cancel := context.WithCancel(t.Context())
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			for ctx.Err() == nil {
				_, err := client.Start(ctx, agent.StartRequest{Command: "echo hi; cat /etc/passwd", WaitMS: 10_000,
					Window: agent.Window{Head: 1000}})
				if err != nil && ctx.Err() == nil {
					t.Error(err)
				}
			}
		})
	}
	for range 10 {
		copies, failed, err := sb.Fork(t.Context(), 2, nil)
		if err != nil || len(failed) > 0 {
			t.Error(failed, err)
		}
		for _, c := range copies {
			if err := c.Kill(sandbox.CauseKilled); err != nil {
				t.Error(err)
			}
		}
	}
	cancel()
	all.Wait()
}

// TestSaveGivenUp: a pause whose caller gives up at any moment leaves the sandbox running or paused, and usable in either case.
func TestSaveGivenUp(t *testing.T) {
	sb, client := newSandbox(t, sandbox.CreateOptions{Limits: sandbox.Limits{Memory: 256 << 20}})
	sandboxtest.Run(t, client, "head -c 100M /dev/urandom > /home/user/large")
	for i, o := range []sandbox.PauseOptions{{}, {ToDisk: true}, {ToDisk: true}, {}, {ToDisk: true, FilesOnly: true}, {ToDisk: true},
		{ToDisk: true}} {
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(i*i*4)*time.Millisecond)
		err := sb.Pause(ctx, o)
		cancel()
		state := sb.Info().State
		if want := sandbox.Running; err == nil {
			want = sandbox.Paused
			if err := sb.Resume(t.Context()); err != nil {
				t.Fatal(err)
			}
			if state != want {
				t.Fatal(i, state)
			}
		} else if state != want {
			t.Fatal(i, state, err)
		}
		client, err = sb.Agent(t.Context(), "use")
		if err != nil {
			t.Fatal(err)
		}
		if got := output(sandboxtest.Run(t, client, "stat -c %s /home/user/large")); got != "104857600\n" {
			t.Fatalf("%d: %q", i, got)
		}
	}
}

// TestAttachWhileSaving: the next server attaches while the sentry still saves for a dead server. It must not take the machine for frozen.
func TestAttachWhileSaving(t *testing.T) {
	runtime, host := newRuntime(t)
	dir := sandboxtest.Dir(t)
	spec := sandbox.Spec{ID: "sbtest", Dir: filepath.Join(dir, "machine"), Template: host, Limits: sandbox.DefaultLimits()}
	if err := os.Mkdir(spec.Dir, 0o711); err != nil {
		t.Fatal(err)
	}
	m, err := runtime.Boot(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := m.Destroy(context.Background()); err != nil {
			t.Error(err)
		}
	}()
	sandboxtest.Run(t, sandboxtest.Greet(t, m), "head -c 300M /dev/urandom > /home/user/large")
	for i := range 5 {
		saved := make(chan error, 1)
		go func() {
			saved <- m.Checkpoint(t.Context(), filepath.Join(dir, fmt.Sprint("saved-", i)), sandbox.CheckpointOptions{Resume: true})
		}()
		time.Sleep(time.Duration(20*i) * time.Millisecond) // at various moments of the save
		sandboxtest.Run(t, sandboxtest.Greet(t, attach(t, runtime, spec.Dir)), "true")
		if err := <-saved; err != nil {
			t.Fatal(i, err)
		}
		sandboxtest.Run(t, sandboxtest.Greet(t, attach(t, runtime, spec.Dir)), "true")
	}
}

func attach(t *testing.T, runtime *gvisor.Runtime, dir string) sandbox.Machine {
	t.Helper()
	m, err := runtime.Attach(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	return m
}
