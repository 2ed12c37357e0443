package guest

import (
	"bytes"
	"cmp"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"soulbox.dev/soulbox/agent"
)

const (
	maxName     = 64      // bytes of a program's name
	manyObjects = 1000    // of the kernel: a process with fewer is not killed, since that frees too little
	objectSize  = 4 << 10 // approximate bytes of the kernel's memory for a descriptor or a task
)

// load is what a process and everything it started uses.
type load struct {
	agent.Relieved
	p    *process
	pids []int
}

// loads measures the memory of all running user processes, largest first.
func (s *Server) loads() []load {
	var all []load
	for _, p := range s.all() {
		pids := p.groupPIDs()
		if len(pids) == 0 {
			continue
		}
		_, memory := p.group.usage(p.PID)
		all = append(all, load{p: p, pids: pids, Relieved: agent.Relieved{Process: p.id, Tag: p.req.Tag, PID: pids[0], Processes: len(pids),
			Memory: memory}})
	}
	slices.SortStableFunc(all, func(a, b load) int { return cmp.Compare(b.Memory, a.Memory) })
	return all
}

// measure measures each process of l, makes the largest one l's PID and Name, and returns its size and the sum.
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

// groupPIDs lists the running processes that p started, with p itself; outside a sandbox only p.
func (p *process) groupPIDs() []int {
	if p.group == nil && p.running() {
		return []int{p.PID}
	}
	return p.group.pids()
}

// relieve kills the processes that use most.
func (s *Server) relieve(r agent.RelieveRequest) (agent.RelieveResult, error) {
	var weight func(load) int64
	switch r.Kind {
	case agent.RelieveMemory:
		weight = func(l load) int64 { return l.Memory }
	case agent.RelieveKernel:
		weight = func(l load) int64 {
			if objects := l.Descriptors + int64(l.Processes); objects >= manyObjects {
				return objects * objectSize
			}
			return 0
		}
	default:
		return agent.RelieveResult{}, agent.Invalid("relieve: unknown kind %q", agent.Clip(r.Kind, 40))
	}
	loads := s.loads()
	result, size := agent.RelieveResult{Killed: []agent.Relieved{}}, residentMemory
	if r.Kind == agent.RelieveKernel {
		size = countDescriptors
	}
	for i := range loads {
		l := &loads[i]
		_, sum := l.measure(size)
		if r.Kind == agent.RelieveKernel {
			l.Descriptors = sum
		}
	}
	if r.Kind == agent.RelieveKernel {
		result.Detail = kernelDetail(loads)
	}
	slices.SortStableFunc(loads, func(a, b load) int { return cmp.Compare(weight(b), weight(a)) })
	var freed int64
	for _, l := range loads {
		if weight(l) == 0 || len(result.Killed) > 0 && (freed >= r.Target || len(result.Killed) == agent.MaxRelieved) {
			break
		}
		l.p.blame(agent.CauseOOM)
		l.p.killAll()
		s.oomKills.Add(1)
		s.log("relieve %s: process %s is killed with %d bytes and %d descriptors", r.Kind, l.Process, l.Memory, l.Descriptors)
		freed += weight(l)
		result.Killed = append(result.Killed, l.Relieved)
	}
	return result, nil
}

// kernelDetail tells what there is most of. Files that no process has open, and connections that have ended, are in no list: it names them
// if the rest is small.
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

// thousands formats a number for people.
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
			continue // the kernel does not list this kind
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

// programName returns the name of a program, which the process itself may have set.
func programName(pid int) string {
	name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	if err != nil {
		return ""
	}
	return agent.Clip(strings.TrimSpace(string(name)), maxName)
}
