package sandbox_test

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"soulbox.dev/soulbox/internal/sandboxtest"
	"soulbox.dev/soulbox/sandbox"
)

// hasNoMore are errors of the host that say nothing about a sandbox.
var hasNoMore = []error{syscall.EMFILE, syscall.ENFILE, syscall.ENOMEM, syscall.ENOSPC, syscall.EIO}

// TestNothingToPauseBy: a sandbox that must not continue, and cannot be paused because the host lacks something, does not fail, however
// often that is tried.
func TestNothingToPauseBy(t *testing.T) {
	for _, fault := range hasNoMore {
		fake := &sandboxtest.Fake{FailSave: fault, FailPause: fault}
		sb := create(t, newManager(t, t.TempDir(), fake, nil), sandbox.CreateOptions{})
		for range 5 {
			sb.ContainNow(&sandbox.OverError{Kind: sandbox.OverSilent})
		}
		if info := sb.Info(); info.State != sandbox.Running {
			t.Fatalf("%v: %+v", fault, info)
		}
		fake.FailSave, fake.FailPause = nil, nil
		sb.ContainNow(&sandbox.OverError{Kind: sandbox.OverSilent})
		if info := sb.Info(); !info.OnDisk {
			t.Fatalf("%v: %+v", fault, info)
		}
	}
}

