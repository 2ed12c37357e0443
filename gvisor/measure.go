package gvisor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"soulbox.dev/soulbox/sandbox"
)

// Check implements sandbox.Machine.
func (m *machine) Check() error {
	if !hasSentry(m.processes) {
		return sandbox.ErrNoMachine
	}
	for _, p := range m.processes {
		if err := m.check(p); err != nil {
			return err
		}
	}
	return nil
}

// check checks one process.
func (m *machine) check(p process) error {
	used, s, failed := m.look(p)
	there, err := m.runtime.isThere(p) // last: the measurements are valid only if it is still the same process
	if err != nil {
		return fmt.Errorf("check: %w", err)
	}
	switch {
	case !there || s.ended():
		if !p.sentry {
			return nil // the sentry ends with it
		}
		if _, err := m.runtime.readFile("read stat", "/proc/self/stat"); err != nil { // without /proc nothing is known
			return fmt.Errorf("check: %w", err)
		}
		return sandbox.ErrNoMachine
	case failed != nil:
		return fmt.Errorf("check: %w", failed)
	case s.state == 'T' || s.state == 't':
		return &sandbox.OverError{Kind: sandbox.OverStopped}
	case m.memory > 0 && used > m.memory:
		return &sandbox.OverError{Kind: sandbox.OverMemory, Used: used, Limit: m.memory}
	case p.sentry:
		return m.overKernel(s.anonymous)
	}
	return nil
}

// look measures one process. If it has ended and was not waited for yet, it has no memory to measure.
func (m *machine) look(p process) (used int64, s status, err error) {
	s, err = m.runtime.readStatus(p.pid)
	if err == nil && p.sentry && !s.ended() {
		used, err = m.guestMemoryOf(p)
	}
	return used, s, err
}

// guestMemoryOf returns how much memory the sentry has for its guest, in bytes. The names of that memory stay the same while the sentry
// lives.
func (m *machine) guestMemoryOf(p process) (int64, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, name := range m.memoryNames {
		link, err := m.runtime.readLink("read fd", name)
		if err != nil && !hasEnded(err) {
			return 0, err
		}
		if !strings.HasPrefix(link, memoryPrefix) {
			m.memoryNames = nil // find them again
			break
		}
	}
	if len(m.memoryNames) == 0 {
		names, err := m.runtime.memoryFiles(p.pid)
		if err != nil {
			return 0, err
		}
		m.memoryNames = names
	}
	return m.runtime.sizeOfMemory(m.memoryNames)
}

// Usage implements sandbox.Machine. It sums the memory of the machine's processes on the host and the guest's memory, mapped or not.
func (m *machine) Usage(context.Context) (u sandbox.Usage, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("measure: %w", err)
		}
	}()
	processes, err := m.runtime.processesOf(m.dir)
	if err != nil {
		return u, err
	}
	for _, p := range processes {
		pss, err := m.runtime.readPSS(p.pid)
		if err := notShown(err); err != nil {
			return u, err
		}
		u.Memory += pss
		if p.sentry {
			guest, err := m.guestMemoryOf(p)
			if err := notShown(err); err != nil {
				return u, err
			}
			u.Memory += guest
		}
	}
	files, err := m.runtime.readDir("readdir disk", filepath.Join(m.dir, "disk")) // the sentry keeps all files in one
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return u, err
	}
	for _, f := range files {
		info, err := f.Info()
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return u, err
		}
		if err == nil {
			if st, ok := info.Sys().(*syscall.Stat_t); ok {
				u.Disk += st.Blocks * 512
			}
		}
	}
	return u, nil
}

// guestMemory bounds what the sentry holds for the guest: the limit that the agent enforces, half of it for tmpfs, another half for a root
// in memory, and what many processes may take before the agent has killed enough of them, even on a slow machine. It is the last resort
// against whatever escapes the guest's cgroups.
func guestMemory(l sandbox.Limits) int64 {
	sum := l.Memory + l.Memory/2 + 1<<30
	if l.DiskInMemory {
		sum += l.Memory / 2
	}
	return sum
}

// clockTick is the unit of times in proc(5), stat, on all Linux machines that gVisor supports.
const clockTick = 10 // ms

// cpuOf returns how much CPU time a process has used, in ms; 0 if it has ended.
func (m *machine) cpuOf(pid int) (int64, error) {
	fields, err := m.runtime.readStat(pid)
	if hasEnded(err) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	user, _ := strconv.ParseInt(fields[11], 10, 64) // 0 if the kernel writes something else
	system, _ := strconv.ParseInt(fields[12], 10, 64)
	return (user + system) * clockTick, nil
}

// IO implements sandbox.Machine. It sums values of proc(5), io and stat.
func (m *machine) IO() (sandbox.IO, error) {
	var sum sandbox.IO
	processes, err := m.ours()
	if err != nil {
		return sum, fmt.Errorf("measure: %w", err)
	}
	for _, p := range processes {
		body, err := m.runtime.readFile("read io", fmt.Sprintf("/proc/%d/io", p.pid))
		if hasEnded(err) {
			continue
		}
		if err != nil {
			return sum, fmt.Errorf("measure: %w", err)
		}
		for line := range strings.Lines(string(body)) {
			name, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
			n, _ := strconv.ParseInt(value, 10, 64) // 0 if the kernel writes something else
			switch name {
			case "read_bytes":
				sum.Read += n
			case "write_bytes":
				sum.Written += n
			}
		}
		cpu, err := m.cpuOf(p.pid)
		if err != nil {
			return sum, fmt.Errorf("measure: %w", err)
		}
		sum.CPUMS += cpu
	}
	return sum, nil
}
