package guest

import (
	"testing"
	"testing/synctest"
	"time"
)

// TestCountdown counts time that goes by in steps, and of a leap no more than one of them.
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
	// A machine that stands still is one whose timer comes late: the goroutine that it would call is held back.
	synctest.Test(t, func(t *testing.T) {
		begin, over := time.Now(), make(chan time.Time, 1)
		c := after(2*time.Second, func() { over <- time.Now() })
		time.Sleep(time.Second + 50*time.Millisecond)
		c.mu.Lock()
		c.timer.Reset(time.Hour) // the step that is under way takes an hour
		c.mu.Unlock()
		if took := (<-over).Sub(begin) - time.Hour; took < 1900*time.Millisecond || took > 2200*time.Millisecond {
			t.Errorf("without the hour it took %v", took)
		}
	})
}
