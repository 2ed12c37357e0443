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
	ports  // its exported methods are the sandbox's
	m      *Manager
	id     string
	owner  string
	env    map[string]string       // for its agent
	ctx    context.Context         // ends with the sandbox, or when this server leaves it
	cancel context.CancelCauseFunc // of ctx
	booted chan struct{}           // closed when the boot is over, successful or not
	left   chan struct{}           // closed when this server leaves it to the next
	ended  chan struct{}           // closed when its end has begun, with a cause
	turn   chan struct{}           // holds a token during a pause, resume, save or destroy
	log    *journal
	meter  *meter
	keeper keeper
	copies copies
	// contained counts the attempts to pause the sandbox when it must not continue.
	contained tries

	mu         sync.Mutex
	rec        record
	lock       *os.File
	machine    Machine       // nil before it is booted, and while it is on disk
	client     *agent.Client // nil if machine is, and while its agent is silent
	unfit      error         // why this server cannot speak with its agent, though it runs
	cancelLink func()        // ends the goroutines that run with the machine
	changing   chan struct{} // closed when a change between running and paused is over; nil if there is none
	shifts     int           // how many such changes there were
	ending     chan struct{} // closed when nothing is left of an ended sandbox
	// rules ends when the network changes; nil until it is first needed.
	rules    context.Context
	endRules context.CancelFunc
	relinked []time.Time // when the connection to its agent was restored
}

// Info is a sandbox at one moment.
type Info struct {
	ID        string
	Owner     string // "" is the user of this machine
	State     State
	Cause     string // why it ended, or is paused
	Template  string
	Parent    string // the snapshot or sandbox that it began from
	Origin    string // the snapshot that it began from, directly or through forks; "" means none
	Metadata  map[string]string
	Limits    Limits
	Network   Network
	Ingress   Ingress
	Times     Times
	Created   time.Time
	Changed   time.Time // the last change of state
	Updated   time.Time // the last change by its user
	Ready     time.Time
	ExpiresAt time.Time // while it runs
	// OnDisk means that it is paused and takes no memory, AutoResume that a call wakes it. RemoveAt is when it ends if it is not resumed.
	OnDisk, AutoResume bool
	RemoveAt           time.Time
	Left               time.Duration // of its life, while it is paused
	Totals             Totals
	Protect            Protect
	// Saved is when the copy was saved that it can be resumed from, if there is one; SavedFiles means that this copy has no memory. Current
	// is until when the sandbox had not changed since then.
	Saved, Current time.Time
	SavedFiles     bool
	Notice         string // what its user must know about how it was resumed
}

// ID is the sandbox's name.
func (s *Sandbox) ID() string { return s.id }

// Info describes the sandbox.
func (s *Sandbox) Info() Info {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.info()
}

func (s *Sandbox) info() Info {
	r := s.rec
	i := Info{ID: r.ID, Owner: r.Owner, State: r.State, Cause: r.Cause, Template: r.Template, Parent: r.Parent, Origin: r.Origin,
		Metadata: maps.Clone(r.Metadata), Limits: r.Limits,
		Network: r.Network, Ingress: r.Ingress, Times: r.Times, Created: r.Created, Changed: r.Changed, Updated: r.Updated, Ready: r.Ready,
		ExpiresAt: r.ExpiresAt, RemoveAt: r.RemoveAt, Left: r.Left, Totals: s.meter.totals(),
		Protect: r.Protect, Notice: r.Notice}
	if r.Pause != nil && !r.ended() {
		i.OnDisk, i.AutoResume = r.Pause.Disk, r.Pause.AutoResume
	}
	if r.Copy != nil && !r.ended() {
		i.Saved, i.SavedFiles, i.Current = r.Copy.At, r.Copy.FilesOnly, s.copies.current()
	}
	return i
}

// become changes the state, on disk first; change, if not nil, changes the other fields of the record with it. s.mu is held.
func (s *Sandbox) become(verb string, next State, cause error, change func(*record)) error {
	return s.setState(verb, next, cause, next.Ended(), change) // a full disk must not keep a sandbox from its end
}

