// Package sandboxtest is what tests of sandboxes share: a Runtime in this process for logic that needs no sandbox, the suite that every
// Runtime must pass, and the means to run a test binary with the real programs, as root and as an ordinary user. It isolates nothing.
package sandboxtest

import (
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"soulbox.dev/soulbox/agent/guest"

	"soulbox.dev/soulbox/sandbox"
)

// Fake is a Runtime whose machines are agents in this process: commands run on the host, as its user. If FailBoot is set, Boot fails with
// it.
type Fake struct {
	FailBoot   error
	FailSave   error // makes every Checkpoint fail
	FailAttach error // makes every Attach fail
	FailPause  error // makes every Pause fail
	Deaf       bool  // machines that begin from a memory do not respond
	// If set, machines take their agents from here: agents made outside of a synctest bubble do not keep its time from advancing.
	Agents chan *guest.Server
	Hang   chan struct{} // if set, Boot waits until it is closed or its context ends
	// If set, every Checkpoint receives two values from it: the first when it has begun, the second before it continues.
	HangSave chan struct{}
	HangEnd  chan struct{} // if set, Destroy waits until it is closed

	mu       sync.Mutex
	machines map[string]*fakeMachine  // by directory
	saved    map[string]*guest.Server // of machines that have ended, by the name of their checkpoint
	unwell   error
	asked    int
	pauses   int // calls of Pause, also those that failed
	ends     sync.Once
}

// EndAfter has what runs in machines, or is saved, end with the test: what a test left is nothing that its package has lost. The first test
// that asks for it is the one; what it closes itself is to be asked for later.
func (f *Fake) EndAfter(t testing.TB) {
	f.ends.Do(func() { t.Cleanup(f.end) })
}

func (f *Fake) end() {
	f.mu.Lock()
	machines, saved := f.machines, f.saved
	f.machines, f.saved = nil, nil
	f.mu.Unlock()
	for _, m := range machines {
		m.stop()
		m.server.Close()
	}
	for _, server := range saved {
		server.Close()
	}
}

// Sicken makes every Check fail.
func (f *Fake) Sicken(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.unwell = err
}

// Asked counts the calls of Check.
func (f *Fake) Asked() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.asked
}

// Pauses counts the calls of Pause.
func (f *Fake) Pauses() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.pauses
}

// Refuse makes every Attach fail from now on.
func (f *Fake) Refuse(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.FailAttach = err
}

// Repair undoes Refuse.
func (f *Fake) Repair() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.FailAttach = nil
}

// Cut ends the pipes to the machine in dir, which runs on.
func (f *Fake) Cut(dir string) {
	f.mu.Lock()
	m := f.machines[dir]
	f.mu.Unlock()
	m.mu.Lock()
	defer m.mu.Unlock()
	for p := range m.pipes {
		_ = p.Close()
	}
}

// Rescue implements sandbox.Rescuer.
func (f *Fake) Rescue(_ context.Context, _ sandbox.Spec, to string) error {
	if err := os.Mkdir(to, 0o755); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(to, "memory"), nil, 0o600)
}

var _ interface {
	sandbox.Runtime
	sandbox.Rescuer
} = (*Fake)(nil)

// Running counts the machines that have not been destroyed.
func (f *Fake) Running() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.machines)
}

// Silence makes the agent in dir stop responding, as if it were stopped.
func (f *Fake) Silence(dir string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if m := f.machines[dir]; m != nil {
		m.gate.shut()
	}
}

// Crash ends the machine in dir as a crash of the sentry would: its pipe ends, and the Fake reports nothing.
func (f *Fake) Crash(dir string) {
	f.mu.Lock()
	m := f.machines[dir]
	f.mu.Unlock()
	if m != nil {
		m.mu.Lock()
		m.dead = true
		m.mu.Unlock()
		m.stop()
	}
}

