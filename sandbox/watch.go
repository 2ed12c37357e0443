package sandbox

import (
	"context"
	"errors"
	"time"

	"soulbox.dev/soulbox/agent"
)

const (
	// unknownPause is the longest time between two questions about a machine that the host could not be asked about.
	unknownPause = 10 * time.Second
	// lostTime is how long the processes of a machine may take to end after its pipe has ended.
	lostTime = 2 * time.Second
	lostPoll = 20 * time.Millisecond
	// An agent is reconnected at most relinks times in relinkTime: a program that breaks the protocol again and again is no agent.
	relinks    = 3
	relinkTime = 10 * time.Minute
)

// watch checks the machine as long as the sandbox has it, and decides by the findings whether the sandbox continues.
func (s *Sandbox) watch(ctx context.Context, machine Machine, client *agent.Client) {
	if client == nil { // no server has reached its agent yet
		s.lost(ctx, machine)
		return
	}
	timer := time.NewTimer(checkEvery)
	defer timer.Stop()
	w := watching{s: s, machine: machine}
	for {
		select {
		case <-ctx.Done():
			return
		case <-client.Done():
			if ctx.Err() == nil {
				s.lost(ctx, machine)
			}
			return
		case <-timer.C:
		}
		if err := machine.Check(); ctx.Err() == nil {
			timer.Reset(w.found(err))
		}
	}
}

// watching is what was found about a machine so far.
type watching struct {
	s       *Sandbox
	machine Machine
	unknown time.Duration // until the next question, while the machine cannot be asked about
	stopped time.Time     // since when it has been stopped
}

// found acts on a finding, and returns when to ask again.
func (w *watching) found(err error) (next time.Duration) {
	s, finding := w.s, FindingOf(err)
	if finding == Unknown {
		if w.unknown == 0 {
			s.m.log.Warn("a sandbox could not be checked; it is tried again", "sandbox", s.id, "error", err)
		}
		w.unknown = min(unknownPause, max(checkEvery, 2*w.unknown))
		return w.unknown
	}
	if w.unknown > 0 {
		s.m.log.Info("a sandbox can be checked again", "sandbox", s.id)
		w.unknown = 0
	}
	var over *OverError
	stopped := errors.As(err, &over) && over.Kind == OverStopped
	if !stopped && !w.stopped.IsZero() {
		w.stopped = time.Time{}
		s.note(LevelInfo, "its processes were continued")
	}
	switch {
	case finding == Gone:
		_ = s.end(Failed, CauseLost) // end logs its error; if the sandbox has already ended, this is not news
	case finding == Well:
		s.contained.reset()
	case stopped && w.stopped.IsZero():
		w.stopped = time.Now()
		s.note(LevelWarn, "%v from outside; the sandbox runs again once that process is continued", err)
	case stopped && time.Since(w.stopped) < s.m.opts.WedgedAfter:
	case s.runs(): // a frozen machine takes no more than it has
		s.contain(w.machine, over)
	}
	return checkEvery
}

// lost finds out about a machine whose pipe has ended: if it has no processes it is gone, else its agent is reconnected.
func (s *Sandbox) lost(ctx context.Context, machine Machine) {
	w := watching{s: s, machine: machine}
	for end := time.Now().Add(lostTime); time.Now().Before(end) || w.unknown > 0; {
		err := machine.Check()
		wait := lostPoll
		if finding := FindingOf(err); finding == Gone || finding == Unknown || w.unknown > 0 {
			if wait = w.found(err); finding == Gone {
				return
			}
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return
		}
	}
	s.m.log.Warn("the connection to the agent of a sandbox was lost; reconnecting", "sandbox", s.id)
	for !s.meetAnew(ctx) {
		if s.runs() {
			s.contain(machine, &OverError{Kind: OverSilent})
		}
		if !s.awaitThaw(ctx, machine) { // a pause to disk that has begun ends ctx
			return
		}
	}
}

// awaitThaw waits for a while, then for as long as the sandbox is frozen, and reports whether it then runs with this machine.
func (s *Sandbox) awaitThaw(ctx context.Context, machine Machine) bool {
	for sleepFor(ctx, checkEvery) {
		if FindingOf(machine.Check()) == Gone {
			_ = s.end(Failed, CauseLost) // end logs its error
			return false
		}
		if s.runs() {
			return true
		}
	}
	return false
}

