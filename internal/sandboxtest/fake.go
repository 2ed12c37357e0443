// Package sandboxtest is what tests of sandboxes share: a Runtime in this process for logic that needs no sandbox, the suite that every
// Runtime must pass, and the means to run a test binary with the real programs, as root and as an ordinary user. It isolates nothing.
package sandboxtest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"sync"

	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/sandbox"
)

// Fake is a Runtime whose machines are agents in this process: commands run on the host, as its user. Boot fails with FailBoot if set.
type Fake struct {
	FailBoot error
	Hang     chan struct{} // if set, Boot waits until it is closed or its context ends

	mu       sync.Mutex
	machines map[string]*fakeMachine // by directory
	unwell   error
}

// Sicken makes every Check fail.
func (f *Fake) Sicken(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.unwell = err
}

var _ sandbox.Runtime = (*Fake)(nil)

// Running counts the machines that have not been destroyed.
func (f *Fake) Running() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.machines)
}

// Silence makes the agent in dir answer nothing, as a stopped one.
func (f *Fake) Silence(dir string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if m := f.machines[dir]; m != nil {
		m.gate.shut()
	}
}

// Crash ends the machine in dir as a dead sentry would: its pipe ends, and nobody is told.
func (f *Fake) Crash(dir string) {
	f.mu.Lock()
	m := f.machines[dir]
	f.mu.Unlock()
	if m != nil {
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
	server, err := agent.NewServer(agent.Options{Version: "fake", SpoolDir: filepath.Join(spec.Dir, "spool"), Home: spec.Dir})
	if err != nil {
		return nil, err
	}
	m := &fakeMachine{fake: f, dir: spec.Dir, server: server, gate: newGate(), pipes: map[net.Conn]bool{}}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.machines == nil {
		f.machines = map[string]*fakeMachine{}
	}
	if f.machines[spec.Dir] != nil {
		return nil, fmt.Errorf("%s has a machine already", spec.Dir)
	}
	f.machines[spec.Dir] = m
	return m.connect(), nil
}

// Attach implements sandbox.Runtime.
func (f *Fake) Attach(_ context.Context, dir string) (sandbox.Machine, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.machines[dir]
	if m == nil {
		return nil, errors.New("attach: no machine runs there")
	}
	return m.connect(), nil
}

// Reap implements sandbox.Runtime.
func (f *Fake) Reap(_ context.Context, dir string) error {
	f.mu.Lock()
	m := f.machines[dir]
	delete(f.machines, dir)
	f.mu.Unlock()
	if m != nil {
		m.stop()
		m.server.Close()
	}
	return nil
}

// fakeMachine is one agent; each connect is another way to it.
type fakeMachine struct {
	fake   *Fake
	dir    string
	server *agent.Server
	gate   *gate

	mu    sync.Mutex
	pipes map[net.Conn]bool
	serve sync.WaitGroup
}

func (m *fakeMachine) connect() sandbox.Machine {
	host, guest := net.Pipe()
	m.mu.Lock()
	m.pipes[guest] = true
	m.mu.Unlock()
	m.serve.Go(func() { _ = m.server.Serve(gated{guest, m.gate}) }) // ends with the pipe
	return &fakeConn{fakeMachine: m, host: host}
}

// stop ends all pipes.
func (m *fakeMachine) stop() {
	m.gate.open()
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
func (c *fakeConn) Pause(context.Context) error { c.gate.shut(); return nil }

// Resume implements sandbox.Machine.
func (c *fakeConn) Resume(context.Context) error { c.gate.open(); return nil }

// Usage implements sandbox.Machine.
func (c *fakeConn) Usage(context.Context) (sandbox.Usage, error) {
	return sandbox.Usage{Memory: 1 << 20}, nil
}

// Check implements sandbox.Machine.
func (c *fakeConn) Check() error {
	c.fake.mu.Lock()
	defer c.fake.mu.Unlock()
	return c.fake.unwell
}

// Destroy implements sandbox.Machine.
func (c *fakeConn) Destroy(ctx context.Context) error {
	_ = c.host.Close()
	return c.fake.Reap(ctx, c.dir)
}

// gate holds an agent's pipe while its machine is paused.
type gate struct {
	mu   sync.Mutex
	cond *sync.Cond
	held bool
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
	g.held = held
	g.cond.Broadcast()
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

func (g gated) Read(p []byte) (int, error) {
	n, err := g.Conn.Read(p)
	g.gate.pass()
	return n, err
}

// Templates is a template for the Fake, which needs no files.
type Templates struct{}

// Template implements sandbox.Templates.
func (Templates) Template(_ context.Context, name string) (sandbox.Template, error) {
	if name != "" && name != "host" {
		return sandbox.Template{}, fmt.Errorf("template %q: %w", name, sandbox.ErrNoTemplate)
	}
	return sandbox.Template{Name: "host"}, nil
}
