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

// PauseOptions say how a sandbox is paused.
type PauseOptions struct {
	ToDisk    bool // save memory and files and end its machine; otherwise freeze it in memory
	FilesOnly bool // with ToDisk: drop its memory and processes; it boots when it is resumed
	// AutoResume lets any call wake the sandbox; otherwise only Resume does.
	AutoResume bool
	Cause      Cause // default CauseRequest

	forced bool // it must not continue: do not wait for its agent
	wedged bool // its agent is silent
}

// Pause stops the sandbox as it is: its processes and the clock of its life. When it goes to disk, calls that wait for something in it
// return with what is there; when it is frozen, they continue after Resume. When Pause fails, the sandbox is as before. If another call is
// already pausing it the same way, Pause waits for that call and succeeds with it; so does Resume.
func (s *Sandbox) Pause(ctx context.Context, o PauseOptions) error {
	if o.FilesOnly && !o.ToDisk {
		return fmt.Errorf("pause sandbox %s: files_only needs a pause to disk: %w", s.id, ErrInvalid)
	}
	return s.pause(ctx, o)
}

func (s *Sandbox) pause(ctx context.Context, o PauseOptions) (err error) {
	began, moved := time.Now(), s.moves(Running)
	ctx, over, err := s.takeTurn(ctx, "pause")
	if err != nil {
		return err
	}
	defer func() {
		over()
		s.m.opts.Observe("pause", time.Since(began), err)
	}()
	if o.Cause == "" {
		o.Cause = CauseRequest
	}
	if r := s.current(); moved && r.isAs(o) {
		return nil // another call was faster
	} else if r.State != Running && (r.State != Paused || !o.ToDisk || r.onDisk()) {
		return s.asError("pause")
	} else if o.forced && r.State == Paused && s.met() { // its user paused it meanwhile: it takes no more than it has
		return s.asError("pause")
	}
	if o.ToDisk {
		err = s.sleep(ctx, o)
	} else {
		err = s.freeze(ctx, o)
	}
	if err != nil && !errors.Is(err, ErrState) {
		err = fmt.Errorf("pause sandbox %s: %w", s.id, s.whyEnded(err))
	}
	return err
}

// moves reports whether a sandbox is in a state or is just being changed. A caller that wants another state, and finds it when its turn
// comes, has what it wants.
func (s *Sandbox) moves(from State) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.rec.State == from || s.hold != nil && !s.rec.State.Ended()
}

// isAs reports whether a sandbox is already paused as o asks.
func (r record) isAs(o PauseOptions) bool {
	return r.State == Paused && !o.forced && r.onDisk() == o.ToDisk && (o.FilesOnly || !r.Pause.FilesOnly)
}

