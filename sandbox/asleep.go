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

// takeOverOnDisk tidies up a sandbox on disk that no server owns. It ends the sandbox if nobody asked for it for too long, adopts it if
// clients can wake it by a port, and otherwise leaves it to the first server that is asked for it.
func (a *adoption) takeOverOnDisk(r record, lock *os.File) {
	as := fmt.Sprint(r.ID, r.Saves)
	if _, tidied := a.tidied.Load(as); !tidied || r.Pause.Waking {
		if err := a.tidyOnDisk(&r); err != nil {
			a.m.log.Error("tidy up after a dead server; the next look tries again", "sandbox", r.ID, "error", err)
		} else {
			a.tidied.Store(as, true)
		}
	}
	if time.Now().After(r.RemoveAt) {
		a.endOrphan(r.ID, r, lock, CauseForgotten)
		return
	}
	if len(r.Ports) > 0 && r.Pause.AutoResume && a.m.opts.Keep { // a server has to listen for clients that wake it, and to leave it again
		if err := a.adopt(r, lock); err != nil {
			a.report(r.ID, errors.Join(err, lock.Close()))
		}
		return
	}
	_ = lock.Close() // it was only looked at
}

// tidyOnDisk ends what a dead server began with a sandbox on disk. The sandbox's memory stays promised while its machine may still exist.
func (a *adoption) tidyOnDisk(r *record) error {
	ctx, cancel := context.WithTimeout(a.m.ctx, adoptTime)
	defer cancel()
	if err := a.tidy(ctx, *r); err != nil || !r.Pause.Waking {
		return err
	}
	p := *r.Pause
	p.Waking = false
	r.Pause = &p
	return a.m.store.save(*r)
}

// claimOnDisk takes a sandbox on disk that no server has, because it is asked for. If there is no such sandbox, it does nothing.
func (a *adoption) claimOnDisk(id string) {
	a.claiming.Lock() // of two calls at once, the second finds what the first has taken
	defer a.claiming.Unlock()
	if a.m.sandboxes.get(id) != nil {
		return
	}
	r, err := a.m.store.load(id)
	if err != nil || !r.onDisk() {
		return
	}
	lock, err := durable.Lock(filepath.Join(a.m.store.path(id), "lock"), false)
	if err != nil {
		return // another server has it, or is looking at it
	}
	r, err = a.m.store.load(id)
	if err != nil || !r.onDisk() {
		_ = lock.Close() // another server has changed it meanwhile
		return
	}
	if err := a.adopt(r, lock); err != nil {
		a.report(id, errors.Join(err, lock.Close()))
	}
}

// unowned lists an owner's sandboxes on disk that no server has.
func (a *adoption) unowned(owner string, known map[string]bool) []Info {
	entries, err := os.ReadDir(a.m.store.dir)
	if err != nil {
		a.m.log.Error("list sandboxes on disk", "error", err)
	}
	var asleep []record
	for _, e := range entries {
		if known[e.Name()] || !e.IsDir() || !ValidID(e.Name()) {
			continue
		}
		r, err := a.m.store.load(e.Name())
		if isOfHost(err) {
			a.m.log.Error("read the state of a sandbox on disk; it is not listed", "sandbox", e.Name(), "error", err)
		}
		if err == nil && r.onDisk() && r.Owner == owner {
			asleep = append(asleep, r)
		}
	}
	var list []Info
	for try := range listTries {
		if try > 0 && slices.ContainsFunc(asleep, func(r record) bool { _, told := a.foreign.Load(r.ID); return !told }) {
			time.Sleep(listPause) // another server may just be looking at it, which does not last
		}
		asleep = slices.DeleteFunc(asleep, func(r record) bool {
			lock, err := durable.Lock(filepath.Join(a.m.store.path(r.ID), "lock"), false)
			switch {
			case errors.Is(err, fs.ErrNotExist): // it is gone
				return true
			case errors.Is(err, syscall.EWOULDBLOCK):
				return false
			case err == nil: // on any other error it is not known to have a server
				_ = lock.Close() // it was only tried
			}
			a.foreign.Delete(r.ID)
			sb := a.m.newSandbox(r)
			sb.meter.sum = r.Totals
			list = append(list, sb.Info())
			sb.cancel(nil)
			return true
		})
	}
	for _, r := range asleep {
		a.foreign.Store(r.ID, true)
	}
	return list // the rest belongs to other servers
}

// How often, and at what interval, a sandbox on disk is tried whose lock another server holds.
const (
	listTries = 5
	listPause = 10 * time.Millisecond
)

// await claims a sandbox on disk that no server has, and waits for a sandbox that this server may be about to adopt because it has just
// started. If a sandbox is locked, another server may just be looking at it, which does not last; a sandbox that another server has is not
// found here.
func (a *adoption) await(id string) (*Sandbox, error) {
	begin := time.Now()
	for wait := adoptWait; isThere(a.m.store.path(id)) && time.Since(begin) < wait; {
		a.claimOnDisk(id)
		if sb := a.m.sandboxes.get(id); sb != nil {
			return sb, nil
		}
		select {
		case <-a.settled:
			wait = lookTime
		default:
		}
		select {
		case <-time.After(adoptPoll):
		case <-a.m.ctx.Done():
			return nil, ErrNotFound
		}
	}
	if sb := a.m.sandboxes.get(id); sb != nil {
		return sb, nil
	}
	if why := a.postponed(id).why; why != nil {
		return nil, fmt.Errorf("look for sandbox %s: %w: %w", id, ErrPutOff, why)
	}
	return nil, ErrNotFound
}
