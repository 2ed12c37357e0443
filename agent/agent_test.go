package agent

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
)

// TestMain checks that no goroutine outlives the tests.
func TestMain(m *testing.M) {
	code := m.Run()
	for end := time.Now().Add(10 * time.Second); code == 0; time.Sleep(10 * time.Millisecond) {
		buf := make([]byte, 1<<20)
		stacks := string(buf[:runtime.Stack(buf, true)])
		if !strings.Contains(stacks, "soulbox/agent.(") && !strings.Contains(stacks, "yamux") {
			break
		}
		if time.Now().After(end) {
			fmt.Fprintf(os.Stderr, "goroutines are left:\n%s", stacks)
			code = 1
		}
	}
	os.Exit(code)
}

// pair is a client and a server on an in-memory pipe, with real processes of this machine.
func pair(t testing.TB) (*Client, string) {
	t.Helper()
	dir := t.TempDir()
	server, err := NewServer(Options{Version: "test", SpoolDir: filepath.Join(dir, "spool"), Home: dir})
	if err != nil {
		t.Fatal(err)
	}
	host, guest := net.Pipe()
	served := make(chan error, 1)
	go func() { served <- server.Serve(guest) }()
	client, err := NewClient(t.Context(), host, "test")
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

// run runs a command to its end.
func run(t testing.TB, c *Client, req StartRequest) Snapshot {
	t.Helper()
	req.WaitMS = 60_000
	if req.Window == (Window{}) {
		req.Window = Window{Head: maxWindow}
	}
	s, err := c.Start(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	if s.Process.State != StateExited {
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
		req  StartRequest
		out  string
		code int
	}{
		"both streams":        {StartRequest{Command: "echo out; echo err >&2; exit 3"}, "out\nerr\n", 3},
		"no shell needed":     {StartRequest{Command: "uname -s"}, "Linux\n", 0},
		"args":                {StartRequest{Args: []string{"printf", "%s|", "a b", "$c"}}, "a b|$c|", 0},
		"cwd":                 {StartRequest{Command: "pwd", Cwd: "/usr"}, "/usr\n", 0},
		"home":                {StartRequest{Command: "pwd"}, dir + "\n", 0},
		"env":                 {StartRequest{Command: "echo $X", Env: map[string]string{"X": "a\nb"}}, "a b\n", 0},
		"stdin":               {StartRequest{Command: "cat", Stdin: []byte("hello")}, "hello", 0},
		"no stdin":            {StartRequest{Command: "cat"}, "", 0},
		"no such command":     {StartRequest{Command: "no-such-command"}, "", 127},
		"not executable":      {StartRequest{Command: "/etc/passwd"}, "", 126},
		"not text":            {StartRequest{Command: `printf '\xff\x00\n'`}, "\xff\x00\n", 0},
		"a builtin":           {StartRequest{Command: "type -t cd"}, "builtin\n", 0},
		"an assignment":       {StartRequest{Command: "X=1 env | grep -c ^X=1"}, "1\n", 0},
		"a slow background":   {StartRequest{Command: "echo a; sleep 600 & echo b"}, "a\nb\n", 0},
		"ended by a signal":   {StartRequest{Command: "kill -TERM $$"}, "", 128 + 15},
		"a script of no kind": {StartRequest{Command: "echo 'echo hi' > s; chmod +x s; ./s"}, "hi\n", 0},
	} {
		s := run(t, c, test.req)
		if test.out != "" && string(s.Output.Head) != test.out || s.Process.ExitCode != test.code {
			t.Errorf("%s: got %q and %d, want %q and %d", name, s.Output.Head, s.Process.ExitCode, test.out, test.code)
		}
	}
}

func TestStartRefuses(t *testing.T) {
	c, _ := pair(t)
	if _, err := c.Start(t.Context(), StartRequest{Command: "sleep 600", Tag: "taken"}); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		req  StartRequest
		want error
	}{
		"nothing":          {StartRequest{}, ErrInvalid},
		"both":             {StartRequest{Command: "a", Args: []string{"b"}}, ErrInvalid},
		"a NUL":            {StartRequest{Command: "echo a\x00b"}, ErrInvalid},
		"a long command":   {StartRequest{Command: strings.Repeat("x", maxCommand+1)}, ErrCommand},
		"no such cwd":      {StartRequest{Command: "true", Cwd: "/no/such"}, ErrCwd},
		"a file as cwd":    {StartRequest{Command: "true", Cwd: "/etc/passwd"}, ErrCwd},
		"a relative cwd":   {StartRequest{Command: "true", Cwd: "tmp"}, ErrInvalid},
		"no such user":     {StartRequest{Command: "true", User: "nobody-here"}, ErrNoUser},
		"a tag in use":     {StartRequest{Command: "true", Tag: "taken"}, ErrTagInUse},
		"a long tag":       {StartRequest{Command: "true", Tag: strings.Repeat("x", maxTag+1)}, ErrInvalid},
		"a tag like an id": {StartRequest{Command: "true", Tag: "p12"}, ErrInvalid},
		"a bad variable":   {StartRequest{Command: "true", Env: map[string]string{"A=B": "c"}}, ErrInvalid},
		"no such program":  {StartRequest{Args: []string{"no-such-program"}}, fs.ErrNotExist},
		"a directory":      {StartRequest{Args: []string{"/usr"}}, fs.ErrPermission},
	} {
		if _, err := c.Start(t.Context(), test.req); !errors.Is(err, test.want) {
			t.Errorf("%s: got %v, want %v", name, err, test.want)
		}
	}
	list, err := c.List(t.Context(), ListRequest{})
	if err != nil || len(list) != 1 {
		t.Fatalf("what was refused left something: %v %v", list, err)
	}
}

func TestTags(t *testing.T) {
	c, _ := pair(t)
	first, err := c.Start(t.Context(), StartRequest{Command: "sleep 600", Tag: "web"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Signal(t.Context(), "web", "kill"); err != nil {
		t.Fatal(err)
	}
	s, err := c.Wait(t.Context(), WaitRequest{Process: "web", WaitMS: 60_000})
	if err != nil || s.Process.Signal != "SIGKILL" || s.Process.ExitCode != 137 {
		t.Fatal(s, err)
	}
	second := run(t, c, StartRequest{Command: "true", Tag: "web"})
	list, err := c.List(t.Context(), ListRequest{Tag: "web"})
	if err != nil || len(list) != 2 || list[0].ID != second.Process.ID || list[1].ID != first.Process.ID {
		t.Fatal(list, err)
	}
}

func TestWaitYieldsAndIsCancelled(t *testing.T) {
	c, _ := pair(t)
	s, err := c.Start(t.Context(), StartRequest{Command: "echo partial; exec sleep 600", WaitMS: 1, Window: Window{Head: 100}})
	if err != nil || s.Process.State != StateRunning {
		t.Fatal(s, err)
	}
	eventually(t, "partial output while it runs", func() bool {
		s, err := c.Wait(t.Context(), WaitRequest{Process: s.Process.ID, Window: Window{Head: 100}})
		return err == nil && string(s.Output.Head) == "partial\n"
	})
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(10*time.Millisecond, cancel)
	if _, err := c.Wait(ctx, WaitRequest{Process: s.Process.ID, WaitMS: 600_000}); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	if list, err := c.List(t.Context(), ListRequest{State: StateRunning}); err != nil || len(list) != 1 {
		t.Fatalf("cancelling a wait ended the process: %v %v", list, err)
	}
}

func TestTimeout(t *testing.T) {
	c, _ := pair(t)
	s := run(t, c, StartRequest{Command: "trap '' TERM; echo on; sleep 600; sleep 600", TimeoutMS: 50})
	if s.Process.Cause != CauseTimeout || string(s.Output.Head) != "on\n" {
		t.Fatalf("%+v", s.Process)
	}
}

func TestBackgroundChild(t *testing.T) {
	c, _ := pair(t)
	s := run(t, c, StartRequest{Command: "(while :; do echo tick; sleep 0.01; done) & echo leader"})
	if s.Process.State != StateExited {
		t.Fatal("the call was held")
	}
	before := s.Output.End
	eventually(t, "the child's output goes on", func() bool {
		s, err := c.Wait(t.Context(), WaitRequest{Process: s.Process.ID})
		return err == nil && s.Output.End > before
	})
}

func TestStdin(t *testing.T) {
	c, _ := pair(t)
	s, err := c.Start(t.Context(), StartRequest{Command: "cat", KeepStdin: true, Stdin: []byte("one ")})
	if err != nil {
		t.Fatal(err)
	}
	id := s.Process.ID
	eventually(t, "the first input", func() bool {
		s, err := c.Wait(t.Context(), WaitRequest{Process: id, Window: Window{Head: 10}})
		return err == nil && string(s.Output.Head) == "one "
	})
	if n, err := c.WriteStdin(t.Context(), id, []byte("two"), true); n != 3 || err != nil {
		t.Fatal(n, err)
	}
	s, err = c.Wait(t.Context(), WaitRequest{Process: id, WaitMS: 60_000, Window: Window{Head: 100}})
	if err != nil || string(s.Output.Head) != "one two" {
		t.Fatalf("%q %v", s.Output.Head, err)
	}
	if _, err := c.WriteStdin(t.Context(), id, []byte("x"), false); !errors.Is(err, ErrEnded) {
		t.Fatal(err)
	}
	if _, err := c.WriteStdin(t.Context(), "p99", []byte("x"), false); !errors.Is(err, ErrNoProcess) {
		t.Fatal(err)
	}
	s, err = c.Start(t.Context(), StartRequest{Command: "sleep 600"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.WriteStdin(t.Context(), s.Process.ID, []byte("x"), false); !errors.Is(err, ErrStdin) {
		t.Fatal(err)
	}
}

// TestStdinBackPressure: who does not read holds up its own writer, and nobody else.
func TestStdinBackPressure(t *testing.T) {
	c, _ := pair(t)
	var n int64
	var err error
	for limit := 200 * time.Millisecond; n == 0 && limit < time.Minute; limit *= 2 { // until there was time for the first bytes
		s, serr := c.Start(t.Context(), StartRequest{Command: "sleep 600", KeepStdin: true})
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
	run(t, c, StartRequest{Command: "true"})
}

func TestOutputStream(t *testing.T) {
	c, _ := pair(t)
	s, err := c.Start(t.Context(), StartRequest{Command: "for i in 1 2 3; do echo out$i; echo err$i >&2; done; read x; echo $x",
		KeepStdin: true})
	if err != nil {
		t.Fatal(err)
	}
	var all bytes.Buffer
	wrote := false
	err = c.Output(t.Context(), s.Process.ID, 0, true, func(f OutputFrame) error {
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
	s := run(t, c, StartRequest{Command: fmt.Sprintf("seq -f %%07.0f 1 %d", lines), Window: Window{Head: 100, Tail: 100}})
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
		err := c.Output(t.Context(), s.Process.ID, from, false, func(f OutputFrame) error {
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
		run(t, c, StartRequest{Command: "/bin/true"})
	}
	eventually(t, "old ones are forgotten", func() bool {
		list, err := c.List(t.Context(), ListRequest{})
		return err == nil && len(list) == endedKept && list[0].ID == fmt.Sprintf("p%d", endedKept+20)
	})
	if _, err := c.Wait(t.Context(), WaitRequest{Process: "p1"}); !errors.Is(err, ErrNoProcess) {
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
		if _, err := c.Dial(t.Context(), "tcp", address); !errors.Is(err, ErrInvalid) {
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
	if err := writeHello(host, hello{Protocol: 99, Version: "future"}); err != nil {
		t.Fatal(err)
	}
	var h hello
	if err := readHello(bufio.NewReader(host), &h); err != nil || !strings.Contains(h.Error, "99") {
		t.Fatal(h, err)
	}

	host, guest = net.Pipe()
	go func() {
		var h hello
		_ = readHello(bufio.NewReader(guest), &h)
		_ = writeHello(guest, hello{Protocol: 7, Version: "old"})
	}()
	if _, err := NewClient(t.Context(), host, "new"); !errors.Is(err, ErrVersion) || !strings.Contains(err.Error(), `"old"`) {
		t.Fatal(err)
	}
}

// TestHostileGuest: whatever a guest sends, the host gets a clear error.
func TestHostileGuest(t *testing.T) {
	greet := func(guest net.Conn) {
		var h hello
		_ = readHello(bufio.NewReader(guest), &h)
		_ = writeHello(guest, hello{Protocol: Protocol})
	}
	// stream answers on the control stream with raw bytes.
	stream := func(bytes []byte) func(net.Conn) {
		return func(guest net.Conn) {
			greet(guest)
			session, err := yamux.Server(guest, muxConfig())
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
		"a long handshake":  func(g net.Conn) { _, _ = g.Write(bytes.Repeat([]byte("x"), maxHello+10)) },
		"a bad handshake":   func(g net.Conn) { _, _ = g.Write([]byte("{]\n")) },
		"not yamux":         func(g net.Conn) { greet(g); _, _ = g.Write(bytes.Repeat([]byte{0xff}, 100)) },
		"a huge message":    stream([]byte{0xff, 0xff, 0xff, 0xff, 'x'}),
		"not JSON":          stream([]byte{0, 0, 0, 1, '{'}),
		"an unknown answer": stream([]byte("\x00\x00\x00\x2b{\"jsonrpc\":\"2.0\",\"id\":999,\"result\":\"hello\"}")),
		"its own stream": func(g net.Conn) {
			greet(g)
			if session, err := yamux.Server(g, muxConfig()); err == nil {
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
			host, g := net.Pipe()
			go func() {
				guest(g)
				go func() { _, _ = io.Copy(io.Discard, g) }()
			}()
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
			defer cancel()
			c, err := NewClient(ctx, host, "test")
			if err == nil {
				defer c.Close()
				_, err = c.List(ctx, ListRequest{})
			}
			if name == "an unknown answer" {
				if err == nil {
					t.Fatal("no error")
				}
				_ = g.Close()
				return
			}
			if !errors.Is(err, ErrLost) {
				t.Fatalf("got %v", err)
			}
			_ = g.Close()
		})
	}
}

// TestForgedRead: a guest cannot make the host take more than it asked for.
func TestForgedRead(t *testing.T) {
	host, g := net.Pipe()
	go func() {
		var h hello
		_ = readHello(bufio.NewReader(g), &h)
		_ = writeHello(g, hello{Protocol: Protocol})
		session, err := yamux.Server(g, muxConfig())
		if err != nil {
			return
		}
		_, _ = session.AcceptStream() // rpc
		s, err := session.AcceptStream()
		if err != nil {
			return
		}
		_ = writeMessage(s, answer{Info: &FileInfo{}})
		_, _ = writeChunks(s, readerFunc(func(p []byte) (int, error) { return len(p), nil })) // for ever
	}()
	c, err := NewClient(t.Context(), host, "test")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	r, _, err := c.ReadFile(t.Context(), "/x", 0, 1000)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if body, err := io.ReadAll(r); !errors.Is(err, ErrLost) || len(body) > 1000 {
		t.Fatalf("%d bytes, %v", len(body), err)
	}
}

// TestLargeAnswers are cut, or are an error: they are never lost.
func TestLargeAnswers(t *testing.T) {
	c, dir := pair(t)
	for i := range 4000 {
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("%s%04d", strings.Repeat("<\x01", 100), i)), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if r, err := c.Dir(t.Context(), DirRequest{Path: dir}); err != nil || !r.More || len(r.Entries) < 100 {
		t.Fatal(len(r.Entries), err)
	}
	if err := os.WriteFile(filepath.Join(dir, "text"), bytes.Repeat([]byte(strings.Repeat("<", 299)+"\n"), 2000), 0o600); err != nil {
		t.Fatal(err)
	}
	if r, err := c.Search(t.Context(), SearchRequest{Path: dir, Pattern: "<", Glob: "text"}); err != nil || !r.More ||
		len(r.Matches) < 100 {
		t.Fatal(len(r.Matches), err)
	}
	if _, err := c.Start(t.Context(), StartRequest{Command: "cat", Stdin: make([]byte, 900_000)}); !errors.Is(err, ErrTooLarge) ||
		errors.Is(err, ErrLost) {
		t.Fatal(err)
	}
	run(t, c, StartRequest{Command: "true"})
}

// TestCancelReachesGuest: a wait that is given up ends in the guest too.
func TestCancelReachesGuest(t *testing.T) {
	c, _ := pair(t)
	s, err := c.Start(t.Context(), StartRequest{Command: "exec sleep 600"})
	if err != nil {
		t.Fatal(err)
	}
	waiting := func() int {
		buf := make([]byte, 4<<20)
		return strings.Count(string(buf[:runtime.Stack(buf, true)]), "agent.(*process).wait(")
	}
	ctx, cancel := context.WithCancel(t.Context())
	for range 10 {
		go func() { _, _ = c.Wait(ctx, WaitRequest{Process: s.Process.ID, WaitMS: 600_000}) }()
	}
	eventually(t, "ten waits", func() bool { return waiting() == 10 })
	cancel()
	eventually(t, "no wait", func() bool { return waiting() == 0 })
}

// TestOrphan: an agent that no host talks to ends by itself, also with a connection open that it was asked to make.
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
	c, err := NewClient(t.Context(), host, "test")
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Configure(t.Context(), Config{OrphanMS: 20}); err != nil {
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
	_ = writeMessage(&b, json.RawMessage(body))
	return b.Bytes()
}

func FuzzDecoders(f *testing.F) {
	f.Add([]byte("\x00\x00\x00\x02{}"))
	f.Add([]byte("\x00\x00\x00\x03abc\x00\x00\x00\x00\x00\x00\x00\x02{}"))
	f.Add([]byte("\x01\x00\x00\x00\x00\x00\x00\x00\x05\x00\x00\x00\x02ab"))
	f.Add([]byte("{\"protocol\":1}\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		var h header
		_ = readMessage(bytes.NewReader(data), &h)
		var a answer
		_ = readMessage(bytes.NewReader(data), &a)
		if a.Error != nil {
			_ = a.Error.Unwrap()
		}
		if body, err := io.ReadAll(&chunkReader{r: bytes.NewReader(data)}); err == nil && len(body) > len(data) {
			t.Fatal("more came out than went in")
		}
		_, _, _, _ = readFrame(bytes.NewReader(data))
		var greeting hello
		_ = readHello(bufio.NewReaderSize(bytes.NewReader(data), maxHello), &greeting)
	})
}
