package sandbox

import (
	"context"
	"errors"
	"fmt"

	"soulbox.dev/soulbox/access"
	"soulbox.dev/soulbox/agent"
)

// connection takes from the owner's account what one connection of a sandbox has in the server. Where the account is full it waits, at most for
// dialTime; then that is a FullError.
func (s *Sandbox) connection(ctx context.Context) (release func(), err error) {
	accounts := s.m.opts.Accounts
	full := errors.New("no room in time")
	ctx, cancel := context.WithTimeoutCause(ctx, dialTime, full)
	defer cancel()
	return takeParts(func(of access.Resource, n int64) (func(), error) {
		give, err := accounts.Wait(ctx, s.owner, of, n)
		if errors.Is(err, full) {
			return accounts.Take(s.owner, of, n) // which says what is full
		}
		return give, err
	})
}

// connectionNow is connection that does not wait.
func (s *Sandbox) connectionNow() (release func(), err error) {
	accounts := s.m.opts.Accounts
	return takeParts(func(of access.Resource, n int64) (func(), error) { return accounts.Take(s.owner, of, n) })
}

// connectionParts are what a connection takes: its place, and what waits in it.
var connectionParts = []struct {
	of access.Resource
	n  int64
}{{access.Connections, 1}, {access.Buffers, agent.ConnBuffers}}

// takeParts takes all that a connection takes, or nothing.
func takeParts(take func(of access.Resource, n int64) (func(), error)) (release func(), err error) {
	var held []func()
	release = func() {
		for _, give := range held {
			give()
		}
	}
	for _, part := range connectionParts {
		give, err := take(part.of, part.n)
		if err != nil {
			release()
			return nil, err
		}
		held = append(held, give)
	}
	return release, nil
}

// promises are what an owner's sandboxes that are not on disk may take of the machine.
type promises struct{ memory, tasks int64 }

// tasksOf is how many tasks of the host a sandbox may have: about two for each in the guest, and its kernel's own.
func tasksOf(l Limits) int64 { return 2*l.Processes + kernelTasks }

const kernelTasks = 64

// largestShare is the part of the memory budget that one owner may be promised, in percent: the rest is for the others. The user of this machine
// may have all of it.
const largestShare = 80

// admitShare says whether an owner's share has room for one more sandbox of these limits, and the server for its tasks. m.room is held.
func (m *Manager) admitShare(owner string, l Limits) error {
	mine, all, err := m.promises(owner)
	if err != nil {
		return err
	}
	if share := max(m.opts.MemoryBudget*largestShare/100, m.opts.Defaults.Memory); owner != "" && mine.memory+l.promised() > share {
		return fmt.Errorf("%d MB of memory needed, %d MB of your share of %d MB are free; pause to disk or kill one of yours: %w",
			l.promised()>>20, max(0, share-mine.memory)>>20, share>>20, ErrNoRoom)
	}
	bound, ok := m.opts.Accounts.Bound(access.Tasks)
	if !ok {
		return nil
	}
	need := tasksOf(l)
	switch {
	case need > min(bound.Share, bound.Total):
		return fmt.Errorf("processes: %d are more than this server gives one sandbox, %d: %w", l.Processes, (min(bound.Share, bound.Total)-kernelTasks)/2, ErrInvalid)
	case mine.tasks+need > bound.Share:
		return fmt.Errorf("%w: %w", ErrNoRoom, &access.FullError{Owner: owner, Resource: access.Tasks, Used: mine.tasks, Share: bound.Share})
	case all.tasks+need > bound.Total:
		return fmt.Errorf("%w: %w", ErrNoRoom, &access.FullError{Owner: owner, Resource: access.Tasks, Used: mine.tasks, Share: bound.Share, All: true})
	}
	return nil
}

// promises sums what is promised to an owner's sandboxes, and to those of all, other servers' too. One on disk has nothing.
func (m *Manager) promises(owner string) (mine, all promises, err error) {
	err = m.store.promisedEach(func(r record) {
		all.memory += r.Limits.promised()
		all.tasks += tasksOf(r.Limits)
		if r.Owner == owner {
			mine.memory += r.Limits.promised()
			mine.tasks += tasksOf(r.Limits)
		}
	})
	return mine, all, err
}

// Promised lists the tasks that are promised to the sandboxes of each owner, in the form of access.Accounts.Uses.
func (m *Manager) Promised() ([]access.Use, error) {
	bound, _ := m.opts.Accounts.Bound(access.Tasks)
	sums := map[string]int64{}
	err := m.store.promisedEach(func(r record) { sums[r.Owner] += tasksOf(r.Limits) })
	var all []access.Use
	for owner, n := range sums {
		all = append(all, access.Use{Owner: owner, Resource: access.Tasks, Used: n, Share: bound.Share})
	}
	return all, err
}
