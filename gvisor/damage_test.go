package gvisor_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"soulbox.dev/soulbox/internal/sandboxtest"
	"soulbox.dev/soulbox/sandbox"
)

// TestDamage: a checkpoint in which one bit changed is refused before its machine counts as running, and the error says where the damage
// is.
func TestDamage(t *testing.T) {
	runtime, host := newRuntime(t)
	m, spec := bootIn(t, runtime, host)
	sandboxtest.Run(t, sandboxtest.Greet(t, m), "head -c 3M /dev/urandom > /home/user/large")
	whole, files := filepath.Join(sandboxtest.Dir(t), "whole"), filepath.Join(sandboxtest.Dir(t), "files")
	if err := m.Checkpoint(t.Context(), files, sandbox.CheckpointOptions{FilesOnly: true, Resume: true}); err != nil {
		t.Fatal(err)
	}
	if err := m.Checkpoint(t.Context(), whole, sandbox.CheckpointOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := m.Destroy(t.Context()); err != nil {
		t.Fatal(err)
	}
	refused := func(name string) {
		t.Helper()
		spec.From = filepath.Dir(name)
		if m, err := runtime.Boot(t.Context(), spec); !errors.Is(err, sandbox.ErrDamaged) ||
			!strings.Contains(err.Error(), filepath.Base(name)) {
			t.Errorf("%s: %v", name, err)
			if err == nil {
				_ = m.Destroy(t.Context())
			}
		}
		if left := sandboxtest.Processes(spec.Dir); len(left) > 0 {
			t.Errorf("%s: processes are left: %v", name, left)
		}
		if left, err := os.ReadDir(spec.Dir); err != nil || len(left) > 0 {
			t.Errorf("%s: files are left: %v, %v", name, left, err)
		}
	}
	for _, name := range []string{
		whole + "/pages.img", whole + "/checkpoint.img", whole + "/pages_meta.img",
		files + "/pages.img", files + "/multitar.img", files + "/fscheckpoint.pb",
	} {
		info, err := os.Stat(name)
		if err != nil {
			t.Fatal(err)
		}
		for _, at := range []int64{0, info.Size() / 2, info.Size() - 1} {
			flip(t, name, at)
			refused(name)
			flip(t, name, at)
		}
	}
	if err := os.Truncate(whole+"/pages.img", 1<<20); err != nil {
		t.Fatal(err)
	}
	refused(whole + "/pages.img")
	// A checkpoint without checksums, of an older version or of a host that lost its power, is used; so is one that is unchanged.
	for _, without := range []string{"", files + "/checksums.json"} {
		if without != "" {
			if err := os.Truncate(without, 100); err != nil {
				t.Fatal(err)
			}
		}
		spec.From = files
		m, err := runtime.Boot(t.Context(), spec)
		if err != nil {
			t.Fatal(err)
		}
		if got := output(sandboxtest.Run(t, sandboxtest.Greet(t, m), "stat -c %s /home/user/large")); got != "3145728\n" {
			t.Errorf("got %q", got)
		}
		if err := m.Destroy(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}

// flip changes one bit of a file.
func flip(t *testing.T, name string, at int64) {
	t.Helper()
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var b [1]byte
	if _, err := f.ReadAt(b[:], at); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 4
	if _, err := f.WriteAt(b[:], at); err != nil {
		t.Fatal(err)
	}
}
