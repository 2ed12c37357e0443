package guest

import (
	"sync"
	"time"

	"soulbox.dev/soulbox/agent"
)

// Bounds of the events that a watch keeps.
const (
	maxRingEvents = 8192
	maxRingBytes  = 4 << 20 // of the paths in them
)

// eventRing keeps the latest events of a watch, by numbers, so that they can be read again. It is safe for concurrent use.
type eventRing struct {
	once bool // what was read is not read again, and not kept

	mu        sync.Mutex
	kept      []agent.TreeEvent
	bytes     int              // of the paths in kept
	first     int64            // number of kept[0]
	delivered int64            // all events before this number were read
	written   map[string]int64 // number of the last opWrite of each path
	changed   chan struct{}
	gone      bool // the watched path does not exist any more
	used      time.Time
}

func newEventRing() *eventRing {
	return &eventRing{written: map[string]int64{}, changed: make(chan struct{}), used: time.Now()}
}

// emit adds an event. It leaves out a write that adds nothing to an unread earlier one, and a loss that follows an unread one.
func (r *eventRing) emit(e agent.TreeEvent) {
	r.mu.Lock()
	defer r.mu.Unlock()
	next := r.first + int64(len(r.kept))
	if e.Op == opWrite {
		if at, ok := r.written[e.Path]; ok && at >= max(r.delivered, r.first) {
			return
		}
		r.written[e.Path] = next
	} else if e.Dir { // the paths below have changed or are gone
		clear(r.written)
	} else {
		delete(r.written, e.Path)
		delete(r.written, e.From)
	}
	if n := len(r.kept); e.Op == opLost && n > 0 && r.kept[n-1].Op == opLost && r.delivered < next {
		return
	}
	r.kept = append(r.kept, e)
	r.bytes += len(e.Path) + len(e.From)
	if len(r.kept) > 2*maxRingEvents || r.bytes > maxRingBytes { // in large steps, because the rest is copied
		r.drop(max(len(r.kept)-maxRingEvents, len(r.kept)/2))
	}
}

// drop removes the oldest events. r.mu is held.
func (r *eventRing) drop(n int) {
	for _, old := range r.kept[:n] {
		r.bytes -= len(old.Path) + len(old.From)
	}
	r.kept = append([]agent.TreeEvent(nil), r.kept[n:]...)
	r.first += int64(n)
	for p, at := range r.written {
		if at < r.first {
			delete(r.written, p)
		}
	}
}

// wake wakes the callers that wait for an event.
func (r *eventRing) wake() {
	r.mu.Lock()
	defer r.mu.Unlock()
	close(r.changed)
	r.changed = make(chan struct{})
}

// end records that there is nothing left to watch.
func (r *eventRing) end() {
	r.mu.Lock()
	r.gone = true
	r.mu.Unlock()
	r.wake()
}

// lastUse returns when the events were read last.
func (r *eventRing) lastUse() time.Time {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.used
}

// read returns the kept events from a number on: at most limit, and as many as fit into a message. Lost means that others are missing.
func (r *eventRing) read(from int64, limit int) (result agent.TreeResult, changed <-chan struct{}, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.used = time.Now()
	end := r.first + int64(len(r.kept))
	if from > end || from < 0 {
		return result, nil, agent.Invalid("there is no event %d, the next one is %d", from, end)
	}
	oldest := max(r.first, end-maxRingEvents)
	result = agent.TreeResult{Next: max(from, oldest), Lost: from < oldest, Gone: r.gone, Events: []agent.TreeEvent{}}
	size := 0
	for _, e := range r.kept[result.Next-r.first:] {
		if size += encodedSize(e.Path, e.From) + 64; len(result.Events) >= limit || size > agent.MaxMessage/2 {
			result.More = true
			break
		}
		result.Next++
		if e.Op == opLost {
			result.Lost = true
			continue
		}
		result.Events = append(result.Events, e)
	}
	r.delivered = max(r.delivered, result.Next)
	if read := int(result.Next - r.first); r.once && read > 0 {
		r.drop(read)
	}
	return result, r.changed, nil
}
