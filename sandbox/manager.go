package sandbox

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"runtime"
	"slices"
	"sync"
	"time"

	"soulbox.dev/soulbox/access"
	"soulbox.dev/soulbox/agent"
)

// Options configure a Manager; zero values mean the documented defaults.
type Options struct {
	Dir       string // where state is kept; made if missing; required
	Runtime   Runtime
	Templates Templates
	NoNetwork bool // no sandbox gets a network, whatever is asked for
	Log       *slog.Logger
	Version   string // told to agents
	Times     Times  // for sandboxes that ask for none; default DefaultLifetime, then kill
	Defaults  Limits // for sandboxes that ask for none; default DefaultLimits
	// Cores is how many cores a sandbox may have; default those that the server may use itself.
	Cores int
	// MemoryBudget bounds the sum of all sandboxes' memory limits, in bytes; default 80 % of the machine.
	MemoryBudget int64
	// BootTimeout bounds the time until a new sandbox's agent responds; default 60 s.
	BootTimeout time.Duration
	// Protect is how sandboxes are protected that ask for nothing; by default they are not.
	Protect Protect
	// RescanEvery is how often the server looks for sandboxes that other servers left; default 5 s.
	RescanEvery time.Duration
	// ContainAfter is how long a machine may stay stopped, or silent to a server that adopts it, before it is continued or saved; default a
	// minute.
	ContainAfter time.Duration
	// PingEvery is how often agents are pinged; default 10 s. PingTime is how long an agent may be silent (agent.Client.Patience); default
	// agent.Silence.
	PingEvery, PingTime time.Duration
	// MaxPerOwner bounds the living sandboxes of one owner; default 100.
	MaxPerOwner int
	// Keep says that sandboxes outlive the server: Close leaves them running, or on disk if PauseOnExit is set, and the next server adopts
	// them. Sandboxes on disk always outlive the server.
	Keep, PauseOnExit bool
	// PausedFor is how long a paused sandbox is kept; default 7 days.
	PausedFor time.Duration
	// DiskBudget bounds the size of all checkpoints and snapshots, in bytes; zero means no bound but the disk. With Reclaim, when there is
	// no room, the sandboxes that have been on disk for the longest time are ended; otherwise nothing more is saved.
	DiskBudget int64
	Reclaim    bool
	// MaxTasks bounds the host tasks that one sandbox is promised, about two for each process of its limit; default half of MachineTasks.
	MaxTasks int64
	// Accounts count what owners use of the server's own resources; nil means no bounds.
	Accounts *access.Accounts
	// ConnWait is how long a connection or a request waits for room in its owner's account; default 30 s.
	ConnWait time.Duration
	// StallTime is how long the client of an exposed port may read nothing while there is data for it; default 60 s.
	StallTime time.Duration
	// Listen listens for exposed ports; default net.Listen.
	Listen func(network, address string) (net.Listener, error)
	// SampleEvery is how often a sandbox's usage is measured; default 5 s.
	SampleEvery time.Duration
	// Changed is called after every change of a sandbox, with locks held: it must neither block nor call back.
	Changed func(Info)
	// Observe is called with how long a create, pause, resume, snapshot, fork or ping took and how it ended. It must not block.
	Observe func(what string, took time.Duration, err error)

	fault func(step, name string, size int) (int, error) // for tests, see durable.Disk
}

const (
	checkEvery     = 500 * time.Millisecond
	destroyTimeout = 20 * time.Second
	exitTime       = 30 * time.Second // for a sandbox to be paused when its server ends
	maxMetadata    = 64
	maxMetadataLen = 1024
	maxEnvValue    = 100_000
	maxCPU         = 1024
)

// Manager knows all sandboxes of this server. It is safe for concurrent use.
type Manager struct {
	opts  Options
	store store
	log   *slog.Logger

	ctx    context.Context // ends with Close
	cancel context.CancelCauseFunc
	work   sync.WaitGroup // goroutines of the manager and its sandboxes

	sandboxes registry
	capacity  capacity
	adoption  adoption
	snapshots snapshots
}

