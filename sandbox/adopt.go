package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	mathrand "math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"time"

	"soulbox.dev/soulbox/agent"
)

const (
	// adoptTime bounds one attempt to adopt a sandbox.
	adoptTime = 20 * time.Second
	// A sandbox that runs but does not respond is tried adoptTries times, with a growing pause in between, before it is put off or
	// contained.
	adoptTries     = 6
	adoptPause     = 200 * time.Millisecond
	adoptLongPause = 5 * time.Second
	adoptAtOnce    = 8
	// adoptWait is how long a call waits for a sandbox that is about to be adopted.
	adoptWait = 10 * time.Second
	adoptPoll = 20 * time.Millisecond
	// lookTime is how long a server that only looks at a sandbox may keep it locked.
	lookTime = time.Second
	// remember is how long tombstones are kept; forgetEvery is how often old ones are looked for.
	remember    = 24 * time.Hour
	forgetEvery = 10 * time.Minute
)

// adoption takes over or ends what other servers left: it looks at the sandboxes that no living server has. It is safe for concurrent use.
type adoption struct {
	m       *Manager
	settled chan struct{} // closed once all have been looked at once
	// tidied has the IDs of unowned sandboxes that have been tidied up.
	tidied sync.Map
	// foreign has the IDs of sandboxes on disk that another server was found to have.
	foreign  sync.Map
	claiming sync.Mutex // held while a sandbox on disk is claimed

	mu    sync.Mutex
	later map[string]postponed // sandboxes of dead servers that could not be taken over
}

