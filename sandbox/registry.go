package sandbox

import (
	"maps"
	"slices"
	"sync"
)

// endedKept is how many ended sandboxes are kept in the registry, so that they need no look at their tombstones.
const endedKept = 100

// registry has the sandboxes of this server. It is safe for concurrent use.
type registry struct {
	mu     sync.Mutex
	closed bool
	byID   map[string]*Sandbox
	ended  []string // ids of ended sandboxes in byID, oldest first
	past   Totals   // of sandboxes that are no longer in byID
}

// get returns a sandbox that this server has; nil if it has none with this ID.
func (g *registry) get(id string) *Sandbox {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.byID[id]
}

// all lists the sandboxes of this server, including the ended ones that it still keeps at hand.
func (g *registry) all() []*Sandbox {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Collect(maps.Values(g.byID))
}

// whileOpen calls f before anything can close the registry. If it is closed, the error is ErrClosed.
func (g *registry) whileOpen(f func()) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return ErrClosed
	}
	f()
	return nil
}

// add enters a sandbox and calls begin before anybody finds it. If the registry is closed, the error is ErrClosed.
func (g *registry) add(s *Sandbox, begin func()) error {
	return g.whileOpen(func() {
		g.byID[s.id] = s
		begin()
	})
}

// remove forgets a failed sandbox whose machine could not be fully ended; the next look treats it like a dead server's sandbox.
func (g *registry) remove(s *Sandbox) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.byID[s.id] == s {
		delete(g.byID, s.id)
	}
}

// retire notes that a sandbox has ended, and forgets the oldest ended ones beyond endedKept. Their tombstones stay.
func (g *registry) retire(id string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.ended = append(g.ended, id)
	for len(g.ended) > endedKept {
		if sb := g.byID[g.ended[0]]; sb != nil {
			g.past = g.past.plus(sb.meter.totals())
		}
		delete(g.byID, g.ended[0])
		g.ended = g.ended[1:]
	}
}

// used returns what all sandboxes of this server have used, including those that have ended.
func (g *registry) used() Totals {
	g.mu.Lock()
	defer g.mu.Unlock()
	sum := g.past
	for _, sb := range g.byID {
		sum = sum.plus(sb.meter.totals())
	}
	return sum
}

// close keeps sandboxes from being added.
func (g *registry) close() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.closed = true
}
