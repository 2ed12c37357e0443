package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"soulbox.dev/soulbox/agent"
)

// suspendTime is how long calls that are under way may take to return before a sandbox is saved.
const suspendTime = 5 * time.Second

// saveTime bounds how long saving a sandbox may take.
const saveTime = 5 * time.Minute

// sleeping is one pause of a sandbox to disk.
type sleeping struct {
	s       *Sandbox
	o       PauseOptions
	was     record // before
	machine Machine
	client  *agent.Client
	target  string      // the directory of the checkpoint
	paused  *StateError // what calls get that wait for something in the sandbox
}

// run saves the sandbox to disk and ends its machine. The machine stays frozen until state.json says that the checkpoint exists, so a crash
// at any point leaves one of the two.
func (p *sleeping) run(ctx context.Context) (err error) {
	s := p.s
	ctx, cancel := context.WithTimeoutCause(ctx, saveTime, errors.New("it was not saved in time"))
	defer cancel()
	s.mu.Lock()
	cancelLink := s.cancelLink
	p.machine, p.client, p.was = s.machine, s.client, s.rec
	s.mu.Unlock()
	saved, err := s.reserveToSave(ctx, !p.o.silent)
	if err != nil {
		return err
	}
	defer saved()
	p.target = s.m.store.checkpoint(s.id, p.was.Saves+1)
	p.paused = &StateError{ID: s.id, Verb: "continue in", State: Paused, At: time.Now(), Cause: p.o.Cause.Error(), Wakes: p.o.AutoResume}
	if err := p.suspend(ctx); err != nil {
		return err
	}
	cancelLink() // from here on, the end of the machine is expected
	err = p.save(ctx)
	s.mu.Lock()
	older := s.m.store.kept(s.rec)
	if err == nil {
		err = s.become("pause", Paused, p.o.Cause, p.change)
	}
	if err != nil {
		defer s.mu.Unlock()
		return p.undo(ctx, err)
	}
	s.machine, s.client = nil, nil
	s.mu.Unlock()
	p.finish(older)
	return nil
}

// suspend makes calls that wait return. Calls that wait for a frozen agent end by CloseFor in finish.
func (p *sleeping) suspend(ctx context.Context) error {
	if p.was.State != Running || p.client == nil || p.o.silent {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, suspendTime)
	defer cancel()
	err := p.client.Suspend(ctx, p.paused)
	if err == nil || p.o.forced {
		return nil
	}
	p.client.Unsuspend()
	return err
}

// save makes the checkpoint. The machine is frozen afterwards.
func (p *sleeping) save(ctx context.Context) error {
	store := p.s.m.store
	if err := p.remove(); err != nil { // left by a pause that failed
		return err
	}
	if err := p.machine.Checkpoint(ctx, p.target+unfinishedSave, CheckpointOptions{FilesOnly: p.o.FilesOnly}); err != nil {
		return err
	}
	return store.finish(p.target, p.o.FilesOnly)
}

// remove removes the checkpoint.
func (p *sleeping) remove() error {
	store := p.s.m.store
	return errors.Join(store.RemoveAll(p.target+unfinishedSave), store.RemoveAll(p.target))
}

// change makes the record that of the paused sandbox.
func (p *sleeping) change(r *record) {
	since := r.pausedSince(r.Changed)
	size, _ := sizeOf(p.target) // only shown; no decision depends on it
	r.Saves++
	r.Pause = &pause{Disk: true, FilesOnly: p.o.FilesOnly, AutoResume: p.o.AutoResume, Silent: p.o.silent || r.Pause != nil &&
		r.Pause.Silent, Since: since}
	r.Copy, r.Notice = &savedCopy{Dir: filepath.Base(p.target), At: since, FilesOnly: p.o.FilesOnly, Size: size}, ""
}

// undo lets the sandbox continue after err. s.mu is held.
func (p *sleeping) undo(ctx context.Context, err error) error {
	s := p.s
	if s.rec.State.Ended() {
		return err // whoever killed it ends the machine
	}
	err = errors.Join(noDisk(err), p.remove())
	if p.was.State == Running {
		err = errors.Join(err, s.thawLater(ctx, p.machine))
		if p.client != nil {
			p.client.Unsuspend()
		}
	}
	s.begin() // its watch finds out if the machine has not survived
	return err
}

// finish ends the machine and removes older, the directory of what was saved before.
func (p *sleeping) finish(older string) {
	log := p.s.m.log.With("sandbox", p.s.id)
	if p.client != nil {
		p.client.CloseFor(p.paused)
	}
	if err := endMachine(p.machine); err != nil {
		log.Error("end the machine of a paused sandbox", "error", err) // the next resume tries again
	}
	if older != "" {
		if err := p.s.m.store.RemoveAll(older); err != nil {
			log.Error("remove the last copy of a paused sandbox", "error", err) // it is removed with the sandbox
		}
	}
}

// noDisk adds ErrNoDisk to the error of a full disk.
func noDisk(err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return fmt.Errorf("%w: %w", ErrNoDisk, err)
	}
	return err
}

func endMachine(machine Machine) error {
	ctx, cancel := context.WithTimeout(context.Background(), destroyTimeout)
	defer cancel()
	return machine.Destroy(ctx)
}

// reserveToSave reports an error unless a checkpoint may be made: within the budget for checkpoints, and with some space left on the
// machine's disk. That space is reserved until done is called. With ask, the agent is asked for its usage first. What the guest says it
// uses is believed only between what the host sees and the limits; a frozen guest has said it earlier.
func (s *Sandbox) reserveToSave(ctx context.Context, ask bool) (done func(), err error) {
	if ask {
		s.Refresh(ctx)
	}
	s.mu.Lock()
	limits, machine := s.rec.Limits, s.machine
	s.mu.Unlock()
	said := s.meter.now()
	seen, err := machine.Usage(ctx)
	if err != nil {
		return nil, err
	}
	return s.m.capacity.reserveDisk(s.owner, baseSave+max(seen.Memory, min(said.Memory, 2*limits.Memory))+
		max(seen.Disk, min(said.DiskUsed, limits.Disk)))
}

// baseSave is about the size of an empty sandbox's checkpoint, in bytes.
const baseSave = 8 << 20

// isThere reports whether a file of that name exists.
func isThere(name string) bool {
	_, err := os.Lstat(name)
	return err == nil
}
