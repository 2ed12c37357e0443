package mcpserver

import (
	"encoding/json"
	"net/http"
	"sync/atomic"

	"golang.org/x/time/rate"
)

// allowance is what an owner currently uses.
type allowance struct {
	rate     *rate.Limiter
	inflight int
	sessions int
	programs int
	reading  int64
	kept     atomic.Int64 // bytes of answers kept for clients that reconnect
}

// allowance returns the allowance of an owner. h.mu is held.
func (h *HTTP) allowance(owner string) *allowance {
	a := h.owners[owner]
	if a == nil {
		a = &allowance{rate: rate.NewLimiter(rate.Limit(h.Rate), max(leastBurst, int(h.Rate)))}
		h.owners[owner] = a
	}
	return a
}

// MayAsk counts a request of an owner, and reports whether the rate allows it.
func (h *HTTP) MayAsk(owner string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.allowance(owner).rate.Allow()
}

// MayRead reserves room for a body, whose size may be unknown (-1). The caller must call done.
func (h *HTTP) MayRead(owner string, size int64) (done func(), ok bool) {
	if size < 0 || size > maxBody {
		size = maxBody
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	a := h.allowance(owner)
	if a.reading+size > maxReading || h.all.reading+size > 4*maxReading {
		return nil, false
	}
	a.reading += size
	h.all.reading += size
	return func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		a.reading -= size
		h.all.reading -= size
	}, true
}

// take takes one call from the owner's allowance. The caller must call done.
func (h *HTTP) take(owner string) (done func(), ok bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	a := h.allowance(owner)
	if a.inflight >= h.inFlight {
		return nil, false
	}
	a.inflight++
	return func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		a.inflight--
	}, true
}

func tooMany(w http.ResponseWriter, id json.RawMessage) {
	w.Header().Set("Retry-After", "1")
	refuse(w, http.StatusTooManyRequests, id, codeBusy,
		"you have sent too many requests, or have too many calls in flight; wait for some of them")
}
