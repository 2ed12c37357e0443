package sandbox

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

// Connections is how many places of connections to its ports are taken.
func (s *Sandbox) Connections() int { return len(s.connSlots) }
