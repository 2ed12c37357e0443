package sandbox

import "time"

// SetFault makes the steps of a Manager's disk fail as a test wants, see durable.Disk.
func (o *Options) SetFault(fault func(step, name string, size int) (int, error)) { o.fault = fault }

// Dir returns the state directory.
func (m *Manager) Dir() string { return m.opts.Dir }

// Settled is closed once what earlier servers left has been looked at.
func (m *Manager) Settled() <-chan struct{} { return m.adoption.settled }

// ProtectNow makes the copy that is due.
func (s *Sandbox) ProtectNow() error {
	s.mu.Lock()
	client := s.client
	s.mu.Unlock()
	_, err := (&link{s: s, client: client}).protectOnce(s.current().Protect, s.meter.haveSeen())
	return err
}

// ContainNow contains the sandbox at once, even if that was tried a moment ago.
func (s *Sandbox) ContainNow(over *OverError) {
	s.contained.mu.Lock()
	s.contained.next = time.Time{}
	s.contained.mu.Unlock()
	s.mu.Lock()
	machine := s.machine
	s.mu.Unlock()
	(&link{s: s, machine: machine}).contain(over)
}

// EndIfOver ends the sandbox as its keeper does that has just found that its time is over.
func (s *Sandbox) EndIfOver() error {
	return s.endIf(Killed, CauseTimeout, func() bool { return (&keeper{s: s}).mayKill(CauseTimeout) })
}

// AdoptSilent adopts an unowned sandbox as if its agent had been silent for long.
func (m *Manager) AdoptSilent(id string) error {
	lock, err := m.store.orphan(id)
	if err != nil {
		return err
	}
	r, err := m.store.load(id)
	if err == nil {
		_, err = m.adoption.adoptSilent(r, lock, &OverError{Kind: OverSilent})
	}
	return err
}

// Connections returns how many connections to its ports the sandbox has.
func (s *Sandbox) Connections() int { return len(s.ports.slots) }

// Closing is closed when Close has begun.
func (m *Manager) Closing() <-chan struct{} { return m.ctx.Done() }

// CloseRegistry keeps sandboxes from being added, as Close does.
func (m *Manager) CloseRegistry() { m.sandboxes.close() }
