package main

import (
	"encoding/json"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"soulbox.dev/soulbox/access"
	"soulbox.dev/soulbox/internal/sandboxtest"
)

// TestKeysFileOfNobody: a server that has a file of keys admits no request without a key, whatever is in the file, and says so.
func TestKeysFileOfNobody(t *testing.T) {
	for _, body := range []string{"[]", "null", "", `[{"id":"1","ow`} {
		state := sandboxtest.Dir(t)
		if err := os.WriteFile(filepath.Join(state, "keys"), []byte(body), 0o600); err != nil {
			t.Fatal(err)
		}
		w := serve(t, state)
		for _, key := range []string{"", "e2b_" + strings.Repeat("0", 40)} {
			c := &sandboxtest.MCP{URL: w.url, Key: key, Modern: true}
			if a, err := c.Do(t.Context(), "tools/list", nil); err != nil || a.Status != http.StatusUnauthorized {
				t.Errorf("keys %q, MCP: %d %v", body, a.Status, err)
			}
			for _, path := range []string{"/v1/sandboxes", "/sandboxes", "/metrics"} {
				if status, _ := w.get(path, key); status != http.StatusUnauthorized {
					t.Errorf("keys %q, %s: %d", body, path, status)
				}
			}
		}
		if status, _ := w.get("/health", ""); status != http.StatusOK {
			t.Errorf("keys %q: health is %d", body, status)
		}
		if log := w.log.String(); !strings.Contains(log, "no key is accepted") {
			t.Errorf("keys %q: the log does not say so: %s", body, log)
		}
		w.stop()
	}
}

// TestKeyRevoked: within a moment of the end of a key, all streams that it admitted end, and so does its session. What another key of the
// same owner admitted continues. With the owner's last key, the tokens of the owner's sandboxes end. Another owner notices nothing.
func TestKeyRevoked(t *testing.T) {
	state := sandboxtest.Dir(t)
	first, second, bobs := makeKey(t, state, "ann"), makeKey(t, state, "ann"), makeKey(t, state, "bob")
	w := serve(t, state)
	base := strings.TrimSuffix(w.url, "/mcp")
	ask := func(method, path, body string, header ...string) *http.Response {
		t.Helper()
		r, err := http.NewRequestWithContext(t.Context(), method, base+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		for i := 0; i < len(header); i += 2 {
			r.Header.Set(header[i], header[i+1])
		}
		res, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = res.Body.Close() }) // it may have ended
		return res
	}
	var made struct {
		ID    string `json:"sandboxID"`
		Token string `json:"envdAccessToken"`
	}
	if res := ask("POST", "/sandboxes", `{"templateID":"base","secure":true}`, "X-API-Key", second, "Content-Type",
		"application/json"); json.NewDecoder(res.Body).Decode(&made) != nil || made.Token == "" {
		t.Fatal(res.Status, made)
	}
	listen := func(key string, modern bool) (*sandboxtest.MCP, <-chan sandboxtest.Message) {
		t.Helper()
		c := w.client(key, modern)
		messages, err := c.Listen(t.Context(), map[string]any{"resourcesListChanged": true})
		if err != nil {
			t.Fatal(err)
		}
		return c, messages
	}
	session, get := listen(first, false)
	_, modern := listen(first, true)
	other, others := listen(second, false)
	_, strangers := listen(bobs, true)
	start := `{"process":{"cmd":"/bin/sleep","args":["600"]}}`
	follow := ask("POST", startCall, string([]byte{0, 0, 0, 0, byte(len(start))})+start, "E2b-Sandbox-Id", made.ID, "X-Access-Token",
		made.Token, "Content-Type", "application/connect+json", "Connect-Protocol-Version", "1")
	followed := make(chan error, 1)
	go func() {
		_, err := io.Copy(io.Discard, follow.Body)
		followed <- err
	}()
	ended := func(what string, messages <-chan sandboxtest.Message) {
		t.Helper()
		begin := time.Now()
		for {
			select {
			case _, open := <-messages:
				if !open {
					t.Logf("%s ended after %s", what, time.Since(begin))
					return
				}
			case <-time.After(30 * time.Second):
				t.Fatalf("%s goes on", what)
			}
		}
	}
	goesOn := func(what string, messages <-chan sandboxtest.Message) {
		t.Helper()
		for {
			select {
			case _, open := <-messages:
				if !open {
					t.Fatalf("%s has ended", what)
				}
				continue
			default:
			}
			return
		}
	}
	revoke(t, state, 0)
	ended("the session's stream", get)
	ended("the stream of subscriptions/listen", modern)
	stolen := &sandboxtest.MCP{URL: w.url, Key: second, Session: session.Session}
	sandboxtest.Eventually(t, "the session is over", func() bool {
		a, err := stolen.Do(t.Context(), "tools/list", nil)
		return err == nil && a.Status == http.StatusNotFound
	})
	goesOn("the stream of the owner's other key", others)
	select {
	case err := <-followed:
		t.Fatal("the sandbox's token ended with one of two keys", err)
	default:
	}
	must2(t)(other.Call(t.Context(), "sandbox_list", map[string]any{}))
	revoke(t, state, 1)
	ended("the stream of the second key", others)
	select {
	case err := <-followed:
		if err == nil {
			t.Error("a stream that was broken off looks like one that has ended")
		}
	case <-time.After(30 * time.Second):
		t.Fatal("a stream of the sandbox's token goes on")
	}
	if res := ask("POST", "/process.Process/List", "{}", "E2b-Sandbox-Id", made.ID, "X-Access-Token", made.Token, "Content-Type",
		"application/json"); res.StatusCode != http.StatusUnauthorized {
		t.Error("the sandbox's token is worth something:", res.Status)
	}
	goesOn("another owner's stream", strangers)
}

// revoke revokes a key by its place in the list.
func revoke(t testing.TB, state string, n int) {
	t.Helper()
	keys := &access.Keys{Dir: state}
	all, err := keys.List()
	if err == nil {
		err = keys.Revoke(all[n].ID)
	}
	if err != nil {
		t.Fatal(err)
	}
}
