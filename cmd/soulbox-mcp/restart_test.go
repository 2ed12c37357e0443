package main

import (
	"net/http"
	"net/url"
	"strings"
	"syscall"
	"testing"
	"time"

	"soulbox.dev/soulbox/internal/sandboxtest"
)

// TestServerRestartedUnderBridge: a client of 'stdio --connect' continues in its own sandbox and shell after the server was restarted, also
// after kill -9, and is told once when its sandbox is gone. A client that leaves while the server is away gets an error for its last call.
func TestServerRestartedUnderBridge(t *testing.T) {
	w := serve(t, "", "--on-exit=keep")
	u, err := url.Parse(w.url)
	if err != nil {
		t.Fatal(err)
	}
	again := func(flags ...string) *web { return serve(t, w.state, append(flags, "--listen="+u.Host)...) }
	p := launch(t, "", "--connect="+w.url)
	p.exec("echo kept > f; V=remembered")
	id := p.call("sandbox_get", nil).Result.StructuredContent["sandbox_id"]
	_ = w.cmd.Process.Signal(syscall.SIGKILL)
	_ = w.cmd.Wait() // an error, since it was killed
	w2 := again("--on-exit=keep")
	if got := p.exec("cat f; echo $V"); got != "kept\nremembered\n" {
		t.Fatalf("after kill -9: %q", got)
	}
	w2.stop()
	w2 = again("--on-exit=keep")
	if got := p.call("sandbox_get", nil).Result.StructuredContent["sandbox_id"]; got != id {
		t.Fatalf("after a stop: %v, want %v\n%s", got, id, w2.log)
	}
	must2(t)(w2.client("", true).Call(t.Context(), "sandbox_kill", map[string]any{"sandbox_id": id, "confirm": true}))
	w2.stop()
	w2 = again("--on-exit=kill")
	gone := p.await(p.start("exec", map[string]any{"command": "true"}))
	if !gone.Result.IsError || !strings.Contains(gone.text(), "makes a new one") {
		t.Fatal(gone.text())
	}
	p.exec("true")
	w2.stop()
	begin := time.Now()
	last := p.start("exec", map[string]any{"command": "true"})
	_ = p.in.Close()
	if m := p.await(last); m.Error == nil {
		t.Error("a call to a server that is not there has an answer:", m.text())
	}
	t.Logf("the last call had its answer after %s", time.Since(begin))
}

// TestHandleIsNoRight: a session that begins with the name of another owner's sandbox, or with an invalid name, gets neither.
func TestHandleIsNoRight(t *testing.T) {
	state := sandboxtest.Dir(t)
	annKey, bobKey := makeKey(t, state, "ann"), makeKey(t, state, "bob")
	w := serve(t, state)
	id := must2(t)(w.client(annKey, false).Call(t.Context(), "exec", map[string]any{"command": "echo secret > f"})).Field("sandbox_id")
	bob := &sandboxtest.MCP{URL: w.url, Key: bobKey, Header: http.Header{"Soulbox-Session-Handle": {id + "/shell"}}}
	bob.Open(t)
	if a, err := bob.Call(t.Context(), "exec", map[string]any{"command": "cat f"}); err != nil ||
		!strings.Contains(a.Text(), "no longer exists") || strings.Contains(a.Text(), "secret") {
		t.Fatal(err, a.Text())
	}
	for _, handle := range []string{"", "/", "x/y", strings.Repeat("a", 300), id, "sb/../../x", "<script>"} {
		odd := &sandboxtest.MCP{URL: w.url, Key: bobKey, Header: http.Header{"Soulbox-Session-Handle": {handle}}}
		if a, err := odd.Open(t).Call(t.Context(), "sandbox_list", nil); err != nil || a.Error != nil {
			t.Errorf("%q: %v %+v", handle, err, a)
		}
	}
}
