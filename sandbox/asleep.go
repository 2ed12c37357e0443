package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"soulbox.dev/soulbox/internal/durable"
)

// letSleep tidies up a sandbox on disk and leaves it to the first server that is asked for it. If no server was for too long, it ends.
func (m *Manager) letSleep(r record, lock *os.File) {
	as := fmt.Sprint(r.ID, r.Saves)
	if _, tidied := m.tidied.Load(as); !tidied || r.Pause.Waking {
		if err := m.settle(&r); err != nil {
			m.log.Error("tidy up after a dead server; the next look tries again", "sandbox", r.ID, "error", err)
		} else {
			m.tidied.Store(as, true)
		}
	}
	if time.Now().After(r.RemoveAt) {
		m.bury(r.ID, r, lock, CauseForgotten)
		return
	}
	if len(r.Ports) > 0 && r.Pause.AutoResume && m.opts.Keep { // a server has to listen for the clients that wake it, and to leave it again
		if err := m.adopt(r, lock); err != nil {
			m.report(r.ID, errors.Join(err, lock.Close()))
		}
		return
	}
	_ = lock.Close() // it was only looked at
}

// settle ends what a dead server began with a sandbox on disk. The sandbox's memory stays promised while its machine may still exist.
func (m *Manager) settle(r *record) error {
	ctx, cancel := context.WithTimeout(m.ctx, adoptTime)
	defer cancel()
	if err := m.tidy(ctx, *r); err != nil || !r.Pause.Waking {
		return err
	}
	p := *r.Pause
	p.Waking = false
	r.Pause = &p
	return m.store.save(*r)
}

// claimAsleep takes a sandbox on disk that no server has, because it is asked for. If there is no such sandbox, it does nothing.
func (m *Manager) claimAsleep(id string) {
	m.claiming.Lock() // of two calls at once, the second finds what the first has taken
	defer m.claiming.Unlock()
	if m.known(id) != nil {
		return
	}
	r, err := m.store.load(id)
	if err != nil || !r.onDisk() {
		return
	}
	lock, err := durable.Lock(filepath.Join(m.store.path(id), "lock"), false)
	if err != nil {
		return // another server has it, or is looking at it
	}
	r, err = m.store.load(id)
	if err != nil || !r.onDisk() {
		_ = lock.Close() // another server has changed it meanwhile
		return
	}
	if err := m.adopt(r, lock); err != nil {
		m.report(id, errors.Join(err, lock.Close()))
	}
}

// unowned lists an owner's sandboxes on disk that no server has.
func (m *Manager) unowned(owner string, known map[string]bool) []Info {
	entries, err := os.ReadDir(m.store.dir)
	if err != nil {
		m.log.Error("list sandboxes on disk", "error", err)
	}
	var asleep []record
	for _, e := range entries {
		if known[e.Name()] || !e.IsDir() || !ValidID(e.Name()) {
			continue
		}
		r, err := m.store.load(e.Name())
		if isOfHost(err) {
			m.log.Error("read the state of a sandbox on disk; it is not listed", "sandbox", e.Name(), "error", err)
		}
		if err == nil && r.onDisk() && r.Owner == owner {
			asleep = append(asleep, r)
		}
	}
	var list []Info
	for try := range listTries {
		if try > 0 && slices.ContainsFunc(asleep, func(r record) bool { _, told := m.foreign.Load(r.ID); return !told }) {
			time.Sleep(listPause) // another server may just be looking at it, which does not last
		}
		asleep = slices.DeleteFunc(asleep, func(r record) bool {
			lock, err := durable.Lock(filepath.Join(m.store.path(r.ID), "lock"), false)
			switch {
			case errors.Is(err, fs.ErrNotExist): // it is gone
				return true
			case errors.Is(err, syscall.EWOULDBLOCK):
				return false
			case err == nil: // on any other error it is not known to have a server
				_ = lock.Close() // it was only tried
			}
			m.foreign.Delete(r.ID)
			sb := m.newSandbox(r)
			sb.meter.sum = r.Totals
			list = append(list, sb.Info())
			sb.cancel(nil)
			return true
		})
	}
	for _, r := range asleep {
		m.foreign.Store(r.ID, true)
	}
	return list // the rest belongs to other servers
}

// How often, and at what interval, a sandbox on disk is tried whose lock another server holds.
const (
	listTries = 5
	listPause = 10 * time.Millisecond
)
