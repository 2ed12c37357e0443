package sandbox_test

import (
	"errors"
	"strings"
	"testing"

	"soulbox.dev/soulbox/access"
	"soulbox.dev/soulbox/internal/sandboxtest"
	"soulbox.dev/soulbox/sandbox"
)

// TestShares: an owner is promised his share of memory and tasks, never what the others need; one on disk has none; the user of this machine may have
// all its memory. What no machine has is refused for good.
func TestShares(t *testing.T) {
	m := newManager(t, t.TempDir(), &sandboxtest.Fake{}, func(o *sandbox.Options) {
		o.MemoryBudget, o.MaxTasks = 10<<30, 2000
		o.Accounts = access.NewAccounts(map[access.Resource]access.Bound{access.Tasks: {Total: 4000, Share: 3000}})
	})
	make := func(owner string, l sandbox.Limits) (*sandbox.Sandbox, error) {
		return m.Create(t.Context(), sandbox.CreateOptions{Owner: owner, Limits: l})
	}
	if _, err := make("ann", sandbox.Limits{Processes: 1_000_000}); !errors.Is(err, sandbox.ErrInvalid) || !strings.Contains(err.Error(), "1000000 are more than this machine has for one sandbox, 968; ask for fewer") {
		t.Error(err)
	}
	big, err := make("ann", sandbox.Limits{Memory: 7 << 30, Processes: 100})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := make("ann", sandbox.Limits{Memory: 2 << 30, Processes: 8}); !errors.Is(err, sandbox.ErrNoRoom) || !strings.Contains(err.Error(), "2048 MB of memory needed, 1024 MB of your share of 8192 MB are free") {
		t.Error(err)
	}
	two, err := make("", sandbox.Limits{Memory: 3 << 30, Processes: 8})
	if err != nil {
		t.Fatal("what is left is for others:", err)
	}
	if err := errors.Join(two.Kill(sandbox.CauseKilled), big.Pause(t.Context(), sandbox.PauseOptions{ToDisk: true})); err != nil {
		t.Fatal(err)
	}
	all, err := make("", sandbox.Limits{Memory: 10 << 30, Processes: 8})
	if err != nil {
		t.Fatal("the user of this machine:", err)
	}
	if err := all.Kill(sandbox.CauseKilled); err != nil {
		t.Fatal(err)
	}
	small := sandbox.Limits{Memory: 64 << 20, Processes: 900} // 1864 tasks
	if _, err := make("ann", small); err != nil {
		t.Fatal(err)
	}
	if _, err := make("ann", small); !errors.Is(err, sandbox.ErrNoRoom) || !errors.Is(err, access.ErrFull) || !strings.Contains(err.Error(), "the account of ann is full: 1864 of 3000 tasks are used") {
		t.Error(err)
	}
	if _, err := make("bob", small); err != nil {
		t.Error("another owner:", err)
	}
	if _, err := make("eve", small); !errors.Is(err, access.ErrFull) || !strings.Contains(err.Error(), "all owners together") {
		t.Error(err)
	}
	uses, err := m.Promised()
	if err != nil || len(uses) != 2 {
		t.Error(uses, err)
	}
}
