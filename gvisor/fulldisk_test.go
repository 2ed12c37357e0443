package gvisor_test

import (
	"errors"
	"testing"
	"time"

	"soulbox.dev/soulbox/internal/sandboxtest"
	"soulbox.dev/soulbox/sandbox"
)

// TestFullHostDisk: on a full disk of the host, nothing is saved and nothing ends: the sandbox continues, and everything works when there
// is room.
func TestFullHostDisk(t *testing.T) {
	sandboxtest.OnSmallDisk(t, 800<<20, func(dir string) {
		m := newManager(t, dir, func(o *sandbox.Options) { o.SampleEvery = 50 * time.Millisecond })
		sb, err := m.Create(t.Context(), sandbox.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		works := func(want string) {
			t.Helper()
			c, err := sb.Agent(t.Context(), "test")
			if err != nil {
				t.Fatal(err)
			}
			if s := sandboxtest.Run(t, c, "cat /home/user/kept"); output(s) != want {
				t.Fatalf("%q", output(s))
			}
		}
		c, err := sb.Agent(t.Context(), "test")
		if err != nil {
			t.Fatal(err)
		}
		sandboxtest.Run(t, c, "echo kept > /home/user/kept")
		for _, left := range []int64{100 << 20, 0} { // no room for a checkpoint; then no room even for the state
			free := sandboxtest.Fill(t, dir, left)
			for _, do := range []func() error{
				func() error { return sb.Pause(t.Context(), sandbox.PauseOptions{ToDisk: true}) },
				func() error {
					_, err := sb.Snapshot(t.Context(), sandbox.SnapshotOptions{Name: "full"})
					return err
				},
			} {
				if err := do(); !errors.Is(err, sandbox.ErrNoDisk) {
					t.Errorf("%d bytes left: %v", left, err)
				}
			}
			if i := sb.Info(); i.State != sandbox.Running {
				t.Fatalf("%d bytes left: %+v", left, i)
			}
			works("kept\n")
			free()
		}
		if err := errors.Join(sb.Pause(t.Context(), sandbox.PauseOptions{ToDisk: true}), sb.Resume(t.Context())); err != nil {
			t.Fatal(err)
		}
		works("kept\n")
		free := sandboxtest.Fill(t, dir, 0)
		if err := sb.Kill(sandbox.CauseKilled); err != nil { // a kill always works
			t.Error(err)
		}
		free()
	})
}
