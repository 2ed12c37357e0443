package main

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"soulbox.dev/soulbox/internal/sandboxtest"
)

// kill9 kills a server as a crash does, and starts the next one.
func (s *soak) kill9(server int) {
	at := s.servers[server]
	at.mu.Lock()
	defer at.mu.Unlock()
	at.w = at.w.kill9(soakFlags...)
	at.kills++
	s.count("fault: a server is killed")
}

// faults causes one fault after the other until ctx ends, and undoes each.
func (s *soak) faults(ctx context.Context) {
	for ctx.Err() == nil {
		lasts := time.Second + time.Duration(rand.Int64N(int64(3*time.Second)))
		if rand.IntN(3) > 0 {
			s.stop(lasts)
		} else {
			s.squeeze(lasts)
		}
		select {
		case <-ctx.Done():
		case <-time.After(time.Duration(rand.Int64N(int64(2 * time.Second)))):
		}
	}
}

// stop stops the sentry and gofer of a sandbox for a while.
func (s *soak) stop(lasts time.Duration) {
	all, err := filepath.Glob(filepath.Join(s.state, "sandboxes", "sb*"))
	if err != nil || len(all) == 0 {
		return
	}
	dir := all[rand.IntN(len(all))]
	stopped := sandboxtest.Processes(dir)
	if len(stopped) == 0 {
		return // it is on disk
	}
	for _, pid := range stopped {
		_ = syscall.Kill(pid, syscall.SIGSTOP) // an error if it has ended meanwhile
	}
	time.Sleep(lasts)
	for _, pid := range sandboxtest.Processes(dir) {
		_ = syscall.Kill(pid, syscall.SIGCONT) // does no harm if it runs
	}
	s.count("fault: a machine is stopped")
}

// squeeze leaves a server only three descriptors more than it uses, for a while.
func (s *soak) squeeze(lasts time.Duration) {
	at := s.servers[rand.IntN(2)]
	var old unix.Rlimit
	at.mu.RLock() // so that the server is not killed now
	pid, kills := at.w.cmd.Process.Pid, at.kills
	err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &old)
	if err == nil {
		at.squeezes.Add(1)
		err = unix.Prlimit(pid, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: uint64(len(descriptors(at.w)) + 3), Max: old.Max}, nil)
	}
	at.mu.RUnlock()
	if err != nil {
		s.t.Error("take descriptors:", err)
	}
	time.Sleep(lasts)
	at.mu.RLock()
	defer at.mu.RUnlock()
	if at.kills == kills {
		if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, &old, nil); err != nil {
			s.t.Error("give descriptors back:", err)
		}
	}
	at.eased.Store(time.Now().UnixNano())
	at.squeezes.Add(1)
	s.count("fault: a server has no descriptors")
}

// sentriesOf are the processes of a sandbox's kernel.
func (s *soak) sentriesOf(b *box) (pids []int) {
	for _, pid := range sandboxtest.Processes(filepath.Join(s.state, "sandboxes", b.id)) {
		line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if title, _, _ := bytes.Cut(line, []byte{0}); err == nil && string(title) == "runsc-sandbox" {
			pids = append(pids, pid)
		}
	}
	return pids
}

// shoot kills the kernel of a sandbox while the sandbox is used, or is at rest. It reports whether the sandbox exists afterwards, resumed
// from what was last saved of it.
func (s *soak) shoot(b *box) bool {
	if len(s.sentriesOf(b)) == 0 {
		return true // it is on disk
	}
	fired := make(chan bool)
	go func() {
		time.Sleep(time.Duration(rand.Int64N(int64(300 * time.Millisecond))))
		pids := s.sentriesOf(b)
		if len(pids) > 0 {
			s.shot.Store(b.id, true)
		}
		for _, pid := range pids {
			_ = syscall.Kill(pid, syscall.SIGKILL) // an error if it has ended meanwhile
		}
		fired <- len(pids) > 0
	}()
	err := s.useDisturbed(b)
	if !<-fired {
		s.told("do what is not disturbed in", b, err)
		return true
	}
	s.count("fault: a sandbox' kernel is killed")
	return s.recover(b)
}

