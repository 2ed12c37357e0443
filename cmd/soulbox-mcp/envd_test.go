package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"soulbox.dev/soulbox/internal/sandboxtest"
)

// remoteBox is a sandbox as E2B's clients reach it, by headers.
type remoteBox struct {
	t         testing.TB
	at        string
	id, token string
	client    *http.Client
}

// newBox makes a sandbox by the REST API.
func newBox(t testing.TB, w *web, body string) *remoteBox {
	t.Helper()
	b := &remoteBox{t: t, at: strings.TrimSuffix(w.url, "/mcp"), client: http.DefaultClient}
	res, err := http.Post(b.at+"/v2/sandboxes", "application/json", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	var made struct{ SandboxID, EnvdAccessToken, Message string }
	if err := json.NewDecoder(res.Body).Decode(&made); err != nil || res.StatusCode != http.StatusCreated {
		t.Fatal(res.Status, made.Message, err)
	}
	b.id, b.token = made.SandboxID, made.EnvdAccessToken
	return b
}

// control calls the REST API, and returns the status.
func (b *remoteBox) control(method, path, body string) int {
	b.t.Helper()
	req, err := http.NewRequest(method, b.at+path, strings.NewReader(body))
	if err != nil {
		b.t.Fatal(err)
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		b.t.Fatal(err)
	}
	defer res.Body.Close()
	_, _ = io.Copy(io.Discard, res.Body)
	return res.StatusCode
}

func (b *remoteBox) request(ctx context.Context, method, path string, body io.Reader, headers ...string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, b.at+path, body)
	if err != nil {
		return nil, err
	}
	for k, v := range map[string]string{"E2b-Sandbox-Id": b.id, "E2b-Sandbox-Port": "49983", "X-Access-Token": b.token} {
		req.Header.Set(k, v)
	}
	for i := 0; i < len(headers); i += 2 {
		req.Header.Set(headers[i], headers[i+1])
	}
	return b.client.Do(req)
}

// rest makes a plain HTTP request, and returns its status and body.
func (b *remoteBox) rest(method, path, body string, headers ...string) (int, string) {
	b.t.Helper()
	res, err := b.request(b.t.Context(), method, path, strings.NewReader(body), headers...)
	if err != nil {
		b.t.Fatal(err)
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		b.t.Fatal(err)
	}
	return res.StatusCode, string(text)
}

// streamed is the outcome of a call that is answered by a stream.
type streamed struct {
	status   int
	messages []map[string]any
	end      map[string]any // of the end frame; nil if there was none
	err      error          // the error with which the body ended
}

func (s streamed) code() string {
	e, _ := s.end["error"].(map[string]any)
	return fmt.Sprint(e["code"])
}

// stream calls a method of envd as the SDK does (Connect protocol, JSON); each is called with every message.
func (b *remoteBox) stream(method, body string, each func(map[string]any), headers ...string) (s streamed) {
	frame := make([]byte, 5, 5+len(body))
	binary.BigEndian.PutUint32(frame[1:], uint32(len(body)))
	res, err := b.request(b.t.Context(), "POST", method, bytes.NewReader(append(frame, body...)),
		append([]string{"Content-Type", "application/connect+json", "Connect-Protocol-Version", "1"}, headers...)...)
	if err != nil {
		s.err = err
		return s
	}
	defer res.Body.Close()
	if s.status = res.StatusCode; s.status != http.StatusOK {
		return s
	}
	for {
		var head [5]byte
		if _, err := io.ReadFull(res.Body, head[:]); err != nil {
			if err != io.EOF {
				s.err = err
			}
			return s
		}
		text := make([]byte, binary.BigEndian.Uint32(head[1:]))
		if _, s.err = io.ReadFull(res.Body, text); s.err != nil {
			return s
		}
		m := map[string]any{}
		if s.err = json.Unmarshal(text, &m); s.err != nil {
			return s
		}
		if head[0]&2 != 0 {
			s.end = m
			continue
		}
		s.messages = append(s.messages, m)
		if each != nil {
			each(m)
		}
	}
}

