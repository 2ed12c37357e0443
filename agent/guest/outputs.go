package guest

import (
	"fmt"
	"sync"

	"soulbox.dev/soulbox/agent"
)

// outputs are where a process without a terminal writes to, and what becomes of it.
type outputs struct {
	spool *spool
	pipes []*outputPipe
	ends  [2]int   // for the process: stdout and stderr
	owner identity // whose pipes they are
}

// outputStock has outputs made ahead, so that a short command need not wait for them.
type outputStock struct {
	mu     sync.Mutex
	ready  *outputs
	owner  identity // who had the last ones, and so, most likely, has the next
	closed bool
}

// takeOutputs gives outputs of a user, whose ends the caller closes once a process has them.
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

// giveOutputs makes outputs a user's: who opens /dev/stdout or /proc/self/fd/1 opens the pipe anew, which its owner alone may, and root.
func (s *Server) giveOutputs(o *outputs, user identity) error {
	for _, end := range o.ends {
		if err := s.givePipe(end, o.owner, user); err != nil {
			return err
		}
	}
	o.owner = user
	return nil
}

// givePipe makes a pipe another user's. What the agent opens is root's, the zero identity's.
func (s *Server) givePipe(end int, from, user identity) error {
	if !s.opts.Init || from.uid == user.uid && from.gid == user.gid {
		return nil
	}
	if err := quickChown(end, user.uid, user.gid); err != nil {
		return fmt.Errorf("start: give a pipe to %s: %w", user.name, err)
	}
	return nil
}

// stockOutputs makes outputs ahead, if there are none; it is called when nobody waits.
func (s *Server) stockOutputs() {
	s.stock.mu.Lock()
	defer s.stock.mu.Unlock()
	if s.stock.ready == nil && !s.stock.closed {
		s.stock.ready, _ = s.makeOutputs(s.stock.owner) // takeOutputs will meet the error, and tell it
	}
}

// closeStock gives back what was made ahead. Nothing is made ahead any more.
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
		if made[i], err = quickPipe(0); err != nil {
			if i == 1 {
				quickClose(made[0][0])
				quickClose(made[0][1])
			}
			return nil, fmt.Errorf("start: open pipe: %w", err)
		}
	}
	// Before a process has them: pipes that are added when both have output would be taken in the order of adding.
	o.pipes = []*outputPipe{s.collector.add(made[0][0], agent.OnStdout, o.spool), s.collector.add(made[1][0], agent.OnStderr, o.spool)}
	o.ends = [2]int{made[0][1], made[1][1]}
	if err := s.giveOutputs(o, user); err != nil {
		o.closeEnds()
		return nil, err
	}
	return o, nil
}

// closeEnds closes what a process writes to. The collector then sees the end of the pipes by itself.
func (o *outputs) closeEnds() {
	quickClose(o.ends[0])
	quickClose(o.ends[1])
}
