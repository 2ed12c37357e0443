// Package access decides who may use a server, and how much of it. Door finds the owner of a request by its key (Keys) or by a token of an
// OpenID provider (Provider). Accounts count what each owner uses of the server's own resources, such as memory in buffers, slots for heavy
// work and connections: code that uses a resource takes it from the owner's account first. Allowances bound the requests of each owner. The
// package knows nothing of sandboxes, MCP or the commands by which keys are made: who opens the door says how to get one (Door.NewKey).
package access

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"
)

// Resource is something that the server has a limited amount of.
type Resource string

// The resources.
const (
	// Buffers are bytes of the server's memory that hold what was sent and not yet read, or what is being made.
	Buffers Resource = "buffers"
	// Work are CPU-heavy tasks at the same time: rendering screens, diffs, decompression, expanding Dockerfiles.
	Work Resource = "work"
	// Builds are builds of templates at the same time, Merges the merges of layers in them.
	Builds Resource = "builds"
	Merges Resource = "merges"
	// Connections are connections and streams, each with its descriptors in the server.
	Connections Resource = "connections"
	// Tasks are processes and threads promised to sandboxes.
	Tasks Resource = "tasks"
)

// frees says what frees some of a resource.
var frees = map[Resource]string{
	Buffers:     "read what was asked for, or close connections and transfers",
	Work:        "wait until other calls have ended",
	Builds:      "wait until a build has ended, or cancel one",
	Merges:      "wait until a build has ended, or cancel one",
	Connections: "close connections",
	Tasks:       "kill a sandbox, pause one to disk, or ask for fewer processes",
}

// Bound is how much of a resource there is.
type Bound struct {
	Total int64 // for all owners together
	Share int64 // for one owner
}

// ErrFull is what every FullError matches.
var ErrFull = errors.New("the account is full")

// FullError says which account has no room.
type FullError struct {
	Owner       string // "" is the user of this machine
	Resource    Resource
	Used, Share int64 // of the owner
	All         bool  // the owner has room, but all owners together have used everything
}

// Error names the account and what frees room in it.
func (e *FullError) Error() string {
	if e.All {
		return fmt.Sprintf("the server has no %s left: all owners together use them; try again later", e.Resource)
	}
	return fmt.Sprintf("the account of %s is full: %d of %d %s are used; %s", Name(e.Owner), e.Used, e.Share, e.Resource, frees[e.Resource])
}

// Is makes errors.Is(err, ErrFull) true.
func (e *FullError) Is(target error) bool { return target == ErrFull }

// Name returns an owner's name for people.
func Name(owner string) string { return cmp.Or(owner, "local") }

// Accounts are the accounts of all owners. It is safe for concurrent use. A nil Accounts has no bounds.
type Accounts struct {
	bounds map[Resource]Bound

	mu      sync.Mutex
	used    map[account]int64
	total   map[Resource]int64
	waiting []*waiter // the longest waiting first
}

type account struct {
	owner    string
	resource Resource
}

type waiter struct {
	account
	n     int64
	taken chan struct{} // closed when it has got what it waits for
}

// NewAccounts makes empty accounts. A resource that bounds does not name has no bound.
func NewAccounts(bounds map[Resource]Bound) *Accounts {
	return &Accounts{bounds: bounds, used: map[account]int64{}, total: map[Resource]int64{}}
}

// Take takes n of a resource for an owner, or refuses with a FullError. The caller gives it back by release; further calls of release do
// nothing.
func (a *Accounts) Take(owner string, r Resource, n int64) (release func(), err error) {
	if a == nil {
		return func() {}, nil
	}
	at := account{owner, r}
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := a.lack(at, n); err != nil {
		return nil, err
	}
	return a.take(at, n), nil
}

