package main

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"soulbox.dev/soulbox/internal/sandboxtest"
)

// TestShellOfSession: the commands of a session share a shell in a real sandbox, whatever one of them does to it, and no other session has
// it.
func TestShellOfSession(t *testing.T) {
	p := launch(t, "", "--disk-mb=64")
	p.exec("mkdir -p app/sub; cd app; export TOKEN=s3cret; greet() { echo hi $1; }; n=5")
	expect := func(command, want string) {
		t.Helper()
		if got := p.exec(command); got != want {
			t.Errorf("%s: %q, want %q", command, got, want)
		}
	}
	expect("pwd; greet you; echo $TOKEN $n", "/home/user/app\nhi you\ns3cret 5\n")
	if m := p.call("exec", map[string]any{"command": "pwd; echo ${TOKEN-none}",
		"isolated": true}); m.Result.StructuredContent["output"] != "/home/user\nnone\n" {
		t.Error(m.text())
	}
	if m := p.call("exec", map[string]any{"command": "cd sub; whoami; pwd", "user": "root"}); !strings.HasSuffix(m.text(), "]") ||
		!strings.Contains(m.text(), "root\n/root\n") {
		t.Error(m.text())
	}
	if m := p.call("exec", map[string]any{"command": "cd sub; exit 3"}); m.Result.StructuredContent["exit_code"] != float64(3) ||
		!strings.Contains(m.text(), "the shell is now in /home/user/app/sub") {
		t.Error(m.text())
	}
	for _, wild := range []string{"kill -9 $$", "exec true", "exec 0<&- 1>&- 2>&-",
		"for fd in /proc/self/fd/*; do eval \"exec ${fd##*/}>&-\"; done 2>/dev/null", "set -e; false; echo never"} {
		p.call("exec", map[string]any{"command": wild})
		expect("pwd; greet you; echo $TOKEN $n", "/home/user/app/sub\nhi you\ns3cret 5\n")
	}
	p.exec("PATH=/nowhere")
	expect("echo $PATH; pwd", "/nowhere\n/home/user/app/sub\n")
	expect("PATH=/usr/bin:/bin; ls -d ../sub", "../sub\n")
	m := p.call("sandbox_get", nil)
	for _, want := range []string{"shell is in /home/user/app/sub", "TOKEN", "functions: greet", "variables: fd n"} {
		if !strings.Contains(m.text(), want) {
			t.Errorf("%q is not told: %s", want, m.text())
		}
	}
	if strings.Contains(m.text(), "s3cret") {
		t.Error("a value is told:", m.text())
	}
	// On a full disk commands still begin with what the shell remembers.
	p.exec("head -c 1G /dev/zero > /home/user/full 2>/dev/null")
	expect("echo $TOKEN; pwd", "s3cret\n/home/user/app/sub\n")
	p.exec("rm /home/user/full")
	expect("cd ..; pwd", "/home/user/app\n")
}

// rebuild applies the events of file_watch to a tree.
func rebuild(tree map[string]bool, events []any) {
	below := func(p, dir string) bool { return p == dir || strings.HasPrefix(p, dir+"/") }
	for _, e := range events {
		e := e.(map[string]any)
		name, from := fmt.Sprint(e["path"]), ""
		if f, ok := e["from"].(string); ok {
			from = f
		}
		switch e["op"] {
		case "create", "write":
			tree[name] = true
		case "remove":
			for p := range tree {
				if below(p, name) {
					delete(tree, p)
				}
			}
		case "rename", "save":
			moved := []string{name}
			for p := range tree {
				if from != "" && below(p, from) {
					delete(tree, p)
					moved = append(moved, path.Join(name, strings.TrimPrefix(p, from)))
				}
			}
			for _, p := range moved {
				tree[p] = true
			}
		}
	}
}