// command is a StartRequest for a shell command.
func command(text string) string {
	body, err := json.Marshal(map[string]any{"process": map[string]any{"cmd": "/bin/bash", "args": []string{"-c", text}}})
	if err != nil {
		panic(err)
	}
	return string(body)
}

// stdout joins the output of a stream.
func (s streamed) stdout() string {
	var all []byte
	for _, m := range s.messages {
		event, _ := m["event"].(map[string]any)
		data, _ := event["data"].(map[string]any)
		part, _ := base64.StdEncoding.DecodeString(fmt.Sprint(data["stdout"]))
		if data["stdout"] != nil {
			all = append(all, part...)
		}
	}
	return string(all)
}

// TestDebugPorts: in debug mode a server of the sandbox is reached at its own port number while it runs. A port that is already in use on
// this machine is left alone, and low ports are not served.
func TestDebugPorts(t *testing.T) {
	cmd := exec.Command(sandboxtest.Program(t, "soulbox-mcp"), "envd", "--listen=127.0.0.1:0", "--state-dir="+sandboxtest.Dir(t))
	log := &lockedBuffer{}
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := errors.Join(cmd.Process.Signal(syscall.SIGTERM), cmd.Wait()); err != nil {
			t.Errorf("%v\n%s", err, log)
		}
	}()
	var at string
	sandboxtest.Eventually(t, "it serves", func() bool {
		at, _, _ = strings.Cut(log.String(), " serves sandbox")
		return strings.HasPrefix(at, "http://")
	})
	ours, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ours.Close()
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	taken, port := ours.Addr().(*net.TCPAddr).Port, free.Addr().(*net.TCPAddr).Port
	if err := free.Close(); err != nil {
		t.Fatal(err)
	}
	b := &remoteBox{t: t, at: at, client: http.DefaultClient}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		b.stream(startCall, command(fmt.Sprintf(`python3 -c '
import os, socket
for port in 80, %d, %d:
    s = socket.create_server(("127.0.0.1", port))
    if os.fork() == 0:
        while True: s.accept()[0].send(b"inside")
s.accept()'`, taken, port)), nil)
	}()
	say := func(port int) string {
		c, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			return err.Error()
		}
		defer c.Close()
		text := make([]byte, 6)
		_, _ = io.ReadFull(c, text) // on an error the text does not match
		return string(text)
	}
	sandboxtest.Eventually(t, "it is reached", func() bool { return say(port) == "inside" })
	sandboxtest.Eventually(t, "the other is told of", func() bool {
		return strings.Contains(log.String(), "cannot be served at its own number") &&
			strings.Contains(log.String(), fmt.Sprint("port=", taken))
	})
	if strings.Contains(log.String(), "port=80 ") {
		t.Error("a low port is served, or tried")
	}
	_ = b.stream(startCall, command("pkill -f create_server"), nil) // pkill also ends its own shell
	<-ended
	sandboxtest.Eventually(t, "it is closed", func() bool { return strings.Contains(say(port), "refused") })
	first := 20000
	if os.Geteuid() != 0 { // the same test may run as root at the same time
		first = 21000
	}
	go b.stream(startCall, command(fmt.Sprintf(`python3 -c '
import select, socket
all = [socket.create_server(("127.0.0.1", port)) for port in range(%d, %d)]
while True:
    for s in select.select(all, [], [])[0]: s.accept()[0].send(b"inside")'`, first, first+2*maxServed)), nil)
	served := func() (n int) {
		for port := range 2 * maxServed {
			if say(first+port) == "inside" {
				n++
			}
		}
		return n
	}
	sandboxtest.Eventually(t, "as many are reached as may be", func() bool { return served() >= maxServed })
	if n := served(); n != maxServed {
		t.Errorf("%d are reached", n)
	}
}

