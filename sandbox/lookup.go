package sandbox

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"time"
)

// Get finds an owner's sandbox, including one that ended not long ago. Unknown IDs, and those of other owners, are ErrNotFound.
func (m *Manager) Get(owner, id string) (*Sandbox, error) {
	m.awaitSuccessor(owner, id)
	return m.lookup(id, func(r record) bool { return r.Owner == owner })
}

// Any finds a sandbox of any owner. It is for callers that demand another proof before they use it.
func (m *Manager) Any(id string) (*Sandbox, error) {
	return m.lookup(id, func(record) bool { return true })
}

// lookup finds a sandbox that theirs accepts: one at hand, one with a tombstone, or one on disk.
func (m *Manager) lookup(id string, theirs func(record) bool) (*Sandbox, error) {
	if sb := m.sandboxes.get(id); sb != nil {
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
		return m.fromTomb(r), nil
	}
	r, err := m.store.load(id)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("look for sandbox %s: %w", id, err)
	}
	if err != nil || !theirs(r) {
		return nil, ErrNotFound
	}
	return m.adoption.await(id)
}

// awaitSuccessor waits, but not for long, while an owner's sandbox has failed and is being ended, if a copy of it stays on disk: what its
// owner does next is meant for the sandbox that takes its place.
func (m *Manager) awaitSuccessor(owner, id string) {
	sb := m.sandboxes.get(id)
	if sb == nil || sb.owner != owner {
		return
	}
	sb.mu.Lock()
	ending, kept := sb.ending, sb.rec.onDisk()
	sb.mu.Unlock()
	if ending == nil || !kept {
		return
	}
	select {
	case <-ending:
	case <-time.After(adoptWait):
	case <-m.ctx.Done():
	}
}

// fromTomb makes an ended Sandbox from its tombstone.
func (m *Manager) fromTomb(r record) *Sandbox {
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
	case <-m.adoption.settled:
	case <-ctx.Done():
	}
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
	for _, sb := range m.sandboxes.all() {
		if known[sb.id] = true; sb.owner != f.Owner {
			continue
		}
		if info := sb.Info(); f.selects(info) {
			list = append(list, info)
		}
	}
	if f.State == "" || f.State == Paused || f.State == Failed {
		for _, info := range m.adoption.unowned(f.Owner, known) {
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
			if info := m.fromTomb(r).Info(); !known[r.ID] && time.Since(r.Changed) <= remember && f.selects(info) {
				list = append(list, info)
			}
		}
	}
	slices.SortFunc(list, func(a, b Info) int { return cmp.Or(b.Created.Compare(a.Created), cmp.Compare(a.ID, b.ID)) })
	return list
}