// setState is become, but with must it also changes the state when the record cannot be written; the next save writes it.
func (s *Sandbox) setState(verb string, next State, cause error, must bool, change func(*record)) error {
	if !s.rec.State.mayBecome(next) {
		return s.wrong(verb)
	}
	r := s.rec
	now := time.Now()
	r.State, r.Changed, r.Cause = next, now, ""
	if cause != nil {
		r.Cause = cause.Error()
	}
	r.switchClock(s.rec.State, next, now, s.m.opts.PausedFor)
	if next == Failed {
		r.Pause = r.afterFailure(now)
	}
	s.meter.setRunning(next == Running, r.Limits.Memory, now)
	r.Totals, r.Seen = s.meter.totals(), s.meter.haveSeen()
	if change != nil {
		change(&r)
	}
	if err := s.m.store.save(r); err != nil && must {
		s.m.log.Error("save the state of a sandbox", "sandbox", s.id, "state", next, "error", err)
	} else if err != nil {
		s.meter.setRunning(s.rec.State == Running, r.Limits.Memory, now)
		return err
	}
	s.rec = r
	if r.Cause != "" {
		s.logChange("%s: %s", next, r.Cause)
	} else {
		s.logChange("%s", next)
	}
	s.keeper.look()
	return nil
}

// commit makes r the record, on disk first; it is for changes of anything but the state. s.mu is held.
func (s *Sandbox) commit(r record) error {
	if err := s.m.store.save(r); err != nil {
		return err
	}
	s.rec = r
	return nil
}

// alive returns the record of a sandbox that runs or is paused; if it does not, the error says why the verb is not possible.
func (s *Sandbox) alive(verb string) (record, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.isAlive() {
		return record{}, s.wrong(verb)
	}
	return s.rec, nil
}

// isAlive reports whether the sandbox runs or is paused, and belongs to this server. s.mu is held.
func (s *Sandbox) isAlive() bool {
	return (s.rec.State == Running || s.rec.State == Paused) && !s.isLeft()
}

func (s *Sandbox) wrong(verb string) error {
	return &StateError{ID: s.rec.ID, Verb: verb, State: s.rec.State, At: s.rec.Changed, Cause: s.rec.Cause,
		Wakes: s.rec.Pause != nil && s.rec.Pause.AutoResume, Saved: s.rec.State == Failed && s.rec.onDisk()}
}

func (s *Sandbox) current() record {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.rec
}

func (s *Sandbox) runs() bool { return s.current().State == Running }

// AwaitEnd waits until the sandbox or ctx has ended, and returns the sandbox's Info.
func (s *Sandbox) AwaitEnd(ctx context.Context) Info {
	if i := s.Info(); i.State.Ended() {
		return i
	}
	select {
	case <-s.ended:
	case <-ctx.Done():
	}
	return s.Info()
}

// Kill ends the sandbox; when it returns, nothing of the sandbox is left.
func (s *Sandbox) Kill(cause error) error { return s.end(Killed, cause) }

// end ends the sandbox in a final state. A second caller waits for the first and gets a StateError.
func (s *Sandbox) end(final State, cause error) error {
	return s.endIf(final, cause, func() bool { return true })
}

// errMeanwhile means that a sandbox was not ended, because the reason for it no longer holds.
var errMeanwhile = errors.New("its state or time has changed meanwhile")

// endIf ends the sandbox only if still() holds, else returns errMeanwhile; still is called with s.mu held. It is for whoever ends a sandbox
// without being asked by its owner: the owner may resume or extend it at the same moment.
func (s *Sandbox) endIf(final State, cause error, still func() bool) error {
	s.mu.Lock()
	if !still() { // before it waits for anything
		s.mu.Unlock()
		return fmt.Errorf("end sandbox %s: %w", s.id, errMeanwhile)
	}
	if s.ending != nil {
		ending := s.ending
		s.mu.Unlock()
		<-ending
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.wrong("kill")
	}
	if s.isLeft() { // it belongs to another server by now
		s.mu.Unlock()
		return fmt.Errorf("end sandbox %s: %w", s.id, ErrClosed)
	}
	err := s.become("kill", final, cause, nil)
	if err != nil {
		s.mu.Unlock()
		return err
	}
	s.ending = make(chan struct{})
	close(s.ended)
	s.cancel(cause) // before anyone sees the state: a resume of what was saved must not begin here, where it would be cut off
	s.mu.Unlock()
	<-s.booted
	s.mu.Lock()
	doomed := s.machine
	s.mu.Unlock()
	dead := doomed != nil && endMachine(doomed) == nil // at once, because a save that is under way does not have to complete
	// A pause or resume that is under way sees that the sandbox has ended; no turn is given after this one.
	s.turn <- struct{}{}
	s.mu.Lock()
	machine, client := s.machine, s.client
	s.mu.Unlock()

	wait := s.ports.stop()
	err = s.destroy(machine, dead && machine == doomed)
	if client != nil {
		client.CloseFor(s.asError("continue in")) // even if the machine could not be ended: this frees callers that wait for it
	}
	wait()
	if err != nil {
		err = fmt.Errorf("end sandbox %s: %w", s.id, err)
		s.m.log.Error("end sandbox", "sandbox", s.id, "error", err)
	} else {
		s.m.log.Info("sandbox ended", "sandbox", s.id, "state", final, "cause", cause)
	}
	if r := s.current(); r.ended() {
		s.m.sandboxes.retire(s.id)
	} else if err != nil {
		s.m.sandboxes.remove(s)
	}
	close(s.ending)
	return err
}

