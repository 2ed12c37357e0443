package sandbox

import (
	"context"
	"time"

	"soulbox.dev/soulbox/agent"
)

// link is the connection of this server with a machine and the agent in it. What it does runs as long as the sandbox has that machine
// and that agent.
type link struct {
	s       *Sandbox
	machine Machine
	client  *agent.Client // nil if the agent is silent
}

// begin starts what runs as long as the machine does. s.mu is held.
func (s *Sandbox) begin() {
	ctx, cancel := context.WithCancel(s.ctx)
	s.cancelLink = cancel
	c := &link{s: s, machine: s.machine, client: s.client}
	work := &s.m.work
	work.Go(func() { c.watch(ctx) })
	if c.client == nil {
		return
	}
	work.Go(func() { c.ping(ctx) })
	work.Go(func() { c.sample(ctx) })
	work.Go(func() { c.protect(ctx) })
	if g, ok := c.machine.(CorePinner); ok {
		work.Go(func() { c.pinCores(ctx, g) })
	}
	if s.rec.Network.On() && !s.m.opts.NoNetwork {
		work.Go(func() { s.serveNetwork(ctx, c.client) })
	}
}

// ping contains a sandbox whose agent is silent. It is separate from watch, because waiting for a silent agent must not delay the checks of
// a machine whose root user may have silenced the agent.
func (c *link) ping(ctx context.Context) {
	s := c.s
	ticker := time.NewTicker(s.m.opts.PingEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-c.client.Done():
			return
		case <-ticker.C:
			if c.answers(ctx) || ctx.Err() != nil {
				continue
			}
			if err := c.machine.Check(); err == nil { // else watch knows better why the agent is silent
				c.contain(&OverError{Kind: OverSilent})
			}
		}
	}
}

// answers reports whether the agent responds. A sandbox that is paused, or was paused meanwhile, counts as responding.
func (c *link) answers(ctx context.Context) bool {
	s := c.s
	ctx, cancel := c.client.Patience(ctx, 0, s.m.opts.PingTime)
	defer cancel()
	before, can := c.shift()
	if !can {
		return true
	}
	began := time.Now()
	err := c.client.Ping(ctx)
	s.m.opts.Observe("ping", time.Since(began), err)
	if err == nil {
		return true
	}
	after, can := c.shift()
	return !can || after != before || context.Cause(ctx) != agent.ErrSilent
}

// shift counts the changes between running and paused, including saves, and reports whether the agent can respond now.
func (c *link) shift() (count int, answers bool) {
	s := c.s
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.shifts, s.rec.State == Running && s.changing == nil
}

// pinCores keeps a machine on one core while nothing in it runs for long. After releasing it to all cores, pinCores releases it once more a
// moment later: the kernel may leave out processes that begin or end meanwhile (proc(5), children), and they would stay on one core.
func (c *link) pinCores(ctx context.Context, machine CorePinner) {
	s := c.s
	var known *bool // whether it has all of its cores; nil means not known
	one := false    // some of it may be on one core
	for {
		busy, err := c.client.Busy(ctx, known)
		if err != nil {
			break // the machine has ended, it stays for another server, or its agent does not know this call
		}
		wait, began, again := pinEvery, time.Now(), false
		if known != nil && busy == *known { // the agent returns no change when the machine is about to be frozen
			wait = time.Second
		} else if err := machine.Pin(!busy); err != nil {
			s.m.log.Warn("bind a sandbox to its cores", "sandbox", s.id, "error", err)
			known, one, wait = nil, true, time.Minute
		} else { // an agent that answers whatever it likes must not keep the server busy
			known, one, wait, again = &busy, !busy, max(pinEvery, 20*time.Since(began)), busy
		}
		if sleepFor(ctx, wait) && again && machine.Pin(false) != nil { // the next round logs why
			known, one = nil, true
		}
	}
	if one {
		_ = machine.Pin(false) // so that it runs on without this server on all cores; an error does no harm if it has ended
	}
}

// pinEvery is the least time between two changes of a machine's pinning.
const pinEvery = 50 * time.Millisecond