// meetAnew tries several times to reconnect to the agent of a machine, and reports whether nothing is left to do.
func (s *Sandbox) meetAnew(watch context.Context) (done bool) {
	for try := range adoptTries {
		if try > 0 && !sleepFor(watch, adoptPauseOf(try)) {
			return true
		}
		err := s.relink(watch)
		switch {
		case err == nil || watch.Err() != nil || errors.Is(err, ErrState):
			return true
		case FindingOf(err) == Gone:
			_ = s.end(Failed, CauseLost) // end logs its error
			return true
		}
		s.m.log.Warn("reconnect to the agent of a sandbox", "sandbox", s.id, "try", try+1, "error", err)
	}
	return false
}

// relink reconnects to the agent of a machine whose session has ended. If watch has ended, that is no longer this caller's job.
func (s *Sandbox) relink(watch context.Context) error {
	ctx, over, err := s.takeTurn(s.ctx, "reach")
	if err != nil {
		return err
	}
	defer over()
	if watch.Err() != nil {
		return context.Cause(watch)
	}
	ctx, cancel := context.WithTimeout(ctx, adoptTime)
	defer cancel()
	s.mu.Lock()
	stop, r := s.stop, s.rec
	for len(s.relinked) > 0 && time.Since(s.relinked[0]) > relinkTime {
		s.relinked = s.relinked[1:]
	}
	often := len(s.relinked) >= relinks
	s.mu.Unlock()
	if r.State != Running && r.State != Paused || r.onDisk() {
		return s.asError("reach")
	}
	if often {
		return &OverError{Kind: OverSilent}
	}
	if err := s.rejoin(ctx); err != nil {
		return err
	}
	stop() // ends what ran with the old session
	s.mu.Lock()
	s.relinked = append(s.relinked, time.Now())
	s.mu.Unlock()
	s.note(LevelWarn, "the connection to its agent was lost and restored")
	return nil
}

// ping contains a sandbox whose agent is silent. It is separate from watch, because waiting for a silent agent must not delay the checks of
// a machine whose root user may have silenced the agent.
func (s *Sandbox) ping(ctx context.Context, machine Machine, client *agent.Client) {
	ticker := time.NewTicker(s.m.opts.PingEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-client.Done():
			return
		case <-ticker.C:
			if s.answers(ctx, client) || ctx.Err() != nil {
				continue
			}
			if err := machine.Check(); err == nil { // else watch knows better why the agent is silent
				s.contain(machine, &OverError{Kind: OverSilent})
			}
		}
	}
}

// answers reports whether the agent responds. A sandbox that is paused, or was paused meanwhile, counts as responding.
func (s *Sandbox) answers(ctx context.Context, client *agent.Client) bool {
	ctx, cancel := client.Patience(ctx, 0, s.m.opts.PingTime)
	defer cancel()
	before, can := s.shift()
	if !can {
		return true
	}
	began := time.Now()
	err := client.Ping(ctx)
	s.m.opts.Observe("ping", time.Since(began), err)
	if err == nil {
		return true
	}
	after, can := s.shift()
	return !can || after != before || context.Cause(ctx) != agent.ErrSilent
}

// gather keeps a machine on one core while nothing in it runs for long. After releasing it to all cores, gather releases it once more a
// moment later: the kernel may leave out processes that begin or end meanwhile (proc(5), children), and they would stay on one core.
func (s *Sandbox) gather(ctx context.Context, client *agent.Client, machine Gatherer) {
	var known *bool // whether it has all of its cores; nil means not known
	one := false    // some of it may be on one core
	for {
		going, err := client.Busy(ctx, known)
		if err != nil {
			break // the machine has ended, it stays for another server, or its agent does not know this call
		}
		wait, began, again := gatherEvery, time.Now(), false
		if known != nil && going == *known { // the agent returns no change when the machine is about to be frozen
			wait = time.Second
		} else if err := machine.Gather(!going); err != nil {
			s.m.log.Warn("bind a sandbox to its cores", "sandbox", s.id, "error", err)
			known, one, wait = nil, true, time.Minute
		} else { // an agent that answers whatever it likes must not keep the server busy
			known, one, wait, again = &going, !going, max(gatherEvery, 20*time.Since(began)), going
		}
		if sleepFor(ctx, wait) && again && machine.Gather(false) != nil { // the next round logs why
			known, one = nil, true
		}
	}
	if one {
		_ = machine.Gather(false) // so that it runs on without this server on all cores; an error does no harm if it has ended
	}
}

// gatherEvery is the least time between two changes of a machine's pinning.
const gatherEvery = 50 * time.Millisecond

// shift counts the changes between running and paused, including saves, and reports whether the agent can respond now.
func (s *Sandbox) shift() (count int, answers bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.shifts, s.rec.State == Running && s.hold == nil
}
