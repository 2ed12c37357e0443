package sandbox_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"soulbox.dev/soulbox/internal/sandboxtest"
	"soulbox.dev/soulbox/sandbox"
)

var errPower = errors.New("the power is gone")

// mortal is a Runtime whose server dies: from then on its calls do nothing, and its machines run on.
type mortal struct {
	*sandboxtest.Fake
	dead atomic.Bool
}

func (m *mortal) Boot(ctx context.Context, s sandbox.Spec) (sandbox.Machine, error) {
	if m.dead.Load() {
		return nil, errPower
	}
	machine, err := m.Fake.Boot(ctx, s)
	return &mortalMachine{machine, m}, err
}

func (m *mortal) Reap(ctx context.Context, dir string) error {
	if m.dead.Load() {
		return errPower
	}
	return m.Fake.Reap(ctx, dir)
}

type mortalMachine struct {
	sandbox.Machine
	m *mortal
}

func (m *mortalMachine) Checkpoint(ctx context.Context, dir string, o sandbox.CheckpointOptions) error {
	if m.m.dead.Load() {
		return errPower
	}
	return m.Machine.Checkpoint(ctx, dir, o)
}

func (m *mortalMachine) Destroy(ctx context.Context) error {
	if m.m.dead.Load() {
		return errPower
	}
	return m.Machine.Destroy(ctx)
}

// outage counts the steps on disk and makes the power fail at one of them, which then writes half of its bytes.
type outage struct {
	mu      sync.Mutex
	at, now int
	runtime *mortal
}

func (o *outage) step(_, _ string, size int) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.now++
	switch {
	case o.at == 0 || o.now < o.at:
		return size, nil
	case o.now == o.at:
		o.runtime.dead.Store(true)
		return size / 2, errPower
	}
	return 0, errPower
}

// TestPowerFails: wherever in a sandbox's life the server and the disk stop, the next server finds the state before or after the last
// change, and nothing else is left.
func TestPowerFails(t *testing.T) {
	for at := 1; ; at++ {
		dir, fake := t.TempDir(), &mortal{Fake: &sandboxtest.Fake{}}
		fake.EndAfter(t)
		power := &outage{at: at, runtime: fake}
		first, err := sandbox.NewManager(faulty(dir, fake, power))
		if err != nil {
			t.Fatal(err)
		}
		known := live(t, first)
		fake.dead.Store(true)
		power.mu.Lock()
		done := power.now < power.at // the life ended before the outage
		power.at = 1
		power.mu.Unlock()
		_ = first.Close() // it could not do anything
		second, err := sandbox.NewManager(sandbox.Options{Dir: dir, Runtime: fake.Fake, Templates: sandboxtest.Templates{}, Keep: true,
			MemoryBudget: 8 << 30})
		if err != nil {
			t.Fatal(err)
		}
		<-second.Settled()
		known.check(t, at, second, fake.Fake, dir)
		for _, i := range second.List(sandbox.Filter{}) {
			if sb, err := second.Get("", i.ID); err == nil {
				_ = sb.Kill(sandbox.CauseKilled)
			}
		}
		if err := second.Close(); err != nil {
			t.Fatal(at, err)
		}
		if fake.Running() != 0 {
			t.Fatalf("step %d: %d machines are left", at, fake.Running())
		}
		if done {
			t.Logf("%d steps", at-1)
			return
		}
	}
}

func faulty(dir string, runtime sandbox.Runtime, power *outage) sandbox.Options {
	o := sandbox.Options{Dir: dir, Runtime: runtime, Templates: sandboxtest.Templates{}, Keep: true, MemoryBudget: 8 << 30}
	o.SetFault(power.step)
	return o
}

// told is what the first server has said about its sandbox, up to the last request before the outage.
type told struct {
	id       string
	before   string
	after    string // the last request
	snapshot bool
}

func (k *told) do(what string, err error) bool {
	k.after = what
	if err != nil {
		return false
	}
	k.before = what
	return true
}

// live is a life in which everything that is written is written once.
func live(t *testing.T, m *sandbox.Manager) *told {
	k := &told{}
	sb, err := m.Create(t.Context(), sandbox.CreateOptions{Metadata: map[string]string{"n": "0"}})
	if !k.do("running 0", err) {
		return k
	}
	k.id = sb.ID()
	one := "1"
	_, err = sb.Update(t.Context(), sandbox.Update{Metadata: map[string]*string{"n": &one}})
	if !k.do("running 1", err) {
		return k
	}
	_, err = sb.Snapshot(t.Context(), sandbox.SnapshotOptions{Name: "snap"})
	if k.snapshot = err == nil; !k.snapshot {
		return k
	}
	for range 2 {
		if !k.do("paused 1", sb.Pause(t.Context(), sandbox.PauseOptions{ToDisk: true})) {
			return k
		}
		if !k.do("running 1", sb.Resume(t.Context())) {
			return k
		}
	}
	k.do("killed 1", sb.Kill(sandbox.CauseKilled))
	return k
}