// TestWatchedTrees: the tree that file_watch reports for a clone, for trees made and removed, and for renames, is the tree as it is in the
// end, or file_watch says that changes are missing.
func TestWatchedTrees(t *testing.T) {
	p := launch(t, "")
	if needs(t, "git") {
		p.exec(`git init -q /tmp/from && cd /tmp/from && git config user.email a@b && git config user.name n && mkdir d{0..49} && ` +
			`for i in $(seq 2000); do echo $i > d$((i % 50))/f$i; done && git add . && git commit -qm all; cd`)
	}
	for name, script := range map[string]string{
		"clone": "git clone -q /tmp/from to",
		"trees": "for i in $(seq 100); do mkdir -p n/p$i/lib; for j in 1 2 3 4 5; do echo $j > n/p$i/lib/f$j; done; done; rm -rf n; " +
			"mkdir n; echo > n/last",
		"renames": "mkdir d; for i in $(seq 100); do : > d/f$i; done; perl -e 'for $k (1 .. 50) { for $i (1 .. 100) { rename \"d/f$i\", " +
			"\"d/g$i\"; rename \"d/g$i\", \"d/f$i\" } }'; mv d e",
	} {
		if name == "clone" && !needs(t, "git") {
			continue
		}
		dir := "/home/user/" + name
		p.exec("mkdir " + dir)
		m := p.call("file_watch", map[string]any{"path": dir})
		cursor, tree, events, lost := m.Result.StructuredContent["cursor"], map[string]bool{}, 0, false
		running := p.start("exec", map[string]any{"command": "cd " + dir + " && " + script + "; cd", "yield_ms": 50_000})
		take := func() bool {
			m := p.call("file_watch", map[string]any{"cursor": cursor, "yield_ms": 200, "limit": 1000})
			if m.Result.IsError {
				t.Fatal(m.text())
			}
			cursor = m.Result.StructuredContent["cursor"]
			list := m.Result.StructuredContent["events"].([]any)
			rebuild(tree, list)
			events += len(list)
			lost = lost || m.Result.StructuredContent["lost"] == true
			return len(list) > 0
		}
		done := make(chan message, 1)
		go func() { done <- p.await(running) }()
		for over := false; !over; {
			select {
			case m := <-done:
				if m.Result.StructuredContent["exit_code"] != float64(0) {
					t.Fatalf("%s: %s", name, m.text())
				}
				over = true
			default:
				take()
			}
		}
		sandboxtest.Eventually(t, name+": the tree as it is", func() bool {
			for take() {
			}
			sum := sha256.Sum256([]byte(strings.Join(slices.Sorted(maps.Keys(tree)), "\n") + "\n"))
			real := p.exec("find " + dir + " -mindepth 1 | LC_ALL=C sort | sha256sum")
			return lost || strings.HasPrefix(real, hex.EncodeToString(sum[:]))
		})
		t.Logf("%s: %d events, %d paths, missing said: %t", name, events, len(tree), lost)
		p.call("file_watch", map[string]any{"cursor": cursor, "close": true})
	}
}

// TestTerminalExact: 100 MB through a terminal are read exactly as they were written.
func TestTerminalExact(t *testing.T) {
	p := launch(t, "")
	m := p.call("exec", map[string]any{"command": "head -c 75000000 /dev/urandom | base64 -w0 > /home/user/text; sha256sum < " +
		"/home/user/text | cut -c1-64"})
	id, sum := m.Result.StructuredContent["sandbox_id"], strings.TrimSpace(fmt.Sprint(m.Result.StructuredContent["output"]))
	// In parts: only the last 16 MB of a terminal's output are kept.
	y := openTTY(t, p, map[string]any{"command": "stty raw -echo; for ((i = 0; i < 100000000; i += 4000000)); do dd if=/home/user/text " +
		"iflag=skip_bytes,count_bytes skip=$i count=4000000 bs=100000 status=none; read -rn1; done", "yield_ms": 0})
	h, offset := sha256.New(), 0
	for next := 4_000_000; offset < 100_000_000; {
		m := p.await(p.request("resources/read",
			map[string]any{"uri": fmt.Sprintf("sandbox://%s/processes/%s/output?offset=%d&limit=500000", id, y.id, offset)}))
		if m.Error != nil || len(m.Result.Contents) != 1 {
			t.Fatalf("%+v", m)
		}
		out := m.Result.Contents[0].Text
		if _, err := io.WriteString(h, out); err != nil {
			t.Fatal(err)
		}
		if offset += len(out); offset == next {
			next += 4_000_000
			p.call("process_write", map[string]any{"process_id": y.id, "input": "x", "yield_ms": 0})
		}
	}
	if got := hex.EncodeToString(h.Sum(nil)); got != sum || offset != 100_000_000 {
		t.Fatalf("%v bytes with the sum %s, want %s", offset, got, sum)
	}
}

