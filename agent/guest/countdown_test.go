package guest

import (
	"testing"
	"testing/synctest"
	"time"
)

// TestCountdown: a countdown counts the time of its steps, and of a leap no more than one step.
func TestCountdown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, limit := range []time.Duration{time.Millisecond, 3 * time.Second, time.Hour} {
			begin, over := time.Now(), make(chan time.Time, 1)
			after(limit, func() { over <- time.Now() })
			if took := (<-over).Sub(begin); took != limit {
				t.Errorf("%v took %v", limit, took)
			}
		}
		called := false
		after(time.Second, func() { called = true }).stop()
		(*countdown)(nil).stop()
		time.Sleep(time.Minute)
		if called {
			t.Error("a countdown that was stopped is over")
		}
	})
	// A frozen machine looks like a late timer: the goroutine that the timer starts is held back.
	synctest.Test(t, func(t *testing.T) {
		begin, over := time.Now(), make(chan time.Time, 1)
		c := after(2*time.Second, func() { over <- time.Now() })
		time.Sleep(time.Second + 50*time.Millisecond)
		c.mu.Lock()
		c.timer.Reset(time.Hour) // the current step takes an hour
		c.mu.Unlock()
		if took := (<-over).Sub(begin) - time.Hour; took < 1900*time.Millisecond || took > 2200*time.Millisecond {
			t.Errorf("without the hour it took %v", took)
		}
	})
}
