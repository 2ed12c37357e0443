package sandbox

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"sync"
	"time"

	"soulbox.dev/soulbox/agent"
)

// Sandbox is one sandbox of this server. It is safe for concurrent use.
type Sandbox struct {
	m      *Manager
	id     string
	owner  string
	env    map[string]string
	life   time.Duration           // from readiness on
	cancel context.CancelCauseFunc // ends the boot
	booted chan struct{}           // closed when the boot is over, whatever came of it
	left   chan struct{}           // closed when this server leaves it to the next
	ended  chan struct{}           // closed when its end has begun, with a cause

	mu      sync.Mutex
	rec     record
	lock    *os.File
	machine Machine
	client  *agent.Client
	expiry  *time.Timer
	ending  chan struct{} // closed when nothing of an ended sandbox is left
	ports   map[int]*exposed
	// connSlots bounds the connections to all ports.
	connSlots chan struct{}
	changed   chan struct{} // closed at the next change of what Info or Logs tell
	log       []LogEntry
}

// Info is a sandbox at one moment.
type Info struct {
	ID        string
	Owner     string // "" is the user of this machine
	State     State
	Cause     string // why it has ended
	Template  string
	Metadata  map[string]string
	Limits    Limits
	Created   time.Time
	Changed   time.Time
	Ready     time.Time
	ExpiresAt time.Time
}

// ID is the sandbox' name.
func (s *Sandbox) ID() string { return s.id }

// Info describes the sandbox.
func (s *Sandbox) Info() Info {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.info()
}

func (s *Sandbox) info() Info {
	r := s.rec
	return Info{ID: r.ID, Owner: r.Owner, State: r.State, Cause: r.Cause, Template: r.Template, Metadata: maps.Clone(r.Metadata), Limits: r.Limits,
		Created: r.Created, Changed: r.Changed, Ready: r.Ready, ExpiresAt: r.ExpiresAt}
}

// become changes the state, on disk first. s.mu is held.
func (s *Sandbox) become(verb string, next State, cause error) error {
	if !s.rec.State.mayBecome(next) {
		return s.wrong(verb)
	}
	r := s.rec
	r.State, r.Changed = next, time.Now()
	if cause != nil {
		r.Cause = cause.Error()
	}
	if err := s.m.store.save(r); err != nil && !next.Ended() { // a full disk must not keep a sandbox from its end
		return err
	}
	s.rec = r
	if r.Cause != "" {
		s.record("%s: %s", next, r.Cause)
	} else {
		s.record("%s", next)
	}
	return nil
}

func (s *Sandbox) wrong(verb string) error {
	e := &StateError{ID: s.rec.ID, Verb: verb, State: s.rec.State, At: s.rec.Changed}
	if s.rec.State.Ended() {
		e.Cause = s.rec.Cause
	}
	return e
}

// boot brings a new sandbox to life.
func (s *Sandbox) boot(ctx context.Context, template Template) error {
	defer close(s.booted)
	ctx, cancel := context.WithTimeoutCause(ctx, s.m.opts.BootTimeout, errors.New("the sandbox was not ready in time"))
	defer cancel()
	limits := s.Info().Limits
	machine, err := s.m.opts.Runtime.Boot(ctx, Spec{ID: s.id, Dir: s.m.store.path(s.id), Template: template, Limits: limits})
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.machine = machine
	s.mu.Unlock()
	client, err := agent.NewClient(ctx, machine.Pipe(), s.m.opts.Version)
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.client = client
	s.mu.Unlock()
	err = client.Configure(ctx, agent.Config{
		Env: s.env, MaxProcesses: limits.Processes, MaxMemory: limits.Memory, OrphanMS: s.life.Milliseconds(),
	})
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.rec.Ready = time.Now()
	s.rec.ExpiresAt = s.rec.Ready.Add(s.life)
	if err := s.become("start", Running, nil); err != nil {
		return err // killed meanwhile
	}
	s.live()
	return nil
}

