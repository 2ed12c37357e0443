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
func (m *Manager) putOff(id string, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	p := m.later[id]
	if p.pause == 0 {
		m.log.Error("a sandbox of a dead server cannot be taken over now; it is left as it is, and tried again", "sandbox", id, "error",
			err)
		p.since = time.Now()
	}
	p.pause = min(putOffLongest, max(m.opts.RescanEvery, 2*p.pause))
	p.why = err
	p.next = time.Now().Add(p.pause - m.opts.RescanEvery/2)
	m.later[id] = p
}

func (m *Manager) isPutOff(id string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return time.Now().Before(m.later[id].next)
}

// putOffSince returns since when a sandbox could not be taken over; zero if it is not put off.
func (m *Manager) putOffSince(id string) time.Time {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.later[id].since
}

// whyPutOff returns why a sandbox could not be taken over; nil if it is not put off.
func (m *Manager) whyPutOff(id string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.later[id].why
}
