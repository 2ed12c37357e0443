package sandbox

// SetFault has the steps of a Manager's disk fail as a test wants, see disk.
func (o *Options) SetFault(fault func(step, name string, size int) (int, error)) { o.fault = fault }

// Dir is the state directory.
func (m *Manager) Dir() string { return m.opts.Dir }
