package sandbox

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
)

// Options configure a Manager; zero values mean the documented defaults.
type Options struct {
	Dir       string // where state is kept; made if missing; required
	Runtime   Runtime
	Templates Templates
	Log       *slog.Logger
	Version   string        // told to agents
	Lifetime  time.Duration // of sandboxes that ask for none; default DefaultLifetime
	Defaults  Limits        // of sandboxes that ask for none; default DefaultLimits
	// MemoryBudget bounds the sum of all sandboxes' memory limits, in bytes; default 80 % of the machine.
	MemoryBudget int64
	// BootTimeout bounds the time until a new sandbox' agent answers; default 60 s.
	BootTimeout time.Duration
	// PingEvery is how often agents are asked whether they answer; default 10 s. PingTime is how long one may take, which in a full
	// sandbox may be long; default 20 s.
	PingEvery, PingTime time.Duration
	// MaxPerOwner bounds the living sandboxes of one owner; default 100.
	MaxPerOwner int
	// Keep says that sandboxes outlive the server: Close leaves them running, and the next server that is started adopts them.
	Keep bool
	// Changed is told of every change of a sandbox. It is called with locks held: it must neither block nor call back.
	Changed func(Info)
	// Observe is told how long a creation or a ping took and how it ended. It must not block.
	Observe func(what string, took time.Duration, err error)
}

const (
	checkEvery     = 500 * time.Millisecond
	destroyTimeout = 20 * time.Second
	endedKept      = 1000 // ended sandboxes whose cause is remembered
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
	room      sync.Mutex // held while memory is promised, so that two creations do not take the same
}

// NewManager opens the state directory and begins to reap what dead servers left in it.
func NewManager(opts Options) (*Manager, error) {
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	if opts.Observe == nil {
		opts.Observe = func(string, time.Duration, error) {}
	}
	opts.MaxPerOwner = cmp.Or(opts.MaxPerOwner, 100)
	opts.Lifetime = cmp.Or(opts.Lifetime, DefaultLifetime)
	opts.BootTimeout = cmp.Or(opts.BootTimeout, time.Minute)
	opts.PingEvery, opts.PingTime = cmp.Or(opts.PingEvery, 10*time.Second), cmp.Or(opts.PingTime, 20*time.Second)
	opts.Defaults = opts.Defaults.or(DefaultLimits())
	if opts.MemoryBudget == 0 {
		total, err := memoryTotal()
		if err != nil {
			return nil, fmt.Errorf("read the machine's memory: %w", err)
		}
		opts.MemoryBudget = total / 10 * 8
	}
	m := &Manager{opts: opts, store: store{filepath.Join(opts.Dir, "sandboxes")}, log: opts.Log, sandboxes: map[string]*Sandbox{}}
	if err := os.MkdirAll(m.store.dir, 0o711); err != nil {
		return nil, fmt.Errorf("open state directory: %w", err)
	}
	m.ctx, m.cancel = context.WithCancelCause(context.Background())
	m.work.Go(m.reap)
	return m, nil
}

func (l Limits) or(d Limits) Limits {
	return Limits{CPU: cmp.Or(l.CPU, d.CPU), Memory: cmp.Or(l.Memory, d.Memory), Disk: cmp.Or(l.Disk, d.Disk), Processes: cmp.Or(l.Processes, d.Processes)}
}

// CreateOptions describe a new sandbox; zero values mean the defaults.
type CreateOptions struct {
	Owner       string // whose it is; nobody else finds it. "" is the user of this machine
	Template    string
	Metadata    map[string]string
	Env         map[string]string // of every process; not written to disk
	Limits      Limits
	Lifetime    time.Duration
	MaxLifetime time.Duration // bounds every extension; zero is no bound
}

// Create boots a sandbox and returns when its agent answers. When ctx ends before that, nothing is left.
func (m *Manager) Create(ctx context.Context, o CreateOptions) (*Sandbox, error) {
	began := time.Now()
	sb, err := m.create(ctx, o)
	m.opts.Observe("create", time.Since(began), err)
	return sb, err
}

func (m *Manager) create(ctx context.Context, o CreateOptions) (*Sandbox, error) {
	// Close waits for a creation that has begun, and none begins after it.
	m.mu.Lock()
	if m.closed {
		m.mu.Unlock()
		return nil, fmt.Errorf("create sandbox: %w", ErrClosed)
	}
	m.work.Add(1)
	m.mu.Unlock()
	defer m.work.Done()
	if err := o.check(); err != nil {
		return nil, err
	}
	template, err := m.opts.Templates.Template(ctx, o.Template)
	if err != nil {
		return nil, fmt.Errorf("create sandbox: %w", err)
	}
	now := time.Now()
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(m.ctx, func() { cancel(context.Cause(m.ctx)) })
	defer stop()
	id := newID()
	sb := m.newSandbox(record{
		Version: recordVersion, ID: id, Owner: o.Owner, Keep: m.opts.Keep, State: Creating, Template: template.Name, Metadata: maps.Clone(o.Metadata),
		Limits: o.Limits.or(m.opts.Defaults), Created: now, Changed: now, MaxLife: o.MaxLifetime, Traffic: rand.Text(),
	})
	sb.cancel, sb.env, sb.life = cancel, maps.Clone(o.Env), cmp.Or(o.Lifetime, m.opts.Lifetime)
	if o.MaxLifetime > 0 {
		sb.life = min(sb.life, o.MaxLifetime)
	}
	if err := m.promise(sb); err != nil {
		cancel(err)
		return nil, err
	}
	defer cancel(nil)
	if err := sb.boot(ctx, template); err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		_ = sb.end(Failed, err) // end logs its error; this one is the cause
		return nil, fmt.Errorf("create sandbox: %w", err)
	}
	return sb, nil
}