// check compares what the next server finds with what the first one said.
func (k *told) check(t *testing.T, at int, m *sandbox.Manager, fake *sandboxtest.Fake, dir string) {
	t.Helper()
	running := 0
	for _, i := range m.List(sandbox.Filter{}) {
		if k.id == "" {
			t.Errorf("step %d: sandbox %s is %s, but was never told", at, i.ID, i.State)
		}
		if i.State == sandbox.Running {
			running++
		}
	}
	if fake.Running() != running {
		t.Errorf("step %d: %d machines for %d sandboxes", at, fake.Running(), running)
	}
	if k.id != "" {
		sb, err := m.Get("", k.id)
		if err != nil {
			t.Fatalf("step %d: after %q the sandbox is lost: %v", at, k.before, err)
		}
		info := sb.Info()
		if got := fmt.Sprintf("%s %s", info.State, info.Metadata["n"]); got != k.before && got != k.after {
			t.Errorf("step %d: it is %q (%s), was %q, and was to be %q", at, got, info.Cause, k.before, k.after)
		}
		if info.State == sandbox.Paused {
			if err := sb.Resume(t.Context()); err != nil {
				t.Errorf("step %d: %v", at, err)
			}
		}
	}
	snaps, err := m.Snapshots("")
	if err != nil || k.snapshot && len(snaps) != 1 {
		t.Errorf("step %d: snapshots %v, %v", at, snaps, err)
	}
	entries, err := os.ReadDir(filepath.Join(dir, "sandboxes"))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if _, err := m.Any(e.Name()); e.IsDir() && err != nil {
			t.Errorf("step %d: %s is left", at, e.Name())
		}
	}
}

// TestHostFails: whichever step of the store fails once in a sandbox's life, with whatever error of the host, the sandbox does not end; the
// next attempt succeeds, and nothing is left after a kill.
func TestHostFails(t *testing.T) {
	for _, fault := range []error{syscall.EMFILE, syscall.EIO, syscall.ENOSPC} {
		t.Run(fault.Error(), func(t *testing.T) {
			t.Parallel()
			for at, steps := 1, 1; at <= steps; at++ {
				steps = failAt(t, fault, at)
			}
		})
	}
}

// failAt makes one step of a life fail, and returns how many steps there were.
func failAt(t *testing.T, fault error, at int) (steps int) {
	dir, fake := t.TempDir(), &sandboxtest.Fake{}
	var now atomic.Int64
	o := sandbox.Options{Dir: dir, Runtime: fake, Templates: sandboxtest.Templates{}, Keep: true, MemoryBudget: 8 << 30,
		RescanEvery: time.Hour}
	o.SetFault(func(_, _ string, size int) (int, error) {
		if now.Add(1) == int64(at) {
			return 0, fault
		}
		return size, nil
	})
	m, err := sandbox.NewManager(o)
	if err != nil {
		t.Fatal(err)
	}
	<-m.Settled()
	liveOn(t, m, fmt.Sprintf("step %d", at))
	if err := m.Close(); err != nil {
		t.Fatal(at, err)
	}
	if fake.Running() != 0 {
		t.Fatalf("step %d: a machine is left", at)
	}
	next := newManager(t, dir, fake, keep) // removes what could not be removed
	<-next.Settled()
	noDirectories(t, dir)
	if err := next.Close(); err != nil {
		t.Fatal(err)
	}
	return int(now.Load())
}

// liveOn is a life in which whatever fails is tried again.
func liveOn(t *testing.T, m *sandbox.Manager, when string) {
	t.Helper()
	again := func(what string, do func() error) {
		t.Helper()
		err := do()
		if err != nil {
			err = do()
		}
		if err != nil {
			t.Fatalf("%s: %s: %v", when, what, err)
		}
	}
	var sb *sandbox.Sandbox
	again("create", func() (err error) {
		sb, err = m.Create(t.Context(), sandbox.CreateOptions{Protect: sandbox.Protect{Every: time.Hour}})
		return err
	})
	alive := func(what string, want sandbox.State) {
		t.Helper()
		if i := sb.Info(); i.State != want || sb.Gone() {
			t.Fatalf("%s: after %s it is %s (%s)", when, what, i.State, i.Cause)
		}
	}
	again("protect", sb.ProtectNow)
	alive("protect", sandbox.Running)
	for range 2 {
		again("pause", func() error { return sb.Pause(t.Context(), sandbox.PauseOptions{ToDisk: true}) })
		alive("pause", sandbox.Paused)
		again("resume", func() error { return sb.Resume(t.Context()) })
		alive("resume", sandbox.Running)
	}
	again("freeze", func() error { return sb.Pause(t.Context(), sandbox.PauseOptions{}) })
	again("thaw", func() error { return sb.Resume(t.Context()) })
	alive("thaw", sandbox.Running)
	if err := sb.Kill(sandbox.CauseKilled); err != nil && sb.Info().State != sandbox.Killed {
		t.Fatalf("%s: kill: %v", when, err)
	}
}
