package guest

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/yamux"
	"soulbox.dev/soulbox/agent"
)

// pair is a client and a server on an in-memory pipe, with real processes of this machine.
func pair(t testing.TB) (*agent.Client, string) {
	t.Helper()
	dir := t.TempDir()
	server, err := NewServer(Options{Version: "test", SpoolDir: filepath.Join(dir, "spool"), Home: dir})
	if err != nil {
		t.Fatal(err)
	}
	host, guest := net.Pipe()
	served := make(chan error, 1)
	go func() { served <- server.Serve(guest) }()
	client, err := agent.NewClient(t.Context(), host, "test")
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

// run runs a command until it ends.
func run(t testing.TB, c *agent.Client, req agent.StartRequest) agent.Snapshot {
	t.Helper()
	req.WaitMS = 60_000
	if req.Window == (agent.Window{}) {
		req.Window = agent.Window{Head: agent.MaxWindow}
	}
	s, err := c.Start(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	if s.Process.State != agent.StateExited {
		t.Fatalf("%q is still running", req.Command)
	}
	return s
}

func eventually(t testing.TB, what string, holds func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !holds(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within 30 s: %s", what)
		}
	}
}

func TestStart(t *testing.T) {
	c, dir := pair(t)
	for name, test := range map[string]struct {
		req  agent.StartRequest
		out  string
		code int
	}{
		"both streams":        {agent.StartRequest{Command: "echo out; echo err >&2; exit 3"}, "out\nerr\n", 3},
		"no shell needed":     {agent.StartRequest{Command: "uname -s"}, "Linux\n", 0},
		"args":                {agent.StartRequest{Args: []string{"printf", "%s|", "a b", "$c"}}, "a b|$c|", 0},
		"cwd":                 {agent.StartRequest{Command: "pwd", Cwd: "/usr"}, "/usr\n", 0},
		"home":                {agent.StartRequest{Command: "pwd"}, dir + "\n", 0},
		"env":                 {agent.StartRequest{Command: "echo $X", Env: map[string]string{"X": "a\nb"}}, "a b\n", 0},
		"stdin":               {agent.StartRequest{Command: "cat", Stdin: []byte("hello")}, "hello", 0},
		"no stdin":            {agent.StartRequest{Command: "cat"}, "", 0},
		"no such command":     {agent.StartRequest{Command: "no-such-command"}, "", 127},
		"not executable":      {agent.StartRequest{Command: "/etc/passwd"}, "", 126},
		"not text":            {agent.StartRequest{Command: `printf '\xff\x00\n'`}, "\xff\x00\n", 0},
		"a builtin":           {agent.StartRequest{Command: "type -t cd"}, "builtin\n", 0},
		"an assignment":       {agent.StartRequest{Command: "X=1 env | grep -c ^X=1"}, "1\n", 0},
		"a slow background":   {agent.StartRequest{Command: "echo a; sleep 600 & echo b"}, "a\nb\n", 0},
		"ended by a signal":   {agent.StartRequest{Command: "kill -TERM $$"}, "", 128 + 15},
		"a script of no kind": {agent.StartRequest{Command: "echo 'echo hi' > s; chmod +x s; ./s"}, "hi\n", 0},
	} {
		s := run(t, c, test.req)
		if test.out != "" && string(s.Output.Head) != test.out || s.Process.ExitCode != test.code {
			t.Errorf("%s: got %q and %d, want %q and %d", name, s.Output.Head, s.Process.ExitCode, test.out, test.code)
		}
	}
}

func TestStartRefuses(t *testing.T) {
	c, _ := pair(t)
	if _, err := c.Start(t.Context(), agent.StartRequest{Command: "sleep 600", Tag: "taken"}); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		req  agent.StartRequest
		want error
	}{
		"nothing":          {agent.StartRequest{}, agent.ErrInvalid},
		"both":             {agent.StartRequest{Command: "a", Args: []string{"b"}}, agent.ErrInvalid},
		"a NUL":            {agent.StartRequest{Command: "echo a\x00b"}, agent.ErrInvalid},
		"a long command":   {agent.StartRequest{Command: strings.Repeat("x", agent.MaxCommand+1)}, agent.ErrCommand},
		"no such cwd":      {agent.StartRequest{Command: "true", Cwd: "/no/such"}, agent.ErrCwd},
		"a file as cwd":    {agent.StartRequest{Command: "true", Cwd: "/etc/passwd"}, agent.ErrCwd},
		"a relative cwd":   {agent.StartRequest{Command: "true", Cwd: "tmp"}, agent.ErrInvalid},
		"no such user":     {agent.StartRequest{Command: "true", User: "nobody-here"}, agent.ErrNoUser},
		"a tag in use":     {agent.StartRequest{Command: "true", Tag: "taken"}, agent.ErrTagInUse},
		"a long tag":       {agent.StartRequest{Command: "true", Tag: strings.Repeat("x", maxTag+1)}, agent.ErrInvalid},
		"a tag like an id": {agent.StartRequest{Command: "true", Tag: "p12"}, agent.ErrInvalid},
		"a bad variable":   {agent.StartRequest{Command: "true", Env: map[string]string{"A=B": "c"}}, agent.ErrInvalid},
		"no such program":  {agent.StartRequest{Args: []string{"no-such-program"}}, fs.ErrNotExist},
		"a directory":      {agent.StartRequest{Args: []string{"/usr"}}, fs.ErrPermission},
	} {
		if _, err := c.Start(t.Context(), test.req); !errors.Is(err, test.want) {
			t.Errorf("%s: got %v, want %v", name, err, test.want)
		}
	}
	list, err := c.List(t.Context(), agent.ListRequest{})
	if err != nil || len(list) != 1 {
		t.Fatalf("what was refused left something: %v %v", list, err)
	}
}

