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

// TestManifestCut: an empty or cut machine.json is no verdict on a machine that runs: Attach says what is wrong and leaves all as it is. As
// it is after a power cut, which leaves no process, Attach finds no machine and Reap removes what is left.
func TestManifestCut(t *testing.T) {
	runtime, host := newRuntime(t)
	m, spec := bootIn(t, runtime, host)
	sandboxtest.Run(t, sandboxtest.Greet(t, m), "echo kept > /home/user/kept")
	name := filepath.Join(spec.Dir, "machine.json")
	whole, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	write := func(body []byte) {
		t.Helper()
		if err := os.WriteFile(name, body, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	files := func() string {
		t.Helper()
		entries, err := os.ReadDir(spec.Dir)
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, e := range entries {
			names = append(names, e.Name())
		}
		return strings.Join(names, " ")
	}
	before, running := files(), len(sandboxtest.Processes(spec.Dir))
	for n := range len(whole) {
		write(whole[:n])
		_, err := runtime.Attach(t.Context(), spec.Dir)
		if sandbox.FindingOf(err) != sandbox.Unknown || !strings.Contains(err.Error(), "machine.json is missing or incomplete") {
			t.Fatalf("%d of %d bytes: %v", n, len(whole), err)
		}
		if left, _ := os.ReadFile(name); string(left) != string(whole[:n]) || files() != before { // it is not read if it is gone
			t.Fatalf("%d of %d bytes: files are %s, with %q", n, len(whole), files(), left)
		}
	}
	if err := m.Check(); err != nil || len(sandboxtest.Processes(spec.Dir)) != running {
		t.Fatal(sandboxtest.Processes(spec.Dir), err)
	}
	write(whole)
	if got := output(sandboxtest.Run(t, sandboxtest.Greet(t, attach(t, runtime, spec.Dir)), "cat /home/user/kept")); got != "kept\n" {
		t.Fatalf("got %q", got)
	}
	if err := m.Destroy(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, n := range []int{0, 1, len(whole) / 2, len(whole) - 1} {
		write(whole[:n])
		if err := os.MkdirAll(filepath.Join(spec.Dir, "bundle", "x"), 0o755); err != nil {
			t.Fatal(err)
		}
		if _, err := runtime.Attach(t.Context(), spec.Dir); !errors.Is(err, sandbox.ErrNoMachine) {
			t.Errorf("%d bytes, after a power cut: %v", n, err)
		}
		if err := runtime.Reap(t.Context(), spec.Dir); err != nil || files() != "" {
			t.Errorf("%d bytes, after a power cut: %v, files are %s", n, err, files())
		}
	}
	if err := os.MkdirAll(filepath.Join(name, "x"), 0o755); err != nil { // what the host does not let us read is another matter
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(spec.Dir, "bundle"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := runtime.Reap(t.Context(), spec.Dir); err == nil || files() != "bundle machine.json" {
		t.Errorf("a record that cannot be read: %v, files are %s", err, files())
	}
	if err := os.RemoveAll(name); err != nil { // the machine is destroyed once more at the end
		t.Fatal(err)
	}
}
