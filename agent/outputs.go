package agent

import (
	"fmt"
	"sync"
)

// outputs are where a process without a terminal writes to, and what becomes of it.
type outputs struct {
	spool *spool
	pipes []*outputPipe
	ends  [2]int // for the process: stdout and stderr
}

// outputStock has outputs made ahead, so that a short command need not wait for them.
type outputStock struct {
	mu     sync.Mutex
	ready  *outputs
	closed bool
}

// takeOutputs gives outputs whose ends the caller closes once a process has them.
func (s *Server) takeOutputs() (*outputs, error) {
	s.stock.mu.Lock()
	o := s.stock.ready
	s.stock.ready = nil
	s.stock.mu.Unlock()
	if o != nil {
		return o, nil
	}
	return s.makeOutputs()
}

// stockOutputs makes outputs ahead, if there are none; it is called when nobody waits.
func (s *Server) stockOutputs() {
	s.stock.mu.Lock()
	defer s.stock.mu.Unlock()
	if s.stock.ready == nil && !s.stock.closed {
		s.stock.ready, _ = s.makeOutputs() // takeOutputs will meet the error, and tell it
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

func (s *Server) makeOutputs() (*outputs, error) {
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
	o.pipes = []*outputPipe{s.collector.add(made[0][0], onStdout, o.spool), s.collector.add(made[1][0], onStderr, o.spool)}
	o.ends = [2]int{made[0][1], made[1][1]}
	return o, nil
}

// closeEnds closes what a process writes to. The collector then sees the end of the pipes by itself.
func (o *outputs) closeEnds() {
	quickClose(o.ends[0])
	quickClose(o.ends[1])
}