func TestTags(t *testing.T) {
	c, _ := pair(t)
	first, err := c.Start(t.Context(), agent.StartRequest{Command: "sleep 600", Tag: "web"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Signal(t.Context(), "web", "kill"); err != nil {
		t.Fatal(err)
	}
	s, err := c.Wait(t.Context(), agent.WaitRequest{Process: "web", WaitMS: 60_000})
	if err != nil || s.Process.Signal != "SIGKILL" || s.Process.ExitCode != 137 {
		t.Fatal(s, err)
	}
	second := run(t, c, agent.StartRequest{Command: "true", Tag: "web"})
	list, err := c.List(t.Context(), agent.ListRequest{Tag: "web"})
	if err != nil || len(list) != 2 || list[0].ID != second.Process.ID || list[1].ID != first.Process.ID {
		t.Fatal(list, err)
	}
}

func TestWaitYieldsAndIsCancelled(t *testing.T) {
	c, _ := pair(t)
	s, err := c.Start(t.Context(), agent.StartRequest{Command: "echo partial; exec sleep 600", WaitMS: 1, Window: agent.Window{Head: 100}})
	if err != nil || s.Process.State != agent.StateRunning {
		t.Fatal(s, err)
	}
	eventually(t, "partial output while it runs", func() bool {
		s, err := c.Wait(t.Context(), agent.WaitRequest{Process: s.Process.ID, Window: agent.Window{Head: 100}})
		return err == nil && string(s.Output.Head) == "partial\n"
	})
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(10*time.Millisecond, cancel)
	if _, err := c.Wait(ctx, agent.WaitRequest{Process: s.Process.ID, WaitMS: 600_000}); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	if list, err := c.List(t.Context(), agent.ListRequest{State: agent.StateRunning}); err != nil || len(list) != 1 {
		t.Fatalf("cancelling a wait ended the process: %v %v", list, err)
	}
}

func TestTimeout(t *testing.T) {
	c, _ := pair(t)
	s := run(t, c, agent.StartRequest{Command: "trap '' TERM; echo on; sleep 600; sleep 600", TimeoutMS: 50})
	if s.Process.Cause != agent.CauseTimeout || string(s.Output.Head) != "on\n" {
		t.Fatalf("%+v", s.Process)
	}
}

func TestBackgroundChild(t *testing.T) {
	c, _ := pair(t)
	s := run(t, c, agent.StartRequest{Command: "(while :; do echo tick; sleep 0.01; done) & echo leader"})
	if s.Process.State != agent.StateExited {
		t.Fatal("the call was held")
	}
	before := s.Output.End
	eventually(t, "the child's output goes on", func() bool {
		s, err := c.Wait(t.Context(), agent.WaitRequest{Process: s.Process.ID})
		return err == nil && s.Output.End > before
	})
}

func TestStdin(t *testing.T) {
	c, _ := pair(t)
	s, err := c.Start(t.Context(), agent.StartRequest{Command: "cat", KeepStdin: true, Stdin: []byte("one ")})
	if err != nil {
		t.Fatal(err)
	}
	id := s.Process.ID
	eventually(t, "the first input", func() bool {
		s, err := c.Wait(t.Context(), agent.WaitRequest{Process: id, Window: agent.Window{Head: 10}})
		return err == nil && string(s.Output.Head) == "one "
	})
	if n, err := c.WriteStdin(t.Context(), id, []byte("two"), true); n != 3 || err != nil {
		t.Fatal(n, err)
	}
	s, err = c.Wait(t.Context(), agent.WaitRequest{Process: id, WaitMS: 60_000, Window: agent.Window{Head: 100}})
	if err != nil || string(s.Output.Head) != "one two" {
		t.Fatalf("%q %v", s.Output.Head, err)
	}
	if _, err := c.WriteStdin(t.Context(), id, []byte("x"), false); !errors.Is(err, agent.ErrEnded) {
		t.Fatal(err)
	}
	if _, err := c.WriteStdin(t.Context(), "p99", []byte("x"), false); !errors.Is(err, agent.ErrNoProcess) {
		t.Fatal(err)
	}
	s, err = c.Start(t.Context(), agent.StartRequest{Command: "sleep 600"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.WriteStdin(t.Context(), s.Process.ID, []byte("x"), false); !errors.Is(err, agent.ErrStdin) {
		t.Fatal(err)
	}
}

// TestStdinBackPressure: a process that does not read blocks only its own writer.
func TestStdinBackPressure(t *testing.T) {
	c, _ := pair(t)
	var n int64
	var err error
	for limit := 200 * time.Millisecond; n == 0 && limit < time.Minute; limit *= 2 { // until there was time for the first bytes
		s, serr := c.Start(t.Context(), agent.StartRequest{Command: "sleep 600", KeepStdin: true})
		if serr != nil {
			t.Fatal(serr)
		}
		ctx, cancel := context.WithTimeout(t.Context(), limit)
		n, err = c.WriteStdin(ctx, s.Process.ID, bytes.Repeat([]byte("x"), 4<<20), false)
		cancel()
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Fatal(n, err)
		}
	}
	if n <= 0 || n >= 4<<20 {
		t.Fatal(n, err)
	}
	run(t, c, agent.StartRequest{Command: "true"})
}

func TestOutputStream(t *testing.T) {
	c, _ := pair(t)
	s, err := c.Start(t.Context(), agent.StartRequest{Command: "for i in 1 2 3; do echo out$i; echo err$i >&2; done; read x; echo $x",
		KeepStdin: true})
	if err != nil {
		t.Fatal(err)
	}
	var all bytes.Buffer
	wrote := false
	err = c.Output(t.Context(), s.Process.ID, 0, true, func(f agent.OutputFrame) error {
		if f.End != nil {
			if f.End.ExitCode != 0 || f.Offset != int64(all.Len()) {
				t.Errorf("the end: %+v at %d", f.End, f.Offset)
			}
			return nil
		}
		if f.Offset != int64(all.Len()) {
			t.Errorf("frame at %d, want %d", f.Offset, all.Len())
		}
		if want := strings.HasPrefix(string(f.Data), "err"); want != (f.Stream == "stderr") && !strings.Contains(string(f.Data), "live") {
			t.Errorf("%q on %s", f.Data, f.Stream)
		}
		all.Write(f.Data)
		if !wrote && all.Len() == len("out1err1")*3+6 {
			wrote = true
			_, err := c.WriteStdin(t.Context(), s.Process.ID, []byte("live\n"), true)
			return err
		}
		return nil
	})
	if err != nil || !strings.HasSuffix(all.String(), "live\n") {
		t.Fatalf("%q %v", all.String(), err)
	}
}

func TestReplayIsExact(t *testing.T) {
	c, _ := pair(t)
	const lines = 4_000_000 // 31 MB, about twice the spool
	s := run(t, c, agent.StartRequest{Command: fmt.Sprintf("seq -f %%07.0f 1 %d", lines), Window: agent.Window{Head: 100, Tail: 100}})
	total := int64(lines * 8)
	if s.Process.Output != total || s.Process.Dropped != total-16<<20 || s.Output.Dropped != s.Process.Dropped {
		t.Fatalf("%+v", s.Process)
	}
	want := make([]byte, 0, total)
	for i := range lines {
		n := i + 1
		for digit := 1_000_000; digit > 0; digit /= 10 {
			want = append(want, byte('0'+n/digit%10))
		}
		want = append(want, '\n')
	}
	for _, from := range []int64{0, 5, spoolHead - 3, total / 2, total - 1000, total} {
		next := from
		err := c.Output(t.Context(), s.Process.ID, from, false, func(f agent.OutputFrame) error {
			if f.End == nil && f.Offset < next {
				return fmt.Errorf("offset %d after %d", f.Offset, next)
			}
			if f.End == nil && !bytes.Equal(f.Data, want[f.Offset:f.Offset+int64(len(f.Data))]) {
				return fmt.Errorf("wrong bytes at %d", f.Offset)
			}
			next = f.Offset + int64(len(f.Data))
			return nil
		})
		if err != nil || next != total {
			t.Fatalf("from %d: ended at %d: %v", from, next, err)
		}
	}
}

func TestEndedProcessesAreForgotten(t *testing.T) {
	c, _ := pair(t)
	for range endedKept + 20 {
		run(t, c, agent.StartRequest{Command: "/bin/true"})
	}
	eventually(t, "old ones are forgotten", func() bool {
		list, err := c.List(t.Context(), agent.ListRequest{})
		return err == nil && len(list) == endedKept && list[0].ID == fmt.Sprintf("p%d", endedKept+20)
	})
	if _, err := c.Wait(t.Context(), agent.WaitRequest{Process: "p1"}); !errors.Is(err, agent.ErrNoProcess) {
		t.Fatal(err)
	}
}

func TestDial(t *testing.T) {
	c, _ := pair(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		body, _ := io.ReadAll(conn) // until our half is closed
		_, _ = conn.Write(append([]byte("got "), body...))
	}()
	conn, err := c.Dial(t.Context(), "tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	if err := conn.Close(); err != nil {
		t.Fatal(err)
	}
	if body, err := io.ReadAll(conn); string(body) != "got hello" {
		t.Fatalf("%q %v", body, err)
	}
	for _, address := range []string{"192.0.2.1:80", "localhost:80", "nonsense"} {
		if _, err := c.Dial(t.Context(), "tcp", address); !errors.Is(err, agent.ErrInvalid) {
			t.Errorf("dial %s: %v", address, err)
		}
	}
	if _, err := c.Dial(t.Context(), "tcp", "127.0.0.1:1"); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Error(err)
	}
}

func TestVersionMismatch(t *testing.T) {
	server, err := NewServer(Options{Version: "new"})
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	host, guest := net.Pipe()
	go func() { _ = server.Serve(guest) }()
	if err := agent.WriteHello(host, agent.Hello{Protocol: 99, Version: "future"}); err != nil {
		t.Fatal(err)
	}
	var h agent.Hello
	if err := agent.ReadHello(bufio.NewReader(host), &h); err != nil || !strings.Contains(h.Error, "99") {
		t.Fatal(h, err)
	}

	host, guest = net.Pipe()
	go func() {
		var h agent.Hello
		_ = agent.ReadHello(bufio.NewReader(guest), &h)
		_ = agent.WriteHello(guest, agent.Hello{Protocol: 7, Version: "old"})
	}()
	if _, err := agent.NewClient(t.Context(), host, "new"); !errors.Is(err, agent.ErrVersion) || !strings.Contains(err.Error(), `"old"`) {
		t.Fatal(err)
	}
}

// TestHostileGuest: whatever a guest sends, the host returns a clear error.
func TestHostileGuest(t *testing.T) {
	greet := func(guest net.Conn) {
		var h agent.Hello
		_ = agent.ReadHello(bufio.NewReader(guest), &h)
		_ = agent.WriteHello(guest, agent.Hello{Protocol: agent.Protocol})
	}
	// stream answers on the control stream with raw bytes.
	stream := func(bytes []byte) func(net.Conn) {
		return func(guest net.Conn) {
			greet(guest)
			session, err := yamux.Server(guest, agent.MuxConfig())
			if err != nil {
				return
			}
			s, err := session.AcceptStream()
			if err != nil {
				return
			}
			_, _ = s.Write(bytes)
		}
	}
	for name, guest := range map[string]func(net.Conn){
		"silence then end":  func(g net.Conn) { greet(g); _ = g.Close() },
		"no handshake":      func(g net.Conn) { _ = g.Close() },
		"a long handshake":  func(g net.Conn) { _, _ = g.Write(bytes.Repeat([]byte("x"), agent.MaxHello+10)) },
		"a bad handshake":   func(g net.Conn) { _, _ = g.Write([]byte("{]\n")) },
		"not yamux":         func(g net.Conn) { greet(g); _, _ = g.Write(bytes.Repeat([]byte{0xff}, 100)) },
		"a huge message":    stream([]byte{0xff, 0xff, 0xff, 0xff, 'x'}),
		"not JSON":          stream([]byte{0, 0, 0, 1, '{'}),
		"an unknown answer": stream([]byte("\x00\x00\x00\x2b{\"jsonrpc\":\"2.0\",\"id\":999,\"result\":\"hello\"}")),
		"its own stream": func(g net.Conn) {
			greet(g)
			if session, err := yamux.Server(g, agent.MuxConfig()); err == nil {
				_, _ = session.OpenStream()
			}
		},
		"a ping": func(g net.Conn) {
			greet(g)
			_, _ = g.Write([]byte{0, 2, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1})
		},
		"its own call": stream(message(`{"jsonrpc":"2.0","id":1,"method":"start","params":{}}`)),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel() // it mostly waits
			host, g := net.Pipe()
			go func() {
				guest(g)
				go func() { _, _ = io.Copy(io.Discard, g) }()
			}()
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
			defer cancel()
			c, err := agent.NewClient(ctx, host, "test")
			if err == nil {
				defer c.Close()
				_, err = c.List(ctx, agent.ListRequest{})
			}
			if name == "an unknown answer" {
				if err == nil {
					t.Fatal("no error")
				}
				_ = g.Close()
				return
			}
			if !errors.Is(err, agent.ErrLost) {
				t.Fatalf("got %v", err)
			}
			_ = g.Close()
		})
	}
}

