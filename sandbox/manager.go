package sandbox

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
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
	// MemoryBudget bounds the sum of all sandboxes' memory limits, in bytes; default 80 % of the machine.
	MemoryBudget int64
	// BootTimeout bounds the time until a new sandbox's agent responds; default 60 s.
	BootTimeout time.Duration
	// Protect is how sandboxes are protected that ask for nothing; by default they are not.
	Protect Protect
	// RescanEvery is how often the server looks for sandboxes that other servers left; default 5 s.
	RescanEvery time.Duration
	// WedgedAfter is how long a machine may stay stopped from outside before it is continued and saved; default a minute.
	WedgedAfter time.Duration
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
	endedKept      = 100              // ended sandboxes kept in Manager.sandboxes, so that they need no look at their tombstones
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

	mu        sync.Mutex
	closed    bool
	sandboxes map[string]*Sandbox
	ended     []string   // ids of ended sandboxes in sandboxes, oldest first
	room      sync.Mutex // held while memory is promised, so that two creations do not take the same memory
	inUse     map[string]int
	past      Totals // of sandboxes that are no longer in sandboxes
	settled   chan struct{}
	later     map[string]postponed // sandboxes of dead servers that could not be taken over
	// tidied has the IDs of unowned sandboxes that have been tidied up.
	tidied sync.Map
	// foreign has the IDs of sandboxes on disk that another server was found to have.
	foreign  sync.Map
	claiming sync.Mutex   // held while a sandbox on disk is claimed
	saving   atomic.Int64 // bytes of the checkpoints being made
}

// NewManager opens the state directory and starts to reap what dead servers left in it.
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
	opts.WedgedAfter = cmp.Or(opts.WedgedAfter, time.Minute)
	if err := opts.Times.check(); err != nil {
		return nil, err
	}
	opts.BootTimeout = cmp.Or(opts.BootTimeout, time.Minute)
	opts.PingEvery, opts.PingTime = cmp.Or(opts.PingEvery, 10*time.Second), cmp.Or(opts.PingTime, agent.Silence)
	opts.Defaults = opts.Defaults.or(DefaultLimits())
	if opts.MemoryBudget == 0 {
		total, err := memoryTotal()
		if err != nil {
			return nil, fmt.Errorf("read the machine's memory: %w", err)
		}
		opts.MemoryBudget = total / 10 * 8
	}
	m := &Manager{opts: opts, store: newStore(opts.Dir), log: opts.Log, sandboxes: map[string]*Sandbox{}, inUse: map[string]int{},
		later: map[string]postponed{}, settled: make(chan struct{})}
	m.store.Fault = opts.fault
	for _, dir := range []string{m.store.dir, m.store.ended, m.store.snapshots} {
		if err := os.MkdirAll(dir, 0o711); err != nil {
			return nil, fmt.Errorf("open state directory: %w", err)
		}
	}
	m.ctx, m.cancel = context.WithCancelCause(context.Background())
	m.work.Go(m.reap)
	return m, nil
}

func (l Limits) or(d Limits) Limits {
	return Limits{CPU: cmp.Or(l.CPU, d.CPU), Memory: cmp.Or(l.Memory, d.Memory), Disk: cmp.Or(l.Disk, d.Disk),
		Processes: cmp.Or(l.Processes, d.Processes), DiskInMemory: l.DiskInMemory || d.DiskInMemory,
		KernelMemory: cmp.Or(l.KernelMemory, d.KernelMemory)}
}

// Limits fills in the default for each limit that is not set.
func (m *Manager) Limits(l Limits) Limits { return l.or(m.opts.Defaults) }

// CreateOptions describe a new sandbox; zero values mean the defaults.
type CreateOptions struct {
	Owner    string // the owner; only the owner finds it. "" is the user of this machine
	Template string // or the name of one of the owner's snapshots
	// Base is what the sandbox begins from, instead of Template. If it is not a template yet, it must have a name that no other template
	// uses.
	Base *Template
	// Transient ends the sandbox with its server, even if the server keeps other sandboxes.
	Transient bool
	Metadata  map[string]string
	Env       map[string]string // of every process; it is only in the sandbox itself, its files and its checkpoints
	Limits    Limits            // a sandbox that begins with a snapshot's memory has the snapshot's limits
	Times     Times
	Network   Network // default none, or the snapshot's
	Ingress   Ingress
	Protect   Protect // default the Manager's

	from   string // a checkpoint
	whole  bool   // with memory
	parent string
	origin string
	ports  []Port
}

// Create boots a sandbox and returns when its agent responds. If ctx ends before that, nothing is left.
func (m *Manager) Create(ctx context.Context, o CreateOptions) (*Sandbox, error) {
	began := time.Now()
	sb, err := m.create(ctx, o)
	m.opts.Observe("create", time.Since(began), err)
	return sb, err
}

