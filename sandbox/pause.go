package sandbox

import (
	"context"
	"errors"
	"fmt"
	"time"

	"soulbox.dev/soulbox/agent"
)

// PauseOptions say how a sandbox is paused.
type PauseOptions struct {
	ToDisk    bool // save memory and files and end its machine; otherwise freeze it in memory
	FilesOnly bool // with ToDisk: drop its memory and processes; it boots when it is resumed
	// AutoResume lets any call wake the sandbox; otherwise only Resume does.
	AutoResume bool
	Cause      Cause // default CauseRequest

	forced bool // it must not continue: do not wait for its agent
	silent bool // its agent is silent
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
	began, couldChange := time.Now(), s.mayBeIn(Running)
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
	s.mu.Lock()
	r, hasAgent := s.rec, s.client != nil
	s.mu.Unlock()
	if couldChange && r.isAs(o) {
		return nil // another call was faster
	} else if r.State != Running && (r.State != Paused || !o.ToDisk || r.onDisk()) {
		return s.asError("pause")
	} else if o.forced && r.State == Paused && hasAgent { // its user paused it meanwhile: it takes no more than it has
		return s.asError("pause")
	}
	if o.ToDisk {
		err = (&sleeping{s: s, o: o}).run(ctx)
	} else {
		err = s.freeze(ctx, o)
	}
	if err != nil && !errors.Is(err, ErrState) {
		err = fmt.Errorf("pause sandbox %s: %w", s.id, s.whyEnded(err))
	}
	return err
}

// mayBeIn reports whether a sandbox is in a state or is just being changed. A caller that wants another state, and finds it when its turn
// comes, has what it wants.
func (s *Sandbox) mayBeIn(from State) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.rec.State == from || s.changing != nil && !s.rec.State.Ended()
}

// isAs reports whether a sandbox is already paused as o asks.
func (r record) isAs(o PauseOptions) bool {
	return r.State == Paused && !o.forced && r.onDisk() == o.ToDisk && (o.FilesOnly || !r.Pause.FilesOnly)
}

// Settle waits until no change between running and paused is under way.
func (s *Sandbox) Settle(ctx context.Context) error {
	for {
		s.mu.Lock()
		changing := s.changing
		s.mu.Unlock()
		if changing == nil {
			return nil
		}
		select {
		case <-changing:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// ResumeOptions say how a sandbox is resumed.
type ResumeOptions struct {
	// FilesOnly boots the files without the processes that were saved. It helps if those hang or are damaged.
	FilesOnly bool
	// Memory is a new memory limit in bytes, larger than before; zero leaves it. Processes that were saved keep the old limit, and their
	// kernel gets the rest: for files and other objects.
	Memory int64
}

// Resume resumes a paused sandbox, or a failed one from what was saved of it.
func (s *Sandbox) Resume(ctx context.Context) error { return s.ResumeWith(ctx, ResumeOptions{}) }

// ResumeWith is Resume with options. Info.Notice says what is missing afterwards.
func (s *Sandbox) ResumeWith(ctx context.Context, o ResumeOptions) (err error) {
	began, couldChange := time.Now(), s.mayBeIn(Paused)
	ctx, over, err := s.takeTurn(ctx, "resume")
	if err != nil {
		return err
	}
	defer func() {
		over()
		s.m.opts.Observe("resume", time.Since(began), err)
	}()
	r := s.current()
	if couldChange && r.State == Running && o == (ResumeOptions{}) {
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
		return fmt.Errorf("resume sandbox %s: its memory limit is %d MB and can only be raised: %w", s.id, r.Limits.Memory>>20,
			ErrInvalid)
	}
	if last := r.lastMoment(); !last.IsZero() && !last.Add(time.Since(r.pausedSince(time.Now()))).After(time.Now()) {
		return fmt.Errorf("resume sandbox %s: its maximum life time is over; a longer one can be set: %w", s.id, ErrInvalid)
	}
	if r.onDisk() {
		err = (&waking{s: s, o: o}).run(ctx)
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
	changing := make(chan struct{})
	s.changing = changing
	s.shifts++
	return ctx, func() {
		stop()
		cancel(nil)
		s.mu.Lock()
		s.changing = nil
		s.mu.Unlock()
		close(changing)
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
	err := s.setState("pause", Paused, o.Cause, o.forced, func(r *record) {
		r.Pause, r.Notice = &pause{AutoResume: o.AutoResume, Silent: o.silent, Since: r.Changed}, ""
	})
	if err != nil && !s.rec.State.Ended() {
		err = errors.Join(err, s.thawLater(ctx, machine))
	}
	return err
}

// thawPause is the time until the next attempt to thaw a machine; it doubles, up to unknownPause.
const thawPause = 100 * time.Millisecond

// thawLater thaws a machine whose pause failed. If that fails too, it tries again in the background until the machine is thawed or is no
// longer its job, because every observer sees the sandbox as running.
func (s *Sandbox) thawLater(ctx context.Context, machine Machine) error {
	err := machine.Resume(ctx)
	if err == nil {
		return nil
	}
	thawed := func() (done bool) {
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
		err = machine.Resume(ctx)
		if err != nil {
			s.m.log.Warn("thaw a sandbox whose pause has failed", "sandbox", s.id, "error", err)
		}
		return err == nil
	}
	s.m.work.Go(func() {
		for wait := thawPause; sleepFor(s.ctx, wait) && !thawed(); wait = min(2*wait, unknownPause) {
		}
	})
	return err
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