const (
	startCall   = "/process.Process/Start"
	connectCall = "/process.Process/Connect"
	watchCall   = "/filesystem.Filesystem/WatchDir"
)

// TestErrorTable: every row of the table of errors in docs/protocol.md, as sent over the wire; e2b.mjs has what users see of it.
func TestErrorTable(t *testing.T) {
	w := serve(t, "", "--memory-budget-mb=700", "--memory-mb=256", "--disk-mb=64")
	b := newBox(t, w, `{"templateID":"base","timeout":600}`)
	if s := b.stream(startCall, command("echo hi"), nil); s.end == nil || len(s.end) != 0 || s.err != nil || s.stdout() != "hi\n" {
		t.Fatalf("a clean end: %+v", s)
	}
	if s := b.stream(startCall, command("sleep 1000"), nil, "Connect-Timeout-Ms", "500"); s.code() != "deadline_exceeded" || s.err != nil {
		t.Errorf("at its timeout: %+v", s)
	}
	for want, call := range map[string]func() streamed{
		"invalid_argument": func() streamed {
			return b.stream(startCall, `{"process":{"cmd":"/bin/bash","cwd":"/nosuch"}}`, nil)
		},
		"unauthenticated": func() streamed {
			return b.stream(startCall, command("true"), nil, "Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte("nosuch:")))
		},
		"not_found": func() streamed { return b.stream(connectCall, `{"process":{"pid":999999}}`, nil) },
		"resource_exhausted": func() streamed {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			for range 64 {
				started := make(chan struct{})
				go func() {
					few := *b
					few.t = contextTB{t, ctx}
					few.stream(watchCall, `{"path":"/tmp"}`, func(map[string]any) { close(started) })
				}()
				<-started
			}
			return b.stream(watchCall, `{"path":"/tmp"}`, nil)
		},
	} {
		if s := call(); s.code() != want || len(s.messages) != 0 || s.err != nil {
			t.Errorf("%s: %+v", want, s)
		}
	}
	if s := b.stream(startCall, command("true"), nil, "X-Access-Token", "wrong"); s.status != 401 {
		t.Errorf("a wrong token: %+v", s)
	}
	for _, test := range []struct {
		method, path, body string
		status             int
		want               string
		headers            []string
	}{
		{"GET", "/files?path=/tmp", "", 400, "path '/tmp' is a directory", nil},
		{"GET", "/files?path=x", "", 401, "missing signature query parameter", []string{"X-Access-Token", ""}},
		{"GET", "/files?path=x&username=nosuch", "", 401, "unknown user nosuch", nil},
		{"GET", "/files?path=/tmp/none", "", 404, "path '/tmp/none' does not exist", nil},
		{"GET", "/files?path=/etc/passwd", "", 406, "no acceptable encoding", []string{"Accept-Encoding", "br, identity;q=0"}},
		{"POST", "/files?path=/tmp/big", strings.Repeat("x", 100<<20), 507, "not enough disk space",
			[]string{"Content-Type", "application/octet-stream"}},
		{"POST", "/files", "x", 400, "name the file", []string{"Content-Type", "application/octet-stream"}},
		{"POST", "/files?path=/tmp/z", "no gzip", 400, "gzip",
			[]string{"Content-Type", "application/octet-stream", "Content-Encoding", "gzip"}},
	} {
		if status, text := b.rest(test.method, test.path, test.body, test.headers...); status != test.status ||
			!strings.Contains(text, test.want) || !strings.Contains(text, fmt.Sprintf(`"code":%d`, test.status)) {
			t.Errorf("%s %s: %d %.300s, want %d %s", test.method, test.path, status, text, test.status, test.want)
		}
	}
	if status, _ := b.rest("GET", "/files?path=/tmp/big", ""); status != 404 {
		t.Errorf("half a file is left: %d", status)
	}
	// A paused sandbox for which there is no room is reported as a limit; one that calls may not wake is reported as not found.
	sleeper := newBox(t, w, `{"templateID":"base","timeout":600,"autoPause":true,"autoResume":{"enabled":true}}`)
	if code := sleeper.control("POST", "/sandboxes/"+sleeper.id+"/pause", "{}"); code != 204 {
		t.Fatal(code)
	}
	other := newBox(t, w, `{"templateID":"base","timeout":600}`)
	if status, text := sleeper.rest("GET", "/files?path=/etc/passwd", ""); status != 429 {
		t.Errorf("no room: %d %s", status, text)
	}
	if code := other.control("POST", "/sandboxes/"+other.id+"/pause", "{}"); code != 204 {
		t.Fatal(code)
	}
	if s := other.stream(startCall, command("true"), nil); s.status != 502 {
		t.Errorf("paused for good: %+v", s)
	}
	if status, text := sleeper.rest("GET", "/files?path=/etc/passwd", ""); status != 200 || !strings.Contains(text, "root:") {
		t.Errorf("there is room: %d %s", status, text)
	}
	b.kill()
	if status, text := b.rest("GET", "/files?path=/etc/passwd", ""); status != 502 || !strings.Contains(text, "The sandbox was not found") {
		t.Errorf("killed: %d %s", status, text)
	}
	if status, _ := b.rest("GET", "/health", ""); status != 502 {
		t.Errorf("killed: %d", status)
	}
}

// contextTB is a test whose requests end earlier.
type contextTB struct {
	testing.TB
	ctx context.Context
}

// Context implements testing.TB.
func (c contextTB) Context() context.Context { return c.ctx }

func (b *remoteBox) kill() {
	b.t.Helper()
	if code := b.control("DELETE", "/sandboxes/"+b.id, ""); code != 204 {
		b.t.Error(code)
	}
}

// TestKilledAborts: streams and transfers of a sandbox that is killed, or paused to disk, break off and do not look properly ended.
func TestKilledAborts(t *testing.T) {
	w := serve(t, "", "--memory-mb=256")
	two := &http.Transport{Protocols: new(http.Protocols)}
	two.Protocols.SetUnencryptedHTTP2(true)
	defer two.CloseIdleConnections()
	for name, client := range map[string]*http.Client{"HTTP/1.1": {Transport: &http.Transport{}}, "HTTP/2": {Transport: two}} {
		for _, how := range []string{"kill", "pause"} {
			b := newBox(t, w, `{"templateID":"base","timeout":600}`)
			b.client = client
			var calls sync.WaitGroup
			began, ended := make(chan struct{}, 3), make(chan struct{})
			results := make([]streamed, 2)
			calls.Go(func() {
				results[0] = b.stream(startCall, command("echo up; sleep 1000"), func(m map[string]any) {
					if strings.Contains(fmt.Sprint(m), "data") {
						began <- struct{}{}
					}
				})
			})
			calls.Go(func() {
				results[1] = b.stream(watchCall, `{"path":"/tmp"}`, func(map[string]any) { began <- struct{}{} })
			})
			var download error
			read := 0
			calls.Go(func() {
				res, err := b.request(t.Context(), "GET", "/files?path=/dev/shm/large", nil)
				if err != nil {
					began <- struct{}{}
					download = err
					return
				}
				defer res.Body.Close()
				_, err = io.ReadFull(res.Body, make([]byte, 1000))
				began <- struct{}{}
				if err != nil || res.StatusCode != 200 {
					download = fmt.Errorf("%s %w", res.Status, err)
					return
				}
				for err == nil {
					select {
					case <-ended: // what has arrived before is read at once: it may be megabytes
					case <-time.After(time.Millisecond): // slower than it is sent
					}
					var n int
					n, err = io.ReadFull(res.Body, make([]byte, 1000))
					read += n
				}
				download = err
			})
			if s := b.stream(startCall, command("head -c 60000000 /dev/zero > /dev/shm/large"), nil); s.end == nil {
				t.Fatalf("%+v", s)
			}
			for range 3 {
				<-began
			}
			at := time.Now()
			if how == "kill" {
				b.kill()
			} else if code := b.control("POST", "/sandboxes/"+b.id+"/pause", "{}"); code != 204 {
				t.Fatal(code)
			}
			close(ended)
			calls.Wait()
			if took := time.Since(at); took > 15*time.Second {
				t.Errorf("%s, %s: after %s", name, how, took)
			} else {
				t.Logf("%s, %s: after %s", name, how, took.Round(time.Millisecond))
			}
			for i, r := range results {
				if r.end != nil || r.err == nil {
					t.Errorf("%s, %s: stream %d ended like a clean one: %+v", name, how, i, r)
				}
			}
			if read < 60_000_000-1000 && (download == nil || download == io.EOF) { // a pause may let it come to its end
				t.Errorf("%s, %s: a download ended after %d bytes like a whole one: %v", name, how, read, download)
			}
		}
	}
}

// TestNobodyReads: the connection of a client that reads nothing, or sends nothing, is also broken off when its sandbox ends.
func TestNobodyReads(t *testing.T) {
	w := serve(t, "", "--memory-mb=256")
	b := newBox(t, w, `{"templateID":"base","timeout":600}`)
	at := strings.TrimPrefix(b.at, "http://")
	var conns []net.Conn
	for range 3 {
		c, err := net.Dial("tcp", at)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		body := command("yes")
		frame := make([]byte, 5, 5+len(body))
		binary.BigEndian.PutUint32(frame[1:], uint32(len(body)))
		if _, err := fmt.Fprintf(c,
			"POST %s HTTP/1.1\r\nHost: 127.0.0.1\r\nE2b-Sandbox-Id: %s\r\nX-Access-Token: %s\r\nContent-Type: "+
				"application/connect+json\r\nContent-Length: %d\r\n\r\n%s%s", startCall, b.id, b.token, 5+len(body), frame,
			body); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c, make([]byte, 1000)); err != nil { // it has begun
			t.Fatal(err)
		}
		conns = append(conns, c)
	}
	waiting := func() (all string) { // the bytes in the kernel's queues that each connection has not read
		body, err := os.ReadFile("/proc/net/tcp")
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range conns {
			port := fmt.Sprintf(":%04X", c.LocalAddr().(*net.TCPAddr).Port)
			for line := range strings.Lines(string(body)) {
				if f := strings.Fields(line); len(f) > 4 && strings.HasSuffix(f[1], port) {
					all += f[4] + " "
				}
			}
		}
		return all
	}
	last := ""
	sandboxtest.Eventually(t, "nothing moves any more", func() bool {
		now := waiting()
		same := now == last && strings.Count(now, ":") == len(conns)
		last = now
		return same
	})
	b.kill()
	for _, c := range conns {
		if err := c.SetReadDeadline(time.Now().Add(15 * time.Second)); err != nil {
			t.Fatal(err)
		}
		_, err := io.Copy(io.Discard, c)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			t.Error("the connection is still there")
		}
	}
}

