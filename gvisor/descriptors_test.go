package gvisor_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"soulbox.dev/soulbox/internal/sandboxtest"
	"soulbox.dev/soulbox/sandbox"
)

// TestNoDescriptorIsLeft: however few descriptors there are, what fails for it gives back all that it took.
func TestNoDescriptorIsLeft(t *testing.T) {
	r, host := newRuntime(t)
	dir := filepath.Join(sandboxtest.Dir(t), "machine")
	boot := func() (sandbox.Machine, error) {
		if err := os.Mkdir(dir, 0o711); err != nil {
			t.Fatal(err)
		}
		m, err := r.Boot(t.Context(), sandbox.Spec{ID: "sbstarved", Dir: dir, Template: host, Limits: sandbox.DefaultLimits()})
		if err != nil {
			err = fmt.Errorf("boot: %w", err)
			if rerr := os.RemoveAll(dir); rerr != nil {
				t.Fatal(rerr)
			}
		}
		return m, err
	}
	m, err := boot()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if m != nil { // what has failed
			_ = m.Destroy(context.Background())
		}
	})
	end := func() {
		_ = m.Pipe().Close()
		if err := m.Destroy(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
	}
	starve(t, "pause", func() error { return m.Pause(t.Context()) })
	if err := m.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	end()
	starve(t, "boot", func() (err error) {
		m, err = boot()
		return err
	})
	end()
}

// starve does something with no descriptor to spare, with one, and so on until there are enough, and looks that none is left each time it fails.
func starve(t *testing.T, what string, do func() error) {
	t.Helper()
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if !t.Failed() {
			return
		}
		var now unix.Rlimit
		err := unix.Getrlimit(unix.RLIMIT_NOFILE, &now)
		t.Logf("%s: the limit was %d of %d, and is %d of %d: %v", what, old.Cur, old.Max, now.Cur, now.Max, err)
		for fd := range int(old.Cur) {
			if name, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd)); err == nil {
				t.Log(fd, name)
			}
		}
		if err := unix.Prlimit(0, unix.RLIMIT_NOFILE, &old, nil); err != nil {
			t.Error(err)
		}
	})
	open := func() int {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(entries) - 1 // the directory itself
	}
	for before, spare := open(), 0; spare < 30; spare++ {
		if err := unix.Prlimit(0, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: uint64(before + spare), Max: old.Max}, nil); err != nil {
			t.Fatal(err)
		}
		err := do()
		if err := unix.Prlimit(0, unix.RLIMIT_NOFILE, &old, nil); err != nil {
			t.Fatal(err)
		}
		if err == nil {
			t.Logf("%s: %d descriptors are enough", what, spare)
			return
		}
		sandboxtest.Eventually(t, fmt.Sprintf("%s with %d descriptors to spare: none is left after %v", what, spare, err), func() bool { return open() <= before })
	}
	t.Errorf("%s: 30 descriptors are not enough", what)
}