func (m *Manager) create(ctx context.Context, o CreateOptions) (*Sandbox, error) {
	// Close waits for a creation that has begun; no creation begins after it.
	m.mu.Lock()
	if m.closed {
		m.mu.Unlock()
		return nil, fmt.Errorf("create sandbox: %w", ErrClosed)
	}
	m.work.Add(1)
	m.mu.Unlock()
	defer m.work.Done()
	template, done, err := m.basis(ctx, &o)
	if err != nil {
		return nil, err
	}
	defer done()
	o.Times = o.Times.or(m.opts.Times)
	if err := o.check(); err != nil {
		return nil, err
	}
	if o.Network, err = o.Network.check(); err != nil {
		return nil, fmt.Errorf("create sandbox: %w", err)
	}
	if err := errors.Join(o.Ingress.check(), o.Protect.check(o.Limits)); err != nil {
		return nil, fmt.Errorf("create sandbox: %w", err)
	}
	if o.Network.On() && m.opts.NoNetwork {
		return nil, fmt.Errorf("create sandbox: the operator of this server gives sandboxes no network: %w", ErrInvalid)
	}
	sb := m.conceive(o, template)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(sb.ctx, func() { cancel(context.Cause(sb.ctx)) })()
	defer context.AfterFunc(m.ctx, func() { cancel(context.Cause(m.ctx)) })()
	if err := m.promise(sb); err != nil {
		sb.cancel(err)
		return nil, err
	}
	served, err := sb.boot(ctx, template, o.from, o.whole)
	if service := template.Service; err == nil && service != nil && !o.whole && !served {
		err = sb.StartService(ctx, *service, nil)
	}
	if err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		_ = sb.end(Failed, fmt.Errorf("it could not be made: %w", err)) // end logs its error; err is the cause
		return nil, fmt.Errorf("create sandbox: %w", err)
	}
	for _, p := range o.ports {
		if _, err := sb.Expose(p.Port, p.Public); err != nil {
			m.log.Error("expose a port of a copy", "sandbox", sb.id, "port", p.Port, "error", err)
		}
	}
	return sb, nil
}

// conceive makes the Sandbox that is asked for; it is not entered anywhere yet.
func (m *Manager) conceive(o CreateOptions, template Template) *Sandbox {
	now := time.Now()
	sb := m.newSandbox(record{
		Version: recordVersion, ID: newID(), Owner: o.Owner, Keep: m.opts.Keep && !o.Transient, State: Creating, Template: template.Name,
		Image: template.ID,
		User:  template.User, Cwd: template.Cwd, Parent: o.parent, Origin: o.origin, Metadata: maps.Clone(o.Metadata),
		Limits: o.Limits.or(template.Limits).or(m.opts.Defaults),
		Times:  o.Times, Network: o.Network, Ingress: o.Ingress, Created: now, Changed: now,
		Protect: o.Protect.or(template.Protect).or(m.opts.Protect),
	})
	sb.rec.giveSecrets()
	if service := template.Service; service != nil {
		sb.rec.StartCmd, sb.rec.ReadyCmd = service.Start, service.Ready
	}
	sb.env = maps.Clone(template.Env)
	if sb.env == nil {
		sb.env = map[string]string{}
	}
	if o.Network.On() {
		maps.Copy(sb.env, proxyEnv())
	}
	maps.Copy(sb.env, o.Env)
	return sb
}

