package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"soulbox.dev/soulbox/internal/sandboxtest"
)

func TestMain(m *testing.M) {
	sandboxtest.Main(m, "TestDoctorAndDemo", "TestWork", "TestServerKilled", "TestKilledInUse", "TestTwoServers", "TestTemplatesOverStdio",
		"TestErrorTable", "TestForks", "TestCertUnreadable")
}

// program is a running soulbox-mcp stdio and its client, which speaks plain JSON lines.
type program struct {
	t     testing.TB
	state string
	cmd   *exec.Cmd
	in    io.WriteCloser

	mu      sync.Mutex
	waiting map[string]chan message
	notes   []message
	ended   chan struct{}
	nextID  int
}

// message is a message from the server.
type message struct {
	ID     json.RawMessage `json:"id"`
	Method string          `json:"method"`
	Params map[string]any  `json:"params"`
	Error  *struct {
		Code    int    `json:"code"`
		Message string `json:"message"`
	} `json:"error"`
	Result struct {
		IsError           bool           `json:"isError"`
		StructuredContent map[string]any `json:"structuredContent"`
		Content           []struct {
			Text string `json:"text"`
		} `json:"content"`
		Contents []struct {
			Text string `json:"text"`
		} `json:"contents"`
	} `json:"result"`
	notesBefore int
}

func (m message) text() string {
	var b strings.Builder
	for _, c := range m.Result.Content {
		b.WriteString(c.Text)
	}
	return b.String()
}

// launch starts the server on a state directory, which is made if it is "".
func launch(t testing.TB, state string, flags ...string) *program {
	t.Helper()
	if state == "" {
		state = sandboxtest.Dir(t)
	}
	p := &program{t: t, state: state, waiting: map[string]chan message{}, ended: make(chan struct{})}
	p.cmd = exec.Command(sandboxtest.Program(t, "soulbox-mcp"),
		append([]string{"stdio", "--state-dir=" + state, "--log-level=warn"}, flags...)...)
	p.cmd.Env = []string{sandboxtest.RuntimeEnv(), "HOME=" + state, "PATH=/usr/bin:/bin"}
	p.cmd.Stderr = os.Stderr
	var err error
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go p.read(out)
	t.Cleanup(func() { p.close() })
	p.await(p.request("initialize", map[string]any{"protocolVersion": "2025-06-18", "capabilities": map[string]any{},
		"clientInfo": map[string]any{"name": "test", "version": "1"}}))
	p.send(map[string]any{"jsonrpc": "2.0", "method": "notifications/initialized"})
	return p
}

// close ends the conversation and waits for the server to end by itself. It may be called twice.
func (p *program) close() {
	_ = p.in.Close()
	<-p.ended
	if p.cmd.ProcessState == nil {
		if err := p.cmd.Wait(); err != nil {
			p.t.Errorf("the server ended with %v", err)
		}
	}
}

func (p *program) read(out io.Reader) {
	defer close(p.ended)
	lines := bufio.NewReaderSize(out, 1<<20)
	for {
		line, err := lines.ReadBytes('\n')
		if err != nil {
			return
		}
		var m message
		if err := json.Unmarshal(line, &m); err != nil {
			p.t.Errorf("stdout carries %q", line)
			continue
		}
		p.mu.Lock()
		if m.Method != "" {
			p.notes = append(p.notes, m)
		} else if to := p.waiting[string(m.ID)]; to != nil {
			m.notesBefore = len(p.notes)
			to <- m
			delete(p.waiting, string(m.ID))
		} else {
			p.t.Errorf("an answer that nobody waits for: %s", line)
		}
		p.mu.Unlock()
	}
}

func (p *program) send(m any) {
	line, err := json.Marshal(m)
	if err != nil {
		p.t.Fatal(err)
	}
	if _, err := p.in.Write(append(line, '\n')); err != nil {
		p.t.Error(err)
	}
}

// pending is a request that has been sent.
type pending struct {
	id     int
	answer chan message
}

func (p *program) request(method string, params map[string]any) pending {
	p.mu.Lock()
	p.nextID++
	r := pending{p.nextID, make(chan message, 1)}
	p.waiting[strconv.Itoa(r.id)] = r.answer
	p.mu.Unlock()
	p.send(map[string]any{"jsonrpc": "2.0", "id": r.id, "method": method, "params": params})
	return r
}

// await waits for an answer. If the server ends instead, the test fails.
func (p *program) await(r pending) message {
	p.t.Helper()
	select {
	case m := <-r.answer:
		return m
	case <-p.ended:
		select {
		case m := <-r.answer:
			return m
		default:
			p.t.Fatal("the server ended")
			return message{}
		}
	}
}

// start sends a tool call.
func (p *program) start(tool string, args map[string]any) pending {
	return p.request("tools/call", map[string]any{"name": tool, "arguments": args})
}

// call makes a tool call that must succeed.
func (p *program) call(tool string, args map[string]any) message {
	p.t.Helper()
	m := p.await(p.start(tool, args))
	if m.Error != nil || m.Result.IsError {
		p.t.Fatalf("%s %v: %s %+v", tool, args, m.text(), m.Error)
	}
	return m
}

// exec runs a command that must end, and returns its output.
func (p *program) exec(command string) string {
	p.t.Helper()
	m := p.call("exec", map[string]any{"command": command, "yield_ms": 50_000})
	if m.Result.StructuredContent["state"] != "exited" {
		p.t.Fatalf("%s: %s", command, m.text())
	}
	return fmt.Sprint(m.Result.StructuredContent["output"])
}

// rss is the server's resident memory in bytes.
func (p *program) rss() int64 { return rssOf(p.t, p.cmd.Process.Pid) }

// rssOf is the resident memory of a process, in bytes.
func rssOf(t testing.TB, pid int) int64 {
	t.Helper()
	body, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "status"))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(body)) {
		var kb int64
		if n, _ := fmt.Sscanf(line, "VmRSS: %d kB", &kb); n == 1 {
			return kb << 10
		}
	}
	t.Fatal("no VmRSS")
	return 0
}
