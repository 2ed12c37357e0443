package guest

import (
	"context"
	"os"

	"golang.org/x/sys/unix"
	"soulbox.dev/soulbox/agent"
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

// usage returns the resource usage of the sandbox.
func (s *Server) usage(r agent.UsageRequest) agent.Usage {
	var u agent.Usage
	if s.groups != nil {
		u = s.groups.usage()
	}
	u.OOMKills = s.oomKills.Load()
	var fs unix.Statfs_t
	if err := unix.Statfs("/", &fs); err == nil {
		u.DiskTotal = int64(fs.Blocks) * fs.Bsize
		u.DiskUsed = u.DiskTotal - int64(fs.Bfree)*fs.Bsize
	}
	_, u.AgentMemory = procUsage(os.Getpid())
	if r.Since != nil {
		u.Events = s.events.since(*r.Since)
	}
	return u
}