// basis finds what a sandbox begins from: a template, or a snapshot of its owner, which is kept until done is called.
func (m *Manager) basis(ctx context.Context, o *CreateOptions) (template Template, done func(), err error) {
	if o.Base != nil {
		return *o.Base, func() {}, nil
	}
	if isID(o.Template) { // an ID would be found whoever owns it
		return Template{}, nil, fmt.Errorf("create sandbox: template %q: %w", o.Template, ErrNoTemplate)
	}
	template, err = m.opts.Templates.Template(ctx, o.Owner, o.Template)
	if err == nil {
		return template, func() {}, nil
	}
	if !errors.Is(err, ErrNoTemplate) {
		return Template{}, nil, fmt.Errorf("create sandbox: %w", err)
	}
	snap, from, release, serr := m.snapshot(o.Owner, o.Template)
	if errors.Is(serr, ErrNoSnapshot) {
		return Template{}, nil, fmt.Errorf("create sandbox: %w", err)
	}
	if serr != nil {
		return Template{}, nil, fmt.Errorf("create sandbox: %w", serr)
	}
	defer func() {
		if err != nil {
			release()
		}
	}()
	if want := o.Limits.or(snap.Limits); !snap.FilesOnly && want != snap.Limits {
		return Template{}, nil, fmt.Errorf("create sandbox: snapshot %q has memory, so its limits stay as they are: %w", snap.Name,
			ErrInvalid)
	}
	o.from, o.whole, o.parent, o.origin = from, !snap.FilesOnly, snap.Name, snap.Name
	o.Limits, o.Times, o.ports = o.Limits.or(snap.Limits), o.Times.or(snap.Times), snap.Ports
	if o.Network.Mode == "" {
		o.Network = snap.Network
	}
	if o.Ingress.Open == "" {
		o.Ingress = snap.Ingress
	}
	if !snap.FilesOnly && o.Network.On() != snap.Network.On() {
		return Template{}, nil, fmt.Errorf("create sandbox: snapshot %q has memory, so whether it has a network cannot change: %w",
			snap.Name, ErrInvalid)
	}
	template, err = m.again(ctx, record{Owner: o.Owner, Template: snap.Template, Image: snap.Image, User: snap.User, Cwd: snap.Cwd,
		StartCmd: snap.StartCmd, ReadyCmd: snap.ReadyCmd})
	if err != nil {
		return Template{}, nil, fmt.Errorf("create sandbox: %w", err)
	}
	return template, release, nil
}

// again returns the template for a sandbox that begins from a checkpoint of r. The template's environment is in the checkpoint.
func (m *Manager) again(ctx context.Context, r record) (Template, error) {
	t, err := m.opts.Templates.Template(ctx, r.Owner, r.basis())
	t.Name, t.User, t.Cwd, t.Env, t.Service = r.Template, r.User, r.Cwd, nil, r.service()
	return t, err
}

// isID reports whether a name is the ID of a template's content.
func isID(name string) bool { return strings.HasPrefix(name, "sha256:") }

// newSandbox makes the Sandbox of a record; it is not entered anywhere yet.
func (m *Manager) newSandbox(r record) *Sandbox {
	s := &Sandbox{m: m, id: r.ID, owner: r.Owner, rec: r, booted: make(chan struct{}), left: make(chan struct{}),
		ended: make(chan struct{}),
		turn:  make(chan struct{}, 1), retime: make(chan struct{}, 1), guard: make(chan struct{}, 1),
		connSlots: make(chan struct{}, maxConns)}
	s.ctx, s.cancel = context.WithCancelCause(context.Background())
	return s
}

