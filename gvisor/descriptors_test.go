package gvisor_test

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"soulbox.dev/soulbox/internal/sandboxtest"
	"soulbox.dev/soulbox/sandbox"
)

// TestBootLeavesNoDescriptors: however few descriptors there are, a boot that fails for it gives back all that it took.
func TestBootLeavesNoDescriptors(t *testing.T) {
	r, host := newRuntime(t)
	dir := filepath.Join(sandboxtest.Dir(t), "machine")
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	open := func() int {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(entries)
	}
	boot := func(few uint64) error {
		if err := os.Mkdir(dir, 0o711); err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(dir)
		if err := unix.Prlimit(0, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: few, Max: old.Max}, nil); err != nil {
			t.Fatal(err)
		}
		m, err := r.Boot(t.Context(), sandbox.Spec{ID: "sbtest", Dir: dir, Template: host, Limits: sandbox.DefaultLimits()})
		if lerr := unix.Prlimit(0, unix.RLIMIT_NOFILE, &old, nil); lerr != nil {
			t.Fatal(lerr)
		}
		if err != nil {
			return err
		}
		_ = m.Pipe().Close()
		return m.Destroy(t.Context())
	}
	if err := boot(old.Cur); err != nil { // what is opened once
		t.Fatal(err)
	}
	before := open()
	for spare := range uint64(30) {
		if err := boot(uint64(before) + spare); err == nil {
			t.Logf("%d descriptors are enough", spare)
			return
		}
		sandboxtest.Eventually(t, fmt.Sprintf("with %d descriptors to spare none is left", spare), func() bool { return open() <= before })
	}
	t.Error("30 are not enough")
}
