package access

import (
	"cmp"
	"sync"

	"golang.org/x/time/rate"
)

// Allowances bound what the requests of an owner take of the server while they come in and run: their rate, the bodies that are being read,
// calls in flight and sessions. Each method takes from an owner's allowance, or reports that there is no room; the caller must call done
// once, further calls do nothing. The zero value is ready to use. It is safe for concurrent use.
type Allowances struct {
	Rate  float64 // requests per second of one owner; default 200
	Calls int     // of one owner at once; default 1024

	mu     sync.Mutex
	owners map[string]*allowance
	all    allowance // totals; its rate is not used
}

// allowance is what an owner currently uses.
type allowance struct {
	rate     *rate.Limiter
	calls    int
	sessions int
	reading  int64
}

const (
	leastBurst  = 1000     // requests of one owner at once beyond its rate
	maxSessions = 2500     // per owner, and four times as many in all
	maxReading  = 64 << 20 // bytes of bodies being read, per owner, and four times as many in all
	maxBody     = 4 << 20  // bytes of a body that MayRead is asked about
)

// of returns the allowance of an owner. a.mu is held.
func (a *Allowances) of(owner string) *allowance {
	own := a.owners[owner]
	if own == nil {
		perSecond := cmp.Or(a.Rate, 200)
		own = &allowance{rate: rate.NewLimiter(rate.Limit(perSecond), max(leastBurst, int(perSecond)))}
		if a.owners == nil {
			a.owners = map[string]*allowance{}
		}
		a.owners[owner] = own
	}
	return own
}

// later returns a function that gives back what is taken, once.
func (a *Allowances) later(give func()) (done func()) {
	return sync.OnceFunc(func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		give()
	})
}

// MayAsk counts a request of an owner, and reports whether the rate allows it.
func (a *Allowances) MayAsk(owner string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.of(owner).rate.Allow()
}

// MayRead reserves room for a body, whose size may be unknown (-1).
func (a *Allowances) MayRead(owner string, size int64) (done func(), ok bool) {
	if size < 0 || size > maxBody {
		size = maxBody
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	own := a.of(owner)
	if own.reading+size > maxReading || a.all.reading+size > 4*maxReading {
		return nil, false
	}
	own.reading += size
	a.all.reading += size
	return a.later(func() {
		own.reading -= size
		a.all.reading -= size
	}), true
}

// MayCall takes one call in flight.
func (a *Allowances) MayCall(owner string) (done func(), ok bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	own := a.of(owner)
	if own.calls >= cmp.Or(a.Calls, 1024) {
		return nil, false
	}
	own.calls++
	return a.later(func() { own.calls-- }), true
}

// MayOpen takes one session.
func (a *Allowances) MayOpen(owner string) (done func(), ok bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	own := a.of(owner)
	if own.sessions >= maxSessions || a.all.sessions >= 4*maxSessions {
		return nil, false
	}
	own.sessions++
	a.all.sessions++
	return a.later(func() {
		own.sessions--
		a.all.sessions--
	}), true
}
