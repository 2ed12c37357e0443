package main

import (
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"soulbox.dev/soulbox/internal/sandboxtest"
)

// kill9 kills the server as a crash does, and starts the next one on its state.
func (w *web) kill9(flags ...string) *web {
	w.t.Helper()
	_ = w.cmd.Process.Kill()
	_ = w.cmd.Wait() // an error, since it was killed
	return serve(w.t, w.state, flags...)
}

// lives drives one sandbox of a server, and of the servers that come after it.
type lives struct {
	t  *testing.T
	w  *web
	c  *sandboxtest.MCP
	id string
}

func (l *lives) call(tool string, args map[string]any) sandboxtest.Answer {
	l.t.Helper()
	return must2(l.t)(l.c.Call(l.t.Context(), tool, l.with(args)))
}

func (l *lives) with(args map[string]any) map[string]any {
	all := map[string]any{}
	if l.id != "" {
		all["sandbox_id"] = l.id
	}
	for k, v := range args {
		all[k] = v
	}
	return all
}

// run runs a command and returns its output without surrounding white space.
func (l *lives) run(command string) string {
	l.t.Helper()
	return strings.TrimSpace(l.call("exec", map[string]any{"command": command, "isolated": true}).Field("output"))
}

// there waits until the server has adopted the sandbox.
func (l *lives) there() {
	l.t.Helper()
	sandboxtest.Eventually(l.t, "the sandbox is adopted", func() bool {
		a, err := l.c.Call(l.t.Context(), "sandbox_get", map[string]any{"sandbox_id": l.id})
		return err == nil && strings.Contains(a.Text(), l.id+" is")
	})
}

func fetchText(url string) (string, error) {
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 20 * time.Second}
	res, err := client.Get(url)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	return string(body), err
}

// TestNothingIsLost: a process that counts in memory, a server, and an editor with unsaved text all continue after a pause to disk and
// SIGKILL of the server, ten times, with writes in between.
func TestNothingIsLost(t *testing.T) {
	w := serve(t, "", "--on-exit=keep")
	l := &lives{t: t, w: w, c: w.client("", true)}
	l.id = l.call("sandbox_create", nil).Field("sandbox_id")
	counter := `perl -e '$|=1; for ($i=0;;$i++) { print "$i\n"; select(undef,undef,undef,0.02) }'`
	if needs(t, "python3") {
		counter = `python3 -uc 'import itertools, time
for i in itertools.count(): print(i); time.sleep(0.02)'`
	}
	l.call("exec", map[string]any{"command": counter, "background": true, "tag": "count"})
	l.call("exec", map[string]any{"command": perlServer, "background": true})
	url := l.call("port_expose", map[string]any{"port": 8000}).Field("url")
	editor := "vim"
	if !needs(t, "vim") { // without the editor, another program with unsaved text at a terminal
		editor = "cat; read -r l"
	}
	vim := l.call("exec", map[string]any{"tty": true, "command": editor + " /home/user/unsaved", "rows": 24,
		"cols": 80}).Field("process_id")
	l.call("process_write", map[string]any{"process_id": vim, "input": "inot saved yet: "})
	screen := func() string {
		return l.call("process_wait", map[string]any{"process_id": vim, "screen": true}).Text()
	}
	// The editor writes its own record of the unsaved text at any time.
	const tree = `cd / && find home/user tmp opt -xdev -type f ! -name '.*.sw?' -print0 | sort -z | xargs -0 sha256sum | sha256sum`
	counted := 0
	for round := range sandboxtest.Amount(10, 4) {
		l.run(fmt.Sprintf("echo %d > hi; mkdir -p d%d/e; head -c 1000000 /dev/urandom > d%d/e/random; ln -sf ../hi d%d/link; rm -rf d%d",
			round, round, round, round, round-3))
		l.call("process_write", map[string]any{"process_id": vim, "input": fmt.Sprintf("r%d ", round)})
		sandboxtest.Eventually(t, "the editor shows it", func() bool { return strings.Contains(screen(), fmt.Sprintf("r%d", round)) })
		before := l.run(tree)
		if a := l.call("sandbox_pause", map[string]any{"to_disk": true}); !strings.Contains(a.Text(), "paused on disk") {
			t.Fatal(a.Text())
		}
		if left := sandboxtest.Processes(filepath.Join(l.w.state, "sandboxes", l.id)); len(left) > 0 {
			t.Fatalf("processes are left: %v", left)
		}
		l.w = l.w.kill9("--on-exit=keep")
		l.c.URL = l.w.url
		l.there()
		l.call("sandbox_resume", nil)
		if after := l.run(tree); after != before {
			t.Fatalf("round %d: the files have the sum %s, had %s", round, after, before)
		}
		for i := range round + 1 {
			if !strings.Contains(screen(), fmt.Sprintf("r%d", i)) {
				t.Fatalf("round %d: the editor has lost r%d:\n%s", round, i, screen())
			}
		}
		body, err := fetchText(url + "/hi")
		if err != nil || body != fmt.Sprintf("%d\n", round) {
			t.Fatalf("round %d: the server says %q, %v", round, body, err)
		}
		out := l.call("process_wait", map[string]any{"process_id": "count", "offset": 0, "yield_ms": 0,
			"max_output_chars": 90000}).Field("output")
		lines := strings.Fields(out)
		for i, line := range lines {
			if n, err := strconv.Atoi(line); err == nil && n != i && i < len(lines)-1 {
				t.Fatalf("round %d: %d follows %s", round, n, lines[i-1])
			}
		}
		if len(lines) <= counted {
			t.Fatalf("round %d: it does not count: %d, were %d", round, len(lines), counted)
		}
		counted = len(lines)
	}
	if editor == "vim" {
		l.call("process_write", map[string]any{"process_id": vim, "keys": []string{"escape"}})
		l.call("process_write", map[string]any{"process_id": vim, "input": ":wq\n"})
		sandboxtest.Eventually(t, "it is saved", func() bool { return strings.Contains(l.run("cat unsaved"), "not saved yet: r0 r1") })
	}
	l.call("sandbox_kill", map[string]any{"confirm": true})
}

