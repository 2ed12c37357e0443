package agent

import (
	"context"
	"sync"
	"time"
)

// ownCalls are the calls that a host makes for itself: they do not count as use of the sandbox, and go through when others are refused.
var ownCalls = map[string]bool{CallPing: true, CallUsage: true, CallConfigure: true, CallSuspend: true, CallBusy: true, CallRelieve: true}

// transfers are the streams that count as use until they end. Other streams, such as a connection to a port, may be open for days.
var transfers = map[string]bool{StreamRead: true, StreamWrite: true, StreamStdin: true, StreamChanges: true, StreamUnpack: true}

// inFlight counts the calls and transfers of a client. It is safe for concurrent use.
type inFlight struct {
	mu     sync.Mutex
	calls  int
	last   time.Time
	closed error         // the error of new calls
	none   chan struct{} // closed when calls becomes 0; nil if no Suspend waits for that
}

func (f *inFlight) begin() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed != nil {
		return f.closed
	}
	f.calls++
	f.last = time.Now()
	return nil
}

func (f *inFlight) end() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls--
	f.last = time.Now()
	if f.calls == 0 && f.none != nil {
		close(f.none)
		f.none = nil
	}
}

// suspendTime is how long an agent may take to make its waiting calls return.
const suspendTime = 10 * time.Second

// Activity returns how many calls and transfers are in progress, and when the last one began or ended.
func (c *Client) Activity() (calls int, last time.Time) {
	c.inFlight.mu.Lock()
	defer c.inFlight.mu.Unlock()
	return c.inFlight.calls, c.inFlight.last
}

// Suspend prepares the sandbox for a pause: new calls are refused with cause, calls that wait for something return what they have, and all
// others may finish until ctx ends. Those that are still in progress then do not matter to the guest.
func (c *Client) Suspend(ctx context.Context, cause error) error {
	c.inFlight.mu.Lock()
	c.inFlight.closed = cause
	none := c.inFlight.none
	if c.inFlight.calls > 0 && none == nil {
		none = make(chan struct{})
		c.inFlight.none = none
	}
	busy := c.inFlight.calls > 0
	c.inFlight.mu.Unlock()
	// This call outlasts ctx: if it were given up and arrived late, it would end the waits of calls after the pause.
	asking, cancel := context.WithTimeout(context.WithoutCancel(ctx), suspendTime)
	defer cancel()
	if _, err := Call[struct{}](asking, c, CallSuspend, struct{}{}); err != nil {
		return err
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if busy {
		select {
		case <-none:
		case <-ctx.Done():
		}
	}
	return nil
}

// Unsuspend undoes Suspend.
func (c *Client) Unsuspend() {
	c.inFlight.mu.Lock()
	defer c.inFlight.mu.Unlock()
	c.inFlight.closed = nil
}

// CloseFor is Close with a cause: calls in progress and later calls get it together with ErrLost.
func (c *Client) CloseFor(cause error) {
	c.inFlight.mu.Lock()
	c.inFlight.closed = cause
	c.inFlight.mu.Unlock()
	c.fail(cause)
}
