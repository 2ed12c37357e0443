package sandbox

import (
	"context"
	"math"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"soulbox.dev/soulbox/access"
	"soulbox.dev/soulbox/agent"
)

// connection takes what one connection of a sandbox uses in the server from the owner's account. If the account is full, it waits for at
// most wait; then the error is a FullError.
func (s *Sandbox) connection(ctx context.Context, wait time.Duration) (release func(), err error) {
	return s.m.opts.Accounts.TakeAll(ctx, wait, s.owner, access.Part{Of: access.Connections, N: 1},
		access.Part{Of: access.Buffers, N: agent.ConnBuffers})
}

// Promised lists the tasks promised to the sandboxes of each owner, in the form of access.Accounts.Uses.
func (m *Manager) Promised() ([]access.Use, error) {
	bound, _ := m.opts.Accounts.Bound(access.Tasks)
	sums := map[string]int64{}
	err := m.store.promisedEach(func(r record) { sums[r.Owner] += tasksOf(r.Limits) })
	var all []access.Use
	for owner, n := range sums {
		all = append(all, access.Use{Owner: owner, Resource: access.Tasks, Used: n, Share: bound.Share})
	}
	return all, err
}

// MachineTasks returns how many processes and threads this machine and its user can have.
func MachineTasks() int64 {
	least := int64(math.MaxInt32)
	for _, name := range []string{"/proc/sys/kernel/pid_max", "/proc/sys/kernel/threads-max", "/sys/fs/cgroup/pids.max"} {
		text, err := os.ReadFile(name)
		n, perr := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
		if err == nil && perr == nil && n > 0 { // if it cannot be read or says "max", the others bound it
			least = min(least, n)
		}
	}
	var own unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NPROC, &own); err == nil && os.Geteuid() != 0 && own.Cur < math.MaxInt32 {
		least = min(least, int64(own.Cur))
	}
	return least
}
