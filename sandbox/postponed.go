package sandbox

import "time"

// postponed is a sandbox of a dead server that could not be taken over yet.
type postponed struct {
	since, next time.Time
	pause       time.Duration
	why         error
}

// putOffLongest is the longest time between two tries.
const putOffLongest = time.Minute

// putOff leaves a sandbox that cannot be looked at or taken over now as it is, until the next try. The operator is told once.
func (a *adoption) putOff(id string, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	every := a.m.opts.RescanEvery
	p := a.later[id]
	if p.pause == 0 {
		a.m.log.Error("a sandbox of a dead server cannot be taken over now; it is left as it is, and tried again", "sandbox", id, "error",
			err)
		p.since = time.Now()
	}
	p.pause = min(putOffLongest, max(every, 2*p.pause))
	p.why = err
	p.next = time.Now().Add(p.pause - every/2)
	a.later[id] = p
}

// postponed returns since when, why and until when a sandbox is put off; zero if it is not.
func (a *adoption) postponed(id string) postponed {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.later[id]
}

// forget ends that a sandbox is put off.
func (a *adoption) forget(id string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.later, id)
}