func (s *Sandbox) asError(verb string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.wrong(verb)
}

// destroy ends the machine, unless it is dead, and then removes what it left.
func (s *Sandbox) destroy(machine Machine, dead bool) (err error) {
	switch {
	case dead:
	case machine != nil:
		err = endMachine(machine)
	default: // the boot failed, or the sandbox is on disk
		ctx, cancel := context.WithTimeout(context.Background(), destroyTimeout)
		defer cancel()
		err = s.m.opts.Runtime.Reap(ctx, s.m.store.path(s.id))
	}
	if err != nil {
		return errors.Join(err, s.lock.Close()) // the directory stays for the next start to reap
	}
	if r := s.current(); r.onDisk() {
		return s.m.adoption.keepFailed(r, s.lock)
	}
	return s.m.store.entomb(s.current(), s.lock)
}

// Update describes changes of a living sandbox. Nil fields stay as they are.
type Update struct {
	Metadata    map[string]*string // nil values remove a pair
	Extend      *time.Duration     // added to what is left
	Lifetime    *time.Duration     // from now on; only this can shorten a life
	AtLeast     *time.Duration     // from now on, if less is left
	MaxLifetime *time.Duration     // counted from readiness, without paused times
	Idle        *time.Duration
	OnTimeout   Action // "" means no change
	Grace       *time.Duration
	Protect     *Protect
	AutoResume  *bool // whether calls wake it, now and when its times pause it
}

// Update applies all of u or nothing.
func (s *Sandbox) Update(ctx context.Context, u Update) (Info, error) {
	info, retimed, err := s.update(u)
	client, lookErr := s.Look("tell")
	if err != nil || !retimed || lookErr != nil { // a sandbox that does not run is told when it does
		return info, err
	}
	// An agent ends itself when no server connects for longer than the sandbox's life, so it is told of a longer life. If it is silent,
	// ping notices.
	ctx, cancel := context.WithTimeout(ctx, tellTime)
	defer cancel()
	if err := client.Configure(ctx, s.current().configuration()); err != nil {
		s.m.log.Warn("tell agent of its new times", "sandbox", s.id, "error", err)
	}
	return info, nil
}

// tellTime bounds a call to the agent that is not urgent.
const tellTime = 5 * time.Second

func (s *Sandbox) update(u Update) (info Info, retimed bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.rec.State != Running && s.rec.State != Paused && !s.rec.onDisk() || s.isLeft() {
		return Info{}, false, s.wrong("update")
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
		return Info{}, false, err
	}
	if err := r.setTimes(u, time.Now()); err != nil {
		return Info{}, false, err
	}
	if u.Protect != nil {
		if err := u.Protect.check(r.Limits); err != nil {
			return Info{}, false, fmt.Errorf("update sandbox %s: %w", s.id, err)
		}
		r.Protect = *u.Protect
	}
	r.Updated = time.Now()
	retimed = !r.ExpiresAt.Equal(s.rec.ExpiresAt)
	if err := s.commit(r); err != nil {
		return Info{}, false, err
	}
	s.logChange("updated")
	s.keeper.look()
	poke(s.copies.again)
	return s.info(), retimed, nil
}

// Usage returns what the sandbox uses inside, and what it takes from the host.
func (s *Sandbox) Usage(ctx context.Context) (agent.Usage, Usage, error) {
	client, err := s.Look("measure")
	if err != nil {
		return agent.Usage{}, Usage{}, err
	}
	inside, err := client.Usage(ctx, nil)
	if err != nil {
		return agent.Usage{}, Usage{}, err
	}
	s.mu.Lock()
	machine := s.machine
	s.mu.Unlock()
	if machine == nil { // it was paused meanwhile
		return agent.Usage{}, Usage{}, s.asError("measure")
	}
	outside, err := machine.Usage(ctx)
	return inside, outside, err
}
