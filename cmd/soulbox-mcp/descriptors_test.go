package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"soulbox.dev/soulbox/internal/sandboxtest"
)

// limitOf sets the soft limit of descriptors of a running process.
func limitOf(t testing.TB, pid int, soft uint64) {
	t.Helper()
	var old unix.Rlimit
	if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &old); err != nil {
		t.Fatal(err)
	}
	if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: soft, Max: old.Max}, nil); err != nil {
		t.Fatal(err)
	}
}

// strangers opens connections without a key, and keeps them all.
func strangers(t testing.TB, w *web, n int) {
	t.Helper()
	address := strings.TrimSuffix(strings.TrimPrefix(w.url, "http://"), "/mcp")
	var mu sync.Mutex
	var all sync.WaitGroup
	for range 20 {
		all.Go(func() {
			for range n / 20 {
				c, err := net.DialTimeout("tcp", address, 30*time.Second)
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				t.Cleanup(func() { _ = c.Close() })
				mu.Unlock()
			}
		})
	}
	all.Wait()
}

// TestDescriptorsOfStrangers: however many connections strangers open, clients with a key work, health answers, and no sandbox ends.
func TestDescriptorsOfStrangers(t *testing.T) {
	state := sandboxtest.Dir(t)
	key := makeKey(t, state, "ann")
	w := serve(t, state)
	c := w.client(key, false)
	id := must2(t)(c.Call(t.Context(), "exec", map[string]any{"command": "echo kept > f"})).Field("sandbox_id")
	limitOf(t, w.cmd.Process.Pid, 256)
	flooding := make(chan struct{})
	go func() {
		defer close(flooding)
		strangers(t, w, 2000)
	}()
	works := func() {
		t.Helper()
		if a := must2(t)(c.Call(t.Context(), "exec", map[string]any{"sandbox_id": id, "command": "cat f"})); !strings.Contains(a.Text(),
			"kept") {
			t.Fatal(a.Text())
		}
		if status, body := w.get("/health", ""); status != http.StatusOK {
			t.Fatal(status, body)
		}
		other := &sandboxtest.MCP{URL: w.url, Key: key, Modern: true}
		must2(t)(other.Call(t.Context(), "sandbox_list", map[string]any{}))
	}
	for done := false; !done; {
		works()
		select {
		case <-flooding:
			done = true
		default:
		}
	}
	works()
	if open := entriesOf(t, w.cmd.Process.Pid); open > 256 {
		t.Errorf("the server has %d descriptors", open)
	}
	second := must2(t)(c.Call(t.Context(), "sandbox_create", map[string]any{})).Field("sandbox_id")
	must2(t)(c.Call(t.Context(), "exec", map[string]any{"sandbox_id": second, "command": "true"}))
}

func entriesOf(t testing.TB, pid int) int {
	t.Helper()
	list, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

// TestDescriptorsTakenAway: the limit is lowered below what the running server uses. Nothing ends, and all works when it is raised again.
func TestDescriptorsTakenAway(t *testing.T) {
	t.Parallel()
	w := serve(t, "")
	c := w.client("", false)
	id := must2(t)(c.Call(t.Context(), "exec", map[string]any{"command": "echo kept > f"})).Field("sandbox_id")
	limitOf(t, w.cmd.Process.Pid, 8)
	// A request gets no answer while its connection cannot be accepted.
	asking := &http.Client{Timeout: time.Second}
	// As long as ten checks of the sandbox take.
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		if res, err := asking.Get(strings.TrimSuffix(w.url, "/mcp") + "/health"); err == nil {
			_ = res.Body.Close() // requests may be refused meanwhile
		}
	}
	limitOf(t, w.cmd.Process.Pid, 4096)
	if a := must2(t)(c.Call(t.Context(), "exec", map[string]any{"sandbox_id": id, "command": "cat f"})); !strings.Contains(a.Text(),
		"kept") {
		t.Fatal(a.Text())
	}
}

// TestDescriptorsFew: a server started with few descriptors takes over its predecessor's sandboxes, and warns that they are too few.
func TestDescriptorsFew(t *testing.T) {
	state := sandboxtest.Dir(t)
	w := serve(t, state, "--on-exit=keep")
	c := w.client("", false)
	id := must2(t)(c.Call(t.Context(), "exec", map[string]any{"command": "echo kept > f"})).Field("sandbox_id")
	w.stop()
	w = serveUnder(t, state, 64, "--on-exit=keep")
	strangers(t, w, 100)
	c = w.client("", false)
	if a := must2(t)(c.Call(t.Context(), "exec", map[string]any{"sandbox_id": id, "command": "cat f"})); !strings.Contains(a.Text(),
		"kept") {
		t.Fatal(a.Text())
	}
	if log := w.log.String(); !strings.Contains(log, "file descriptors") {
		t.Errorf("the log does not say that there are few: %s", log)
	}
	must2(t)(c.Call(t.Context(), "sandbox_kill", map[string]any{"sandbox_id": id, "confirm": true}))
	out, err := exec.Command("sh", "-c", fmt.Sprintf("ulimit -n 64; exec %s doctor --state-dir=%s", sandboxtest.Program(t, "soulbox-mcp"),
		sandboxtest.Dir(t))).CombinedOutput()
	if !strings.Contains(string(out), "descriptors") || !strings.Contains(string(out), "64") {
		t.Errorf("doctor: %v: %s", err, out)
	}
}