// Boot implements sandbox.Runtime.
func (f *Fake) Boot(ctx context.Context, spec sandbox.Spec) (sandbox.Machine, error) {
	if f.FailBoot != nil {
		return nil, f.FailBoot
	}
	if f.Hang != nil {
		select {
		case <-f.Hang:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	saved, err := readCheckpoint(spec.From)
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	server := f.saved[saved]
	delete(f.saved, saved)
	if server == nil && f.Agents != nil {
		server = <-f.Agents
	}
	if server == nil {
		if server, err = guest.NewServer(guest.Options{Version: "fake", SpoolDir: filepath.Join(spec.Dir, "spool"),
			Home: spec.Dir}); err != nil {
			return nil, err
		}
	}
	m := &fakeMachine{fake: f, dir: spec.Dir, server: server, gate: newGate(), pipes: map[net.Conn]bool{}}
	if f.machines == nil {
		f.machines = map[string]*fakeMachine{}
	}
	if f.machines[spec.Dir] != nil {
		return nil, fmt.Errorf("%s has a machine already", spec.Dir)
	}
	f.machines[spec.Dir] = m
	if saved != "" {
		if f.Deaf {
			m.gate.shut()
		}
		return m.connect(server.ServeAnew), nil
	}
	return m.connect(server.Serve), nil
}

// readCheckpoint returns the name of a checkpoint with memory; "" for others.
func readCheckpoint(dir string) (string, error) {
	if dir == "" {
		return "", nil
	}
	name, err := os.ReadFile(filepath.Join(dir, "memory"))
	return string(name), err
}

// Checkpoint implements sandbox.Machine. It saves the agent itself: the first machine that begins from the checkpoint has the memory, all
// others are new.
func (c *fakeConn) Checkpoint(_ context.Context, dir string, o sandbox.CheckpointOptions) error {
	for range 2 {
		if c.fake.HangSave != nil {
			<-c.fake.HangSave
		}
	}
	if c.fake.FailSave != nil {
		return c.fake.FailSave
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	name := rand.Text()
	if o.FilesOnly {
		name = ""
	}
	if err := os.WriteFile(filepath.Join(dir, "memory"), []byte(name), 0o600); err != nil || o.Resume {
		return err
	}
	c.gate.shut()
	c.mu.Lock()
	c.savedAs = name
	c.mu.Unlock()
	return nil
}

// Attach implements sandbox.Runtime.
func (f *Fake) Attach(_ context.Context, dir string) (sandbox.Machine, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.machines[dir]
	if f.FailAttach != nil {
		return nil, f.FailAttach
	}
	if m == nil || m.isDead() {
		return nil, fmt.Errorf("attach: %w", sandbox.ErrNoMachine)
	}
	m.mu.Lock()
	m.savedAs = ""
	m.mu.Unlock()
	m.gate.open()
	return m.connect(m.server.Serve), nil
}

// Reap implements sandbox.Runtime.
func (f *Fake) Reap(_ context.Context, dir string) error {
	f.mu.Lock()
	m := f.machines[dir]
	delete(f.machines, dir)
	saved := false
	if m != nil {
		m.mu.Lock()
		if saved = m.savedAs != ""; saved { // its memory lives on in the checkpoint
			if f.saved == nil {
				f.saved = map[string]*guest.Server{}
			}
			f.saved[m.savedAs] = m.server
		}
		m.mu.Unlock()
	}
	f.mu.Unlock()
	if m != nil {
		m.stop()
		if !saved {
			m.server.Close()
		}
	}
	return nil
}

// fakeMachine is one agent; each connect makes another connection to it.
type fakeMachine struct {
	fake   *Fake
	dir    string
	server *guest.Server
	gate   *gate

	mu      sync.Mutex
	dead    bool
	savedAs string // the checkpoint that has its memory, while it is frozen
	pipes   map[net.Conn]bool
	serve   sync.WaitGroup
}

func (m *fakeMachine) connect(serve func(io.ReadWriteCloser) error) sandbox.Machine {
	host, guest := net.Pipe()
	m.mu.Lock()
	m.pipes[guest] = true
	m.mu.Unlock()
	m.serve.Go(func() { _ = serve(gated{guest, m.gate}) }) // ends with the pipe
	return &fakeConn{fakeMachine: m, host: host}
}

func (m *fakeMachine) isDead() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.dead
}

// stop ends all pipes.
func (m *fakeMachine) stop() {
	m.gate.end()
	m.mu.Lock()
	for p := range m.pipes {
		_ = p.Close()
	}
	m.mu.Unlock()
	m.serve.Wait()
}

type fakeConn struct {
	*fakeMachine
	host net.Conn
}

// Pipe implements sandbox.Machine.
func (c *fakeConn) Pipe() io.ReadWriteCloser { return c.host }

// Pause implements sandbox.Machine.
func (c *fakeConn) Pause(context.Context) error {
	c.fake.mu.Lock()
	c.fake.pauses++
	c.fake.mu.Unlock()
	if c.fake.FailPause != nil {
		return c.fake.FailPause
	}
	c.gate.shut()
	return nil
}

// Resume implements sandbox.Machine.
func (c *fakeConn) Resume(context.Context) error {
	c.mu.Lock()
	c.savedAs = ""
	c.mu.Unlock()
	c.gate.open()
	return nil
}

// Usage implements sandbox.Machine.
func (c *fakeConn) Usage(context.Context) (sandbox.Usage, error) {
	return sandbox.Usage{Memory: 1 << 20}, nil
}

// IO implements sandbox.Machine.
func (c *fakeConn) IO() (sandbox.IO, error) { return sandbox.IO{}, nil }

// Check implements sandbox.Machine.
func (c *fakeConn) Check() error {
	if c.isDead() {
		return sandbox.ErrNoMachine
	}
	c.fake.mu.Lock()
	defer c.fake.mu.Unlock()
	c.fake.asked++
	return c.fake.unwell
}

// Destroy implements sandbox.Machine.
func (c *fakeConn) Destroy(ctx context.Context) error {
	if c.fake.HangEnd != nil {
		<-c.fake.HangEnd
	}
	_ = c.host.Close()
	return c.fake.Reap(ctx, c.dir)
}

// gate holds the bytes of an agent's pipe while its machine is paused.
type gate struct {
	mu   sync.Mutex
	cond *sync.Cond
	held bool
	over bool // the machine has ended, and nothing waits any more
}

func newGate() *gate {
	g := &gate{}
	g.cond = sync.NewCond(&g.mu)
	return g
}

func (g *gate) shut() { g.set(true) }
func (g *gate) open() { g.set(false) }

func (g *gate) set(held bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.held = held && !g.over
	g.cond.Broadcast()
}

// end opens the gate for good.
func (g *gate) end() {
	g.mu.Lock()
	g.over = true
	g.mu.Unlock()
	g.open()
}

func (g *gate) pass() {
	g.mu.Lock()
	defer g.mu.Unlock()
	for g.held {
		g.cond.Wait()
	}
}

// gated is a pipe whose bytes wait at a gate.
type gated struct {
	net.Conn
	gate *gate
}

// Read implements io.Reader.
func (g gated) Read(p []byte) (int, error) {
	n, err := g.Conn.Read(p)
	g.gate.pass()
	return n, err
}

// Templates has one template for the Fake, which needs no files.
type Templates struct{}

// Template implements sandbox.Templates.
func (Templates) Template(_ context.Context, _, name string) (sandbox.Template, error) {
	if name != "" && name != "host" {
		return sandbox.Template{}, fmt.Errorf("template %q: %w", name, sandbox.ErrNoTemplate)
	}
	return sandbox.Template{Name: "host"}, nil
}