// live begins what goes on as long as the sandbox lives. s.mu is held.
func (s *Sandbox) live() {
	machine, client := s.machine, s.client
	s.expiry = time.AfterFunc(time.Until(s.rec.ExpiresAt), func() { _ = s.Kill(CauseTimeout) }) // end logs its error
	s.m.work.Go(func() { s.watch(machine, client) })
	s.m.work.Go(func() { s.ping(client) })
}

// watch ends the sandbox when its agent is gone or its machine is not well.
func (s *Sandbox) watch(machine Machine, client *agent.Client) {
	ticker := time.NewTicker(checkEvery)
	defer ticker.Stop()
	for {
		select {
		case <-s.left:
			return
		case <-client.Done():
			if s.isLeft() {
				return
			}
			_ = s.end(Failed, CauseLost) // end logs its error; it has ended already where this is not news
			return
		case <-ticker.C:
			if err := machine.Check(); err != nil {
				_ = s.end(Failed, err)
				return
			}
		}
	}
}

// ping ends the sandbox when its agent does not answer. It is apart from watch: waiting for a silent agent must not hold up the checks
// of a machine whose root may have silenced it.
func (s *Sandbox) ping(client *agent.Client) {
	ticker := time.NewTicker(s.m.opts.PingEvery)
	defer ticker.Stop()
	for {
		select {
		case <-client.Done():
			return
		case <-ticker.C:
			if !s.answers(client) {
				_ = s.end(Failed, CauseSilent)
				return
			}
		}
	}
}

// answers says whether a running sandbox' agent does. One that is paused, or was meanwhile, does not have to.
func (s *Sandbox) answers(client *agent.Client) bool {
	before := s.Info()
	ctx, cancel := context.WithTimeout(s.m.ctx, s.m.opts.PingTime)
	defer cancel()
	if before.State != Running {
		return true
	}
	began := time.Now()
	err := client.Ping(ctx)
	s.m.opts.Observe("ping", time.Since(began), err)
	if err == nil {
		return true
	}
	after := s.Info()
	return after.State != Running || after.Changed != before.Changed || ctx.Err() != context.DeadlineExceeded
}

// Agent is the way into a running sandbox, for the verb that the caller is about to do.
func (s *Sandbox) Agent(verb string) (*agent.Client, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.rec.State != Running {
		return nil, s.wrong(verb)
	}
	return s.client, nil
}

// AwaitEnd waits until the sandbox has ended or ctx has, and describes it.
func (s *Sandbox) AwaitEnd(ctx context.Context) Info {
	select {
	case <-s.ended:
	case <-ctx.Done():
	}
	return s.Info()
}

// Kill ends the sandbox; nothing of it is left when it returns.
func (s *Sandbox) Kill(cause error) error { return s.end(Killed, cause) }

// end ends the sandbox in a final state. Whoever comes second waits for the first, and gets a StateError.
func (s *Sandbox) end(final State, cause error) error {
	s.mu.Lock()
	if s.ending != nil {
		ending := s.ending
		s.mu.Unlock()
		<-ending
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.wrong("kill")
	}
	if s.isLeft() { // another server's by now
		s.mu.Unlock()
		return fmt.Errorf("end sandbox %s: %w", s.id, ErrClosed)
	}
	err := s.become("kill", final, cause)
	if err != nil {
		s.mu.Unlock()
		return err
	}
	s.ending = make(chan struct{})
	close(s.ended)
	if s.expiry != nil {
		s.expiry.Stop()
	}
	s.mu.Unlock()
	s.cancel(cause)
	<-s.booted
	s.mu.Lock()
	machine, client := s.machine, s.client
	s.mu.Unlock()

	wait := s.stopPorts()
	err = s.destroy(machine, client)
	if client != nil {
		_ = client.Close() // also where the machine could not be ended: what hangs on it is freed
	}
	wait()
	if err != nil {
		err = fmt.Errorf("end sandbox %s: %w", s.id, err)
		s.m.log.Error("end sandbox", "sandbox", s.id, "error", err)
	} else {
		s.m.log.Info("sandbox ended", "sandbox", s.id, "state", final, "cause", cause)
	}
	s.m.forget(s.id)
	close(s.ending)
	return err
}

