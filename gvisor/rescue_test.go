package gvisor_test

import (
	"os"
	"path/filepath"
	"testing"

	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/internal/sandboxtest"
	"soulbox.dev/soulbox/sandbox"
)

// TestRescue: the files of a checkpoint whose agent will never respond can still be rescued, and a machine boots with them.
func TestRescue(t *testing.T) {
	runtime, host := newRuntime(t)
	m, spec := bootIn(t, runtime, host)
	c := sandboxtest.Greet(t, m)
	sandboxtest.Run(t, c, "echo kept > /home/user/kept; head -c 20M /dev/urandom > /home/user/large")
	want := output(sandboxtest.Run(t, c, "sha256sum /home/user/large"))
	if _, err := c.Start(t.Context(), agent.StartRequest{Command: "sleep 600"}); err != nil {
		t.Fatal(err)
	}
	whole, files := filepath.Join(sandboxtest.Dir(t), "whole"), filepath.Join(sandboxtest.Dir(t), "files")
	if err := m.Checkpoint(t.Context(), whole, sandbox.CheckpointOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := m.Destroy(t.Context()); err != nil {
		t.Fatal(err)
	}
	spec.From = whole
	if err := runtime.Rescue(t.Context(), spec, files); err != nil {
		t.Fatal(err)
	}
	if left := sandboxtest.Processes(spec.Dir); len(left) > 0 {
		t.Errorf("processes are left: %v", left)
	}
	if entries, err := os.ReadDir(spec.Dir); err != nil || len(entries) > 0 {
		t.Errorf("files are left: %v, %v", entries, err)
	}
	spec.From = files
	m, err := runtime.Boot(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	c = sandboxtest.Greet(t, m)
	if got := output(sandboxtest.Run(t, c, "cat kept; sha256sum /home/user/large")); got != "kept\n"+want {
		t.Errorf("got %q, want %q", got, want)
	}
	if err := m.Destroy(t.Context()); err != nil {
		t.Fatal(err)
	}
	// A directory that is not a checkpoint is reported as such, and nothing is left.
	spec.From = sandboxtest.Dir(t)
	if err := runtime.Rescue(t.Context(), spec, filepath.Join(sandboxtest.Dir(t), "none")); err == nil {
		t.Error("files of nothing were rescued")
	}
}
