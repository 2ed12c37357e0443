package sandbox

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"time"
)

// Get finds a sandbox of an owner, also one that has ended not long ago. Unknown ids, and those of others, are ErrNotFound.
func (m *Manager) Get(owner, id string) (*Sandbox, error) {
	return m.find(id, func(r record) bool { return r.Owner == owner })
}

// Any finds a sandbox of whomever. It is for callers who let nobody near it without another proof.
func (m *Manager) Any(id string) (*Sandbox, error) {
	return m.find(id, func(record) bool { return true })
}

// find finds a sandbox that is the caller's: here, in its tomb, or on disk.
func (m *Manager) find(id string, theirs func(record) bool) (*Sandbox, error) {
	if sb := m.known(id); sb != nil {
		if !theirs(sb.current()) {
			return nil, ErrNotFound
		}
		return sb, nil
	}
	if !ValidID(id) {
		return nil, ErrNotFound
	}
	if r, err := loadFrom(m.store.tomb(id), id); err == nil {
		if !r.State.Ended() || time.Since(r.Changed) > remember || !theirs(r) {
			return nil, ErrNotFound
		}
		return m.remembered(r), nil
	}
	r, err := m.store.load(id)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("look for sandbox %s: %w", id, err)
	}
	if err != nil || !theirs(r) {
		return nil, ErrNotFound
	}
	return m.awaitAdoption(id)
}

// known is a sandbox that this server has at hand; nil is none.
func (m *Manager) known(id string) *Sandbox {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.sandboxes[id]
}

// awaitAdoption finds a sandbox on disk that no server has, and waits for one that this server, which has just been started, may be about
// to adopt. One that is locked may only be looked at by another server, which does not last; one that another server has stays unknown
// here.
func (m *Manager) awaitAdoption(id string) (*Sandbox, error) {
	begin := time.Now()
	for wait := adoptWait; isThere(m.store.path(id)) && time.Since(begin) < wait; {
		m.claimAsleep(id)
		if sb := m.known(id); sb != nil {
			return sb, nil
		}
		select {
		case <-m.settled:
			wait = lookTime
		default:
		}
		select {
		case <-time.After(adoptPoll):
		case <-m.ctx.Done():
			return nil, ErrNotFound
		}
	}
	if sb := m.known(id); sb != nil {
		return sb, nil
	}
	if why := m.whyPutOff(id); why != nil {
		return nil, fmt.Errorf("look for sandbox %s: %w: %w", id, ErrPutOff, why)
	}
	return nil, ErrNotFound
}

// remembered is a sandbox that has ended, from its tombstone.
func (m *Manager) remembered(r record) *Sandbox {
	sb := m.newSandbox(r)
	sb.meter.sum = r.Totals
	sb.cancel(Cause(r.Cause))
	sb.ending = make(chan struct{})
	close(sb.booted)
	close(sb.ended)
	close(sb.ending)
	return sb
}

// AwaitSettled waits until what earlier servers left has been looked at once, but not for long.
func (m *Manager) AwaitSettled(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, adoptWait)
	defer cancel()
	select {
	case <-m.settled:
	case <-ctx.Done():
	}
}

// all lists the sandboxes of this server, and of those that have ended the last.
func (m *Manager) all() []*Sandbox {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Collect(maps.Values(m.sandboxes))
}

// Filter selects sandboxes of an owner; zero values select all that have not ended.
type Filter struct {
	Owner    string
	State    State
	Template string            // or snapshot
	Metadata map[string]string // all pairs must match
	Since    time.Time         // created then or later
	Until    time.Time         // created before
}

func (f Filter) selects(i Info) bool {
	if f.Owner != i.Owner || f.State == "" && i.State.Ended() && !i.OnDisk || f.State != "" && i.State != f.State ||
		i.Created.Before(f.Since) ||
		!f.Until.IsZero() && !i.Created.Before(f.Until) ||
		f.Template != "" && i.Template != f.Template && i.Parent != f.Template && i.Origin != f.Template {
		return false
	}
	for k, v := range f.Metadata {
		if have, ok := i.Metadata[k]; !ok || have != v {
			return false
		}
	}
	return true
}

// List lists sandboxes of an owner, the newest first.
func (m *Manager) List(f Filter) []Info {
	var list []Info
	known := map[string]bool{}
	for _, sb := range m.all() {
		if known[sb.id] = true; sb.owner != f.Owner {
			continue
		}
		if info := sb.Info(); f.selects(info) {
			list = append(list, info)
		}
	}
	if f.State == "" || f.State == Paused || f.State == Failed {
		for _, info := range m.unowned(f.Owner, known) {
			if f.selects(info) {
				list = append(list, info)
			}
		}
	}
	if f.State != "" && f.State.Ended() {
		tombs, err := m.store.tombs()
		if err != nil {
			m.log.Error("list tombstones", "error", err)
		}
		for _, r := range tombs {
			if info := m.remembered(r).Info(); !known[r.ID] && time.Since(r.Changed) <= remember && f.selects(info) {
				list = append(list, info)
			}
		}
	}
	slices.SortFunc(list, func(a, b Info) int { return cmp.Or(b.Created.Compare(a.Created), cmp.Compare(a.ID, b.ID)) })
	return list
}