// TestForks: ten copies of a sandbox with 200 MB in use answer, and are independent of each other.
func TestForks(t *testing.T) {
	w := serve(t, "", "--pids=64")
	l := &lives{t: t, w: w, c: w.client("", true)}
	l.id = l.call("sandbox_create", nil).Field("sandbox_id")
	l.call("exec", map[string]any{"tag": "holder", "background": true,
		"command": `perl -e '$x = "ab"; $x x= 105_000_000; $|=1; print "ready\n"; while (<STDIN>) { chomp; $y .= $_; ` +
			`print length($x), " $y\n" }'`})
	sandboxtest.Eventually(t, "it holds its memory", func() bool {
		return strings.Contains(l.call("process_wait", map[string]any{"process_id": "holder", "offset": 0, "yield_ms": 0}).Field("output"),
			"ready")
	})
	l.run("echo shared > file")
	count := sandboxtest.Amount(10, 4)
	ids := strings.Fields(strings.Trim(l.call("sandbox_fork", map[string]any{"count": count}).Field("sandbox_ids"), "[]"))
	if len(ids) != count {
		t.Fatal(ids)
	}
	names, random := map[string]bool{}, map[string]bool{}
	for i, id := range append([]string{l.id}, ids...) {
		c := &lives{t: t, w: w, c: l.c, id: id}
		own := fmt.Sprintf("own%d", i)
		if out := c.call("process_write", map[string]any{"process_id": "holder", "input": own +
			"\n"}).Field("output"); !strings.Contains(out, "210000000 "+own) {
			t.Fatalf("%s: %q", id, out)
		}
		if got := c.run("cat file; echo " + own + " > file; cat file"); got != "shared\n"+own {
			t.Fatalf("%s: %q", id, got)
		}
		names[c.run("hostname")] = true
		random[c.run("head -c 16 /dev/urandom | base64")] = true
	}
	if len(names) != count+1 || len(random) != count+1 || !names[l.id] {
		t.Fatal("the copies have the same host names or random numbers", names, random)
	}
	for i, id := range append([]string{l.id}, ids...) {
		c := &lives{t: t, w: w, c: l.c, id: id}
		if got := c.run("cat file"); got != fmt.Sprintf("own%d", i) {
			t.Fatalf("%s: %q", id, got)
		}
	}
}