// destroy ends the machine first, so that the agent's end is no surprise to anyone, then removes what it left.
func (s *Sandbox) destroy(machine Machine, client *agent.Client) error {
	ctx, cancel := context.WithTimeout(context.Background(), destroyTimeout)
	defer cancel()
	end := func(ctx context.Context) error { return s.m.opts.Runtime.Reap(ctx, s.m.store.path(s.id)) } // of a boot that failed
	if machine != nil {
		end = machine.Destroy
	}
	if err := end(ctx); err != nil {
		return errors.Join(err, s.lock.Close()) // the directory stays for the next start to reap
	}
	if client != nil {
		_ = client.Close()
	}
	return s.m.store.remove(s.id, s.lock)
}

// Update changes what can be changed of a living sandbox. Nil fields stay.
type Update struct {
	Metadata    map[string]*string // nil values remove a pair
	Extend      *time.Duration     // added to what is left
	Lifetime    *time.Duration     // from now on; the only way to shorten a life
	MaxLifetime *time.Duration     // counted from readiness
}

// Update applies u as a whole or not at all.
func (s *Sandbox) Update(u Update) (Info, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.rec.State != Running && s.rec.State != Paused || s.isLeft() {
		return Info{}, s.wrong("update")
	}
	r := s.rec
	r.Metadata = maps.Clone(r.Metadata)
	for k, v := range u.Metadata {
		if v == nil {
			delete(r.Metadata, k)
			continue
		}
		if r.Metadata == nil {
			r.Metadata = map[string]string{}
		}
		r.Metadata[k] = *v
	}
	if err := checkMetadata(r.Metadata); err != nil {
		return Info{}, err
	}
	if u.MaxLifetime != nil {
		r.MaxLife = *u.MaxLifetime
	}
	switch {
	case u.Extend != nil && u.Lifetime != nil:
		return Info{}, fmt.Errorf("update sandbox %s: give either an extension or a life time: %w", r.ID, ErrInvalid)
	case u.Extend != nil:
		r.ExpiresAt = r.ExpiresAt.Add(*u.Extend)
	case u.Lifetime != nil:
		r.ExpiresAt = time.Now().Add(*u.Lifetime)
	}
	if u.Extend != nil && *u.Extend < 0 || u.Lifetime != nil && *u.Lifetime < 0 || r.MaxLife < 0 {
		return Info{}, fmt.Errorf("update sandbox %s: times cannot be negative: %w", r.ID, ErrInvalid)
	}
	if last := r.Ready.Add(r.MaxLife); r.MaxLife > 0 && r.ExpiresAt.After(last) {
		left := max(0, time.Until(last)).Round(time.Second)
		return Info{}, fmt.Errorf("update sandbox %s: its maximum life time leaves %s from now: %w", r.ID, left, ErrInvalid)
	}
	if err := s.m.store.save(r); err != nil {
		return Info{}, err
	}
	s.rec = r
	s.record("updated")
	s.expiry.Reset(max(0, time.Until(r.ExpiresAt)))
	return s.info(), nil
}

// Pause freezes the sandbox in memory.
func (s *Sandbox) Pause(ctx context.Context) error {
	return s.shift(ctx, "pause", Running, Paused, func() error { return s.machine.Pause(ctx) })
}

// Resume goes on after Pause.
func (s *Sandbox) Resume(ctx context.Context) error {
	return s.shift(ctx, "resume", Paused, Running, func() error { return s.machine.Resume(ctx) })
}

func (s *Sandbox) shift(ctx context.Context, verb string, from, to State, do func() error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.rec.State != from {
		return s.wrong(verb)
	}
	if err := do(); err != nil {
		return fmt.Errorf("%s sandbox %s: %w", verb, s.rec.ID, err)
	}
	return s.become(verb, to, nil)
}

// Usage tells what the sandbox uses: inside, and of the host.
func (s *Sandbox) Usage(ctx context.Context) (agent.Usage, Usage, error) {
	client, err := s.Agent("measure")
	if err != nil {
		return agent.Usage{}, Usage{}, err
	}
	inside, err := client.Usage(ctx)
	if err != nil {
		return agent.Usage{}, Usage{}, err
	}
	outside, err := s.machine.Usage(ctx)
	return inside, outside, err
}
