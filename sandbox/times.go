package sandbox

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"soulbox.dev/soulbox/agent"
)

// Action is what becomes of a sandbox when its time is over.
type Action string

// The actions.
const (
	ActionKill  Action = "kill"
	ActionPause Action = "pause" // to disk
)

// Times are the times of a sandbox as its user wants them. They have nothing to do with the time that a command or a request may take.
type Times struct {
	Life time.Duration `json:"life"` // from its readiness on, and again from each waking at which none is left
	// Bounds every extension, counted from readiness without the times when it was paused; zero is no bound.
	Max  time.Duration `json:"max,omitempty"`
	Idle time.Duration `json:"idle,omitempty"` // without a call, nor traffic on a port; zero is no bound
	// OnTimeout is done at the end of either time, when those who are at work in it have had Grace: calls, and where it is killed
	// processes, too, which are told by SIGTERM.
	OnTimeout Action        `json:"on_timeout"`
	Grace     time.Duration `json:"grace,omitempty"`
	// First is the Life with which it was made: what it has at least when a request for one of its ports wakes it. Zero is no such bound.
	First time.Duration `json:"first,omitempty"`
	// NoAutoResume says that calls do not wake it where its times have paused it, FilesOnly that its memory is given up then.
	NoAutoResume bool `json:"no_auto_resume,omitempty"`
	FilesOnly    bool `json:"files_only,omitempty"`
}

// clock is where the times of a sandbox stand.
type clock struct {
	Ready     time.Time     `json:"ready,omitzero"`
	ExpiresAt time.Time     `json:"expires_at,omitzero"` // while it runs
	Left      time.Duration `json:"left,omitempty"`      // of its life, while it is paused: that does not count
	Slept     time.Duration `json:"slept,omitempty"`     // all times when it was paused
	RemoveAt  time.Time     `json:"remove_at,omitzero"`  // while it is paused
}

const (
	minimumLife = time.Second // what a pause leaves at least, so that a waking makes sense
	gracePoll   = 100 * time.Millisecond
	// strayTime is how long a machine lives whose server is gone and whose time is over, where its end is to be a pause.
	strayTime = 24 * time.Hour
)

// or fills in what is not said.
func (t Times) or(d Times) Times {
	t.Life, t.Max, t.Idle, t.Grace = cmp.Or(t.Life, d.Life), cmp.Or(t.Max, d.Max), cmp.Or(t.Idle, d.Idle), cmp.Or(t.Grace, d.Grace)
	if t.OnTimeout == "" {
		t.OnTimeout, t.FilesOnly = d.OnTimeout, d.FilesOnly
	}
	if t.Max > 0 {
		t.Life = min(t.Life, t.Max)
	}
	return t
}

func (t Times) check() error {
	if t.Life < 0 || t.Max < 0 || t.Idle < 0 || t.Grace < 0 {
		return fmt.Errorf("times cannot be negative: %w", ErrInvalid)
	}
	if t.OnTimeout != ActionKill && t.OnTimeout != ActionPause {
		return fmt.Errorf("at its timeout a sandbox is paused or killed, not %q: %w", t.OnTimeout, ErrInvalid)
	}
	return nil
}

// turnClock starts and stops the clock with the state; paused is how long a paused sandbox is kept.
func (r *record) turnClock(from, to State, now time.Time, paused time.Duration) {
	switch {
	case to == Running && from == Creating:
		r.Ready = now
		r.ExpiresAt = now.Add(r.Times.Life)
	case to == Running:
		r.Slept += now.Sub(r.pausedSince(now))
		life := r.Left
		if life < minimumLife {
			life = max(r.Times.Life, minimumLife)
		}
		r.ExpiresAt = now.Add(life)
		r.Left, r.RemoveAt = 0, time.Time{}
	case (to == Paused || to == Failed && r.Copy != nil) && from != Paused:
		r.Left, r.ExpiresAt = max(0, r.ExpiresAt.Sub(now)), time.Time{}
		r.RemoveAt = now.Add(paused)
	}
	if last := r.lastMoment(); to == Running && !last.IsZero() && r.ExpiresAt.After(last) {
		r.ExpiresAt = last
	}
}

// pausedSince is when the sandbox was paused: RemoveAt and Changed may both have been changed meanwhile, so it is kept with the pause.
func (r *record) pausedSince(now time.Time) time.Time {
	if r.Pause == nil {
		return now
	}
	return r.Pause.Since
}

