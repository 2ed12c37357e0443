package gvisor_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"soulbox.dev/soulbox/gvisor"
	"soulbox.dev/soulbox/internal/sandboxtest"
	"soulbox.dev/soulbox/sandbox"
)

// passing are errors of the host that say nothing about a machine.
var passing = []error{syscall.EMFILE, syscall.ENFILE, syscall.ENOMEM, syscall.EAGAIN, syscall.EINTR, syscall.EIO, syscall.ENOSPC,
	context.DeadlineExceeded}

// injector makes each place fail, one after another, at which a runtime asks the host.
type injector struct {
	mu   sync.Mutex
	done map[string]bool
	at   string
	err  error // nil injects nothing
	once bool  // only the first time
}

func (i *injector) fault(what string) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.err == nil {
		return nil
	}
	if i.at == "" && !i.done[what] {
		i.at, i.done[what] = what, true
		return i.err
	}
	if i.at == what && !i.once {
		return i.err
	}
	return nil
}

// next starts another round with an error; it returns where the last error was injected, "" if there was no new place.
func (i *injector) next(err error) (last string) {
	i.mu.Lock()
	defer i.mu.Unlock()
	last, i.at, i.err = i.at, "", err
	return last
}

func bootIn(t *testing.T, runtime *gvisor.Runtime, host sandbox.Template) (sandbox.Machine, sandbox.Spec) {
	t.Helper()
	spec := sandbox.Spec{ID: "sbtest", Dir: filepath.Join(sandboxtest.Dir(t), "machine"), Template: host, Limits: sandbox.DefaultLimits()}
	if err := os.Mkdir(spec.Dir, 0o711); err != nil {
		t.Fatal(err)
	}
	return boot(t, runtime, spec), spec
}

// TestFaults: an error of the host at any place is no verdict on the machine, which is as before.
func TestFaults(t *testing.T) {
	runtime, host := newRuntime(t)
	inject := &injector{}
	runtime.Fault = inject.fault
	m, spec := bootIn(t, runtime, host)
	sandboxtest.Run(t, sandboxtest.Greet(t, m), "echo kept > /home/user/kept")
	saves := 0
	for _, op := range []struct {
		name string
		must bool // an error is required, because the result would be wrong
		do   func() error
	}{
		{"Check", true, m.Check},
		{"Usage", true, func() error { _, err := m.Usage(t.Context()); return err }},
		{"IO", true, func() error { _, err := m.IO(); return err }},
		{"Pin", false, func() error { return m.(sandbox.CorePinner).Pin(true) }},
		{"Pause", false, func() error { return m.Pause(t.Context()) }},
		{"Resume", false, func() error { return m.Resume(t.Context()) }},
		{"Checkpoint", true, func() error {
			saves++
			return m.Checkpoint(t.Context(), fmt.Sprint(spec.Dir, "/saved-", saves), sandbox.CheckpointOptions{Resume: true})
		}},
		{"Attach", true, func() error {
			again, err := runtime.Attach(t.Context(), spec.Dir)
			if err == nil {
				err = again.Pipe().Close()
			}
			return err
		}},
	} {
		for _, fault := range passing {
			inject.done = map[string]bool{}
			for {
				inject.next(fault)
				err := op.do()
				at := inject.next(nil)
				if at == "" {
					if err != nil {
						t.Fatalf("%s: %v", op.name, err)
					}
					break
				}
				if found := sandbox.FindingOf(err); found != sandbox.Unknown && (op.must || err != nil) {
					t.Errorf("%s, %v at %q: found %v: %v", op.name, fault, at, found, err)
				}
			}
		}
		if err := m.Check(); err != nil {
			t.Fatalf("after faults of %s: %v", op.name, err)
		}
	}
	if got := output(sandboxtest.Run(t, sandboxtest.Greet(t, attach(t, runtime, spec.Dir)), "cat /home/user/kept")); got != "kept\n" {
		t.Fatalf("got %q", got)
	}
	if whole, err := filepath.Glob(spec.Dir + "/saved-*"); err != nil || len(whole) != len(passing) {
		t.Errorf("checkpoints are left: %v, %v", whole, err)
	}
	inject.done = map[string]bool{}
	for i := 0; ; i++ {
		inject.next(passing[i%len(passing)])
		err := runtime.Reap(t.Context(), spec.Dir)
		if at := inject.next(nil); at == "" {
			if err != nil {
				t.Fatal(err)
			}
			break
		} else if err == nil || errors.Is(err, sandbox.ErrNoMachine) {
			t.Errorf("Reap, %v at %q: %v", passing[i%len(passing)], at, err)
		}
	}
	if err := m.Check(); sandbox.FindingOf(err) != sandbox.Gone {
		t.Errorf("of one that is gone: %v", err)
	}
	if _, err := runtime.Attach(t.Context(), spec.Dir); sandbox.FindingOf(err) != sandbox.Gone {
		t.Errorf("of one that is gone: %v", err)
	}
}

