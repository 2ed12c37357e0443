package agent

import (
	"context"
	"errors"
	"io"
	"sync/atomic"
	"time"
)

// ErrSilent means that a sandbox sends nothing, or does not send the answer.
var ErrSilent = errors.New("the sandbox does not answer")

const (
	// Silence is how long a sandbox may send no byte before it counts as silent. On a busy machine, one sandbox of many has been seen to
	// take 16 s for its next byte.
	Silence = 30 * time.Second

	quietSteps = 10 // a silence is counted in this many steps; a step counts once even if the machine did not run us for longer
	busyRatio  = 6  // a sandbox that sends data but not the answer gets this many times the silence
)

// Patience returns a context for a call that takes the time work, plus what a slow sandbox needs. It ends with ErrSilent when the guest has
// sent nothing for silence, or has sent data but not the answer for six times silence: the caller waits for a busy sandbox but not for a
// dead one.
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

// heardReader counts the bytes that are read.
type heardReader struct {
	io.Reader
	bytes *atomic.Int64
}

// Read implements io.Reader.
func (r heardReader) Read(p []byte) (int, error) {
	n, err := r.Reader.Read(p)
	r.bytes.Add(int64(n))
	return n, err
}