// promise finds room for a sandbox and enters it into the Manager.
func (m *Manager) promise(sb *Sandbox) error {
	done, err := m.lockRoom()
	if err != nil {
		return fmt.Errorf("create sandbox: %w", err)
	}
	defer done()
	if n := len(m.List(Filter{Owner: sb.owner})); n >= asleepFactor*m.opts.MaxPerOwner {
		return fmt.Errorf("create sandbox: you have %d, those on disk too, the most one may have: %w", n, ErrTooMany)
	}
	if err := m.admitOne(sb.owner); err != nil {
		return fmt.Errorf("create sandbox: %w", err)
	}
	if err := m.admit(sb.owner, sb.rec.Limits); err != nil {
		return fmt.Errorf("create sandbox: %w", err)
	}
	if sb.lock, err = m.store.claim(sb.rec.ID); err != nil {
		return fmt.Errorf("create sandbox: %w", err)
	}
	if err := m.store.save(sb.rec); err != nil {
		return errors.Join(err, m.store.discard(sb.rec.ID, sb.lock))
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.sandboxes[sb.rec.ID] = sb
	sb.mu.Lock()
	defer sb.mu.Unlock()
	sb.record("%s", Creating)
	return nil
}

func (o CreateOptions) check() error {
	if err := checkMetadata(o.Metadata); err != nil {
		return err
	}
	if err := checkEnv(o.Env); err != nil {
		return fmt.Errorf("create sandbox: %w", err)
	}
	if err := o.Times.check(); err != nil {
		return fmt.Errorf("create sandbox: %w", err)
	}
	l := o.Limits
	if l.CPU < 0 || l.CPU > maxCPU || min(l.Memory, l.KernelMemory) < 0 || l.Disk < 0 || l.Processes < 0 {
		return fmt.Errorf("create sandbox: limits cannot be negative, nor cpu more than 1024: %w", ErrInvalid)
	}
	if l.Memory != 0 && l.Memory < 64<<20 || l.Disk != 0 && l.Disk < 16<<20 || l.Processes != 0 && l.Processes < 8 {
		return fmt.Errorf("create sandbox: at least 64 MB of memory, 16 MB of disk and 8 processes are needed: %w", ErrInvalid)
	}
	if l.KernelMemory != 0 && l.KernelMemory < 64<<20 {
		return fmt.Errorf("create sandbox: its kernel needs at least 64 MB of memory for itself: %w", ErrInvalid)
	}
	return nil
}

func checkEnv(env map[string]string) error {
	for k, v := range env {
		if k == "" || strings.ContainsAny(k, "=\x00") || strings.IndexByte(v, 0) >= 0 || len(v) > maxEnvValue {
			return fmt.Errorf("%q is not a valid name of an environment variable, or its value is not valid: %w", k, ErrInvalid)
		}
	}
	return nil
}

func checkMetadata(metadata map[string]string) error {
	if len(metadata) > maxMetadata {
		return fmt.Errorf("metadata: %d pairs, at most %d are allowed: %w", len(metadata), maxMetadata, ErrInvalid)
	}
	for k, v := range metadata {
		if k == "" || len(k) > maxMetadataLen || len(v) > maxMetadataLen {
			return fmt.Errorf("metadata: a key has 1 to %d bytes, a value at most %d: %w", maxMetadataLen, maxMetadataLen, ErrInvalid)
		}
	}
	return nil
}

// Accounts returns what owners use of the server's own resources.
func (m *Manager) Accounts() *access.Accounts { return m.opts.Accounts }

// ConnWait is how long a request waits for room in its owner's account.
func (m *Manager) ConnWait() time.Duration { return m.opts.ConnWait }

// Room returns how much memory can still be promised, in bytes, and how many sandboxes of all owners are in each state.
func (m *Manager) Room() (free int64, states map[State]int, err error) {
	promised, err := m.store.promised()
	states = map[State]int{}
	for _, sb := range m.all() {
		states[sb.Info().State]++
	}
	return max(0, m.opts.MemoryBudget-promised), states, err
}

// Busy reports whether a sandbox of this server is in memory, so that the server is needed to end it in time.
func (m *Manager) Busy() bool {
	return slices.ContainsFunc(m.all(), func(sb *Sandbox) bool {
		i := sb.Info()
		return !i.State.Ended() && !i.OnDisk
	})
}

// Used returns what all sandboxes of this server have used, including those that have ended.
func (m *Manager) Used() Totals {
	m.mu.Lock()
	defer m.mu.Unlock()
	sum := m.past
	for _, sb := range m.sandboxes {
		sum = sum.plus(sb.meter.totals())
	}
	return sum
}

// Now returns what all running sandboxes of this server use, as last measured, and how many bytes all checkpoints and snapshots take on
// disk.
func (m *Manager) Now() (sum Sample, saved int64, err error) {
	for _, sb := range m.all() {
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

// letGo forgets a failed sandbox whose machine could not be fully ended; the next look treats it like a dead server's sandbox.
func (m *Manager) letGo(s *Sandbox) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.sandboxes[s.id] == s {
		delete(m.sandboxes, s.id)
	}
}

// retire forgets the oldest ended sandboxes beyond endedKept. Their tombstones stay.
func (m *Manager) retire(id string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.ended = append(m.ended, id)
	for len(m.ended) > endedKept {
		if sb := m.sandboxes[m.ended[0]]; sb != nil {
			m.past = m.past.plus(sb.meter.totals())
		}
		delete(m.sandboxes, m.ended[0])
		m.ended = m.ended[1:]
	}
}

// Close leaves this server's sandboxes as Options say, and waits until nothing is left of those that are not kept. It may be called twice.
func (m *Manager) Close() error {
	m.cancel(ErrClosed)
	m.mu.Lock()
	m.closed = true
	m.mu.Unlock()
	var ends sync.WaitGroup
	var mu sync.Mutex
	var errs error
	for _, sb := range m.all() {
		ends.Go(func() {
			if m.opts.PauseOnExit && sb.current().Keep {
				sb.putToSleep()
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

// putToSleep pauses the sandbox to disk if it is not there yet. If that fails, the sandbox runs on without a server until the next one
// adopts it.
func (s *Sandbox) putToSleep() {
	r := s.current()
	if r.onDisk() || r.State != Running && r.State != Paused || s.isLeft() {
		return
	}
	ctx, cancel := context.WithTimeout(s.ctx, exitTime)
	defer cancel()
	o := PauseOptions{ToDisk: true, AutoResume: !r.Times.NoAutoResume, Cause: CauseShutdown}
	if r.State == Paused { // keep how it was paused
		o.AutoResume, o.Cause = r.Pause.AutoResume, Cause(r.Cause)
	}
	err := s.pause(ctx, o)
	if err != nil && !errors.Is(err, ErrState) && !errors.Is(err, ErrClosed) {
		s.m.log.Error("pause sandbox at the end of its server; it runs on", "sandbox", s.id, "error", err)
	}
}
