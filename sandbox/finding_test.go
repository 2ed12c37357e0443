package sandbox_test

import (
	"context"
	"errors"
	"fmt"
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

// hostFaults are errors of a host that cannot be asked: never a verdict on a sandbox.
var hostFaults = []error{syscall.EMFILE, syscall.ENFILE, syscall.ENOMEM, syscall.EAGAIN, syscall.EINTR, syscall.EIO, syscall.ENOSPC,
	context.DeadlineExceeded}

// TestUnknown: a machine that cannot be asked about continues, and is looked after again.
func TestUnknown(t *testing.T) {
	for _, fault := range hostFaults {
		t.Run(fault.Error(), func(t *testing.T) {
			t.Parallel()
			fake := &sandboxtest.Fake{}
			m := newManager(t, t.TempDir(), fake, nil)
			sb := create(t, m, sandbox.CreateOptions{})
			fake.Sicken(fmt.Errorf("check: %w", fault))
			asked := fake.Asked()
			sandboxtest.Eventually(t, "it was asked about several times", func() bool { return fake.Asked() >= asked+2 })
			if info := sb.Info(); info.State != sandbox.Running {
				t.Fatalf("%+v", info)
			}
			fake.Sicken(sandbox.ErrNoMachine) // this is a verdict
			sandboxtest.Eventually(t, "it is gone", func() bool { return sb.Info().State == sandbox.Failed && fake.Running() == 0 })
		})
	}
}

// TestOver: a sandbox that takes more than it may is paused to disk with a cause, or in memory if that fails; it fails only if it cannot be
// paused at all.
func TestOver(t *testing.T) {
	t.Parallel() // it mostly waits
	over := &sandbox.OverError{Kind: sandbox.OverKernel, Used: 640 << 20, Limit: 512 << 20, Detail: "150,000 open files"}
	const took, advice = "its kernel took 640 MB for ", ", limit 512 MB; resume it with more memory, or delete files and close connections"
	for name, test := range map[string]struct {
		save, pause error
		state       sandbox.State
		onDisk      bool
	}{
		"to disk":    {nil, nil, sandbox.Paused, true},
		"in memory":  {syscall.ENOSPC, nil, sandbox.Paused, false},
		"not at all": {syscall.EIO, errors.New("its kernel does not answer"), sandbox.Failed, false},
	} {
		t.Run(name, func(t *testing.T) {
			fake := &sandboxtest.Fake{FailSave: test.save, FailPause: test.pause}
			m := newManager(t, t.TempDir(), fake, nil)
			sb := create(t, m, sandbox.CreateOptions{})
			fake.Sicken(over)
			sandboxtest.Eventually(t, "it is dealt with", func() bool { return sb.Info().State == test.state })
			info := sb.Info()
			if info.OnDisk != test.onDisk || !strings.HasPrefix(info.Cause, took) || !strings.HasSuffix(info.Cause, advice) ||
				info.AutoResume {
				t.Fatalf("%+v", info)
			}
			if tried := fake.Pauses(); test.state == sandbox.Failed && tried != 3 {
				t.Fatalf("it was tried %d times to pause it", tried)
			}
			_, err := sb.Agent(t.Context(), "run in")
			if !errors.Is(err, sandbox.ErrState) || !strings.Contains(err.Error(), took) {
				t.Fatal("the next call does not tell why:", err)
			}
			fake.Sicken(nil)
			fake.FailPause = nil
			if err := sb.Resume(t.Context()); (err == nil) != (test.state == sandbox.Paused) {
				t.Fatal(err)
			}
		})
	}
}

// TestSilent: a machine whose agent is silent is saved. It is resumed with its memory; if its agent is silent again, its files are booted.
func TestSilent(t *testing.T) {
	for _, deaf := range []bool{false, true} {
		silent(t, deaf)
	}
}

func silent(t *testing.T, deaf bool) {
	fake, dir := &sandboxtest.Fake{Deaf: deaf}, t.TempDir()
	m := newManager(t, dir, fake, func(o *sandbox.Options) {
		o.PingEvery, o.PingTime, o.BootTimeout = time.Millisecond, 20*time.Millisecond, time.Second
	})
	sb := create(t, m, sandbox.CreateOptions{})
	fake.Silence(filepath.Join(dir, "sandboxes", sb.ID()))
	sandboxtest.Eventually(t, "it is paused", func() bool { return sb.Info().State == sandbox.Paused })
	if info := sb.Info(); !info.OnDisk || info.Cause != sandbox.CauseSilent.Error() {
		t.Fatalf("%+v", info)
	}
	if err := sb.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	if info := sb.Info(); info.State != sandbox.Running ||
		strings.Contains(info.Notice, "the processes that were paused are missing") != deaf {
		t.Fatalf("%+v", info)
	}
}

// TestStopped: a machine that is stopped from outside is reported, and runs again when it is continued; in the end it is saved.
func TestStopped(t *testing.T) {
	t.Parallel() // it mostly waits
	fake := &sandboxtest.Fake{}
	m := newManager(t, t.TempDir(), fake, func(o *sandbox.Options) { o.ContainAfter = 2 * time.Second })
	sb := create(t, m, sandbox.CreateOptions{})
	says := func(text string) func() bool {
		return func() bool {
			page, err := sb.Logs(sandbox.LogQuery{Text: text})
			return err == nil && len(page.Entries) == 1
		}
	}
	fake.Sicken(&sandbox.OverError{Kind: sandbox.OverStopped})
	sandboxtest.Eventually(t, "it is reported", says("was stopped from outside"))
	fake.Sicken(nil)
	sandboxtest.Eventually(t, "it runs again", says("were continued"))
	if info := sb.Info(); info.State != sandbox.Running {
		t.Fatalf("%+v", info)
	}
	fake.Sicken(&sandbox.OverError{Kind: sandbox.OverStopped})
	sandboxtest.Eventually(t, "it is saved", func() bool { return sb.Info().State == sandbox.Paused })
	if info := sb.Info(); !info.OnDisk || info.Cause != sandbox.CauseStopped.Error() {
		t.Fatalf("%+v", info)
	}
}

// TestRelink: the end of a pipe is not the end of a machine whose processes exist. One whose pipe ends again and again is paused.
func TestRelink(t *testing.T) {
	t.Parallel() // it mostly waits
	fake, dir := &sandboxtest.Fake{}, t.TempDir()
	m := newManager(t, dir, fake, nil)
	sb := create(t, m, sandbox.CreateOptions{})
	client, err := sb.Agent(t.Context(), "use")
	if err != nil {
		t.Fatal(err)
	}
	sandboxtest.Run(t, client, "true")
	for range 3 {
		fake.Cut(filepath.Join(dir, "sandboxes", sb.ID()))
		again := client
		sandboxtest.Eventually(t, "its agent is reconnected", func() bool {
			again, err = sb.Agent(t.Context(), "use")
			return err == nil && again != client
		})
		if again.Boot() != client.Boot() {
			t.Fatal("another agent answers")
		}
		sandboxtest.Run(t, again, "true")
		client = again
	}
	fake.Cut(filepath.Join(dir, "sandboxes", sb.ID()))
	sandboxtest.Eventually(t, "it is paused", func() bool { return sb.Info().State == sandbox.Paused })
	if info := sb.Info(); info.Cause != string(sandbox.CauseSilent) || info.AutoResume {
		t.Fatalf("%+v", info)
	}
}

// TestProtect: a failed sandbox is resumed from its last copy, and Notice says what is missing; a copy is made only if something changed.
func TestProtect(t *testing.T) {
	fake, dir := &sandboxtest.Fake{}, t.TempDir()
	m := newManager(t, dir, fake, keep)
	if _, err := m.Create(t.Context(), sandbox.CreateOptions{Protect: sandbox.Protect{Every: time.Second}}); !errors.Is(err,
		sandbox.ErrInvalid) {
		t.Fatal(err)
	}
	sb := create(t, m, sandbox.CreateOptions{Protect: sandbox.Protect{Every: time.Hour, Memory: true}})
	if !sb.Info().Saved.IsZero() {
		t.Fatal("it has a copy already")
	}
	if err := sb.ProtectNow(); err != nil {
		t.Fatal(err)
	}
	first := sb.Info()
	if err := sb.ProtectNow(); err != nil {
		t.Fatal(err)
	}
	if again := sb.Info(); !again.Saved.Equal(first.Saved) || !again.Current.After(first.Current) {
		t.Fatal("nothing has changed, and it was saved again")
	}
	client, err := sb.Agent(t.Context(), "use")
	if err != nil {
		t.Fatal(err)
	}
	sandboxtest.Run(t, client, "true")
	if err := sb.ProtectNow(); err != nil {
		t.Fatal(err)
	}
	info := sb.Info()
	if !info.Saved.After(first.Saved) {
		t.Fatal("something has changed, and it was not saved")
	}
	if found, err := filepath.Glob(filepath.Join(dir, "sandboxes", sb.ID(), "*-*")); err != nil || len(found) != 1 {
		t.Fatal("there is one copy", found, err)
	}
	fake.Crash(filepath.Join(dir, "sandboxes", sb.ID()))
	sandboxtest.Eventually(t, "it has failed", func() bool { return sb.Info().State == sandbox.Failed && fake.Running() == 0 })
	for range 2 { // by this server and by the next
		sandboxtest.Eventually(t, "it is at hand", func() bool {
			sb, err = m.Get("", info.ID)
			return err == nil && sb.Info().OnDisk && !sb.Gone()
		})
		_, err = sb.Agent(t.Context(), "use")
		var state *sandbox.StateError
		if !errors.As(err, &state) || !state.Saved || state.State != sandbox.Failed {
			t.Fatal(err)
		}
		if list := m.List(sandbox.Filter{}); len(list) != 1 || list[0].State != sandbox.Failed || list[0].RemoveAt.IsZero() {
			t.Fatal("what can be resumed is listed:", list)
		}
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
		m = newManager(t, dir, fake, keep)
	}
	sb = awaitSandbox(t, m, "", info.ID)
	if err := sb.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := sb.Info(); got.State != sandbox.Running || !strings.Contains(got.Notice, "what came after that is missing") {
		t.Fatalf("%+v", got)
	}
	if err := sb.Kill(sandbox.CauseKilled); err != nil {
		t.Fatal(err)
	}
	noDirectories(t, dir)
}

// TestFaultyStart: a server that starts while the host cannot be asked leaves every sandbox as it is, says so, and has it after the fault
// is over.
func TestFaultyStart(t *testing.T) {
	for _, step := range []string{"list", "lock", "read", "create", "attach"} {
		for _, fault := range hostFaults {
			fake, dir := &sandboxtest.Fake{}, t.TempDir()
			first := newManager(t, dir, fake, keep)
			runs := create(t, first, sandbox.CreateOptions{})
			sleeps := create(t, first, sandbox.CreateOptions{})
			if err := sleeps.Pause(t.Context(), sandbox.PauseOptions{ToDisk: true}); err != nil {
				t.Fatal(err)
			}
			if err := first.Close(); err != nil {
				t.Fatal(err)
			}
			var faults atomic.Int64
			faults.Store(1)
			if step == "attach" {
				fake.FailAttach = fault
			}
			second := newManager(t, dir, fake, func(o *sandbox.Options) {
				o.Keep, o.RescanEvery = true, 20*time.Millisecond
				o.SetFault(func(at, _ string, size int) (int, error) {
					if at == step && faults.Load() > 0 {
						faults.Add(1)
						return 0, fault
					}
					return size, nil
				})
			})
			if step != "attach" {
				sandboxtest.Eventually(t, "the fault was met", func() bool { return faults.Load() > 2 || step == "create" })
			}
			if fake.Running() != 1 {
				t.Fatalf("%s: %v: %d machines", step, fault, fake.Running())
			}
			faults.Store(0)
			fake.Repair()
			for _, id := range []string{runs.ID(), sleeps.ID()} {
				sandboxtest.Eventually(t, step+": it is there", func() bool {
					sb, err := second.Get("", id)
					return err == nil && (sb.Info().State == sandbox.Running || sb.Resume(t.Context()) == nil)
				})
			}
			if err := second.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// TestOneBadLock: one sandbox that cannot be locked or read does not stop the others.
func TestOneBadLock(t *testing.T) {
	fake, dir := &sandboxtest.Fake{}, t.TempDir()
	first := newManager(t, dir, fake, keep)
	var ids []string
	for range 3 {
		ids = append(ids, create(t, first, sandbox.CreateOptions{}).ID())
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	lock, state := filepath.Join(dir, "sandboxes", ids[0], "lock"), filepath.Join(dir, "sandboxes", ids[1], "state.json")
	body, err := os.ReadFile(state)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Remove(lock), os.Mkdir(lock, 0o700), os.WriteFile(state, []byte("{half"), 0o600)); err != nil {
		t.Fatal(err)
	}
	second := newManager(t, dir, fake, func(o *sandbox.Options) { o.Keep, o.RescanEvery = true, 20*time.Millisecond })
	awaitSandbox(t, second, "", ids[2])
	if fake.Running() != 3 {
		t.Fatal("one was ended")
	}
	if err := errors.Join(os.Remove(lock), os.WriteFile(state, body, 0o600)); err != nil {
		t.Fatal(err)
	}
	for _, id := range ids {
		awaitSandbox(t, second, "", id)
	}
}
