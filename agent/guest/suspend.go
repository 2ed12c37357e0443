package guest

import (
	"context"
)

// waiting returns ctx for a call that waits: it also ends with suspend.
func (s *Server) waiting(ctx context.Context) context.Context {
	s.mu.Lock()
	waits := s.waits
	s.mu.Unlock()
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(waits, cancel)
	context.AfterFunc(ctx, func() { stop() }) // ctx ends with the call
	return ctx
}

// suspend makes all calls that wait return what they have: the machine is about to be paused.
func (s *Server) suspend() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cancelWaits()
	s.waits, s.cancelWaits = context.WithCancel(s.ctx)
}