// lastMoment is when no extension leads beyond; zero is never.
func (r *record) lastMoment() time.Time {
	if r.Times.Max <= 0 {
		return time.Time{}
	}
	return r.Ready.Add(r.Times.Max + r.Slept)
}

// orphanTime is how long an agent lives that no server comes to.
func (r *record) orphanTime() time.Duration {
	left := max(r.Times.Life, r.Left) // of one that is just being started
	if !r.ExpiresAt.IsZero() {
		left = time.Until(r.ExpiresAt)
	}
	if r.Times.OnTimeout == ActionPause {
		left += strayTime // the next server is to pause it
	}
	return max(left, minimumLife)
}

// setTimes changes the times as a user wants.
func (r *record) setTimes(u Update, now time.Time) error {
	t := r.Times
	for from, to := range map[*time.Duration]*time.Duration{u.MaxLifetime: &t.Max, u.Idle: &t.Idle, u.Grace: &t.Grace} {
		if from != nil {
			*to = *from
		}
	}
	if u.OnTimeout != "" {
		t.OnTimeout = u.OnTimeout
	}
	if u.AutoResume != nil {
		t.NoAutoResume = !*u.AutoResume
		if r.Pause != nil {
			paused := *r.Pause
			paused.AutoResume = *u.AutoResume
			r.Pause = &paused
		}
	}
	if u.Extend != nil && u.Lifetime != nil {
		return fmt.Errorf("update sandbox %s: give either an extension or a life time: %w", r.ID, ErrInvalid)
	}
	if u.Extend != nil && *u.Extend < 0 || u.Lifetime != nil && *u.Lifetime < 0 || u.AtLeast != nil && *u.AtLeast < 0 {
		return fmt.Errorf("update sandbox %s: times cannot be negative: %w", r.ID, ErrInvalid)
	}
	if err := t.check(); err != nil {
		return fmt.Errorf("update sandbox %s: %w", r.ID, err)
	}
	r.Times = t
	if u.Lifetime != nil {
		r.Times.Life = *u.Lifetime
	}
	end, err := r.newEnd(u, now)
	if err != nil {
		return err
	}
	if r.State != Running {
		r.Left = max(0, end.Sub(now))
		return nil
	}
	r.ExpiresAt = end
	return nil
}

// newEnd is when the life ends that a user wants; of one that is paused, as if it went on now. The bound of all its life holds.
func (r *record) newEnd(u Update, now time.Time) (time.Time, error) {
	end, slept := r.ExpiresAt, time.Duration(0)
	if r.State != Running {
		end, slept = now.Add(r.Left), now.Sub(r.pausedSince(now))
	}
	before := end
	if u.Extend != nil {
		end = end.Add(*u.Extend)
	}
	if u.Lifetime != nil {
		end = now.Add(*u.Lifetime)
	}
	if u.AtLeast != nil && now.Add(*u.AtLeast).After(end) {
		end = now.Add(*u.AtLeast)
	}
	bound := r.lastMoment()
	last := bound.Add(slept)
	if bound.IsZero() || !end.After(last) {
		return end, nil
	}
	if end.After(before) {
		left := max(0, last.Sub(now)).Round(time.Second)
		return end, fmt.Errorf("update sandbox %s: its maximum life time leaves %s from now: %w", r.ID, left, ErrInvalid)
	}
	return last, nil // only the bound was set: what is beyond it is cut, which is what was asked for
}

// wakeKeeper has the keeper of the sandbox' time look again.
func (s *Sandbox) wakeKeeper() { poke(s.retime) }

// poke tells whoever waits on a channel to look again.
func poke(waits chan struct{}) {
	select {
	case waits <- struct{}{}:
	default: // it will anyway
	}
}

// keepTime does what is due as long as the sandbox lives and this server has it.
func (s *Sandbox) keepTime() {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-s.retime:
		case <-timer.C:
		}
		at, cause := s.due()
		if at.IsZero() {
			continue // ended: ctx is about to be
		}
		if wait := time.Until(at); wait > 0 {
			timer.Reset(wait)
			continue
		}
		timer.Reset(s.expire(at, cause))
	}
}

// due tells what is due next, and when.
func (s *Sandbox) due() (time.Time, Cause) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.rec
	if r.State == Paused || r.onDisk() {
		return r.RemoveAt, CauseForgotten
	}
	if r.State != Running {
		return time.Time{}, ""
	}
	if r.Times.Idle > 0 && s.client != nil && s.hold == nil {
		if idle := s.lastUse().Add(r.Times.Idle); idle.Before(r.ExpiresAt) {
			return idle, CauseIdle
		}
	}
	return r.ExpiresAt, CauseTimeout
}

