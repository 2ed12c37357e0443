package envd

import (
	"testing"

	"soulbox.dev/soulbox/internal/sandboxtest"
	"soulbox.dev/soulbox/sandbox"
)

// newManager makes a Manager of sandboxes on the fake Runtime.
func newManager(t *testing.T) *sandbox.Manager {
	t.Helper()
	m, err := sandbox.NewManager(sandbox.Options{Dir: t.TempDir(), Runtime: &sandboxtest.Fake{}, Templates: sandboxtest.Templates{},
		Version: "test"})
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

// TestWatchersEnd: the watches of a sandbox are forgotten when it ends; those of others are not.
func TestWatchersEnd(t *testing.T) {
	m := newManager(t)
	var all watchers
	count := func() int {
		all.mu.Lock()
		defer all.mu.Unlock()
		return len(all.byID)
	}
	var first *sandbox.Sandbox
	for range 2 {
		sb, err := m.Create(t.Context(), sandbox.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if err := all.add(&scope{Target: Target{Sandbox: sb}}, &watcher{id: "w"}); err != nil {
			t.Fatal(err)
		}
		first = sb
	}
	if err := first.Kill(sandbox.CauseKilled); err != nil {
		t.Fatal(err)
	}
	sandboxtest.Eventually(t, "they are forgotten", func() bool { return count() == 1 })
}