// TestForgedRead: a guest cannot make the host accept more than it asked for.
func TestForgedRead(t *testing.T) {
	host, g := net.Pipe()
	go func() {
		var h agent.Hello
		_ = agent.ReadHello(bufio.NewReader(g), &h)
		_ = agent.WriteHello(g, agent.Hello{Protocol: agent.Protocol})
		session, err := yamux.Server(g, agent.MuxConfig())
		if err != nil {
			return
		}
		_, _ = session.AcceptStream() // rpc
		s, err := session.AcceptStream()
		if err != nil {
			return
		}
		_ = agent.WriteMessage(s, agent.Answer{Info: &agent.FileInfo{}})
		_, _ = agent.WriteChunks(s, readerFunc(func(p []byte) (int, error) { return len(p), nil })) // without end
	}()
	c, err := agent.NewClient(t.Context(), host, "test")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	r, _, err := c.ReadFile(t.Context(), "/x", 0, 1000)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if body, err := io.ReadAll(r); !errors.Is(err, agent.ErrLost) || len(body) > 1000 {
		t.Fatalf("%d bytes, %v", len(body), err)
	}
}

// TestLargeAnswers: large answers are cut or become an error, but are never lost.
func TestLargeAnswers(t *testing.T) {
	c, dir := pair(t)
	for i := range 4000 {
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("%s%04d", strings.Repeat("<\x01", 100), i)), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if r, err := c.Dir(t.Context(), agent.DirRequest{Path: dir}); err != nil || !r.More || len(r.Entries) < 100 {
		t.Fatal(len(r.Entries), err)
	}
	if err := os.WriteFile(filepath.Join(dir, "text"), bytes.Repeat([]byte(strings.Repeat("<", 299)+"\n"), 2000), 0o600); err != nil {
		t.Fatal(err)
	}
	if r, err := c.Search(t.Context(), agent.SearchRequest{Path: dir, Pattern: "<", Glob: "text"}); err != nil || !r.More ||
		len(r.Matches) < 100 {
		t.Fatal(len(r.Matches), err)
	}
	if _, err := c.Start(t.Context(), agent.StartRequest{Command: "cat", Stdin: make([]byte, 900_000)}); !errors.Is(err,
		agent.ErrTooLarge) ||
		errors.Is(err, agent.ErrLost) {
		t.Fatal(err)
	}
	run(t, c, agent.StartRequest{Command: "true"})
}