// TestLargeFile: a large file goes in and out whole, and the server's memory does not grow with it. The benchmark uses 1 GiB.
func TestLargeFile(t *testing.T) {
	w := serve(t, "")
	b := newBox(t, w, `{"templateID":"base","timeout":1200}`)
	in, out := b.transfer(256 << 20)
	t.Logf("in %.0f MB/s, out %.0f MB/s", in, out)
	if rss := peakMemory(t, w.cmd.Process.Pid); rss > 96<<20 {
		t.Errorf("the server took %d MB", rss>>20)
	} else {
		t.Logf("the server took %d MB at most", rss>>20)
	}
}

// transfer sends a file and gets it back, and returns the speeds in MB/s.
func (b *remoteBox) transfer(size int64) (in, out float64) {
	b.t.Helper()
	part := make([]byte, 1<<20)
	for i := range part {
		part[i] = byte(rand.Uint32())
	}
	sum, back := sha256.New(), sha256.New()
	began := time.Now()
	res, err := b.request(b.t.Context(), "POST", "/files?path=/tmp/large", io.TeeReader(io.LimitReader(endless{part}, size), sum),
		"Content-Type", "application/octet-stream")
	if err != nil {
		b.t.Fatal(err)
	}
	_ = res.Body.Close()
	if res.StatusCode != 200 {
		b.t.Fatal(res.Status)
	}
	in = float64(size) / time.Since(began).Seconds() / 1e6
	began = time.Now()
	res, err = b.request(b.t.Context(), "GET", "/files?path=/tmp/large", nil)
	if err != nil {
		b.t.Fatal(err)
	}
	defer res.Body.Close()
	if n, err := io.Copy(back, res.Body); err != nil || n != size || !bytes.Equal(back.Sum(nil), sum.Sum(nil)) {
		b.t.Fatalf("%d bytes, another sum or %v", n, err)
	}
	return in, float64(size) / time.Since(began).Seconds() / 1e6
}