// TestFaultsOfBoot: a boot that meets one fault of the host fails or does not notice, and leaves nothing running. It does not call the
// checkpoint damaged because of it.
func TestFaultsOfBoot(t *testing.T) {
	runtime, host := newRuntime(t)
	m, spec := bootIn(t, runtime, host)
	sandboxtest.Run(t, sandboxtest.Greet(t, m), "true")
	saved := filepath.Join(sandboxtest.Dir(t), "saved")
	if err := errors.Join(m.Checkpoint(t.Context(), saved, sandbox.CheckpointOptions{}), m.Destroy(t.Context())); err != nil {
		t.Fatal(err)
	}
	for _, spec.From = range []string{"", saved} {
		inject := &injector{done: map[string]bool{}, once: true}
		runtime.Fault = inject.fault
		for i := 0; ; i++ {
			spec.Dir = sandboxtest.Dir(t)
			fault := passing[i%len(passing)]
			inject.next(fault)
			m, err := runtime.Boot(t.Context(), spec)
			at := inject.next(nil)
			if sandbox.FindingOf(err) == sandbox.Gone || errors.Is(err, sandbox.ErrDamaged) {
				t.Errorf("%v at %q: %v", fault, at, err)
			}
			if err == nil {
				if err := errors.Join(m.Check(), m.Destroy(t.Context())); err != nil {
					t.Fatal(err)
				}
			}
			if left := sandboxtest.Processes(spec.Dir); len(left) > 0 {
				t.Errorf("%v at %q: processes are left: %v", fault, at, left)
			}
			if entries, lerr := os.ReadDir(spec.Dir); lerr != nil || len(entries) > 0 {
				t.Errorf("%v at %q (%v): files are left: %v, %v", fault, at, err, entries, lerr)
			}
			if at == "" {
				if err != nil {
					t.Fatal(err)
				}
				break
			}
		}
	}
}

// TestStrangers: processes that have a machine's directory on their command line are not taken for the machine's.
func TestStrangers(t *testing.T) {
	runtime, host := newRuntime(t)
	spec := sandbox.Spec{ID: "sbtest", Dir: filepath.Join(sandboxtest.Dir(t), "machine"), Template: host, Limits: sandbox.DefaultLimits()}
	if err := os.Mkdir(spec.Dir, 0o711); err != nil {
		t.Fatal(err)
	}
	owner, _ := gvisor.Owner()
	users := []int{owner}
	if os.Geteuid() == 0 {
		users = append(users, 0, 1234)
	}
	var strangers []int
	for _, user := range users {
		for _, title := range []string{"sh", "runsc-sandbox", "runsc-gofer"} {
			cmd := exec.Command("/bin/sh", "-c", "kill -STOP $$; sleep 600", "sh", "--root="+spec.Dir+"/run")
			cmd.Args[0] = title
			cmd.Dir = "/"
			if os.Geteuid() == 0 {
				cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(user), Gid: uint32(user)}}
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			strangers = append(strangers, cmd.Process.Pid)
			t.Cleanup(func() {
				_ = cmd.Process.Kill() // the result of Wait says whether it was killed
				_ = cmd.Wait()
			})
		}
	}
	stopped := func() bool {
		for _, pid := range strangers {
			body, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
			if err != nil || !strings.Contains(string(body), ") T ") {
				return false
			}
		}
		return true
	}
	sandboxtest.Eventually(t, "the strangers are stopped", stopped)
	m, err := runtime.Boot(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	again := attach(t, runtime, spec.Dir)
	for _, m := range []sandbox.Machine{m, again} {
		if err := m.Check(); err != nil {
			t.Error(err)
		}
	}
	if err := errors.Join(again.Pipe().Close(), m.Destroy(t.Context())); err != nil {
		t.Fatal(err)
	}
	if !stopped() {
		t.Error("a stranger was ended or continued")
	}
	if err := m.Check(); sandbox.FindingOf(err) != sandbox.Gone {
		t.Error(err)
	}
	if _, err := runtime.Attach(t.Context(), spec.Dir); !errors.Is(err, sandbox.ErrNoMachine) {
		t.Error(err)
	}
}