// TestKilledInUse: a terminal, a watch and a port outlive the server, and nothing of them is lost.
func TestKilledInUse(t *testing.T) {
	state := sandboxtest.Dir(t)
	w := serve(t, state, "--on-exit=keep")
	c := w.client("", true)
	id := ""
	call := func(tool string, args map[string]any) sandboxtest.Answer {
		t.Helper()
		if id != "" {
			args["sandbox_id"] = id
		}
		return must2(t)(c.Call(t.Context(), tool, args))
	}
	id = call("exec", map[string]any{"command": "mkdir watched; echo hello > hi; export KEPT=1"}).Field("sandbox_id")
	sh := call("exec", map[string]any{"tty": true, "command": "PS1= exec bash --norc -i"}).Field("process_id")
	call("process_write", map[string]any{"process_id": sh, "input": "stty -echo; n=0; for i in $(seq 50); do echo line-$i; done\n"})
	cursor := call("file_watch", map[string]any{"path": "/home/user/watched"}).Field("cursor")
	call("exec", map[string]any{"command": "echo 1 > watched/before"})
	call("exec", map[string]any{"command": perlServer, "background": true})
	base := call("port_expose", map[string]any{"port": 8000}).Field("url")
	first := call("process_wait", map[string]any{"process_id": sh, "offset": 0, "raw": true, "yield_ms": 0}).Field("output")
	// While no server is there, the shell continues and a file is made.
	call("process_write", map[string]any{"process_id": sh,
		"input": "while ! [ -e go ]; do sleep 0.1; done; for i in $(seq 51 100); do echo line-$i; done; echo 2 > watched/meanwhile\n"})
	call("exec", map[string]any{"command": "(sleep 1; touch go) & disown"})

	_ = w.cmd.Process.Kill()
	_ = w.cmd.Wait() // an error, since it was killed
	w = serve(t, state, "--on-exit=keep")
	c.URL = w.url
	sandboxtest.Eventually(t, "the sandbox is adopted", func() bool {
		a, err := c.Call(t.Context(), "sandbox_get", map[string]any{"sandbox_id": id})
		return err == nil && strings.Contains(a.Text(), "is running")
	})
	var out string
	sandboxtest.Eventually(t, "all lines of the terminal", func() bool {
		out = call("process_wait", map[string]any{"process_id": sh, "offset": 0, "raw": true, "yield_ms": 0}).Field("output")
		return strings.Contains(out, "line-100")
	})
	if !strings.HasPrefix(out, first) {
		t.Errorf("replayed %q, was %q", out, first)
	}
	for i := range 100 {
		if !strings.Contains(out, fmt.Sprintf("line-%d\r\n", i+1)) {
			t.Errorf("line %d is lost", i+1)
		}
	}
	call("process_write", map[string]any{"process_id": sh, "input": "echo alive-$((n + 42))\n"})
	sandboxtest.Eventually(t, "the shell goes on", func() bool {
		return strings.Contains(call("process_wait", map[string]any{"process_id": sh, "offset": 0, "raw": true,
			"yield_ms": 0}).Field("output"), "alive-42")
	})
	sandboxtest.Eventually(t, "what happened before and meanwhile, from the cursor", func() bool {
		text := call("file_watch", map[string]any{"cursor": cursor, "yield_ms": 0}).Text()
		return strings.Contains(text, "create /home/user/watched/before") && strings.Contains(text, "create /home/user/watched/meanwhile")
	})
	sandboxtest.Eventually(t, "the port at the same number", func() bool {
		res, err := http.Get(base + "/hi")
		if err != nil {
			return false
		}
		defer res.Body.Close()
		body, err := io.ReadAll(res.Body)
		return err == nil && string(body) == "hello\n"
	})
	call("sandbox_kill", map[string]any{"confirm": true})
}

// TestGatewayOfServer: an exposed port of a real sandbox is reached by its name, with the URL that the tool returns.
func TestGatewayOfServer(t *testing.T) {
	w := serve(t, "", "--domain=box.localhost")
	c := w.client("", true)
	call := func(tool string, args map[string]any) sandboxtest.Answer {
		t.Helper()
		return must2(t)(c.Call(t.Context(), tool, args))
	}
	call("exec", map[string]any{"command": "echo hello > hi"})
	call("exec", map[string]any{"command": perlServer, "background": true})
	url := call("port_expose", map[string]any{"port": 8000}).Field("url")
	if !strings.Contains(url, ".box.localhost:") || !strings.Contains(url, "traffic_token=") {
		t.Fatal(url)
	}
	fetch := func(url string, header ...string) (int, string) {
		t.Helper()
		// By the server's address: not every machine resolves names below localhost.
		host, target, _ := strings.Cut(strings.TrimPrefix(url, "http://"), "/")
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, strings.TrimSuffix(w.url, "mcp")+target, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Host = host
		for i := 0; i < len(header); i += 2 {
			req.Header.Set(header[i], header[i+1])
		}
		res, err := http.DefaultTransport.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		body, _ := io.ReadAll(res.Body)
		if len(res.Cookies()) > 0 {
			return res.StatusCode, res.Cookies()[0].Name + "=" + res.Cookies()[0].Value
		}
		return res.StatusCode, string(body)
	}
	plain, _, _ := strings.Cut(url, "?")
	if status, body := fetch(plain + "hi"); status != http.StatusForbidden {
		t.Error(status, body)
	}
	status, cookie := fetch(url, "User-Agent", "Mozilla/5.0")
	if status != http.StatusFound {
		t.Fatal(status, cookie)
	}
	if status, body := fetch(plain+"hi", "Cookie", cookie); status != http.StatusOK || body != "hello\n" {
		t.Error(status, body)
	}
	call("port_expose", map[string]any{"port": 8000, "public": true})
	if status, body := fetch(plain + "hi"); status != http.StatusOK || body != "hello\n" {
		t.Error(status, body)
	}
	if secret := strings.SplitN(url, "traffic_token=", 2)[1]; strings.Contains(w.log.String(), secret) {
		t.Error("the token is in the log")
	}
	var all sync.WaitGroup
	for range 32 {
		all.Go(func() {
			for range 5 {
				if status, body := fetch(plain + "hi"); status != http.StatusOK || body != "hello\n" {
					t.Error(status, body)
				}
			}
		})
	}
	all.Wait()
	states, _ := filepath.Glob(filepath.Join(w.state, "sandboxes", "*", "state.json"))
	for _, s := range states {
		if info, err := os.Stat(s); err != nil || info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s: %v %v", s, info.Mode(), err)
		}
	}
}
