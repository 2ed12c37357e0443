package sandbox_test

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"soulbox.dev/soulbox/internal/sandboxtest"
	"soulbox.dev/soulbox/sandbox"
)

// unthawed is a Fake whose machines cannot be saved, stay frozen then, and can be thawed only after some attempts.
type unthawed struct {
	*sandboxtest.Fake
	fails atomic.Int32 // attempts to thaw that are still to fail
}

func (f *unthawed) Boot(ctx context.Context, spec sandbox.Spec) (sandbox.Machine, error) {
	m, err := f.Fake.Boot(ctx, spec)
	return unthawedMachine{m, f}, err
}

type unthawedMachine struct {
	sandbox.Machine
	f *unthawed
}

func (m unthawedMachine) Checkpoint(ctx context.Context, _ string, _ sandbox.CheckpointOptions) error {
	return errors.Join(errors.New("it cannot be saved"), m.Machine.Pause(ctx))
}

func (m unthawedMachine) Resume(ctx context.Context) error {
	if m.f.fails.Add(-1) >= 0 {
		return errors.New("it cannot be thawed")
	}
	return m.Machine.Resume(ctx)
}

// TestThawedAgain: a sandbox whose pause fails, and whose machine cannot be thawed at once, does not stay frozen while its state is
// running.
func TestThawedAgain(t *testing.T) {
	runtime := &unthawed{Fake: &sandboxtest.Fake{}}
	m := newManager(t, t.TempDir(), runtime.Fake, func(o *sandbox.Options) { o.Runtime = runtime })
	sb := create(t, m, sandbox.CreateOptions{})
	runtime.fails.Store(3)
	if err := sb.Pause(t.Context(), sandbox.PauseOptions{ToDisk: true}); err == nil {
		t.Fatal("it is paused")
	}
	if state := sb.Info().State; state != sandbox.Running {
		t.Fatal(state)
	}
	sandboxtest.Eventually(t, "it runs again", func() bool {
		client, err := sb.Agent(t.Context(), "use")
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		return client.Ping(ctx) == nil
	})
	if left := runtime.fails.Load(); left >= 0 {
		t.Errorf("it was tried too rarely: %d", left)
	}
}