// useDisturbed uses a sandbox that may be killed meanwhile.
func (s *soak) useDisturbed(b *box) (err error) {
	switch rand.IntN(4) {
	case 0:
		if err = s.resume(b); err == nil {
			err = s.exec(b)
		}
	case 1:
		if err = s.pause(b, true); err != nil { // it may have been saved
			b.saved = append(b.saved, b.may...)
		}
	case 2:
		var copies []*box
		copies, err = s.fork(b)
		for _, c := range copies {
			s.kill(c)
		}
	}
	return err
}

// recover waits for the outcome for a sandbox whose kernel was killed, and reports whether the sandbox still exists: it has failed, unless
// it was already on its way to disk.
func (s *soak) recover(b *box) bool {
	said, back := "", false
	for end := time.Now().Add(2 * soakPatience); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		a, err := s.onBox(b, "sandbox_get", nil)
		text := a.Text()
		if said = fmt.Sprint(text, err); err != nil {
			continue
		}
		switch {
		case strings.Contains(text, "is failed") && !strings.Contains(text, resumable):
			s.count("shot, and nothing was saved before")
			return false
		case strings.Contains(text, "is failed"):
			back, b.may = true, slices.Clone(b.saved)
			if err := s.resume(b); err != nil {
				said += err.Error()
			}
		case strings.Contains(text, "paused on disk"):
			b.paused = true
			s.count("shot, and on disk before")
			return true
		case back && strings.Contains(text, "is running"):
			s.told("go back in", b, s.exec(b))
			s.count("shot, and resumed from what was saved")
			return true
		}
	}
	s.t.Errorf("what was shot is neither failed nor on disk: %s", said)
	return false
}

// notMade are causes of sandboxes that failed before a client knew of them.
var notMade = []string{"while it was made", "it could not be made", "cancelled by the client"}

// checkFailed: only those sandboxes have failed that the test has ended, or that were not made yet.
func (s *soak) checkFailed() {
	for _, i := range s.list("failed") {
		_, shot := s.shot.Load(i.ID)
		_, asked := s.asked.Load(i.ID)
		if !shot && !asked && !slices.ContainsFunc(notMade, func(cause string) bool { return strings.Contains(i.Cause, cause) }) {
			s.t.Errorf("%s has failed: %s", i.ID, i.Cause)
		}
	}
}

// tree is everything in the state directory, except what is remembered of sandboxes that have ended.
func (s *soak) tree() (names []string) {
	err := filepath.WalkDir(s.state, func(name string, d fs.DirEntry, err error) error {
		if err == nil && filepath.Base(filepath.Dir(name)) == "ended" {
			return filepath.SkipDir
		}
		if d != nil && d.Name() == ".collecting" { // a lock that is never removed
			return err
		}
		names = append(names, name)
		return err
	})
	if err != nil {
		s.t.Error(err)
	}
	return names
}

// checkLeft: no process, mount, directory or descriptor is left. fds and before are the descriptors of quiet servers.
func (s *soak) checkLeft(fds int, before []string) {
	http.DefaultClient.CloseIdleConnections()
	for _, at := range s.servers {
		open := descriptors(at.w)
		for end := time.Now().Add(30 * time.Second); len(open) > fds && time.Now().Before(end); open = descriptors(at.w) {
			time.Sleep(100 * time.Millisecond)
		}
		if len(open) > fds {
			s.t.Errorf("more than %d descriptors: %q", fds, open)
		}
	}
	sandboxtest.Eventually(s.t, "no process is left", func() bool { return len(sandboxtest.Processes(s.state)) == 0 })
	for _, name := range s.tree() {
		if !slices.Contains(before, name) {
			s.t.Error("left:", name)
		}
	}
	if mounts, err := os.ReadFile("/proc/self/mountinfo"); err != nil || strings.Contains(string(mounts), s.state) {
		s.t.Error("a mount is left", err)
	}
	for _, at := range s.servers {
		at.w.stop()
	}
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		s.t.Error(err)
	}
	for _, name := range lines {
		if line, err := os.ReadFile(name); err == nil && bytes.Contains(line, []byte(s.state)) {
			s.t.Errorf("a process is left: %q", line)
		}
	}
}
