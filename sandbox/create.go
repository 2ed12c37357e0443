package sandbox

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

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
	if err := m.sandboxes.whileOpen(func() { m.work.Add(1) }); err != nil {
		return nil, fmt.Errorf("create sandbox: %w", err)
	}
	defer m.work.Done()
	template, done, err := m.basis(ctx, &o)
	defer done()
	if err != nil {
		return nil, fmt.Errorf("create sandbox: %w", err)
	}
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
	sb := m.sandboxFor(o, template)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(sb.ctx, func() { cancel(context.Cause(sb.ctx)) })()
	defer context.AfterFunc(m.ctx, func() { cancel(context.Cause(m.ctx)) })()
	if err := m.make(ctx, sb, template, o); err != nil {
		return nil, fmt.Errorf("create sandbox: %w", err)
	}
	for _, p := range o.ports {
		if _, err := sb.Expose(p.Port, p.Public); err != nil {
			m.log.Error("expose a port of a copy", "sandbox", sb.id, "port", p.Port, "error", err)
		}
	}
	return sb, nil
}

// undoStack has what undoes the steps of a creation, the first step first.
type undoStack []func(cause error) error

// run undoes all steps, the last one first, and returns cause with what could not be undone.
func (u undoStack) run(cause error) error {
	err := cause
	for _, undo := range slices.Backward(u) {
		if uerr := undo(cause); uerr != nil {
			err = errors.Join(err, uerr)
		}
	}
	return err
}

// make gives a new sandbox its directory, boots it, and returns when it is ready. If a step fails, the steps before it are undone.
func (m *Manager) make(ctx context.Context, sb *Sandbox, template Template, o CreateOptions) (err error) {
	undo := undoStack{func(cause error) error { sb.cancel(cause); return nil }}
	defer func() {
		if err != nil {
			err = undo.run(err)
		}
	}()
	if err := m.reserve(sb, &undo); err != nil {
		return err
	}
	served, err := sb.boot(ctx, template, o.from, o.whole)
	if start := template.Start; err == nil && start != nil && !o.whole && !served {
		err = sb.RunStartCommand(ctx, *start, nil)
	}
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return err
}

