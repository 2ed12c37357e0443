package main

import (
	"runtime"

	"soulbox.dev/soulbox/access"
	"soulbox.dev/soulbox/sandbox"
)

// The server's memory for buffers is a sixteenth of the machine's, within these bounds in bytes.
const (
	leastBuffers = 512 << 20
	mostBuffers  = 2 << 30
)

// accounts says what the owners of one server may use of it. The shares leave room for others. What health checks, kill, pause and the
// operator need is never taken from an account.
func accounts() *access.Accounts {
	cores, connections := int64(runtime.NumCPU()), int64(8192)
	if limit, err := softLimit(); err == nil { // half of the descriptors that are left for connections
		connections = min(connections, max(int64(limit-reserve(limit))/2, 16))
	}
	buffers := int64(leastBuffers)
	if memory, err := machineMemory(); err == nil {
		buffers = min(max(buffers, memory/16), mostBuffers)
	}
	tasks := sandbox.MachineTasks() // more is promised than there is: a sandbox seldom has a tenth of its limit
	return access.NewAccounts(map[access.Resource]access.Bound{
		access.Buffers:     {Total: buffers, Share: buffers / 2},
		access.Work:        {Total: 2 * cores, Share: cores},
		access.Builds:      {Total: 4 * cores, Share: 4},
		access.Merges:      {Total: 2 * cores, Share: cores},
		access.Connections: {Total: connections, Share: max(connections/4, 8)},
		access.Tasks:       {Total: 10 * tasks, Share: 5 * tasks},
	})
}
