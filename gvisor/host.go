package gvisor

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// askTries bounds how often a request to the host is tried that fails with EINTR or EAGAIN.
const askTries = 4

// ask makes a request to the host that may be repeated. It repeats a request that fails with EINTR or EAGAIN; any other error means that
// the answer is not known, unless the caller takes that error for an answer.
func (r *Runtime) ask(what string, do func() error) error {
	for try := 1; ; try++ {
		err := r.fault(what)
		if err == nil {
			err = do()
		}
		if try == askTries || !errors.Is(err, syscall.EINTR) && !errors.Is(err, syscall.EAGAIN) {
			return err
		}
		time.Sleep(time.Duration(try) * time.Millisecond)
	}
}

// fault asks Fault about a request to the host. Without Fault, it is made.
func (r *Runtime) fault(what string) error {
	if r.Fault == nil {
		return nil
	}
	return r.Fault(what)
}

func (r *Runtime) readFile(what, name string) (body []byte, err error) {
	err = r.ask(what, func() error {
		body, err = os.ReadFile(name)
		return err
	})
	return body, err
}

func (r *Runtime) readDir(what, name string) (entries []os.DirEntry, err error) {
	err = r.ask(what, func() error {
		entries, err = os.ReadDir(name)
		return err
	})
	return entries, err
}

func (r *Runtime) readLink(what, name string) (target string, err error) {
	err = r.ask(what, func() error {
		target, err = os.Readlink(name)
		return err
	})
	return target, err
}

// hasEnded reports whether an error of reading about a process in /proc means that the process does not exist (any more).
func hasEnded(err error) bool { return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ESRCH) }

// status is what proc(5), status, says about a process.
type status struct {
	state     byte
	uids      []string // real, effective, saved, of the file system
	anonymous int64    // bytes of memory without a file
}

// ended reports whether the process has ended, even if its parent has not waited for it yet.
func (s status) ended() bool { return s.state == 'Z' || s.state == 'X' }

func (r *Runtime) readStatus(pid int) (s status, err error) {
	body, err := r.readFile("read status", fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return s, err
	}
	for line := range strings.Lines(string(body)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ":")
		switch value = strings.TrimSpace(value); {
		case name == "State" && value != "":
			s.state = value[0]
		case name == "Uid":
			s.uids = strings.Fields(value)
		case name == "RssAnon":
			if s.anonymous, err = kilobytes(value); err != nil {
				return s, fmt.Errorf("read status of process %d: %w", pid, err)
			}
		}
	}
	return s, nil
}

// kilobytes parses "12 kB" and returns bytes.
func kilobytes(text string) (int64, error) {
	kb, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(text), " kB"), 10, 64)
	return kb << 10, err
}

// startOf returns when a process was started, in ticks since the host's own start (proc(5), stat, field 22).
func (r *Runtime) startOf(pid int) (uint64, error) {
	fields, err := r.readStat(pid)
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(fields[19], 10, 64)
}

// readStat returns the fields of proc(5), stat, that follow a process's name, from field 3 on; at least 20.
func (r *Runtime) readStat(pid int) ([]string, error) {
	body, err := r.readFile("read stat", fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return nil, err
	}
	_, after, _ := strings.Cut(string(body[max(0, strings.LastIndexByte(string(body), ')')):]), " ") // the name may contain anything
	fields := strings.Fields(after)
	if len(fields) < 20 {
		return nil, fmt.Errorf("read stat of process %d: it has %d fields", pid, len(fields))
	}
	return fields, nil
}

// memoryPrefix begins the name of the memory file in which a sentry keeps what it has for its guest (gVisor, pkg/sentry/pgalloc).
const memoryPrefix = "/memfd:runsc-memory"

// memoryFiles finds the descriptors of a process that are the guest's memory, as names in /proc. If the kernel does not show them, as to a
// root without CAP_SYS_PTRACE, it returns none, because an error would tell no more.
func (r *Runtime) memoryFiles(pid int) (names []string, err error) {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := r.readDir("readdir fd", dir)
	if errors.Is(err, fs.ErrPermission) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		name := filepath.Join(dir, e.Name())
		link, err := r.readLink("read fd", name)
		if err != nil && !hasEnded(err) { // it was closed meanwhile
			return nil, err
		}
		if strings.HasPrefix(link, memoryPrefix) {
			names = append(names, name)
		}
	}
	return names, nil
}

// sizeOfMemory sums the sizes of memory files in bytes, by the names from memoryFiles. It opens nothing.
func (r *Runtime) sizeOfMemory(names []string) (sum int64, err error) {
	var seen []syscall.Stat_t
next:
	for _, name := range names {
		var st syscall.Stat_t
		if err := r.ask("stat memory", func() error { return syscall.Stat(name, &st) }); err != nil {
			return 0, err
		}
		for _, other := range seen {
			if other.Dev == st.Dev && other.Ino == st.Ino {
				continue next
			}
		}
		seen = append(seen, st)
		sum += st.Blocks * 512
	}
	return sum, nil
}

// readPSS reads the memory of a process in bytes, shared pages in part, without shared memory (proc(5), smaps_rollup).
func (r *Runtime) readPSS(pid int) (sum int64, err error) {
	body, err := r.readFile("read pss", fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(body)) {
		name, value, _ := strings.Cut(line, ":")
		if name == "Pss_Anon" || name == "Pss_File" {
			n, err := kilobytes(value)
			if err != nil {
				return 0, err
			}
			sum += n
		}
	}
	return sum, nil
}