// Settle waits until no change between running and paused is under way.
func (s *Sandbox) Settle(ctx context.Context) error {
	for {
		s.mu.Lock()
		hold := s.hold
		s.mu.Unlock()
		if hold == nil {
			return nil
		}
		select {
		case <-hold:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// met reports whether there is a session with the agent.
func (s *Sandbox) met() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.client != nil
}

// ResumeOptions say how a sandbox is resumed.
type ResumeOptions struct {
	// FilesOnly boots the files without the processes that were saved. It helps if those are wedged or damaged.
	FilesOnly bool
	// Memory is a new memory limit in bytes, larger than before; zero leaves it. Processes that were saved keep the old limit, and their
	// kernel gets the rest: for files and other objects.
	Memory int64
}

// Resume resumes a paused sandbox, or a failed one from what was saved of it.
func (s *Sandbox) Resume(ctx context.Context) error { return s.ResumeWith(ctx, ResumeOptions{}) }

// ResumeWith is Resume with options. Info.Notice says what is missing afterwards.
func (s *Sandbox) ResumeWith(ctx context.Context, o ResumeOptions) (err error) {
	began, moved := time.Now(), s.moves(Paused)
	ctx, over, err := s.takeTurn(ctx, "resume")
	if err != nil {
		return err
	}
	defer func() {
		over()
		s.m.opts.Observe("resume", time.Since(began), err)
	}()
	r := s.current()
	if moved && r.State == Running && o == (ResumeOptions{}) {
		return nil // another call was faster
	}
	if r.State != Paused && !r.onDisk() {
		return s.asError("resume")
	}
	if !r.onDisk() && o != (ResumeOptions{}) {
		return fmt.Errorf("resume sandbox %s: it is paused in memory, so it is resumed as it is; pause it to disk first: %w", s.id,
			ErrInvalid)
	}
	if o.Memory != 0 && o.Memory < r.Limits.Memory {
		return fmt.Errorf("resume sandbox %s: its memory limit is %d MB, and only more can be given: %w", s.id, r.Limits.Memory>>20,
			ErrInvalid)
	}
	if last := r.lastMoment(); !last.IsZero() && !last.Add(time.Since(r.pausedSince(time.Now()))).After(time.Now()) {
		return fmt.Errorf("resume sandbox %s: its maximum life time is over; a longer one can be set: %w", s.id, ErrInvalid)
	}
	if r.onDisk() {
		err = s.wake(ctx, o)
	} else {
		err = s.thaw(ctx)
	}
	if err != nil && !errors.Is(err, ErrState) {
		err = fmt.Errorf("resume sandbox %s: %w", s.id, s.whyEnded(err))
	}
	return err
}

// takeTurn waits until no other change between running and paused is under way, and makes callers of Agent wait until over is called. The
// context that it returns also ends with the sandbox.
func (s *Sandbox) takeTurn(ctx context.Context, verb string) (_ context.Context, over func(), err error) {
	<-s.booted
	mine := false
	select {
	case s.turn <- struct{}{}:
		mine = true
	case <-s.ctx.Done():
	case <-ctx.Done():
		return nil, nil, context.Cause(ctx)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.unfit != nil && s.ctx.Err() == nil {
		if mine {
			<-s.turn
		}
		return nil, nil, s.unfit
	}
	if s.ctx.Err() != nil || s.isLeft() {
		if mine {
			<-s.turn
		}
		if s.isLeft() {
			return nil, nil, fmt.Errorf("%s sandbox %s: %w", verb, s.id, ErrClosed)
		}
		return nil, nil, s.wrong(verb)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(s.ctx, func() { cancel(context.Cause(s.ctx)) })
	hold := make(chan struct{})
	s.hold = hold
	s.shifts++
	return ctx, func() {
		stop()
		cancel(nil)
		s.mu.Lock()
		s.hold = nil
		s.mu.Unlock()
		close(hold)
		s.keeper.look() // it did not look at the idle time meanwhile
		<-s.turn
	}, nil
}

// whyEnded returns the sandbox's end instead of err if the sandbox ended during a change, because that is why the change failed.
func (s *Sandbox) whyEnded(err error) error {
	if s.current().ended() {
		return s.asError("continue in")
	}
	return err
}

// freeze pauses the machine in memory.
func (s *Sandbox) freeze(ctx context.Context, o PauseOptions) error {
	if !o.forced {
		s.Refresh(ctx)
	}
	s.mu.Lock()
	machine := s.machine
	s.mu.Unlock()
	if err := machine.Pause(ctx); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	err := s.turnTo("pause", Paused, o.Cause, o.forced, func(r *record) {
		r.Pause, r.Notice = &pause{AutoResume: o.AutoResume, Wedged: o.wedged, Since: r.Changed}, ""
	})
	if err != nil && !s.rec.State.Ended() {
		err = errors.Join(err, s.goOn(ctx, machine))
	}
	return err
}

// goOnPause is the time until the next attempt to thaw a machine; it doubles, up to unknownPause.
const goOnPause = 100 * time.Millisecond

// goOn thaws a machine whose pause failed. If that fails too, it tries again in the background until the machine is thawed or is no longer
// its job, because every observer sees the sandbox as running.
func (s *Sandbox) goOn(ctx context.Context, machine Machine) error {
	err := machine.Resume(ctx)
	if err == nil {
		return nil
	}
	s.m.work.Go(func() {
		for wait := goOnPause; sleepFor(s.ctx, wait); wait = min(2*wait, unknownPause) {
			if s.goneOn(machine) {
				return
			}
		}
	})
	return err
}

// goneOn tries once more to thaw a machine, and reports whether nothing is left to do.
func (s *Sandbox) goneOn(machine Machine) bool {
	ctx, over, err := s.takeTurn(s.ctx, "continue in")
	if err != nil {
		return true // it has ended, or this server has left it to another
	}
	defer over()
	s.mu.Lock()
	ours := s.machine == machine && s.rec.State == Running
	s.mu.Unlock()
	if !ours {
		return true
	}
	if err := machine.Resume(ctx); err != nil {
		s.m.log.Warn("thaw a sandbox whose pause has failed", "sandbox", s.id, "error", err)
		return false
	}
	return true
}

// thaw resumes a sandbox that freeze paused.
func (s *Sandbox) thaw(ctx context.Context) error {
	s.mu.Lock()
	machine := s.machine
	s.mu.Unlock()
	if err := machine.Resume(ctx); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	err := s.become("resume", Running, nil, func(r *record) { r.Pause = nil })
	if err != nil && !s.rec.State.Ended() {
		err = errors.Join(err, machine.Pause(ctx))
	}
	return err
}

// rejoin connects to the agent of a machine that another server booted. If the sandbox is paused, its machine is frozen again.
func (s *Sandbox) rejoin(ctx context.Context) error {
	machine, err := s.m.opts.Runtime.Attach(ctx, s.m.store.path(s.id))
	if err != nil {
		return err
	}
	client, err := agent.NewClient(ctx, machine.Pipe(), s.m.opts.Version)
	if err != nil {
		_ = machine.Pipe().Close() // the sandbox does not notice
		if !errors.Is(err, agent.ErrVersion) {
			err = errors.Join(&OverError{Kind: OverSilent}, err)
		}
	}
	if s.current().State == Paused {
		err = errors.Join(err, machine.Pause(ctx))
	}
	if err != nil {
		if client != nil {
			_ = client.Close()
		}
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.machine, s.client = machine, client
	s.begin()
	return nil
}

// sleep saves the sandbox to disk and ends its machine. The machine stays frozen until state.json says that the checkpoint exists, so a
// crash at any point leaves one of the two.
func (s *Sandbox) sleep(ctx context.Context, o PauseOptions) (err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, saveTime, errors.New("it was not saved in time"))
	defer cancel()
	s.mu.Lock()
	machine, client, stop, r := s.machine, s.client, s.stop, s.rec
	s.mu.Unlock()
	saved, err := s.roomToSave(ctx, !o.wedged)
	if err != nil {
		return err
	}
	defer saved()
	paused := &StateError{ID: s.id, Verb: "continue in", State: Paused, At: time.Now(), Cause: o.Cause.Error(), Wakes: o.AutoResume}
	if r.State == Running && client != nil && !o.wedged { // calls that wait for a frozen agent end by CloseFor below
		suspending, done := context.WithTimeout(ctx, suspendTime)
		err = client.Suspend(suspending, paused)
		done()
		if err != nil && !o.forced {
			client.GoOn()
			return err
		}
	}
	stop() // from here on, the end of the machine is expected
	target := s.m.store.checkpoint(s.id, r.Saves+1)
	if err = errors.Join(s.m.store.RemoveAll(target+unfinishedSave),
		s.m.store.RemoveAll(target)); err == nil { // left by a pause that failed
		err = machine.Checkpoint(ctx, target+unfinishedSave, CheckpointOptions{FilesOnly: o.FilesOnly})
	}
	if err == nil {
		err = s.m.store.finish(target, o.FilesOnly)
	}
	s.mu.Lock()
	older := s.m.store.kept(s.rec)
	if err == nil {
		err = s.become("pause", Paused, o.Cause, func(r *record) {
			since := r.pausedSince(r.Changed)
			size, _ := sizeOf(target) // only shown; no decision depends on it
			r.Saves++
			r.Pause = &pause{Disk: true, FilesOnly: o.FilesOnly, AutoResume: o.AutoResume, Wedged: o.wedged || r.Pause != nil &&
				r.Pause.Wedged, Since: since}
			r.Copy, r.Notice = &savedCopy{Dir: filepath.Base(target), At: since, FilesOnly: o.FilesOnly, Size: size}, ""
		})
	}
	if err != nil {
		defer s.mu.Unlock()
		if s.rec.State.Ended() {
			return err // whoever killed it ends the machine
		}
		err = errors.Join(noDisk(err), s.m.store.RemoveAll(target+unfinishedSave), s.m.store.RemoveAll(target))
		if r.State == Running {
			err = errors.Join(err, s.goOn(ctx, machine))
			if client != nil {
				client.GoOn()
			}
		}
		s.begin() // its watch finds out if the machine has not survived
		return err
	}
	s.machine, s.client = nil, nil
	s.mu.Unlock()
	if client != nil {
		client.CloseFor(paused)
	}
	if err := s.endMachine(machine); err != nil {
		s.m.log.Error("end the machine of a paused sandbox", "sandbox", s.id, "error", err) // the next resume tries again
	}
	if older != "" {
		if err := s.m.store.RemoveAll(older); err != nil {
			s.m.log.Error("remove the last copy of a paused sandbox", "sandbox", s.id, "error", err) // it is removed with the sandbox
		}
	}
	return nil
}

// noDisk adds ErrNoDisk to the error of a full disk.
func noDisk(err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return fmt.Errorf("%w: %w", ErrNoDisk, err)
	}
	return err
}

func (s *Sandbox) endMachine(machine Machine) error {
	ctx, cancel := context.WithTimeout(context.Background(), destroyTimeout)
	defer cancel()
	return machine.Destroy(ctx)
}

// roomToSave reports an error unless a checkpoint may be made: within the budget for checkpoints, and with some room left on the machine's
// disk. That room is reserved until done is called. With ask, the agent is asked for its usage first. What the guest says it uses is
// believed only between what the host sees and the limits; a frozen guest has said it earlier.
func (s *Sandbox) roomToSave(ctx context.Context, ask bool) (done func(), err error) {
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
	return s.m.roomOnDisk(s.owner, baseSave+max(seen.Memory, min(said.Memory, 2*limits.Memory))+
		max(seen.Disk, min(said.DiskUsed, limits.Disk)))
}

// baseSave is about the size of an empty sandbox's checkpoint, in bytes.
const baseSave = 8 << 20

// isThere reports whether a file of that name exists.
func isThere(name string) bool {
	_, err := os.Lstat(name)
	return err == nil
}
