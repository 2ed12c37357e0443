package agent

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// pair is a client and a server on an in-memory pipe, with real processes.
func pair(t *testing.T) (*Client, string) {
	t.Helper()
	dir := t.TempDir()
	server, err := NewServer(Options{Version: "test", SpoolDir: filepath.Join(dir, "spool"), Home: dir})
	if err != nil {
		t.Fatal(err)
	}
	host, guest := net.Pipe()
	served := make(chan error, 1)
	go func() { served <- server.Serve(guest) }()
	client, err := NewClient(t.Context(), host, "test")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = client.Close()
		if err := <-served; err != nil {
			t.Error(err)
		}
		server.Close()
	})
	return client, dir
}

func TestStart(t *testing.T) {
	c, _ := pair(t)
	s, err := c.Start(t.Context(), StartRequest{Command: "echo out; echo err >&2; exit 3", WaitMS: 10_000, Window: Window{Head: 1000}})
	if err != nil {
		t.Fatal(err)
	}
	if s.Process.State != StateExited || s.Process.ExitCode != 3 || string(s.Output.Head) != "out\nerr\n" {
		t.Fatalf("got %+v, output %q", s.Process, s.Output.Head)
	}
	_, err = c.Stat(t.Context(), "/does/not/exist")
	if !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("stat of nothing: %v", err)
	}
}

func TestFiles(t *testing.T) {
	c, dir := pair(t)
	name := filepath.Join(dir, "a/b/c.txt")
	info, err := c.WriteFile(t.Context(), name, strings.NewReader("one\ntwo\n"), WriteOptions{})
	if err != nil || info.Size != 8 {
		t.Fatal(info, err)
	}
	if _, err := c.Edit(t.Context(), EditRequest{Path: name, Old: "two", New: "three"}); err != nil {
		t.Fatal(err)
	}
	body, err := os.ReadFile(name)
	if err != nil || string(body) != "one\nthree\n" {
		t.Fatalf("%q %v", body, err)
	}
	_ = context.Background
}
