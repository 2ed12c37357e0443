package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"soulbox.dev/soulbox/internal/sandboxtest"
)

// TestWatchAcrossUpgrade: a cursor of file_watch holds across an upgrade that brings another agent, because a sandbox keeps the agent that
// it began with; not once the sandbox has begun anew from its files, and then the answer says what to do.
func TestWatchAcrossUpgrade(t *testing.T) {
	state := sandboxtest.Dir(t)
	body, err := os.ReadFile(sandboxtest.AgentPath(t))
	if err != nil {
		t.Fatal(err)
	}
	newer := filepath.Join(sandboxtest.Dir(t), "soulbox-agent")
	if err := os.WriteFile(newer, append(body, "another version"...), 0o755); err != nil { // the loader ignores what follows the program
		t.Fatal(err)
	}
	w := serve(t, state, "--on-exit=keep")
	call := func(tool string, arguments map[string]any) sandboxtest.Answer {
		t.Helper()
		a, err := w.client("", true).Call(t.Context(), tool, arguments)
		return must(t, a, err)
	}
	id := call("exec", map[string]any{"command": "mkdir watched"}).Field("sandbox_id")
	cursor := call("file_watch", map[string]any{"sandbox_id": id, "path": "/home/user/watched"}).Field("cursor")
	read := func() string {
		t.Helper()
		return call("file_watch", map[string]any{"sandbox_id": id, "cursor": cursor, "yield_ms": 20_000}).Text()
	}
	w.stop()
	w = serve(t, state, "--on-exit=keep", "--agent="+newer)
	call("exec", map[string]any{"sandbox_id": id, "command": "echo > watched/later"})
	if got := read(); !strings.Contains(got, "watched/later") {
		t.Errorf("after an upgrade: %s", got)
	}
	call("sandbox_pause", map[string]any{"sandbox_id": id, "to_disk": true})
	call("sandbox_resume", map[string]any{"sandbox_id": id})
	if got := read(); !strings.Contains(got, "watched/later") {
		t.Errorf("after an upgrade and a pause to disk: %s", got)
	}
	call("sandbox_pause", map[string]any{"sandbox_id": id, "to_disk": true, "files_only": true})
	call("sandbox_resume", map[string]any{"sandbox_id": id})
	a, err := w.client("", true).Call(t.Context(), "file_watch", map[string]any{"sandbox_id": id, "cursor": cursor, "yield_ms": 0})
	if err != nil || !strings.Contains(string(a.Result), `"isError":true`) || !strings.Contains(a.Text(), "Start again with file_watch") {
		t.Errorf("of a sandbox that began anew: %s %v", a.Text(), err)
	}
	call("sandbox_kill", map[string]any{"sandbox_id": id, "confirm": true})
}
