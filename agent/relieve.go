package agent

import (
	"context"
)

// Kinds of relief.
const (
	RelieveMemory = "memory" // of processes and their files in memory
	RelieveKernel = "kernel" // of the sandbox's kernel: descriptors, sockets, tasks
)

// RelieveRequest has the agent kill what takes most, whole processes with all that they have started, until about Target bytes are free.
// Zero is the largest one alone.
type RelieveRequest struct {
	Kind   string `json:"kind"`
	Target int64  `json:"target,omitempty"`
}

// RelieveResult tells what was killed, the largest first, and in words for people what there is most of: "150,000 open files".
type RelieveResult struct {
	Killed []Relieved `json:"killed" max:"64"`
	Detail string     `json:"detail,omitempty" max:"200"`
}

// Relieved is a process that was killed with all that it has started. PID and Name are of the largest one among them, the numbers of all.
type Relieved struct {
	Process     string `json:"process" max:"128"`
	Tag         string `json:"tag,omitempty" max:"128"`
	PID         int    `json:"pid"`
	Name        string `json:"name" max:"256"`
	Processes   int    `json:"processes"`
	Memory      int64  `json:"memory"`      // bytes
	Descriptors int64  `json:"descriptors"` // open files, sockets and others
}

// Relieve has processes killed where the host finds that the sandbox takes too much. It is no use of the sandbox. An older agent is
// ErrVersion.
func (c *Client) Relieve(ctx context.Context, r RelieveRequest) (RelieveResult, error) {
	return Call[RelieveResult](ctx, c, CallRelieve, r)
}

const (
	MaxRelieved = 64 // in one answer
)
