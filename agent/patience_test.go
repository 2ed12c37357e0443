package agent

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// TestPatience: a sandbox that sends anything is waited for, but not forever; a silent one is given up.
func TestPatience(t *testing.T) {
	for name, test := range map[string]struct {
		work, talks time.Duration
		least, most time.Duration
	}{
		"silent":            {0, 0, Silence, Silence + 2*Silence/quietSteps},
		"busy for a while":  {0, time.Minute, time.Minute + Silence/2, time.Minute + Silence},
		"busy for ever":     {0, time.Hour, busyRatio * Silence, busyRatio*Silence + 2*Silence/quietSteps},
		"silent at work":    {time.Hour, 0, time.Hour + Silence, time.Hour + Silence + 2*Silence/quietSteps},
		"noisy during work": {time.Hour, time.Hour, time.Hour + Silence, time.Hour + Silence + 2*Silence/quietSteps},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := new(Client)
				began := time.Now()
				ctx, cancel := c.Patience(t.Context(), test.work, Silence)
				defer cancel()
				var talk sync.WaitGroup
				defer talk.Wait()
				talk.Go(func() {
					for time.Since(began) < test.talks && ctx.Err() == nil {
						c.heard.Add(1)
						time.Sleep(Silence / 2)
					}
				})
				<-ctx.Done()
				if took := time.Since(began); took < test.least || took > test.most || !errors.Is(context.Cause(ctx), ErrSilent) {
					t.Error(took, context.Cause(ctx))
				}
			})
		})
	}
}