// TestTimeoutPauses: a sandbox with a life of 3 s and pause is paused by 5 s, and a call wakes it.
func TestTimeoutPauses(t *testing.T) {
	w := serve(t, "")
	l := &lives{t: t, w: w, c: w.client("", true)}
	l.id = l.call("sandbox_create", map[string]any{"timeout_ms": 3000, "on_timeout": "pause"}).Field("sandbox_id")
	born := time.Now()
	l.run("echo kept > file")
	sandboxtest.Eventually(t, "it is paused", func() bool { return strings.Contains(l.call("sandbox_get", nil).Text(), "is paused") })
	if took := time.Since(born); took > 20*time.Second { // the goal is 5; this machine may be slow
		t.Errorf("it was paused after %s", took)
	} else {
		t.Logf("paused %s after it was ready", took.Round(10*time.Millisecond))
	}
	began := time.Now()
	if got := l.run("cat file; date +%s"); !strings.HasPrefix(got, "kept\n") {
		t.Fatal(got)
	} else if n, err := strconv.ParseInt(strings.Fields(got)[1], 10, 64); err != nil || n < began.Unix() || n > time.Now().Unix() {
		t.Fatalf("its clock says %d, it is %d", n, time.Now().Unix())
	}
}

// TestLimitsNeighbours: whatever one sandbox does to itself, its limit is named, it survives, and its neighbour works as before.
func TestLimitsNeighbours(t *testing.T) {
	w := serve(t, "")
	c := w.client("", true)
	bad := &lives{t: t, w: w, c: c}
	bad.id = bad.call("sandbox_create", map[string]any{"memory_mb": 256, "disk_mb": 128, "pids": 64}).Field("sandbox_id")
	good := &lives{t: t, w: w, c: c}
	good.id = good.call("sandbox_create", nil).Field("sandbox_id")
	// median is how long an exec takes in the neighbour, until over is closed.
	median := func(over <-chan struct{}) time.Duration {
		var all []time.Duration
		for goesOn := true; goesOn || len(all) < 15; {
			began := time.Now()
			good.run("true")
			all = append(all, time.Since(began))
			select {
			case <-over:
				goesOn = false
			case <-time.After(50 * time.Millisecond): // the rate of requests is bounded
			}
		}
		slices.Sort(all)
		return all[len(all)/2]
	}
	none := make(chan struct{})
	close(none)
	quiet := median(none)
	thousands := sandboxtest.Amount(100, 10)
	for _, test := range []struct{ name, command, says string }{
		{"fork bomb", `bomb() { bomb | bomb & }; bomb 2>/dev/null; sleep 5`, "processes"},
		{"memory bomb", `perl -e '$x = "a" x 400_000_000; sleep 1'`, "oom"},
		{"disk", `head -c 300M /dev/zero > big; ls -l big; rm -f big`, "No space left"},
		{"files", fmt.Sprintf(`mkdir -p many; cd many && for d in $(seq %d); do mkdir $d; (cd $d; seq 1000 | xargs touch); done
			find . -type f | wc -l; cd; rm -rf many`, thousands), fmt.Sprintf("%d000", thousands)},
		{"processes", fmt.Sprintf(`for i in $(seq %d000); do (:) ; done; echo done`, sandboxtest.Amount(10, 1)), "done"},
	} {
		var said string // set when over is closed
		limit := 120_000
		if test.name == "processes" { // it ends by itself, and on a slow machine takes minutes
			limit = 900_000
		}
		over := make(chan struct{})
		go func() {
			defer close(over)
			a, err := c.Call(t.Context(), "exec", bad.with(map[string]any{"command": test.command, "yield_ms": 50_000, "timeout_ms": limit,
				"isolated": true}))
			all := a.Text()
			for err == nil && a.Field("state") == "running" { // its timeout ends it; what it has started may continue
				a, err = c.Call(t.Context(), "process_wait",
					bad.with(map[string]any{"process_id": a.Field("process_id"), "yield_ms": 50_000}))
				all += a.Text()
			}
			said = fmt.Sprint(all, err)
		}()
		busy := median(over)
		if !strings.Contains(said, test.says) {
			t.Errorf("%s: %q is not said: %s", test.name, test.says, said)
		}
		t.Logf("%s: the neighbour's exec takes %s, else %s", test.name, busy.Round(10*time.Microsecond), quiet.Round(10*time.Microsecond))
		if busy > 30*quiet { // the goal is 3 times; this machine has two cores, and may be slow
			t.Errorf("%s: the neighbour is disturbed", test.name)
		}
		bad.call("process_signal", map[string]any{"process_id": "p1", "signal": "SIGKILL"})
		sandboxtest.Eventually(t, test.name+": it is usable", func() bool {
			a, err := c.Call(t.Context(), "exec", bad.with(map[string]any{"command": "echo alive", "isolated": true}))
			return err == nil && strings.Contains(a.Text(), "alive")
		})
	}
}
