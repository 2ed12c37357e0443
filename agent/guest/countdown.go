package guest

import (
	"sync"
	"time"
)

// countdown calls something when a time has run, in which the sandbox did: a pause is not part of it. The guest's clocks go on while its
// machine is frozen or saved, all at once as it seems to it, so a countdown is made of steps, and of each as much counts as it should have
// taken, and half as much again.
type countdown struct {
	mu      sync.Mutex
	timer   *time.Timer
	stopped bool
}

// steps is how many a countdown has at least: its error after a pause is as large as one of them, and a half.
const steps = 20

// longestStep bounds how long a step is. Shorter ones would wake an idle sandbox for nothing.
const longestStep = time.Second

// after starts a countdown.
func after(left time.Duration, do func()) *countdown {
	c := &countdown{}
	step := min(max(left/steps, time.Millisecond), longestStep)
	begun := time.Now()
	next := func() {
		c.mu.Lock()
		if c.stopped {
			c.mu.Unlock()
			return
		}
		now := time.Now()
		left -= min(now.Sub(begun), step*3/2)
		begun = now
		if left > 0 {
			c.timer.Reset(min(step, left))
			c.mu.Unlock()
			return
		}
		c.stopped = true
		c.mu.Unlock()
		do()
	}
	c.mu.Lock() // next finds the timer
	c.timer = time.AfterFunc(min(step, left), next)
	c.mu.Unlock()
	return c
}

// stop ends a countdown that is not over. Of nil it does nothing.
func (c *countdown) stop() {
	if c == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stopped = true
	c.timer.Stop()
}
