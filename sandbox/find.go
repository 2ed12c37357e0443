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

// Get finds an owner's sandbox, including one that ended not long ago. Unknown IDs, and those of other owners, are ErrNotFound.
func (m *Manager) Get(owner, id string) (*Sandbox, error) {
	return m.find(id, func(r record) bool { return r.Owner == owner })
}

// Any finds a sandbox of any owner. It is for callers that demand another proof before they use it.
func (m *Manager) Any(id string) (*Sandbox, error) {
	return m.find(id, func(record) bool { return true })
}

// find finds a sandbox that theirs accepts: one at hand, one with a tombstone, or one on disk.
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

// known returns a sandbox that this server has; nil if it has none with this ID.
func (m *Manager) known(id string) *Sandbox {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.sandboxes[id]
}

// awaitAdoption claims a sandbox on disk that no server has, and waits for a sandbox that this server may be about to adopt because it has
// just started. If a sandbox is locked, another server may just be looking at it, which does not last; a sandbox that another server has is
// not found here.
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

// remembered makes an ended Sandbox from its tombstone.
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

// AwaitSettled waits, but not for long, until what earlier servers left has been looked at once.
func (m *Manager) AwaitSettled(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, adoptWait)
	defer cancel()
	select {
	case <-m.settled:
	case <-ctx.Done():
	}
}

// all lists the sandboxes of this server, including the ended ones that it still keeps at hand.
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

// List lists an owner's sandboxes, the newest first.
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