// lastUse is when the sandbox was last used: now, where a call is under way. s.mu is held.
func (s *Sandbox) lastUse() time.Time {
	calls, last := s.client.Activity()
	if calls > 0 {
		return time.Now()
	}
	for _, at := range []time.Time{s.meter.lastTraffic(), s.rec.Changed} {
		if at.After(last) {
			last = at
		}
	}
	return last
}

// expire does what is due, and tells when to look again. An extension during the grace is still in time.
func (s *Sandbox) expire(at time.Time, cause Cause) (next time.Duration) {
	times := s.current().Times
	if cause == CauseForgotten {
		_ = s.Kill(cause) // end logs its error
		return checkEvery
	}
	if !s.giveGrace(at, cause, times) {
		return checkEvery
	}
	times = s.current().Times // it may have been told something else meanwhile
	if times.OnTimeout == ActionKill {
		_ = s.Kill(cause)
		return checkEvery
	}
	err := s.pause(s.ctx, PauseOptions{ToDisk: true, FilesOnly: times.FilesOnly, Cause: cause, AutoResume: !times.NoAutoResume})
	if err == nil || s.ctx.Err() != nil || !s.runs() || errors.Is(err, ErrUnfit) { // which is for a server of another version
		return checkEvery
	}
	s.m.log.Error("pause sandbox to disk; it is frozen in memory instead", "sandbox", s.id, "error", err)
	s.note(LevelError, "it could not be paused to disk, and is frozen in memory: %v", err)
	if err := s.pause(s.ctx, PauseOptions{Cause: cause, AutoResume: !times.NoAutoResume}); err != nil && s.ctx.Err() == nil {
		s.m.log.Error("pause sandbox; it goes on, and that is tried again", "sandbox", s.id, "error", err)
		s.note(LevelError, "its time is over, and it could not be paused: it goes on, and that is tried again: %v", err)
		return unknownPause // one that is wedged is noticed elsewhere
	}
	return checkEvery
}

// giveGrace waits until nobody is at work in the sandbox, as long as its grace allows, and says whether its time is still over then.
func (s *Sandbox) giveGrace(at time.Time, cause Cause, times Times) bool {
	over := func() bool {
		due, why := s.due()
		return !due.IsZero() && !due.After(time.Now()) && why == cause
	}
	if times.Grace <= 0 || cause != CauseTimeout {
		return over()
	}
	end := at.Add(times.Grace)
	client := s.await(end)
	if client == nil {
		return over()
	}
	s.note(LevelInfo, "its time is over; those at work in it have %s to finish", times.Grace)
	if times.OnTimeout == ActionKill {
		s.terminate(client)
	}
	ticker := time.NewTicker(gracePoll)
	defer ticker.Stop()
	for time.Now().Before(end) && over() {
		calls, _ := client.Activity()
		if calls == 0 && (times.OnTimeout == ActionPause || len(s.processes(client)) == 0) {
			break
		}
		select {
		case <-ticker.C:
		case <-s.ctx.Done():
			return false
		}
	}
	return over()
}

// await is the agent of a running sandbox, when what is done with it as a whole is over; nil where there is none at that time.
func (s *Sandbox) await(end time.Time) *agent.Client {
	ctx, cancel := context.WithDeadline(s.ctx, end)
	defer cancel()
	for {
		s.mu.Lock()
		hold, client, running := s.hold, s.client, s.rec.State == Running
		s.mu.Unlock()
		if !running || hold == nil {
			return client
		}
		select {
		case <-hold:
		case <-ctx.Done():
			return nil
		}
	}
}

// terminate tells all processes that their time is over.
func (s *Sandbox) terminate(client *agent.Client) {
	ctx, cancel := context.WithTimeout(s.ctx, tellTime)
	defer cancel()
	for _, p := range s.processes(client) {
		if _, err := client.Signal(ctx, p.ID, "SIGTERM"); err != nil {
			s.m.log.Debug("tell process that its time is over", "sandbox", s.id, "process", p.ID, "error", err)
		}
	}
}

// processes lists those that run; one that does not answer has none that could be waited for.
func (s *Sandbox) processes(client *agent.Client) []agent.Process {
	ctx, cancel := context.WithTimeout(s.ctx, tellTime)
	defer cancel()
	list, err := client.List(ctx, agent.ListRequest{State: agent.StateRunning})
	if err != nil {
		s.m.log.Debug("list processes at the end of a sandbox' time", "sandbox", s.id, "error", err)
	}
	return list
}
