package sandbox

import (
	"cmp"
	"fmt"
	"time"
)

// DefaultLifetime is how long a sandbox lives that asks for no other time, counted from when it is ready.
const DefaultLifetime = time.Hour

// Action is what happens to a sandbox when its time is over.
type Action string

// The actions.
const (
	ActionKill  Action = "kill"
	ActionPause Action = "pause" // to disk
)

// Times are the times of a sandbox as its user wants them. They are independent of the time that a command or a request may take.
type Times struct {
	Life time.Duration `json:"life"` // counted from readiness, and again from each resume at which none is left
	// Max bounds every extension, counted from readiness without the time that it was paused; zero means no bound.
	Max  time.Duration `json:"max,omitempty"`
	Idle time.Duration `json:"idle,omitempty"` // time without a call or traffic on a port; zero means no bound
	// OnTimeout happens when Life or Idle is over. At the end of Life, calls under way get Grace to finish; if the sandbox is to be killed,
	// so do its processes, which get SIGTERM.
	OnTimeout Action        `json:"on_timeout"`
	Grace     time.Duration `json:"grace,omitempty"`
	// First is the Life that it was made with: it has at least that much when a request for one of its ports wakes it. Zero means no such
	// bound.
	First time.Duration `json:"first,omitempty"`
	// NoAutoResume means that calls do not wake it after its times paused it; FilesOnly means that its memory is dropped then.
	NoAutoResume bool `json:"no_auto_resume,omitempty"`
	FilesOnly    bool `json:"files_only,omitempty"`
}

// clock holds what is left of a sandbox's times.
type clock struct {
	Ready     time.Time     `json:"ready,omitzero"`
	ExpiresAt time.Time     `json:"expires_at,omitzero"` // while it runs
	Left      time.Duration `json:"left,omitempty"`      // of its life, while it is paused: paused time does not count
	Slept     time.Duration `json:"slept,omitempty"`     // sum of the time that it was paused
	RemoveAt  time.Time     `json:"remove_at,omitzero"`  // while it is paused
}

const (
	minimumLife = time.Second // what is left at least after a pause, so that a resume makes sense
	gracePoll   = 100 * time.Millisecond
	// strayTime is how much longer a machine lives whose server is gone and whose time is over, if it is to be paused at its end.
	strayTime = 24 * time.Hour
)

// or fills in what is not set.
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

// switchClock starts and stops the clock with the state; paused is how long a paused sandbox is kept.
func (r *record) switchClock(from, to State, now time.Time, paused time.Duration) {
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

// pausedSince is when the sandbox was paused. It is kept with the pause, because RemoveAt and Changed may both have changed since then.
func (r *record) pausedSince(now time.Time) time.Time {
	if r.Pause == nil {
		return now
	}
	return r.Pause.Since
}

// lastMoment is the time that no extension can exceed; zero means no bound.
func (r *record) lastMoment() time.Time {
	if r.Times.Max <= 0 {
		return time.Time{}
	}
	return r.Ready.Add(r.Times.Max + r.Slept)
}

// orphanTime is how long an agent lives to which no server connects.
func (r *record) orphanTime() time.Duration {
	left := max(r.Times.Life, r.Left) // while it is being started
	if !r.ExpiresAt.IsZero() {
		left = time.Until(r.ExpiresAt)
	}
	if r.Times.OnTimeout == ActionPause {
		left += strayTime // the next server is to pause it
	}
	return max(left, minimumLife)
}

// setTimes changes the times as the user asks.
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

// newEnd returns when the life ends that the user asks for; for a paused sandbox, as if it were resumed now. It never exceeds lastMoment.
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
	return last, nil // only the bound was lowered: what is beyond it is cut, as asked
}