// NewManager opens the state directory and starts to adopt or end what dead servers left in it.
func NewManager(opts Options) (*Manager, error) {
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	if opts.Observe == nil {
		opts.Observe = func(string, time.Duration, error) {}
	}
	if opts.Listen == nil {
		opts.Listen = net.Listen
	}
	opts.MaxPerOwner = cmp.Or(opts.MaxPerOwner, 100)
	opts.Times.Life = cmp.Or(opts.Times.Life, DefaultLifetime)
	opts.Times.OnTimeout = cmp.Or(opts.Times.OnTimeout, ActionKill)
	opts.PausedFor = cmp.Or(opts.PausedFor, 7*24*time.Hour)
	opts.MaxTasks = cmp.Or(opts.MaxTasks, MachineTasks()/2)
	opts.ConnWait = cmp.Or(opts.ConnWait, 30*time.Second)
	opts.StallTime = cmp.Or(opts.StallTime, time.Minute)
	opts.SampleEvery = cmp.Or(opts.SampleEvery, 5*time.Second)
	opts.RescanEvery = cmp.Or(opts.RescanEvery, 5*time.Second)
	opts.ContainAfter = cmp.Or(opts.ContainAfter, time.Minute)
	if err := opts.Times.check(); err != nil {
		return nil, err
	}
	opts.BootTimeout = cmp.Or(opts.BootTimeout, time.Minute)
	opts.PingEvery, opts.PingTime = cmp.Or(opts.PingEvery, 10*time.Second), cmp.Or(opts.PingTime, agent.Silence)
	opts.Defaults, opts.Cores = opts.Defaults.or(DefaultLimits()), cmp.Or(opts.Cores, runtime.NumCPU())
	if opts.MemoryBudget == 0 {
		total, err := memoryTotal()
		if err != nil {
			return nil, fmt.Errorf("read the machine's memory: %w", err)
		}
		opts.MemoryBudget = total / 10 * 8
	}
	m := &Manager{opts: opts, store: newStore(opts.Dir), log: opts.Log, sandboxes: registry{byID: map[string]*Sandbox{}}}
	m.store.Fault = opts.fault
	m.snapshots = snapshots{store: m.store, log: m.log, inUse: map[string]int{}}
	m.capacity.m = m
	m.adoption = adoption{m: m, settled: make(chan struct{}), later: map[string]postponed{}}
	for _, dir := range []string{m.store.dir, m.store.ended, m.store.snapshots} {
		if err := os.MkdirAll(dir, 0o711); err != nil {
			return nil, fmt.Errorf("open state directory: %w", err)
		}
	}
	m.ctx, m.cancel = context.WithCancelCause(context.Background())
	m.work.Go(m.adoption.run)
	return m, nil
}

// Limits fills in the default for each limit that is not set.
func (m *Manager) Limits(l Limits) Limits { return l.or(m.opts.Defaults) }

// Accounts returns what owners use of the server's own resources.
func (m *Manager) Accounts() *access.Accounts { return m.opts.Accounts }

// ConnWait is how long a request waits for room in its owner's account.
func (m *Manager) ConnWait() time.Duration { return m.opts.ConnWait }

// FreeMemory returns how much memory can still be promised, in bytes.
func (m *Manager) FreeMemory() (int64, error) {
	promised, err := m.store.promised()
	return max(0, m.opts.MemoryBudget-promised), err
}

// CountStates returns how many sandboxes of all owners are in each state.
func (m *Manager) CountStates() map[State]int {
	states := map[State]int{}
	for _, sb := range m.sandboxes.all() {
		states[sb.Info().State]++
	}
	return states
}

// Busy reports whether a sandbox of this server is in memory, so that the server is needed to end it in time.
func (m *Manager) Busy() bool {
	return slices.ContainsFunc(m.sandboxes.all(), func(sb *Sandbox) bool {
		i := sb.Info()
		return !i.State.Ended() && !i.OnDisk
	})
}

// Used returns what all sandboxes of this server have used, including those that have ended.
func (m *Manager) Used() Totals { return m.sandboxes.used() }

// Now returns what all running sandboxes of this server use, as last measured, and how many bytes all checkpoints and snapshots take on
// disk.
func (m *Manager) Now() (sum Sample, saved int64, err error) {
	for _, sb := range m.sandboxes.all() {
		if sb.runs() {
			latest := sb.meter.now()
			sum.Memory += latest.Memory
			sum.DiskUsed += latest.DiskUsed
			sum.DiskRead += latest.DiskRead
			sum.DiskWritten += latest.DiskWritten
			sum.Processes += latest.Processes
		}
	}
	saved, err = m.store.saved()
	return sum, saved, err
}

// Close leaves this server's sandboxes as Options say, and waits until nothing is left of those that are not kept. It may be called twice.
func (m *Manager) Close() error {
	m.cancel(ErrClosed)
	m.sandboxes.close()
	var ends sync.WaitGroup
	var mu sync.Mutex
	var errs error
	for _, sb := range m.sandboxes.all() {
		ends.Go(func() {
			if m.opts.PauseOnExit && sb.current().Keep {
				pauseAtExit(sb)
			}
			if sb.leave() {
				return
			}
			if err := sb.Kill(CauseShutdown); err != nil && !errors.Is(err, ErrState) {
				mu.Lock()
				errs = errors.Join(errs, err)
				mu.Unlock()
			}
		})
	}
	ends.Wait()
	m.work.Wait()
	return errs
}
