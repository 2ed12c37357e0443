package guest

import (
	"time"

	"soulbox.dev/soulbox/agent"
)

// emit adds an event to the ring. It leaves out a write that adds nothing to an unread earlier one, and a second loss in a row.
func (t *tree) emit(e agent.TreeEvent) {
	t.mu.Lock()
	defer t.mu.Unlock()
	next := t.first + int64(len(t.ring))
	if e.Op == opWrite {
		if at, ok := t.written[e.Path]; ok && at >= max(t.delivered, t.first) {
			return
		}
		t.written[e.Path] = next
	} else if e.Dir { // the paths below have changed or are gone
		clear(t.written)
	} else {
		delete(t.written, e.Path)
		delete(t.written, e.From)
	}
	if n := len(t.ring); e.Op == opLost && n > 0 && t.ring[n-1].Op == opLost {
		return
	}
	t.ring = append(t.ring, e)
	t.bytes += len(e.Path) + len(e.From)
	if len(t.ring) > 2*maxTreeEvents || t.bytes > maxTreeBytes { // in large steps, because the rest is copied
		cut := max(len(t.ring)-maxTreeEvents, len(t.ring)/2)
		for _, old := range t.ring[:cut] {
			t.bytes -= len(old.Path) + len(old.From)
		}
		t.ring = append([]agent.TreeEvent(nil), t.ring[cut:]...)
		t.first += int64(cut)
		for p, at := range t.written {
			if at < t.first {
				delete(t.written, p)
			}
		}
	}
}

// tell wakes the callers that wait.
func (t *tree) tell() {
	t.mu.Lock()
	defer t.mu.Unlock()
	close(t.changed)
	t.changed = make(chan struct{})
}

// read returns the kept events from a sequence number on: at most limit, and as many as fit into a message. Lost means that others are
// missing.
func (t *tree) read(from int64, limit int) (r agent.TreeResult, changed <-chan struct{}, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.used = time.Now()
	end := t.first + int64(len(t.ring))
	if from > end || from < 0 {
		return r, nil, agent.Invalid("watch %s: there is no event %d, the next one is %d", t.id, from, end)
	}
	oldest := max(t.first, end-maxTreeEvents)
	r = agent.TreeResult{Watch: t.id, Next: max(from, oldest), Lost: from < oldest, Gone: t.gone, Events: []agent.TreeEvent{}}
	size := 0
	for _, e := range t.ring[r.Next-t.first:] {
		if size += encodedSize(e.Path, e.From) + 64; len(r.Events) >= limit || size > agent.MaxMessage/2 {
			r.More = true
			break
		}
		r.Next++
		if e.Op == opLost {
			r.Lost = true
			continue
		}
		r.Events = append(r.Events, e)
	}
	t.delivered = max(t.delivered, r.Next)
	return r, t.changed, nil
}

func (t *tree) close() { _ = t.notify.file.Close() }
