package sandbox

import (
	"context"
	"fmt"
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

// promises are what an owner's sandboxes that are not on disk may take from the machine.
type promises struct{ memory, tasks int64 }

// tasksOf returns how many host tasks a sandbox may have: about two for each task in the guest, plus those of its kernel.
func tasksOf(l Limits) int64 { return 2*l.Processes + kernelTasks }

const kernelTasks = 64

// largestShare is the part of the memory budget that one owner may be promised, in percent: the rest is for others. The user of this
// machine may have all of it.
const largestShare = 80

// admitShare returns an error unless the owner's share has room for one more sandbox with these limits, and the server has room for its
// tasks. m.room is held.
func (m *Manager) admitShare(owner string, l Limits) error {
	mine, all, err := m.promises(owner)
	if err != nil {
		return err
	}
	if share := max(m.opts.MemoryBudget*largestShare/100, m.opts.Defaults.Memory); owner != "" && mine.memory+l.promised() > share {
		return fmt.Errorf("%d MB of memory needed, %d MB of your share of %d MB are free; pause to disk or kill one of yours: %w",
			l.promised()>>20, max(0, share-mine.memory)>>20, share>>20, ErrNoRoom)
	}
	need := tasksOf(l)
	if need > m.opts.MaxTasks {
		return fmt.Errorf("processes: %d are more than this machine has for one sandbox, %d; ask for fewer: %w", l.Processes,
			(m.opts.MaxTasks-kernelTasks)/2, ErrInvalid)
	}
	bound, ok := m.opts.Accounts.Bound(access.Tasks)
	if !ok {
		return nil
	}
	full := &access.FullError{Owner: owner, Resource: access.Tasks, Used: mine.tasks, Share: bound.Share}
	if full.All = mine.tasks+need <= bound.Share; full.All && all.tasks+need <= bound.Total {
		return nil
	}
	return fmt.Errorf("%d tasks needed for %d processes: %w: %w", need, l.Processes, full, ErrNoRoom)
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

// promises sums what is promised to an owner's sandboxes, and to all, including those of other servers. A sandbox on disk has nothing.
func (m *Manager) promises(owner string) (mine, all promises, err error) {
	err = m.store.promisedEach(func(r record) {
		all.memory += r.Limits.promised()
		all.tasks += tasksOf(r.Limits)
		if r.Owner == owner {
			mine.memory += r.Limits.promised()
			mine.tasks += tasksOf(r.Limits)
		}
	})
	return mine, all, err
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
