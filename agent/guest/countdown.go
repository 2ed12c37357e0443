package guest

import (
	"sync"
	"time"
)

// countdown calls a function after a time in which the sandbox runs: a pause does not count. For the guest, its clocks jump ahead by the
// time its machine was frozen or saved. So a countdown consists of steps, and each step counts as at most one and a half times its planned
// length.
type countdown struct {
	mu      sync.Mutex
	timer   *time.Timer
	stopped bool
}

// steps is the smallest number of steps of a countdown: a pause adds an error of at most one and a half steps.
const steps = 20

// longestStep bounds the length of a step. Shorter steps would wake an idle sandbox for nothing.
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
	c.mu.Lock() // so that next finds the timer set
	c.timer = time.AfterFunc(min(step, left), next)
	c.mu.Unlock()
	return c
}

// stop ends a countdown that is not over. For nil it does nothing.
func (c *countdown) stop() {
	if c == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stopped = true
	c.timer.Stop()
}
