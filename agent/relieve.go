package agent

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
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
	return call[RelieveResult](ctx, c, callRelieve, r)
}

const (
	maxRelieved = 64      // in one answer
	maxName     = 64      // bytes of a program's name
	manyObjects = 1000    // of the kernel's: who has fewer dies for nothing
	objectSize  = 4 << 10 // bytes of the kernel's memory that a descriptor or a task takes, about
)

// load is what a process, and all that it has started, takes.
type load struct {
	Relieved
	p    *process
	pids []int
}

// loads measures the memory of all user processes that are alive, the largest first.
func (s *Server) loads() []load {
	var all []load
	for _, p := range s.all() {
		pids := p.groupPIDs()
		if len(pids) == 0 {
			continue
		}
		_, memory := p.group.usage(p.pid)
		all = append(all, load{p: p, pids: pids, Relieved: Relieved{Process: p.id, Tag: p.req.Tag, PID: pids[0], Processes: len(pids),
			Memory: memory}})
	}
	slices.SortStableFunc(all, func(a, b load) int { return cmp.Compare(b.Memory, a.Memory) })
	return all
}

// measure measures each process, finds the largest one, and gives its size and the sum.
func (l *load) measure(size func(pid int) int64) (largest, sum int64) {
	for _, pid := range l.pids {
		n := size(pid)
		if sum += n; n > largest {
			largest, l.PID = n, pid
		}
	}
	l.Name = programName(l.PID)
	return largest, sum
}

func residentMemory(pid int) int64 {
	_, memory := procUsage(pid)
	return memory
}

// groupPIDs lists what the process has started and is alive; outside a sandbox the leader alone.
func (p *process) groupPIDs() []int {
	if p.group == nil && p.running() {
		return []int{p.pid}
	}
	return p.group.pids()
}

// relieve kills what takes most.
func (s *Server) relieve(r RelieveRequest) (RelieveResult, error) {
	var weight func(load) int64
	switch r.Kind {
	case RelieveMemory:
		weight = func(l load) int64 { return l.Memory }
	case RelieveKernel:
		weight = func(l load) int64 {
			if objects := l.Descriptors + int64(l.Processes); objects >= manyObjects {
				return objects * objectSize
			}
			return 0
		}
	default:
		return RelieveResult{}, invalid("relieve: unknown kind %q", clip(r.Kind, 40))
	}
	loads := s.loads()
	result, size := RelieveResult{Killed: []Relieved{}}, residentMemory
	if r.Kind == RelieveKernel {
		size = countDescriptors
	}
	for i := range loads {
		l := &loads[i]
		_, sum := l.measure(size)
		if r.Kind == RelieveKernel {
			l.Descriptors = sum
		}
	}
	if r.Kind == RelieveKernel {
		result.Detail = kernelDetail(loads)
	}
	slices.SortStableFunc(loads, func(a, b load) int { return cmp.Compare(weight(b), weight(a)) })
	var freed int64
	for _, l := range loads {
		if weight(l) == 0 || len(result.Killed) > 0 && (freed >= r.Target || len(result.Killed) == maxRelieved) {
			break
		}
		l.p.blame(CauseOOM)
		l.p.killAll()
		s.oomKills.Add(1)
		s.log("relieve %s: process %s is killed with %d bytes and %d descriptors", r.Kind, l.Process, l.Memory, l.Descriptors)
		freed += weight(l)
		result.Killed = append(result.Killed, l.Relieved)
	}
	return result, nil
}

// kernelDetail tells what there is most of. Files that nobody has open, and connections that are over, are in no list: they are what is
// left.
func kernelDetail(loads []load) string {
	var descriptors, tasks int64
	for _, l := range loads {
		descriptors += l.Descriptors
		tasks += int64(l.Processes)
	}
	sockets := countSockets()
	files := max(0, descriptors-sockets)
	switch most := max(files, sockets, tasks); {
	case most < manyObjects:
		return "files on its disk, or connections that are over"
	case most == sockets:
		return thousands(most) + " sockets"
	case most == tasks:
		return thousands(most) + " processes"
	}
	return thousands(files) + " open files"
}

// thousands writes a number as people read it.
func thousands(n int64) string {
	text := strconv.FormatInt(n, 10)
	for i := len(text) - 3; i > 0; i -= 3 {
		text = text[:i] + "," + text[i:]
	}
	return text
}

// countDescriptors counts the open descriptors of a process.
func countDescriptors(pid int) (n int64) {
	dir, err := os.Open(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		return 0 // it has ended
	}
	defer dir.Close()
	for {
		names, err := dir.Readdirnames(4096)
		n += int64(len(names))
		if err != nil || len(names) == 0 {
			return n
		}
	}
}

// countSockets counts the sockets that the kernel lists.
func countSockets() (n int64) {
	for _, name := range []string{"tcp", "tcp6", "udp", "udp6", "unix"} {
		f, err := os.Open("/proc/net/" + name)
		if err != nil {
			continue // the kernel does not list those
		}
		lines, buf := int64(-1), make([]byte, 64<<10) // without the heading
		for {
			got, err := f.Read(buf)
			lines += int64(bytes.Count(buf[:got], []byte("\n")))
			if err != nil || got == 0 {
				break
			}
		}
		_ = f.Close()
		n += max(0, lines)
	}
	return n
}

// programName is the name of a program, as the process itself may have set it.
func programName(pid int) string {
	name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	if err != nil {
		return ""
	}
	return clip(strings.TrimSpace(string(name)), maxName)
}