// endless is a reader that repeats a part.
type endless struct{ part []byte }

func (e endless) Read(p []byte) (int, error) { return copy(p, e.part), nil }

// peakMemory is the most memory that a process has had, in bytes (proc(5), VmHWM).
func peakMemory(t testing.TB, pid int) int64 {
	t.Helper()
	body, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(body)) {
		if kb, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			n, err := strconv.ParseInt(strings.Fields(kb)[0], 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return n << 10
		}
	}
	t.Fatal("no VmHWM")
	return 0
}

// TestThousandRequests: 1,000 requests at once to 20 sandboxes are all answered, each by its own sandbox.
func TestThousandRequests(t *testing.T) {
	w := serve(t, "", "--memory-mb=128")
	boxes := make([]*remoteBox, sandboxtest.Amount(20, 8))
	for i := range boxes {
		boxes[i] = newBox(t, w, `{"templateID":"base","timeout":600}`)
		if status, text := boxes[i].rest("POST", "/files?path=/tmp/who", boxes[i].id, "Content-Type",
			"application/octet-stream"); status != 200 {
			t.Fatal(text)
		}
	}
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 1000}}
	defer client.CloseIdleConnections()
	var all sync.WaitGroup
	requests := sandboxtest.Amount(1000, 400)
	errs := make(chan error, requests)
	began := time.Now()
	for i := range requests {
		b := *boxes[i%len(boxes)]
		b.client = client
		all.Go(func() { errs <- b.oneOf(i / len(boxes)) })
	}
	all.Wait()
	close(errs)
	failed := 0
	for err := range errs {
		if err != nil {
			if failed++; failed < 10 {
				t.Error(err)
			}
		}
	}
	t.Logf("%d requests in %s, %d failed", requests, time.Since(began).Round(time.Millisecond), failed)
	for _, b := range boxes {
		if s := b.stream(startCall, command("cat /tmp/who"), nil); s.stdout() != b.id {
			t.Errorf("%+v", s)
		}
	}
}