// TestDescriptorsOfSandbox: a running sandbox costs the server no more descriptors than doctor assumes.
func TestDescriptorsOfSandbox(t *testing.T) {
	w := serve(t, "")
	c := w.client("", false)
	make1 := func() string {
		id := must2(t)(c.Call(t.Context(), "sandbox_create", map[string]any{})).Field("sandbox_id")
		must2(t)(c.Call(t.Context(), "exec", map[string]any{"sandbox_id": id, "command": "true"}))
		return id
	}
	make1()
	before := entriesOf(t, w.cmd.Process.Pid)
	const more = 3
	for range more {
		make1()
	}
	each := 0.0
	sandboxtest.Eventually(t, fmt.Sprintf("a sandbox costs %d descriptors at most", perSandbox), func() bool {
		// Others are open for a moment.
		each = float64(entriesOf(t, w.cmd.Process.Pid)-before) / more
		return each <= perSandbox
	})
	t.Logf("a sandbox costs %.1f descriptors; the server had %d with one", each, before)
	runsc := sandboxtest.Processes(w.state)
	if len(runsc) == 0 {
		t.Fatal("no process of a sandbox")
	}
	var limit unix.Rlimit
	if err := unix.Prlimit(runsc[0], unix.RLIMIT_NOFILE, nil, &limit); err != nil || limit.Cur < 1024 && limit.Cur < limit.Max {
		t.Errorf("a process of a sandbox may have %d descriptors of %d: %v", limit.Cur, limit.Max, err)
	}
}

// TestSlowRequests: the server does not wait long for a head or a body that does not arrive, and answers a client without a key without
// waiting for a body at all.
func TestSlowRequests(t *testing.T) {
	t.Parallel()
	state := sandboxtest.Dir(t)
	key := makeKey(t, state, "ann")
	w := serve(t, state)
	address := strings.TrimSuffix(strings.TrimPrefix(w.url, "http://"), "/mcp")
	var all sync.WaitGroup
	for name, head := range map[string]string{
		"half a head":  "POST /mcp HTTP/1.1\r\nHost: localhost\r\nX-A",
		"MCP":          "POST /mcp HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n",
		"MCP, chunked": "POST /mcp HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n",
		"API":          "POST /sandboxes HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n",
		"API, nowhere": "POST /nowhere HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n",
		"the gateway": "POST / HTTP/1.1\r\nHost: localhost\r\nE2b-Sandbox-Id: sbaaaaaaaaaaaaaaaaaaaa\r\nContent-Length: " +
			"1000\r\n\r\n",
		"health, with a body":   "GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n",
		"upload, with no proof": "PUT /templates/t/files/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n",
		"with a key, some bytes": "POST /mcp HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer " + key +
			"\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{",
	} {
		all.Go(func() {
			c, err := net.Dial("tcp", address)
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			begin := time.Now()
			if _, err := io.WriteString(c, head); err != nil {
				t.Error(err)
				return
			}
			if err := c.SetReadDeadline(begin.Add(90 * time.Second)); err != nil {
				t.Error(err)
			}
			r := bufio.NewReader(c)
			first, err := r.ReadString('\n')
			answered := time.Since(begin)
			if _, rest := io.Copy(io.Discard, r); err == nil {
				err = rest
			}
			if errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("%s: it is still open", name)
			}
			if took := time.Since(begin); took > time.Minute {
				t.Errorf("%s: closed after %s", name, took)
			}
			t.Logf("%s: %q after %.1fs, closed after %.1fs", name, strings.TrimSpace(first), answered.Seconds(),
				time.Since(begin).Seconds())
		})
	}
	all.Wait()
}

// serveUnder is serve with a limit of descriptors, soft and hard.
func serveUnder(t testing.TB, state string, limit int, flags ...string) *web {
	t.Helper()
	return serveBy(t, state, func(cmd *exec.Cmd) {
		cmd.Args = append([]string{"sh", "-c", fmt.Sprintf(`ulimit -n %d; exec "$0" "$@"`, limit), cmd.Path}, cmd.Args[1:]...)
		cmd.Path = "/bin/sh"
	}, flags...)
}