// TestCancelReachesGuest: cancelling a wait on the host also ends it in the guest.
func TestCancelReachesGuest(t *testing.T) {
	c, _ := pair(t)
	s, err := c.Start(t.Context(), agent.StartRequest{Command: "exec sleep 600"})
	if err != nil {
		t.Fatal(err)
	}
	waiting := func() int {
		buf := make([]byte, 4<<20)
		return strings.Count(string(buf[:runtime.Stack(buf, true)]), "guest.(*process).wait(")
	}
	ctx, cancel := context.WithCancel(t.Context())
	for range 10 {
		go func() { _, _ = c.Wait(ctx, agent.WaitRequest{Process: s.Process.ID, WaitMS: 600_000}) }()
	}
	eventually(t, "ten waits", func() bool { return waiting() == 10 })
	cancel()
	eventually(t, "no wait", func() bool { return waiting() == 0 })
}

// TestOrphan: an agent without a host ends by itself, even with an open connection that a host asked for.
func TestOrphan(t *testing.T) {
	server, err := NewServer(Options{Version: "test"})
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	host, guest := net.Pipe()
	go func() { _ = server.Serve(guest) }()
	c, err := agent.NewClient(t.Context(), host, "test")
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Configure(t.Context(), agent.Config{OrphanMS: 20}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Dial(t.Context(), "tcp", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
	<-server.Done()
}

func message(body string) []byte {
	var b bytes.Buffer
	_ = agent.WriteMessage(&b, json.RawMessage(body))
	return b.Bytes()
}

func FuzzDecoders(f *testing.F) {
	f.Add([]byte("\x00\x00\x00\x02{}"))
	f.Add([]byte("\x00\x00\x00\x03abc\x00\x00\x00\x00\x00\x00\x00\x02{}"))
	f.Add([]byte("\x01\x00\x00\x00\x00\x00\x00\x00\x05\x00\x00\x00\x02ab"))
	f.Add([]byte("{\"protocol\":1}\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		var h agent.Header
		_ = agent.ReadMessage(bytes.NewReader(data), &h)
		var a agent.Answer
		_ = agent.ReadMessage(bytes.NewReader(data), &a)
		if a.Error != nil {
			_ = a.Error.Unwrap()
		}
		if body, err := io.ReadAll(&agent.ChunkReader{R: bytes.NewReader(data)}); err == nil && len(body) > len(data) {
			t.Fatal("more came out than went in")
		}
		_, _, _, _ = agent.ReadFrame(bytes.NewReader(data))
		var greeting agent.Hello
		_ = agent.ReadHello(bufio.NewReaderSize(bytes.NewReader(data), agent.MaxHello), &greeting)
	})
}