// sandboxFor makes the Sandbox that is asked for; it is not entered anywhere yet.
func (m *Manager) sandboxFor(o CreateOptions, template Template) *Sandbox {
	now := time.Now()
	sb := m.newSandbox(record{
		Version: recordVersion, ID: newID(), Owner: o.Owner, Keep: m.opts.Keep && !o.Transient, State: Creating, Template: template.Name,
		Image: template.ID,
		User:  template.User, Cwd: template.Cwd, Parent: o.parent, Origin: o.origin, Metadata: maps.Clone(o.Metadata),
		Limits: m.granted(o, template),
		Times:  o.Times, Network: o.Network, Ingress: o.Ingress, Created: now, Changed: now,
		Protect: o.Protect.or(template.Protect).or(m.opts.Protect),
	})
	sb.rec.giveSecrets()
	if start := template.Start; start != nil {
		sb.rec.StartCmd, sb.rec.ReadyCmd = start.Command, start.Ready
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

// granted returns the limits of a new sandbox: what is asked for, or else the defaults, but no more cores than there are. Limits that
// belong to a saved memory stay as they are, since they must match it.
func (m *Manager) granted(o CreateOptions, template Template) Limits {
	l := o.Limits.or(template.Limits).or(m.opts.Defaults)
	if start := template.Start; o.whole || start != nil && start.Saved != "" && start.Limits.fits(l) &&
		start.Network == o.Network.On() {
		return l
	}
	return m.within(l)
}

// within cuts limits to what the machine has.
func (m *Manager) within(l Limits) Limits {
	l.CPU = min(l.CPU, float64(m.opts.Cores))
	return l
}

// basis finds what a sandbox begins from: a template, or a snapshot of its owner, which is kept until done is called, even after an error.
func (m *Manager) basis(ctx context.Context, o *CreateOptions) (template Template, done func(), err error) {
	done = func() {}
	if o.Base != nil {
		return *o.Base, done, nil
	}
	if isID(o.Template) { // an ID would be found whoever owns it
		return Template{}, done, fmt.Errorf("template %q: %w", o.Template, ErrNoTemplate)
	}
	template, err = m.opts.Templates.Template(ctx, o.Owner, o.Template)
	if err == nil || !errors.Is(err, ErrNoTemplate) {
		return template, done, err
	}
	snap, from, release, serr := m.snapshots.open(o.Owner, o.Template)
	if errors.Is(serr, ErrNoSnapshot) {
		return Template{}, done, err
	}
	if serr != nil {
		return Template{}, done, serr
	}
	done = release
	want := o.Limits.or(snap.Limits)
	if !snap.FilesOnly && m.within(want) == snap.Limits { // as much was asked for when it was made
		want = snap.Limits
	}
	if !snap.FilesOnly && want != snap.Limits {
		return Template{}, done, fmt.Errorf("snapshot %q has memory, so its limits stay as they are: %w", snap.Name, ErrInvalid)
	}
	o.from, o.whole, o.parent, o.origin = from, !snap.FilesOnly, snap.Name, snap.Name
	o.Limits, o.Times, o.ports = want, o.Times.or(snap.Times), snap.Ports
	if o.Network.Mode == "" {
		o.Network = snap.Network
	}
	if o.Ingress.Open == "" {
		o.Ingress = snap.Ingress
	}
	if !snap.FilesOnly && o.Network.On() != snap.Network.On() {
		return Template{}, done, fmt.Errorf("snapshot %q has memory, so whether it has a network cannot change: %w", snap.Name, ErrInvalid)
	}
	template, err = m.templateOf(ctx, record{Owner: o.Owner, Template: snap.Template, Image: snap.Image, User: snap.User, Cwd: snap.Cwd,
		StartCmd: snap.StartCmd, ReadyCmd: snap.ReadyCmd})
	return template, done, err
}

// templateOf returns the template for a sandbox that begins from a checkpoint of r. The template's environment is in the checkpoint.
func (m *Manager) templateOf(ctx context.Context, r record) (Template, error) {
	t, err := m.opts.Templates.Template(ctx, r.Owner, r.basis())
	t.Name, t.User, t.Cwd, t.Env, t.Start = r.Template, r.User, r.Cwd, nil, r.startCommand()
	return t, err
}

// isID reports whether a name is the ID of a template's content.
func isID(name string) bool { return strings.HasPrefix(name, "sha256:") }

// newSandbox makes the Sandbox of a record; it is not entered anywhere yet.
func (m *Manager) newSandbox(r record) *Sandbox {
	s := &Sandbox{m: m, id: r.ID, owner: r.Owner, rec: r, booted: make(chan struct{}), left: make(chan struct{}),
		ended: make(chan struct{}),
		turn:  make(chan struct{}, 1)}
	s.ports = newPorts(s)
	s.keeper = keeper{s: s, again: make(chan struct{}, 1)}
	s.copies.s, s.copies.again = s, make(chan struct{}, 1)
	s.ctx, s.cancel = context.WithCancelCause(context.Background())
	s.log = &journal{store: m.store, id: r.ID, log: m.log}
	s.meter = &meter{store: m.store, id: r.ID, log: m.log, journal: s.log}
	return s
}

// reserve finds room for a sandbox and enters it into the Manager.
func (m *Manager) reserve(sb *Sandbox, undo *undoStack) error {
	done, err := m.capacity.lock()
	if err != nil {
		return err
	}
	defer done()
	if n := len(m.List(Filter{Owner: sb.owner})); n >= asleepFactor*m.opts.MaxPerOwner {
		return fmt.Errorf("you have %d sandboxes, including those on disk; more are not allowed: %w", n, ErrTooMany)
	}
	if err := m.capacity.checkCount(sb.owner); err != nil {
		return err
	}
	if err := m.capacity.checkMemory(sb.owner, sb.rec.Limits); err != nil {
		return err
	}
	if sb.lock, err = m.store.claim(sb.id); err != nil {
		return err
	}
	*undo = append(*undo, func(error) error { return m.store.discard(sb.id, sb.lock) })
	if err := m.store.save(sb.rec); err != nil {
		return err
	}
	err = m.sandboxes.add(sb, func() {
		sb.mu.Lock()
		defer sb.mu.Unlock()
		sb.logChange("%s", Creating)
	})
	if err == nil { // from here on it can be seen, and its end undoes all of this
		*undo = undoStack{func(cause error) error {
			_ = sb.end(Failed, fmt.Errorf("it could not be made: %w", cause)) // end logs its error
			return nil
		}}
	}
	return err
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