// TestFrozenOnFullDisk: a sandbox that must not continue is frozen even if the disk has no room for its state.
func TestFrozenOnFullDisk(t *testing.T) {
	fake := &sandboxtest.Fake{FailSave: syscall.ENOSPC}
	var full atomic.Bool
	m := newManager(t, t.TempDir(), fake, func(o *sandbox.Options) {
		o.SetFault(func(step, _ string, size int) (int, error) {
			if full.Load() && step == "create" {
				return 0, syscall.ENOSPC
			}
			return size, nil
		})
	})
	sb := create(t, m, sandbox.CreateOptions{})
	full.Store(true)
	sb.ContainNow(&sandbox.OverError{Kind: sandbox.OverKernel, Used: 5 << 30, Limit: 1 << 30})
	if info := sb.Info(); info.State != sandbox.Paused || info.OnDisk {
		t.Fatalf("%+v", info)
	}
	full.Store(false)
	if err := sb.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// TestTimeOverAndNoPause: a sandbox whose time is over and that cannot be paused is not killed; the pause is tried again.
func TestTimeOverAndNoPause(t *testing.T) {
	fake := &sandboxtest.Fake{FailSave: syscall.ENOSPC, FailPause: syscall.EMFILE}
	sb := create(t, newManager(t, t.TempDir(), fake, nil),
		sandbox.CreateOptions{Times: sandbox.Times{Life: time.Second, OnTimeout: sandbox.ActionPause}})
	sandboxtest.Eventually(t, "it is said", func() bool {
		page, err := sb.Logs(sandbox.LogQuery{Text: "could not be paused: it runs on"})
		return err == nil && len(page.Entries) > 0
	})
	if info := sb.Info(); info.State != sandbox.Running || fake.Running() != 1 {
		t.Fatalf("%+v", info)
	}
}

// TestThawedWithoutLink: a sandbox that was frozen because its link was lost has a link again after its resume.
func TestThawedWithoutLink(t *testing.T) {
	t.Parallel()
	fake, dir := &sandboxtest.Fake{FailSave: syscall.ENOSPC}, t.TempDir()
	sb := create(t, newManager(t, dir, fake, nil), sandbox.CreateOptions{})
	fake.Refuse(syscall.EMFILE)
	fake.Cut(filepath.Join(dir, "sandboxes", sb.ID()))
	sandboxtest.Eventually(t, "it is frozen", func() bool { return sb.Info().State == sandbox.Paused })
	fake.Repair()
	if err := sb.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	answers(t, sb)
}

func answers(t *testing.T, sb *sandbox.Sandbox) {
	t.Helper()
	sandboxtest.Eventually(t, "its agent answers", func() bool {
		client, err := sb.Agent(t.Context(), "use")
		return err == nil && client.Ping(t.Context()) == nil
	})
}

// TestAdoptSilent: a sandbox whose agent was silent to the new server is saved; if it cannot be saved, it is frozen, and its agent is
// reconnected when it is resumed.
func TestAdoptSilent(t *testing.T) {
	t.Parallel() // it mostly waits
	for _, fault := range []error{nil, syscall.ENOSPC} {
		for _, frozen := range []bool{false, true} {
			fake, dir := &sandboxtest.Fake{}, t.TempDir()
			first := newManager(t, dir, fake, keep)
			id := create(t, first, sandbox.CreateOptions{}).ID()
			if sb, err := first.Get("", id); err != nil || frozen && sb.Pause(t.Context(), sandbox.PauseOptions{}) != nil {
				t.Fatal(err)
			}
			if err := first.Close(); err != nil {
				t.Fatal(err)
			}
			fake.FailSave = fault
			second := newManager(t, dir, fake, nil) // it adopts none by itself
			<-second.Settled()
			if err := second.AdoptSilent(id); err != nil {
				t.Fatal(err)
			}
			sb, err := second.Get("", id)
			if err != nil {
				t.Fatal(err)
			}
			if info := sb.Info(); info.State != sandbox.Paused || info.OnDisk != (fault == nil) {
				t.Fatalf("%+v", info)
			}
			if err := sb.Resume(t.Context()); err != nil {
				t.Fatal(err)
			}
			answers(t, sb)
		}
	}
}

// stubborn is a Runtime whose machines end as a test wants.
type stubborn struct {
	*sandboxtest.Fake
	end func() error
}

func (r *stubborn) Boot(ctx context.Context, s sandbox.Spec) (sandbox.Machine, error) {
	m, err := r.Fake.Boot(ctx, s)
	return &stubbornMachine{m, r}, err
}

type stubbornMachine struct {
	sandbox.Machine
	r *stubborn
}

func (m *stubbornMachine) Destroy(ctx context.Context) error {
	if err := m.r.end(); err != nil {
		return err
	}
	return m.Machine.Destroy(ctx)
}

// failing creates a sandbox that has a copy, and makes it fail.
func failing(t *testing.T, m *sandbox.Manager, fake *sandboxtest.Fake) *sandbox.Sandbox {
	t.Helper()
	sb := create(t, m, sandbox.CreateOptions{Protect: sandbox.Protect{Every: time.Hour, Memory: true}})
	if err := sb.ProtectNow(); err != nil {
		t.Fatal(err)
	}
	fake.Crash(filepath.Join(m.Dir(), "sandboxes", sb.ID()))
	return sb
}

// TestCloseAtFailure: a server that is closed while a sandbox with a copy fails comes to its end, and the next server has the copy.
func TestCloseAtFailure(t *testing.T) {
	fake, dir := &sandboxtest.Fake{}, t.TempDir()
	ending, goOn := make(chan struct{}, 10), make(chan struct{})
	m := newManager(t, dir, fake, func(o *sandbox.Options) {
		o.Keep, o.Runtime = true, &stubborn{fake, func() error { ending <- struct{}{}; <-goOn; return nil }}
	})
	sb := failing(t, m, fake)
	<-ending
	closed := make(chan error, 1)
	go func() { closed <- m.Close() }()
	<-m.Closing()
	close(goOn)
	select {
	case err := <-closed:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(time.Minute):
		t.Fatal("the server does not end")
	}
	if err := awaitSandbox(t, newManager(t, dir, fake, keep), "", sb.ID()).Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// TestFailsUnended: a failed sandbox whose machine cannot be removed at once can be resumed as soon as it can.
func TestFailsUnended(t *testing.T) {
	fake := &sandboxtest.Fake{}
	var faulty atomic.Bool
	faulty.Store(true)
	m := newManager(t, t.TempDir(), fake, func(o *sandbox.Options) {
		o.Keep, o.RescanEvery = true, 20*time.Millisecond
		o.Runtime = &stubborn{fake, func() error {
			if faulty.Load() {
				return syscall.EMFILE
			}
			return nil
		}}
	})
	id := failing(t, m, fake).ID()
	sandboxtest.Eventually(t, "it can be resumed", func() bool {
		sb, err := m.Get("", id)
		return err == nil && sb.Info().State == sandbox.Failed && sb.Resume(t.Context()) == nil
	})
	faulty.Store(false)
}

// TestStaleCheckpoint: a checkpoint of a failed pause that could not be removed does no harm.
func TestStaleCheckpoint(t *testing.T) {
	m := newManager(t, t.TempDir(), &sandboxtest.Fake{}, nil)
	sb := create(t, m, sandbox.CreateOptions{})
	stale := filepath.Join(m.Dir(), "sandboxes", sb.ID(), "checkpoint-1")
	if err := errors.Join(os.Mkdir(stale, 0o700), os.WriteFile(filepath.Join(stale, "old"), nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	if err := sb.Pause(t.Context(), sandbox.PauseOptions{ToDisk: true}); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(stale, "old")); !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	if err := sb.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// TestStrangersLeaveNothing: refused connections take no place from others.
func TestStrangersLeaveNothing(t *testing.T) {
	sb := create(t, newManager(t, t.TempDir(), &sandboxtest.Fake{}, nil), sandbox.CreateOptions{})
	port, err := sb.Expose(4321, false)
	if err != nil {
		t.Fatal(err)
	}
	for range 100 { // the owner of a closed connection is not known
		conn, err := net.Dial("tcp", port.Address())
		if err != nil {
			if strings.Contains(err.Error(), "refused") {
				t.Fatal(err)
			}
			continue
		}
		_ = conn.(*net.TCPConn).SetLinger(0)
		_ = conn.Close()
	}
	sandboxtest.Eventually(t, "no connection is left", func() bool { return sb.Connections() == 0 })
}

// TestSuccessor: whoever looks for a sandbox that has failed and is still being ended gets the one that takes its place, and can resume it.
func TestSuccessor(t *testing.T) {
	fake, dir := &sandboxtest.Fake{}, t.TempDir()
	m := newManager(t, dir, fake, nil)
	sb := create(t, m, sandbox.CreateOptions{Owner: "ann"})
	if err := errors.Join(sb.Pause(t.Context(), sandbox.PauseOptions{ToDisk: true}), sb.Resume(t.Context())); err != nil {
		t.Fatal(err)
	}
	fake.HangEnd = make(chan struct{})
	fake.Crash(filepath.Join(dir, "sandboxes", sb.ID()))
	sandboxtest.Eventually(t, "it has failed", func() bool { return sb.Info().State == sandbox.Failed })
	found := make(chan *sandbox.Sandbox, 1)
	go func() {
		next, err := m.Get("ann", sb.ID())
		if err != nil {
			t.Error(err)
		}
		found <- next
	}()
	select {
	case <-found:
		t.Fatal("the one that is being ended was found")
	case <-time.After(50 * time.Millisecond):
	}
	close(fake.HangEnd)
	next := <-found
	if err := next.Resume(t.Context()); err != nil || next.Info().State != sandbox.Running {
		t.Fatal(err, next.Info().State)
	}
}
