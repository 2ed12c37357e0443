package guest

import (
	"os"

	"golang.org/x/sys/unix"
	"soulbox.dev/soulbox/agent"
)

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