// oneOf makes a request of one of several kinds.
func (b *remoteBox) oneOf(n int) error {
	switch n % 5 {
	case 0:
		if s := b.stream(startCall, command("cat /tmp/who; sleep 0.1; echo over"), nil); s.err != nil || s.stdout() != b.id+"over\n" ||
			s.end == nil || len(s.end) != 0 {
			return fmt.Errorf("start: %+v", s)
		}
		return nil
	case 1:
		return b.expect("GET", "/files?path=/tmp/who", "", 200, b.id)
	case 2:
		return b.expect("POST", "/filesystem.Filesystem/ListDir", `{"path":"/tmp"}`, 200, `"who"`)
	case 3:
		return b.expect("POST", "/files?path=/tmp/f"+strconv.Itoa(n), strings.Repeat("y", 10_000), 200, `"type":"file"`)
	}
	return b.expect("POST", "/process.Process/List", "{}", 200, "{")
}

func (b *remoteBox) expect(method, path, body string, status int, want string) error {
	kind := "application/json"
	if strings.HasPrefix(path, "/files?") {
		kind = "application/octet-stream"
	}
	res, err := b.request(b.t.Context(), method, path, strings.NewReader(body), "Content-Type", kind)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err == nil && (res.StatusCode != status || !strings.Contains(string(text), want)) {
		err = errors.New(res.Status)
	}
	if err != nil {
		return fmt.Errorf("%s %s: %w %.200s", method, path, err, text)
	}
	return nil
}

