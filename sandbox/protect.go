package sandbox

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// Protect says how often a running sandbox is saved in the background, so that it can be resumed if it fails. A copy replaces the previous
// one, and is made only if something has changed. While it is made, the sandbox stands still for about as long as a snapshot takes.
type Protect struct {
	Every  time.Duration `json:"every,omitempty"`  // zero means not set, negative means off whatever the server's default
	Memory bool          `json:"memory,omitempty"` // memory and processes too, not only files
}

// minProtect is the shortest time between two copies.
const minProtect = 10 * time.Second

func (p Protect) on() bool { return p.Every > 0 }

// or fills in what is not set.
func (p Protect) or(d Protect) Protect {
	if p.Every == 0 {
		return d
	}
	return p
}

func (p Protect) check(l Limits) error {
	if p.on() && p.Every < minProtect {
		return fmt.Errorf("protect: every %s is too often, at least %s must be between two copies: %w", p.Every, minProtect, ErrInvalid)
	}
	if p.on() && !p.Memory && l.DiskInMemory {
		return fmt.Errorf("protect: what this sandbox writes is in its memory, so its memory must be saved, too: %w", ErrInvalid)
	}
	return nil
}

// protect saves the sandbox as often as its user wants, until ctx ends.
func (c *link) protect(ctx context.Context) {
	s := c.s
	var saw seen // at the last copy
	for {
		p := s.current().Protect
		var due <-chan time.Time
		if p.on() {
			due = time.After(max(0, time.Until(c.nextCopy(p))))
		}
		select {
		case <-ctx.Done():
			return
		case <-c.client.Done():
			return
		case <-s.copies.again:
			continue
		case <-due:
		}
		now, err := c.protectOnce(p, saw)
		if err != nil && ctx.Err() == nil && !errors.Is(err, ErrState) {
			s.log.note(LevelWarn, "it could not be saved in the background: %v", err)
		}
		if err != nil {
			if !sleepFor(ctx, minProtect) {
				return
			}
			continue
		}
		saw = now
	}
}

// nextCopy returns when the next copy is due.
func (c *link) nextCopy(p Protect) time.Time {
	s := c.s
	r := s.current()
	last := r.Changed
	for _, at := range []time.Time{s.copies.current(), r.copied()} {
		if at.After(last) {
			last = at
		}
	}
	return last.Add(p.Every)
}

// protectOnce makes a copy, unless nothing has happened since saw, and returns what it has seen then.
func (c *link) protectOnce(p Protect, saw seen) (seen, error) {
	s := c.s
	if !s.runs() { // a paused sandbox has not changed
		s.copies.setUnchanged(time.Now())
		return saw, nil
	}
	ctx, over, err := s.takeTurn(s.ctx, "protect")
	if err != nil {
		return saw, err
	}
	defer over()
	calls, last := c.client.Activity()
	r := s.current()
	copied, made := r.copied(), r.Copy
	now := time.Now()
	s.Refresh(ctx)
	next := s.meter.haveSeen()
	if made != nil && made.FilesOnly != p.Memory && calls == 0 && last.Before(copied) && saw == next &&
		s.meter.lastTraffic().Before(copied) {
		s.copies.setUnchanged(now)
		return next, nil
	}
	return next, s.copies.make(ctx, !p.Memory)
}

// sleepFor waits for d, and reports whether ctx had not ended by then.
func sleepFor(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}
