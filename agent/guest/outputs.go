package guest

import (
	"fmt"
	"sync"

	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/agent/guest/rawsys"
)

// outputs are the pipes of a process without a terminal, and the spool where its output goes.
type outputs struct {
	spool *spool
	pipes []*outputPipe
	ends  [2]int   // of the process: stdout and stderr
	owner identity // owner of the pipes
}

// outputStock holds outputs made in advance, so that a short command need not wait for them.
type outputStock struct {
	mu     sync.Mutex
	ready  *outputs
	owner  identity // the last user of outputs, and so probably the next one
	closed bool
}

// takeOutputs returns outputs for a user. The caller closes their ends once a process has them.
func (s *Server) takeOutputs(user identity) (o *outputs, err error) {
	s.stock.mu.Lock()
	o = s.stock.ready
	s.stock.ready, s.stock.owner = nil, user
	s.stock.mu.Unlock()
	if o == nil {
		return s.makeOutputs(user)
	}
	if err := s.giveOutputs(o, user); err != nil {
		o.closeEnds()
		return nil, err
	}
	return o, nil
}

// giveOutputs makes a user the owner of outputs: opening /dev/stdout or /proc/self/fd/1 opens the pipe again, which only its owner and root
// may.
func (s *Server) giveOutputs(o *outputs, user identity) error {
	for _, end := range o.ends {
		if err := s.givePipe(end, o.owner, user); err != nil {
			return err
		}
	}
	o.owner = user
	return nil
}

// givePipe changes the owner of a pipe. What the agent opens belongs to root, the zero identity.
func (s *Server) givePipe(end int, from, user identity) error {
	if !s.opts.Init || from.uid == user.uid && from.gid == user.gid {
		return nil
	}
	if err := rawsys.Chown(end, user.uid, user.gid); err != nil {
		return fmt.Errorf("start: give a pipe to %s: %w", user.name, err)
	}
	return nil
}

// stockOutputs makes outputs in advance if there are none; it is called when no caller waits.
func (s *Server) stockOutputs() {
	s.stock.mu.Lock()
	defer s.stock.mu.Unlock()
	if s.stock.ready == nil && !s.stock.closed {
		s.stock.ready, _ = s.makeOutputs(s.stock.owner) // takeOutputs will get the error again, and report it
	}
}

// closeStock closes what was made in advance, and prevents that more is made.
func (s *Server) closeStock() {
	s.stock.mu.Lock()
	defer s.stock.mu.Unlock()
	s.stock.closed = true
	if s.stock.ready != nil {
		s.stock.ready.closeEnds()
		s.stock.ready = nil
	}
}

func (s *Server) makeOutputs(user identity) (*outputs, error) {
	o := &outputs{spool: newSpool(s.opts.SpoolDir)}
	var made [2][2]int
	for i := range made {
		var err error
		if made[i], err = rawsys.Pipe(0); err != nil {
			if i == 1 {
				rawsys.Close(made[0][0])
				rawsys.Close(made[0][1])
			}
			return nil, fmt.Errorf("start: open pipe: %w", err)
		}
	}
	// Add them before a process has them: when both have output, epoll would report pipes added later in the order of adding.
	o.pipes = []*outputPipe{s.collector.add(made[0][0], agent.OnStdout, false, o.spool),
		s.collector.add(made[1][0], agent.OnStderr, false, o.spool)}
	o.ends = [2]int{made[0][1], made[1][1]}
	if err := s.giveOutputs(o, user); err != nil {
		o.closeEnds()
		return nil, err
	}
	return o, nil
}

// closeEnds closes the writing ends. The collector then sees the end of the pipes by itself.
func (o *outputs) closeEnds() {
	rawsys.Close(o.ends[0])
	rawsys.Close(o.ends[1])
}
