package guest

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"

	"soulbox.dev/soulbox/agent"
)

// addProcess gives a process its id and checks its tag.
func (s *Server) addProcess(p *process) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if old := s.tags[p.req.Tag]; p.req.Tag != "" && old != nil && old.running() {
		return fmt.Errorf("tag %q belongs to process %s: %w", p.req.Tag, old.id, agent.ErrTagInUse)
	}
	s.seq++
	p.seq, p.id = s.seq, "p"+strconv.Itoa(s.seq)
	s.procs[p.id] = p
	if p.req.Tag != "" {
		p.namesake = s.tags[p.req.Tag]
		s.tags[p.req.Tag] = p
	}
	return nil
}

// removeProcess undoes addProcess.
func (s *Server) removeProcess(p *process) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.procs, p.id)
	if s.tags[p.req.Tag] == p {
		delete(s.tags, p.req.Tag)
		if p.namesake != nil {
			s.tags[p.req.Tag] = p.namesake
		}
	}
}

// forgetEnded cleans up after the end of p: it releases the cgroup if that is empty, and forgets all but the last ended processes.
func (s *Server) forgetEnded(p *process) {
	p.group.release(p.ended.Sub(p.started) > firstLook)
	if s.groups != nil {
		s.groups.stock()
		if busy, _ := s.activity.now(); busy {
			s.countProcesses()
		}
	}
	s.stockOutputs()
	s.mu.Lock()
	var ended []*process
	for _, q := range s.procs {
		if q.ready.Load() && !q.running() {
			ended = append(ended, q)
		}
	}
	var drop []*process
	for len(ended) > endedKept {
		oldest := 0
		for i, q := range ended {
			if q.seq < ended[oldest].seq {
				oldest = i
			}
		}
		q := ended[oldest]
		ended = append(ended[:oldest], ended[oldest+1:]...)
		if !q.group.remove() {
			continue // something that it started still runs
		}
		drop = append(drop, q)
		delete(s.procs, q.id)
		if s.tags[q.req.Tag] == q {
			delete(s.tags, q.req.Tag)
		}
	}
	s.mu.Unlock()
	for _, q := range drop {
		q.output.discard()
	}
}

// processByName returns a process by id or tag.
func (s *Server) processByName(name string) (*process, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p := s.procs[name]; p != nil && p.ready.Load() {
		return p, nil
	}
	if p := s.tags[name]; p != nil && p.ready.Load() {
		return p, nil
	}
	return nil, fmt.Errorf("process %q: %w", agent.Clip(name, 80), agent.ErrNoProcess)
}

// all returns the processes in the order of their start.
func (s *Server) all() []*process {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []*process
	for _, p := range s.procs {
		if p.ready.Load() {
			all = append(all, p)
		}
	}
	slices.SortFunc(all, func(a, b *process) int { return cmp.Compare(a.seq, b.seq) })
	return all
}
