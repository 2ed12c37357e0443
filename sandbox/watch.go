package sandbox

import (
	"context"
	"errors"
	"time"
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
func (c *link) watch(ctx context.Context) {
	if c.client == nil { // no server has reached its agent yet
		c.lost(ctx)
		return
	}
	timer := time.NewTimer(checkEvery)
	defer timer.Stop()
	w := watching{link: c}
	for {
		select {
		case <-ctx.Done():
			return
		case <-c.client.Done():
			if ctx.Err() == nil {
				c.lost(ctx)
			}
			return
		case <-timer.C:
		}
		if err := c.machine.Check(); ctx.Err() == nil {
			timer.Reset(w.found(err))
		}
	}
}

// watching is what was found about a machine so far.
type watching struct {
	*link
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
		s.log.note(LevelInfo, "its processes were continued")
	}
	switch {
	case finding == Gone:
		_ = s.end(Failed, CauseLost) // end logs its error; if the sandbox has already ended, this is not news
	case finding == Well:
		s.contained.reset()
	case stopped && w.stopped.IsZero():
		w.stopped = time.Now()
		s.log.note(LevelWarn, "%v from outside; the sandbox runs again once that process is continued", err)
	case stopped && time.Since(w.stopped) < s.m.opts.ContainAfter:
	case s.runs(): // a frozen machine takes no more than it has
		w.contain(over)
	}
	return checkEvery
}

// lost finds out about a machine whose pipe has ended: if it has no processes it is gone, else its agent is reconnected.
func (c *link) lost(ctx context.Context) {
	s := c.s
	w := watching{link: c}
	for end := time.Now().Add(lostTime); time.Now().Before(end) || w.unknown > 0; {
		err := c.machine.Check()
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
	for !c.reconnect(ctx) {
		if s.runs() {
			c.contain(&OverError{Kind: OverSilent})
		}
		if !c.awaitThaw(ctx) { // a pause to disk that has begun ends ctx
			return
		}
	}
}

// awaitThaw waits for a while, then for as long as the sandbox is frozen, and reports whether it then runs with this machine.
func (c *link) awaitThaw(ctx context.Context) bool {
	s := c.s
	for sleepFor(ctx, checkEvery) {
		if FindingOf(c.machine.Check()) == Gone {
			_ = s.end(Failed, CauseLost) // end logs its error
			return false
		}
		if s.runs() {
			return true
		}
	}
	return false
}

// reconnect tries several times to reconnect to the agent of a machine, and reports whether nothing is left to do.
func (c *link) reconnect(watch context.Context) (done bool) {
	s := c.s
	for try := range adoptTries {
		if try > 0 && !sleepFor(watch, adoptPauseOf(try)) {
			return true
		}
		err := c.relink(watch)
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

// relink reconnects to the agent of a machine whose link has ended. If watch has ended, that is no longer this caller's job.
func (c *link) relink(watch context.Context) error {
	s := c.s
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
	cancelLink, r := s.cancelLink, s.rec
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
	cancelLink() // ends what ran with the old link
	s.mu.Lock()
	s.relinked = append(s.relinked, time.Now())
	s.mu.Unlock()
	s.log.note(LevelWarn, "the connection to its agent was lost and restored")
	return nil
}
