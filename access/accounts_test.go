package access_test

import (
	"context"
	"errors"
	"runtime"
	"strings"
	"testing"

	"soulbox.dev/soulbox/access"
)

func TestShares(t *testing.T) {
	a := access.NewAccounts(map[access.Resource]access.Bound{access.Buffers: {Total: 10, Share: 6}})
	release, err := a.Take("ann", access.Buffers, 6)
	if err != nil {
		t.Fatal(err)
	}
	_, err = a.Take("ann", access.Buffers, 1)
	if !errors.Is(err, access.ErrFull) || !strings.Contains(err.Error(), "the account of ann is full: 6 of 6 buffers") {
		t.Fatal(err)
	}
	if _, err := a.Take("bob", access.Buffers, 4); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Take("bob", access.Buffers, 1); !errors.Is(err, access.ErrFull) || strings.Contains(err.Error(), "bob") {
		t.Fatal("bob has room, the server has none:", err)
	}
	release()
	release() // a second call does no harm
	if uses := a.Uses(); len(uses) != 1 || uses[0] != (access.Use{Owner: "bob", Resource: access.Buffers, Used: 4, Share: 6}) {
		t.Fatal(uses)
	}
	if _, err := a.Take("ann", access.Work, 1000); err != nil {
		t.Fatal("a resource without a bound:", err)
	}
	var none *access.Accounts
	if _, err := none.Take("ann", access.Buffers, 1000); err != nil {
		t.Fatal(err)
	}
}

// TestWait: a waiter gets what its owner gives back; another owner's waiters delay no one; a cancelled waiter leaves nothing behind.
func TestWait(t *testing.T) {
	a := access.NewAccounts(map[access.Resource]access.Bound{access.Merges: {Total: 3, Share: 2}})
	var mine []func()
	for range 2 {
		release, err := a.Wait(t.Context(), "ann", access.Merges, 1)
		if err != nil {
			t.Fatal(err)
		}
		mine = append(mine, release)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	gone := make(chan error)
	go func() {
		_, err := a.Wait(ctx, "ann", access.Merges, 1)
		gone <- err
	}()
	release, err := a.Wait(t.Context(), "bob", access.Merges, 1)
	if err != nil {
		t.Fatal(err)
	}
	release()
	cause := errors.New("given up")
	cancel(cause)
	if err := <-gone; err != cause {
		t.Fatal(err)
	}
	got := make(chan func())
	go func() {
		release, err := a.Wait(t.Context(), "ann", access.Merges, 1)
		if err != nil {
			t.Error(err)
		}
		got <- release
	}()
	mine[0]()
	(<-got)()
	mine[1]()
	if uses := a.Uses(); len(uses) != 0 {
		t.Fatal(uses)
	}
	behindOneWhoGivesUp(t, a)
	if _, err := a.Wait(t.Context(), "ann", access.Merges, 3); !errors.Is(err, access.ErrFull) {
		t.Fatal("more than there ever is:", err)
	}
}

// behindOneWhoGivesUp: a waiter behind one that wants too much gets what there is when that one gives up.
func behindOneWhoGivesUp(t *testing.T, a *access.Accounts) {
	t.Helper()
	held, err := a.Wait(t.Context(), "ann", access.Merges, 1)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	first, second := make(chan error, 1), make(chan error, 1)
	wait := func(ctx context.Context, n int64, done chan<- error) {
		release, err := a.Wait(ctx, "ann", access.Merges, n)
		if err == nil {
			release()
		}
		done <- err
	}
	go wait(ctx, 2, first)
	for a.Waiting() < 1 {
		runtime.Gosched()
	}
	go wait(t.Context(), 1, second)
	for a.Waiting() < 2 {
		runtime.Gosched()
	}
	cancel()
	if err := <-first; err == nil {
		t.Fatal("it has got more than there is")
	}
	if err := <-second; err != nil {
		t.Fatal(err)
	}
	held()
}