// TestOneDomain: MCP clients find what the SDK makes, and the other way round; a link to a file works for anyone who has it.
func TestOneDomain(t *testing.T) {
	w := serve(t, "", "--memory-mb=256")
	b := newBox(t, w, `{"templateID":"base","timeout":600,"metadata":{"by":"sdk"}}`)
	c := w.client("", true)
	call := func(name string, args map[string]any) (out map[string]any) {
		t.Helper()
		a, err := c.Call(t.Context(), name, args)
		var result struct {
			IsError           bool
			StructuredContent map[string]any
		}
		if err != nil || json.Unmarshal(a.Result, &result) != nil || result.IsError {
			t.Fatalf("%s: %v %s", name, err, a.Text())
		}
		return result.StructuredContent
	}
	if list := fmt.Sprint(call("sandbox_list", map[string]any{"metadata": map[string]any{"by": "sdk"}})); !strings.Contains(list, b.id) {
		t.Error(list)
	}
	if out := call("exec", map[string]any{"sandbox_id": b.id, "command": "echo from MCP | tee /tmp/f"})["output"]; out != "from MCP\n" {
		t.Error(out)
	}
	if status, text := b.rest("GET", "/files?path=/tmp/f", ""); status != 200 || text != "from MCP\n" {
		t.Error(status, text)
	}
	made := fmt.Sprint(call("sandbox_create", nil)["sandbox_id"])
	link := fmt.Sprint(call("file_url", map[string]any{"sandbox_id": made, "path": "/tmp/up", "operation": "write"})["url"])
	res, err := http.Post(link, "application/octet-stream", strings.NewReader("by link"))
	if err != nil || res.StatusCode != 200 {
		t.Fatal(res, err)
	}
	_ = res.Body.Close()
	link = fmt.Sprint(call("file_url", map[string]any{"sandbox_id": made, "path": "/tmp/up"})["url"])
	if res, err = http.Get(link); err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil || string(text) != "by link" || !strings.HasPrefix(res.Header.Get("Content-Disposition"), "attachment") ||
		res.Header.Get("Content-Security-Policy") != "sandbox" {
		t.Errorf("%s %q %v %v", res.Status, text, res.Header, err)
	}
	if bad, err := http.Get(strings.Replace(link, "up", "f", 1)); err != nil || bad.StatusCode != 401 {
		t.Error(bad, err)
	}
	theirs := &remoteBox{t: t, at: b.at, id: made, client: http.DefaultClient}
	if code := theirs.control("POST", "/v2/sandboxes/"+made+"/connect", `{"timeout":100}`); code != 200 {
		t.Error(code)
	}
	theirs.kill()
	if a, err := c.Call(t.Context(), "exec", map[string]any{"sandbox_id": made, "command": "true"}); err != nil ||
		!strings.Contains(a.Text(), "killed") {
		t.Error("it is still there", err)
	}
	call("sandbox_kill", map[string]any{"sandbox_id": b.id, "confirm": true})
	if code := b.control("GET", "/sandboxes/"+b.id, ""); code != 404 {
		t.Error(code)
	}
}
