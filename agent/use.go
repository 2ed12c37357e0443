package agent

import (
	"context"
	"sync"
	"time"
)

// ownCalls are those that a host makes for itself: they are no use of the sandbox, and go through when others do not.
var ownCalls = map[string]bool{CallPing: true, CallUsage: true, CallConfigure: true, CallSuspend: true, CallWork: true, CallRelieve: true}

// transfers are the streams that are in use until they end. Others, such as a connection to a port, may be open for days.
var transfers = map[string]bool{StreamRead: true, StreamWrite: true, StreamStdin: true, StreamChanges: true, StreamUnpack: true}

// usage counts what a client is used for. It is safe for concurrent use.
type usage struct {
	mu     sync.Mutex
	calls  int
	last   time.Time
	closed error         // what new calls are told
	none   chan struct{} // closed when calls is 0; nil where nobody waits for it
}

func (u *usage) enter() error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.closed != nil {
		return u.closed
	}
	u.calls++
	u.last = time.Now()
	return nil
}

func (u *usage) leave() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.calls--
	u.last = time.Now()
	if u.calls == 0 && u.none != nil {
		close(u.none)
		u.none = nil
	}
}

// suspendTime is how long an agent may take to have its calls return.
const suspendTime = 10 * time.Second

// Activity tells how many calls and transfers are under way, and when the last one was.
func (c *Client) Activity() (calls int, last time.Time) {
	c.use.mu.Lock()
	defer c.use.mu.Unlock()
	return c.use.calls, c.use.last
}

// Suspend makes the sandbox ready to stand still: new calls are refused with cause, those that wait for something return with what is
// there, and the others have as long as ctx allows. What is still under way then is of no concern to the guest.
func (c *Client) Suspend(ctx context.Context, cause error) error {
	c.use.mu.Lock()
	c.use.closed = cause
	none := c.use.none
	if c.use.calls > 0 && none == nil {
		none = make(chan struct{})
		c.use.none = none
	}
	busy := c.use.calls > 0
	c.use.mu.Unlock()
	// It is not given up half-way: one that came late would end the waits of calls that have nothing to do with it.
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

// GoOn takes Suspend back.
func (c *Client) GoOn() {
	c.use.mu.Lock()
	defer c.use.mu.Unlock()
	c.use.closed = nil
}

// CloseFor is Close with a cause that calls under way, and later ones, are told beside ErrLost.
func (c *Client) CloseFor(cause error) {
	c.use.mu.Lock()
	c.use.closed = cause
	c.use.mu.Unlock()
	c.fail(cause)
}
