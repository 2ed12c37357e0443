package main

import (
	"bytes"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// user is someone who runs the program within this process, at servers that are fakes.
type user struct {
	home string
	env  map[string]string
}

// run runs the program with a text on stdin, and gives its exit code and all that it says.
func (u user) run(t *testing.T, stdin string, args ...string) (code int, said string) {
	t.Helper()
	name := filepath.Join(t.TempDir(), "stdin")
	if err := os.WriteFile(name, []byte(stdin), 0o600); err != nil {
		t.Fatal(err)
	}
	in, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	var out bytes.Buffer
	a := &app{stdin: in, stdout: &out, stderr: &out, getenv: func(name string) string {
		if name == "HOME" {
			return u.home
		}
		return u.env[name]
	}}
	return a.run(args), out.String()
}

// team is a fake server that knows everybody as ann.
func team(t *testing.T) *url.URL {
	t.Helper()
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = w.Write([]byte(`[{"name":"ann"}]`)) }))
	t.Cleanup(web.Close)
	u, err := url.Parse(web.URL)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

// TestLogins: a login is named by host and port, one to another server is replaced only if it was named, and one that an older soulbox has
// named by the host alone keeps its name.
func TestLogins(t *testing.T) {
	one, two := team(t), team(t)
	me := user{home: t.TempDir()}
	loginWith := func(key, at string, args ...string) (int, string) {
		t.Helper()
		return me.run(t, key, append([]string{"auth", "login", "--url", at, "--key", "-"}, args...)...)
	}
	known := func() contexts {
		t.Helper()
		var c contexts
		body, err := os.ReadFile(filepath.Join(me.home, ".config", "soulbox", "contexts.json"))
		if err == nil {
			err = json.Unmarshal(body, &c)
		}
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	if code, said := me.run(t, "", "auth", "logout"); code != exitFailed || !strings.Contains(said, "no login is used") {
		t.Errorf("%d %s", code, said)
	}
	for _, u := range []*url.URL{one, two} {
		if code, said := loginWith("key of "+u.Host, u.String()); code != 0 {
			t.Fatalf("%d %s", code, said)
		}
	}
	if c := known(); !slices.Equal(c.names(), slices.Sorted(slices.Values([]string{one.Host, two.Host}))) || c.Current != two.Host ||
		c.Known[one.Host] != loginTo(one, "key of "+one.Host) {
		t.Errorf("%+v", c)
	}
	if code, said := loginWith("new", one.String()+"/mcp"); code != 0 || known().Known[one.Host].Key != "new" {
		t.Errorf("the same server: %d %s", code, said)
	}

	old := contexts{Current: "127.0.0.1", Known: map[string]login{"127.0.0.1": loginTo(one, "old"),
		two.Host: {URL: "https://" + two.Host, Key: "rare"}}}
	body, err := json.Marshal(old)
	if err == nil {
		err = os.WriteFile(filepath.Join(me.home, ".config", "soulbox", "contexts.json"), body, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	if code, said := loginWith("mine", one.String()); code != 0 || len(known().Known) != 2 || known().Known["127.0.0.1"].Key != "mine" {
		t.Errorf("an old name: %d %s", code, said)
	}
	if code, said := loginWith("mine", two.String()); code != exitFailed || !strings.Contains(said, "--name "+two.Host) ||
		known().Known[two.Host].Key != "rare" {
		t.Errorf("another scheme: %d %s", code, said)
	}
	if code, said := loginWith("mine", two.String(), "--name", two.Host); code != 0 || known().Known[two.Host] != loginTo(two, "mine") {
		t.Errorf("one that is named: %d %s", code, said)
	}
}

// TestAway: if the chosen server cannot be reached, the error names the other logins.
func TestAway(t *testing.T) {
	at := team(t)
	me := user{home: t.TempDir()}
	if code, said := me.run(t, "k", "auth", "login", "--url", at.String(), "--key", "-", "--name", "box"); code != 0 {
		t.Fatal(said)
	}
	gone := httptest.NewServer(http.NotFoundHandler())
	gone.Close()
	body, err := json.Marshal(contexts{Current: "box", Known: map[string]login{"box": {URL: gone.URL}}})
	if err == nil {
		err = os.WriteFile(filepath.Join(me.home, ".config", "soulbox", "contexts.json"), body, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	for want, args := range map[string][]string{"'soulbox auth use local'": {"sandbox", "list"},
		"'soulbox-mcp http'": {"exec", "x", "ls"}} {
		if code, said := me.run(t, "", args...); code == 0 || !strings.Contains(said, "refused") || !strings.Contains(said, want) {
			t.Errorf("%v: %d %s", args, code, said)
		}
	}
	me.env = map[string]string{"SOULBOX_URL": gone.URL}
	if _, said := me.run(t, "", "sandbox", "list"); !strings.Contains(said, "SOULBOX_URL") {
		t.Error(said)
	}
}

func loginTo(u *url.URL, key string) login { return login{URL: u.String(), Key: key} }

// TestHostOf: the port is part of a login's name unless it is the scheme's own.
func TestHostOf(t *testing.T) {
	for at, want := range map[string]string{"https://Box.example.com": "box.example.com", "https://box:443": "box",
		"http://box:443": "box:443", "http://[::1]:8787": "[::1]:8787", "http://[::1]": "::1",
		"https://127.0.0.1:8787/mcp": "127.0.0.1:8787"} {
		u, err := url.Parse(at)
		if err != nil {
			t.Fatal(err)
		}
		if got := hostOf(u); got != want {
			t.Errorf("%s: %s, want %s", at, got, want)
		}
	}
}