// run clears what dead servers left, and takes over what servers left on purpose: sandboxes on disk and, if this server keeps sandboxes,
// also those that run. What cannot be looked at now stays as it is and is looked at again.
func (a *adoption) run() {
	ticker := time.NewTicker(a.m.opts.RescanEvery)
	defer ticker.Stop()
	var forgot time.Time
	for first := true; ; first = false {
		if a.m.store.untidy.Swap(false) || time.Since(forgot) >= forgetEvery {
			forgot = time.Now()
			err := errors.Join(a.m.store.forget(forgot.Add(-remember)), a.m.store.tidySnapshots())
			if err != nil {
				a.m.store.untidy.Store(true)
				a.m.log.Error("remove old tombstones and unfinished snapshots", "error", err)
			}
		}
		a.lookAtAll()
		if first {
			close(a.settled)
		}
		select {
		case <-a.m.ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

// lookAtAll looks once at all sandboxes that no living server owns. They are independent: one that cannot be looked at does not stop the
// others.
func (a *adoption) lookAtAll() {
	ids, err := a.m.store.ids()
	if err != nil {
		a.m.log.Error("look for sandboxes of dead servers", "error", err)
	}
	var all sync.WaitGroup
	defer all.Wait()
	slots := make(chan struct{}, adoptAtOnce) // a silent one must not delay the others
	for _, id := range ids {
		if sb := a.m.sandboxes.get(id); sb != nil && !sb.current().ended() || time.Now().Before(a.postponed(id).next) {
			continue // an ended one is looked at, because something of it may be left
		}
		lock, err := a.m.store.orphan(id)
		if err != nil {
			a.putOff(id, fmt.Errorf("lock it: %w", err))
			continue
		}
		if lock == nil {
			continue
		}
		r, err := a.m.store.load(id)
		if err == nil && r.onDisk() { // at once, because calls for it find it locked meanwhile
			a.takeOverOnDisk(r, lock)
			continue
		}
		slots <- struct{}{}
		all.Go(func() {
			defer func() { <-slots }()
			a.takeOver(id, r, err, lock)
		})
	}
}

// takeOver adopts, ends or leaves alone a sandbox that no server owns and that is not on disk; err is from loading its record.
func (a *adoption) takeOver(id string, r record, err error, lock *os.File) {
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // it cannot be read now, or another version wrote it: this server must not end it
		a.putOff(id, fmt.Errorf("read its state: %w", err))
		_ = lock.Close() // it was only read
		return
	}
	cause := CauseDied
	switch {
	case err != nil || r.State == Creating:
		cause = CauseHalfMade
	case r.State.Ended():
		cause = Cause(r.Cause)
	case r.Keep && (!r.isOver() || r.Times.OnTimeout == ActionPause):
		if !a.m.opts.Keep {
			_ = lock.Close() // it was only read
			return
		}
		taken, err := a.adoptRunning(r, lock)
		switch {
		case taken:
			a.report(id, err)
			return
		case a.m.ctx.Err() != nil:
			a.report(id, errors.Join(err, lock.Close()))
			return
		case FindingOf(err) != Gone:
			a.putOff(id, err)
			_ = lock.Close() // whoever comes next may have it
			return
		}
		a.m.log.Error("cannot adopt sandbox: nothing of it runs", "sandbox", id, "error", err)
		cause = CauseGone
	case r.Keep:
		cause = CauseTimeout
	}
	a.endOrphan(id, r, lock, cause)
}

// isOver reports whether the life of a running sandbox is over.
func (r record) isOver() bool { return r.State == Running && !time.Now().Before(r.ExpiresAt) }

func (a *adoption) report(id string, err error) {
	if err != nil {
		a.m.log.Error("adopt sandbox", "sandbox", id, "error", err)
		return
	}
	a.m.log.Info("adopted sandbox", "sandbox", id)
}

// adoptRunning adopts a sandbox that had a machine. If it does not take the sandbox, err says why, and the lock is still the caller's.
func (a *adoption) adoptRunning(r record, lock *os.File) (taken bool, err error) {
	for try := range adoptTries {
		if try > 0 {
			if !sleepFor(a.m.ctx, adoptPauseOf(try)) {
				return true, errors.Join(ErrClosed, lock.Close())
			}
			a.m.log.Warn("adopt sandbox; trying again", "sandbox", r.ID, "try", try+1, "error", err)
		}
		if err = a.adopt(r, lock); err == nil {
			return true, nil
		}
		if errors.Is(err, ErrClosed) {
			return true, errors.Join(err, lock.Close())
		}
		if FindingOf(err) == Gone {
			return a.adoptSaved(r, lock, err)
		}
	}
	var over *OverError
	since := a.postponed(r.ID).since
	if !errors.As(err, &over) || since.IsZero() || time.Since(since) < a.m.opts.ContainAfter {
		return false, err
	}
	if c, ok := a.m.opts.Runtime.(Continuer); ok && over.Kind == OverStopped { // the next try finds it running
		return false, errors.Join(err, c.Continue(a.m.store.path(r.ID)))
	}
	return a.adoptSilent(r, lock, over)
}

// adoptPauseOf returns how long to wait before an attempt.
func adoptPauseOf(try int) time.Duration {
	pause := min(adoptLongPause, adoptPause<<try)
	return pause/2 + mathrand.N(pause)
}

// adoptSaved adopts a sandbox without a machine whose server died after the checkpoint was complete and before state.json said so.
func (a *adoption) adoptSaved(r record, lock *os.File, gone error) (taken bool, err error) {
	next := a.m.store.checkpoint(r.ID, r.Saves+1)
	if _, err := os.Lstat(next); errors.Is(err, fs.ErrNotExist) {
		return false, gone
	} else if err != nil {
		return false, err
	}
	r.Saves++
	since := time.Now()
	p := pause{Disk: true, FilesOnly: !hasMemory(next), AutoResume: !r.Times.NoAutoResume, Since: r.pausedSince(since)}
	if r.Pause != nil { // it was frozen before
		p.AutoResume, p.Silent = r.Pause.AutoResume, r.Pause.Silent
	} else {
		r.Cause = string(CauseRequest)
	}
	r.switchClock(r.State, Paused, since, a.m.opts.PausedFor)
	r.State, r.Changed, r.Pause = Paused, since, &p
	r.Copy = &savedCopy{Dir: filepath.Base(next), At: since, FilesOnly: p.FilesOnly}
	if err = a.m.store.save(r); err == nil {
		err = a.adopt(r, lock)
	}
	if err != nil {
		err = errors.Join(err, lock.Close())
	}
	return true, err
}

// adoptSilent adopts a sandbox whose machine runs and whose agent has been silent for long: the sandbox is saved and waits for its owner.
func (a *adoption) adoptSilent(r record, lock *os.File, over *OverError) (taken bool, err error) {
	ctx, cancel := context.WithTimeout(a.m.ctx, adoptTime)
	defer cancel()
	machine, err := a.m.opts.Runtime.Attach(ctx, a.m.store.path(r.ID))
	if err != nil {
		return false, err
	}
	_ = machine.Pipe().Close() // the agent is silent
	if r.State == Paused {
		if err := machine.Pause(ctx); err != nil {
			return false, err
		}
	}
	sb := a.m.newSandbox(r)
	sb.lock, sb.machine = lock, machine
	sb.meter.recall(r)
	close(sb.booted)
	sb.mu.Lock()
	sb.begin()
	sb.mu.Unlock()
	if err := a.register(sb, "taken over by a new server, and its agent is silent"); err != nil {
		return false, err
	}
	(&link{s: sb, machine: machine}).contain(over)
	return true, nil
}

// filesOnlyMark is the name of a file that marks a checkpoint without memory.
const filesOnlyMark = "files-only"

func hasMemory(dir string) bool { return !isThere(filepath.Join(dir, filesOnlyMark)) }

// adopt takes over a sandbox that a server left on purpose or when it died. If adopt fails, it has changed nothing, and the lock is still
// the caller's.
func (a *adoption) adopt(r record, lock *os.File) (err error) {
	ctx, cancel := context.WithTimeout(a.m.ctx, adoptTime)
	defer cancel()
	if r.giveSecrets() { // an older version did not make all of them
		if err := a.m.store.save(r); err != nil {
			return err
		}
	}
	r.Keep = a.m.opts.Keep // this server decides what happens to it when this server ends
	sb := a.m.newSandbox(r)
	sb.lock = lock
	sb.meter.recall(r)
	close(sb.booted)
	if !r.onDisk() {
		err := sb.rejoin(ctx)
		if errors.Is(err, agent.ErrVersion) { // it runs on by itself; here it can be seen and killed
			sb.unfit = fmt.Errorf("sandbox %s: %w: %w", r.ID, ErrUnfit, err)
			a.m.log.Error("a sandbox was made by a version that this server is not compatible with", "sandbox", r.ID, "error", err)
		} else if err != nil {
			sb.cancel(err)
			return err
		}
	}
	a.tidyUp(ctx, r)
	return a.register(sb, "adopted by a new server")
}

// register adds a sandbox that was not made here to the Manager, which looks after it from now on.
func (a *adoption) register(sb *Sandbox, how string) error {
	err := a.m.sandboxes.add(sb, func() {
		a.forget(sb.id)
		sb.mu.Lock()
		ended := sb.rec.ended() // meanwhile
		if !ended {
			sb.logChange("%s", how)
		}
		sb.mu.Unlock()
		if !ended {
			sb.ports.restore()
			a.m.work.Go(sb.keeper.run)
		}
	})
	if err != nil {
		sb.cancel(err)
		sb.mu.Lock()
		defer sb.mu.Unlock()
		if sb.client != nil {
			_ = sb.client.Close()
		}
	}
	return err
}

// keepFailed enters a failed sandbox that has a saved copy into the Manager, so that it can be resumed.
func (a *adoption) keepFailed(r record, lock *os.File) error {
	ctx, cancel := context.WithTimeout(context.Background(), destroyTimeout)
	defer cancel()
	a.tidyUp(ctx, r)
	sb := a.m.newSandbox(r)
	sb.lock = lock
	sb.meter.recall(r)
	close(sb.booted)
	at := r.Copy.At.UTC().Format(time.RFC3339)
	err := a.register(sb, "what was saved of it at "+at+" is kept, and can be resumed")
	if errors.Is(err, ErrClosed) { // the next server takes it
		return lock.Close()
	}
	return err
}

// tidyUp is tidy, but only logs errors: what is left is removed with the sandbox, or by its next resume.
func (a *adoption) tidyUp(ctx context.Context, r record) {
	if err := a.tidy(ctx, r); err != nil {
		a.m.log.Error("remove what a dead server left", "sandbox", r.ID, "error", err)
	}
}

// tidy removes what a dead server had begun to make or to remove.
func (a *adoption) tidy(ctx context.Context, r record) error {
	keep := ""
	if dir := a.m.store.kept(r); dir != "" {
		keep = filepath.Base(dir)
	}
	if r.onDisk() {
		if err := a.m.opts.Runtime.Reap(ctx, a.m.store.path(r.ID)); err != nil { // left by a resume or a pause that was cut off
			return err
		}
	}
	// Names with a hyphen are checkpoints, copies, and the temporary names of files.
	left, err := filepath.Glob(filepath.Join(a.m.store.path(r.ID), "*-*"))
	for _, name := range left {
		if base := filepath.Base(name); base != keep {
			err = errors.Join(err, a.m.store.RemoveAll(name))
		}
	}
	return err
}

// endOrphan ends what is left of a sandbox and makes its tombstone.
func (a *adoption) endOrphan(id string, r record, lock *os.File, cause Cause) {
	ctx, cancel := context.WithTimeout(context.Background(), destroyTimeout)
	defer cancel()
	if err := a.m.opts.Runtime.Reap(ctx, a.m.store.path(id)); err != nil {
		a.m.log.Error("reap sandbox of a dead server", "sandbox", id, "error", err)
		_ = lock.Close() // the next look tries again
		return
	}
	if r.ID != id { // there is nothing to remember
		if err := a.m.store.discard(id, lock); err != nil {
			a.m.log.Error("remove sandbox of a dead server", "sandbox", id, "error", err)
		}
		return
	}
	if !r.ended() {
		was := r.State
		r.State, r.Cause, r.Changed, r.Pause = Failed, string(cause), time.Now(), nil
		if cause == CauseTimeout || cause == CauseForgotten {
			r.State = Killed
		} else if r.Pause = r.afterFailure(r.Changed); r.Pause != nil {
			r.switchClock(was, Failed, r.Changed, a.m.opts.PausedFor)
		}
		sb := a.m.newSandbox(r)
		sb.meter.recall(r)
		sb.meter.since = time.Time{} // how long it ran without a server is not known
		r.Totals = sb.meter.totals()
		sb.log.add(LogEntry{Time: r.Changed, Level: LevelError, Source: SourceSystem, Message: string(r.State) + ": " + r.Cause})
		sb.cancel(cause)
	}
	if r.onDisk() {
		err := a.m.store.save(r)
		if err == nil {
			err = a.keepFailed(r, lock)
		}
		if err != nil {
			a.putOff(id, fmt.Errorf("keep what was saved of it: %w", errors.Join(err, lock.Close())))
		}
		return
	}
	if err := a.m.store.entomb(r, lock); err != nil {
		a.m.log.Error("remove sandbox of a dead server", "sandbox", id, "error", err)
		return
	}
	a.m.log.Info("reaped sandbox of a dead server", "sandbox", id, "cause", cause)
}
