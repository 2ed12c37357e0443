package gvisor_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"soulbox.dev/soulbox/internal/sandboxtest"
	"soulbox.dev/soulbox/sandbox"
)

// TestNoDescriptorIsLeft: however few descriptors there are, a call that fails for lack of them closes all that it opened.
func TestNoDescriptorIsLeft(t *testing.T) {
	r, host := newRuntime(t)
	dir := filepath.Join(sandboxtest.Dir(t), "machine")
	prepare := func() {
		if err := errors.Join(os.RemoveAll(dir), os.Mkdir(dir, 0o711)); err != nil {
			t.Fatal(err)
		}
	}
	boot := func() (sandbox.Machine, error) {
		return r.Boot(t.Context(), sandbox.Spec{ID: "sbstarved", Dir: dir, Template: host, Limits: sandbox.DefaultLimits()})
	}
	prepare()
	m, err := boot()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if m != nil { // it is the one that failed
			_ = m.Destroy(context.Background())
		}
	})
	end := func() {
		_ = m.Pipe().Close()
		if err := m.Destroy(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	starve(t, "pause", func() {}, func() error { return m.Pause(t.Context()) })
	if err := m.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	end()
	starve(t, "boot", prepare, func() (err error) {
		m, err = boot()
		return err
	})
	end()
}

// starve calls a function with no descriptor to spare, then with one, and so on until there are enough. Before each call it prepares with
// plenty of them, and after each failure it checks that none is left open.
func starve(t *testing.T, what string, prepare func(), do func() error) {
	t.Helper()
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	restore := func() {
		if err := unix.Prlimit(0, unix.RLIMIT_NOFILE, &old, nil); err != nil {
			t.Fatal(err)
		}
	}
	defer restore()
	open := func() int {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(entries) - 1 // without the directory itself
	}
	for before, spare := open(), 0; spare < 30; spare++ {
		prepare()
		if err := unix.Prlimit(0, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: uint64(before + spare), Max: old.Max}, nil); err != nil {
			t.Fatal(err)
		}
		err := do()
		restore()
		if err == nil {
			t.Logf("%s: %d descriptors are enough", what, spare)
			return
		}
		sandboxtest.Eventually(t, fmt.Sprintf("%s with %d descriptors to spare: none is left after %v", what, spare, err),
			func() bool { return open() <= before })
	}
	t.Errorf("%s: 30 descriptors are not enough", what)
}