// Wait is Take that waits until there is room. One owner's waiters never delay another owner who has room; if several owners wait for the
// same resource, the one that uses least is first. Wait fails when ctx ends, and at once if n is more than the bounds allow.
func (a *Accounts) Wait(ctx context.Context, owner string, r Resource, n int64) (release func(), err error) {
	if a == nil {
		return func() {}, nil
	}
	at := account{owner, r}
	a.mu.Lock()
	if b, ok := a.bounds[r]; ok && n > min(b.Total, b.Share) {
		defer a.mu.Unlock()
		return nil, &FullError{Owner: owner, Resource: r, Used: a.used[at], Share: min(b.Total, b.Share)}
	}
	if a.lack(at, n) == nil && !slices.ContainsFunc(a.waiting, func(w *waiter) bool { return w.account == at }) {
		defer a.mu.Unlock()
		return a.take(at, n), nil
	}
	w := &waiter{account: at, n: n, taken: make(chan struct{})}
	a.waiting = append(a.waiting, w)
	a.mu.Unlock()
	select {
	case <-w.taken:
		return a.giver(at, n), nil
	case <-ctx.Done():
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	select {
	case <-w.taken: // at the same moment
		a.give(at, n)
	default:
		a.waiting = slices.DeleteFunc(a.waiting, func(other *waiter) bool { return other == w })
		a.letIn(r) // the owner's waiters behind it
	}
	return nil, context.Cause(ctx)
}

// Part is an amount of a resource.
type Part struct {
	Of Resource
	N  int64
}

// errLate means that a wait took too long.
var errLate = errors.New("no room in time")

// TakeAll takes all parts for an owner, or nothing. If there is no room, it waits for at most wait, which may be 0; then the error is a
// FullError.
func (a *Accounts) TakeAll(ctx context.Context, wait time.Duration, owner string, parts ...Part) (release func(), err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, wait, errLate)
	defer cancel()
	var held []func()
	release = func() {
		for _, give := range held {
			give()
		}
	}
	for _, p := range parts {
		give, err := a.Take(owner, p.Of, p.N)
		if errors.Is(err, ErrFull) && wait > 0 {
			if give, err = a.Wait(ctx, owner, p.Of, p.N); errors.Is(err, errLate) {
				give, err = a.Take(owner, p.Of, p.N) // its error says what is full
			}
		}
		if err != nil {
			release()
			return nil, err
		}
		held = append(held, give)
	}
	return release, nil
}

// lack returns why n cannot be taken; nil if it can. a.mu is held.
func (a *Accounts) lack(at account, n int64) error {
	b, ok := a.bounds[at.resource]
	switch {
	case !ok:
		return nil
	case a.used[at]+n > b.Share:
		return &FullError{Owner: at.owner, Resource: at.resource, Used: a.used[at], Share: b.Share}
	case a.total[at.resource]+n > b.Total:
		return &FullError{Owner: at.owner, Resource: at.resource, Used: a.used[at], Share: b.Share, All: true}
	}
	return nil
}

// take counts n as used. a.mu is held.
func (a *Accounts) take(at account, n int64) (release func()) {
	a.used[at] += n
	a.total[at.resource] += n
	return a.giver(at, n)
}

func (a *Accounts) giver(at account, n int64) (release func()) {
	return sync.OnceFunc(func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		a.give(at, n)
	})
}

// give returns n, and serves those that wait for it. a.mu is held.
func (a *Accounts) give(at account, n int64) {
	a.total[at.resource] -= n
	if a.used[at] -= n; a.used[at] == 0 {
		delete(a.used, at)
	}
	a.letIn(at.resource)
}

// letIn serves those that wait for a resource, as far as there is room. a.mu is held.
func (a *Accounts) letIn(r Resource) {
	for {
		next := -1
		blocked := map[account]bool{} // accounts whose first waiter cannot be served: their later waiters stay behind it
		for i, w := range a.waiting {
			if w.resource != r || blocked[w.account] {
				continue
			}
			if a.lack(w.account, w.n) != nil {
				blocked[w.account] = true
				continue
			}
			if next < 0 || a.used[w.account] < a.used[a.waiting[next].account] {
				next = i
			}
		}
		if next < 0 {
			return
		}
		w := a.waiting[next]
		a.waiting = slices.Delete(a.waiting, next, next+1)
		a.used[w.account] += w.n
		a.total[w.resource] += w.n
		close(w.taken)
	}
}

// Bound returns how much there is of a resource; ok is false if it has no bound.
func (a *Accounts) Bound(r Resource) (b Bound, ok bool) {
	if a == nil {
		return Bound{}, false
	}
	b, ok = a.bounds[r]
	return b, ok
}

// Use is how much of a resource an owner uses.
type Use struct {
	Owner       string
	Resource    Resource
	Used, Share int64
}

// Uses lists what is used, by owner and resource.
func (a *Accounts) Uses() []Use {
	if a == nil {
		return nil
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	var all []Use
	for at, n := range a.used {
		all = append(all, Use{Owner: at.owner, Resource: at.resource, Used: n, Share: a.bounds[at.resource].Share})
	}
	slices.SortFunc(all, func(x, y Use) int { return cmp.Or(cmp.Compare(x.Owner, y.Owner), cmp.Compare(x.Resource, y.Resource)) })
	return all
}
