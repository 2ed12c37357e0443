package agent

import (
	"context"
)

// Kinds of relief.
const (
	RelieveMemory = "memory" // memory of processes and their files in memory
	RelieveKernel = "kernel" // objects of the sandbox's kernel: descriptors, sockets, tasks
)

// RelieveRequest makes the agent kill the largest processes, each with everything it started, until about Target bytes are free. Zero kills
// only the largest one.
type RelieveRequest struct {
	Kind   string `json:"kind"`
	Target int64  `json:"target,omitempty"`
}

// RelieveResult lists what was killed, largest first. Detail tells people what there is most of, such as "150,000 open files".
type RelieveResult struct {
	Killed []Relieved `json:"killed" max:"64"`
	Detail string     `json:"detail,omitempty" max:"200"`
}

// Relieved is a process that was killed with everything it started. PID and Name are those of the largest of these processes, the numbers
// are totals.
type Relieved struct {
	Process     string `json:"process" max:"128"`
	Tag         string `json:"tag,omitempty" max:"128"`
	PID         int    `json:"pid"`
	Name        string `json:"name" max:"256"`
	Processes   int    `json:"processes"`
	Memory      int64  `json:"memory"`      // bytes
	Descriptors int64  `json:"descriptors"` // open files, sockets and so on
}

// Relieve makes the agent kill processes when the host finds that the sandbox takes too much. It does not count as use of the sandbox. The
// error of an older agent is ErrVersion.
func (c *Client) Relieve(ctx context.Context, r RelieveRequest) (RelieveResult, error) {
	return Call[RelieveResult](ctx, c, CallRelieve, r)
}

const (
	MaxRelieved = 64 // in one answer
)