// newSandbox is a sandbox of a record, which nobody knows yet.
func (m *Manager) newSandbox(r record) *Sandbox {
	return &Sandbox{m: m, id: r.ID, owner: r.Owner, rec: r, cancel: func(error) {}, booted: make(chan struct{}), left: make(chan struct{}), ended: make(chan struct{}),
		connSlots: make(chan struct{}, maxConns)}
}

// promise finds room for a sandbox and enters it.
func (m *Manager) promise(sb *Sandbox) error {
	m.room.Lock()
	defer m.room.Unlock()
	if n := len(m.List(Filter{Owner: sb.rec.Owner})); n >= m.opts.MaxPerOwner {
		return fmt.Errorf("create sandbox: you have %d, the most one may have: %w", n, ErrTooMany)
	}
	promised, err := m.store.promised()
	if err != nil {
		return fmt.Errorf("create sandbox: %w", err)
	}
	if need, free := sb.rec.Limits.Memory, m.opts.MemoryBudget-promised; need > free {
		return fmt.Errorf("create sandbox: %d MB needed, %d MB free: %w", need>>20, max(free, 0)>>20, ErrNoRoom)
	}
	if sb.lock, err = m.store.claim(sb.rec.ID); err != nil {
		return fmt.Errorf("create sandbox: %w", err)
	}
	if err := m.store.save(sb.rec); err != nil {
		return errors.Join(err, m.store.remove(sb.rec.ID, sb.lock))
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
	for k, v := range o.Env {
		if k == "" || strings.ContainsAny(k, "=\x00") || strings.IndexByte(v, 0) >= 0 || len(v) > maxEnvValue {
			return fmt.Errorf("create sandbox: %q is not a name of an environment variable, or its value is not one: %w", k, ErrInvalid)
		}
	}
	l := o.Limits
	if l.CPU < 0 || l.CPU > maxCPU || l.Memory < 0 || l.Disk < 0 || l.Processes < 0 || o.Lifetime < 0 || o.MaxLifetime < 0 {
		return fmt.Errorf("create sandbox: limits and times cannot be negative, nor cpu more than 1024: %w", ErrInvalid)
	}
	if l.Memory != 0 && l.Memory < 64<<20 || l.Disk != 0 && l.Disk < 16<<20 || l.Processes != 0 && l.Processes < 8 {
		return fmt.Errorf("create sandbox: at least 64 MB of memory, 16 MB of disk and 8 processes are needed: %w", ErrInvalid)
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

// Get finds a sandbox of an owner, also one that has ended not long ago. Unknown ids, and those of others, are ErrNotFound.
func (m *Manager) Get(owner, id string) (*Sandbox, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if sb := m.sandboxes[id]; sb != nil && sb.owner == owner {
		return sb, nil
	}
	return nil, ErrNotFound
}

// Any finds a sandbox of whomever. It is for callers who let nobody near it without another proof.
func (m *Manager) Any(id string) (*Sandbox, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if sb := m.sandboxes[id]; sb != nil {
		return sb, nil
	}
	return nil, ErrNotFound
}

// Filter selects sandboxes of an owner; zero values select all that have not ended.
type Filter struct {
	Owner    string
	State    State
	Template string
	Metadata map[string]string // all pairs must match
}

// List lists sandboxes of an owner, the newest first.
func (m *Manager) List(f Filter) []Info {
	m.mu.Lock()
	all := slices.Collect(maps.Values(m.sandboxes))
	m.mu.Unlock()
	var list []Info
	for _, sb := range all {
		if sb.owner != f.Owner {
			continue
		}
		info := sb.Info()
		if f.State == "" && info.State.Ended() || f.State != "" && info.State != f.State || f.Template != "" && info.Template != f.Template {
			continue
		}
		match := true
		for k, v := range f.Metadata {
			have, ok := info.Metadata[k]
			match = match && ok && have == v
		}
		if match {
			list = append(list, info)
		}
	}
	slices.SortFunc(list, func(a, b Info) int { return cmp.Or(b.Created.Compare(a.Created), cmp.Compare(a.ID, b.ID)) })
	return list
}

// Room is how much memory is still to be promised, in bytes, and how many sandboxes of all owners are in each state.
func (m *Manager) Room() (free int64, states map[State]int, err error) {
	promised, err := m.store.promised()
	states = map[State]int{}
	m.mu.Lock()
	all := slices.Collect(maps.Values(m.sandboxes))
	m.mu.Unlock()
	for _, sb := range all {
		states[sb.Info().State]++
	}
	return max(0, m.opts.MemoryBudget-promised), states, err
}

// forget drops the oldest ended sandboxes beyond the number that is remembered.
func (m *Manager) forget(id string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.ended = append(m.ended, id)
	for len(m.ended) > endedKept {
		delete(m.sandboxes, m.ended[0])
		m.ended = m.ended[1:]
	}
}

// Close ends all sandboxes of this server and waits until nothing of them is left; those that are kept it leaves running. It may be called
// twice.
func (m *Manager) Close() error {
	m.cancel(ErrClosed)
	m.mu.Lock()
	m.closed = true
	all := slices.Collect(maps.Values(m.sandboxes))
	m.mu.Unlock()
	var ends sync.WaitGroup
	var mu sync.Mutex
	var errs error
	for _, sb := range all {
		ends.Go(func() {
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
