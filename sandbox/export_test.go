package sandbox

import "time"

// SetFault has the steps of a Manager's disk fail as a test wants, see disk.
func (o *Options) SetFault(fault func(step, name string, size int) (int, error)) { o.fault = fault }

// Dir is the state directory.
func (m *Manager) Dir() string { return m.opts.Dir }

// Settled is closed when what earlier servers left has been looked at once.
func (m *Manager) Settled() <-chan struct{} { return m.settled }

// ProtectNow makes the copy that is due.
func (s *Sandbox) ProtectNow() error {
	s.mu.Lock()
	client := s.client
	s.mu.Unlock()
	_, err := s.protectOnce(client, s.current().Protect, s.meter.haveSeen())
	return err
}

// ContainNow deals with what the sandbox is over, however lately that was tried.
func (s *Sandbox) ContainNow(over *OverError) {
	s.contained.mu.Lock()
	s.contained.next = time.Time{}
	s.contained.mu.Unlock()
	s.mu.Lock()
	machine := s.machine
	s.mu.Unlock()
	s.contain(machine, over)
}

// AdoptWedged adopts a sandbox that no server has as one whose agent has been silent for long.
func (m *Manager) AdoptWedged(id string) error {
	lock, err := m.store.orphan(id)
	if err != nil {
		return err
	}
	r, err := m.store.load(id)
	if err == nil {
		_, err = m.adoptWedged(r, lock, &OverError{Kind: OverSilent})
	}
	return err
}

// Connections is how many connections to its ports it has.
func (s *Sandbox) Connections() int { return len(s.connSlots) }

// Closing is closed when Close has begun.
func (m *Manager) Closing() <-chan struct{} { return m.ctx.Done() }
