package agent

import (
	"context"
	"errors"
	"io"
	"sync/atomic"
	"time"
)

// ErrSilent is of a sandbox from which nothing comes, or not what was asked for.
var ErrSilent = errors.New("the sandbox does not answer")

const (
	// Silence is after how long without a byte from it a sandbox counts as silent. One among many on a busy machine has been seen to need
	// 16 s for its next one.
	Silence = 30 * time.Second

	quietSteps = 10 // a silence is made of as many steps; those in which we ourselves did not run are not counted
	busyRatio  = 6  // a sandbox that says other things than the answer gets as many times the silence
)

// Patience is a context for a call that takes as long as work and what the sandbox needs beside. It ends with ErrSilent when nothing at all
// has come from the guest for silence, or much has and the answer has not for six times as long: a busy sandbox is waited for, a dead one
// is not.
func (c *Client) Patience(ctx context.Context, work, silence time.Duration) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	step := max(silence/quietSteps, time.Millisecond)
	last, quiet, all := c.heard.Load(), 0, 0
	var check func()
	check = func() {
		if now := c.heard.Load(); now != last {
			last, quiet = now, 0
		}
		quiet++
		if all++; quiet > quietSteps || all > busyRatio*quietSteps {
			cancel(ErrSilent)
		}
		if ctx.Err() == nil {
			time.AfterFunc(step, check)
		}
	}
	timer := time.AfterFunc(work+step, check)
	return ctx, func() { cancel(nil); timer.Stop() }
}

// heardReader counts what is read.
type heardReader struct {
	io.Reader
	bytes *atomic.Int64
}

func (r heardReader) Read(p []byte) (int, error) {
	n, err := r.Reader.Read(p)
	r.bytes.Add(int64(n))
	return n, err
}
