package client_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"soulbox.dev/soulbox/api/client"
	"soulbox.dev/soulbox/internal/sandboxtest"
)

// TestFiles writes, finds and reads files, also those whose names are no text.
func TestFiles(t *testing.T) {
	s := newSite(t)
	c, ctx, dir := s.as("ann"), t.Context(), t.TempDir()
	box := s.create(c)
	big := strings.Repeat("0123456789", 500_000)
	for name, body := range map[string]string{"d/a": "one", "d/odd %?#&+ ": "two", "d/\xff\xfe": "three", "d/%FF": "four", "big": big} {
		if err := c.Upload(ctx, box.ID, dir+"/"+name, strings.NewReader(body)); err != nil {
			t.Fatalf("%q: %v", name, err)
		}
		if got, err := os.ReadFile(dir + "/" + name); err != nil || string(got) != body {
			t.Errorf("%q: %.40q %v", name, got, err)
		}
		r, err := c.Download(ctx, box.ID, dir+"/"+name)
		if err != nil {
			t.Fatalf("%q: %v", name, err)
		}
		got, err := io.ReadAll(r)
		if err := errors.Join(err, r.Close()); err != nil || string(got) != body {
			t.Errorf("%q: %.40q %v", name, got, err)
		}
		f, err := c.Stat(ctx, box.ID, dir+"/"+name)
		if err != nil || f.Path != dir+"/"+name || f.Dir || f.Size != int64(len(body)) || time.Since(f.Modified) > time.Minute {
			t.Errorf("%q: %+v %v", name, f, err)
		}
	}
	if f, err := c.Stat(ctx, box.ID, dir); err != nil || !f.Dir {
		t.Errorf("%+v %v", f, err)
	}
	all, err := c.Names(ctx, box.ID, dir)
	if slices.Sort(all); err != nil || !slices.Equal(all, []string{"big", "d/"}) {
		t.Errorf("%q %v", all, err)
	}
	all, err = c.Names(ctx, box.ID, dir+"/d")
	if slices.Sort(all); err != nil || !slices.Equal(all, []string{"%FF", "a", "odd %?#&+ ", "\xff\xfe"}) {
		t.Errorf("%q %v", all, err)
	}
	for name, err := range map[string]error{"stat": nothing(c.Stat(ctx, box.ID, dir+"/no")),
		"names":    nothing(c.Names(ctx, box.ID, dir+"/no")),
		"download": nothing(c.Download(ctx, box.ID, dir+"/no"))} {
		if !client.IsNotFound(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, err := range map[string]error{"names of a file": nothing(c.Names(ctx, box.ID, dir+"/big")),
		"a directory":      nothing(c.Download(ctx, box.ID, dir)),
		"below a file":     c.Upload(ctx, box.ID, dir+"/big/x", strings.NewReader("x")),
		"over a directory": c.Upload(ctx, box.ID, dir+"/d", strings.NewReader("x"))} {
		if told := new(client.Error); !errors.As(err, &told) || told.Status >= 500 {
			t.Errorf("%s: %v", name, err)
		}
	}
	broken := errors.New("broken")
	half := io.MultiReader(strings.NewReader("half"), errorReader{broken})
	if err := c.Upload(ctx, box.ID, dir+"/half", half); !errors.Is(err, broken) {
		t.Error(err)
	}
	if _, err := os.Stat(dir + "/half"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("half of a file is there: %v", err)
	}
}

type errorReader struct{ error }

func (r errorReader) Read([]byte) (int, error) { return 0, r.error }

// TestWatch is told what changes below a directory, until it is enough, or its context ends.
func TestWatch(t *testing.T) {
	s := newSite(t)
	c, dir := s.as("ann"), t.TempDir()
	box := s.create(c)
	if err := os.Mkdir(dir+"/sub", 0o755); err != nil {
		t.Fatal(err)
	}
	enough := errors.New("enough")
	var seen []client.Event
	err := c.Watch(t.Context(), box.ID, dir, true, func() {
		for _, name := range []string{"/sub/new", "/end"} {
			if err := os.WriteFile(dir+name, nil, 0o644); err != nil {
				t.Error(err)
			}
		}
	}, func(e client.Event) error {
		if seen = append(seen, e); e.Name == "end" {
			return enough
		}
		return nil
	})
	if !errors.Is(err, enough) || !slices.Contains(seen, client.Event{Op: "create", Name: "sub/new"}) {
		t.Errorf("%v, %+v", err, seen)
	}
	ctx, cancel := context.WithCancel(t.Context())
	if err := c.Watch(ctx, box.ID, dir, false, cancel, func(client.Event) error { return nil }); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if err := c.Watch(t.Context(), box.ID, dir+"/no", false, func() {}, nil); !client.IsNotFound(err) {
		t.Error(err)
	}
}

// start starts a program, and gives what it writes.
func (s *site) start(c *client.Client, box client.Sandbox, cmd client.Command) (*client.ProcessHandle, *output) {
	s.Helper()
	p, err := c.Start(s.Context(), box.ID, cmd, func(context.Context) (*client.Client, error) { return c, nil })
	if err != nil {
		s.Fatal(err)
	}
	return p, &output{}
}

// output is what is written; it can be looked at meanwhile.
type output struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.String()
}

// TestProcess starts programs: their arguments, environment, input and both outputs, and how they end.
func TestProcess(t *testing.T) {
	s := newSite(t)
	c, ctx, dir := s.as("ann"), t.Context(), t.TempDir()
	box := s.create(c)
	for name, test := range map[string]struct {
		cmd      client.Command
		out, err string
		exit     client.Exit
	}{
		"both outputs": {client.Command{Args: []string{"sh", "-c", "echo out; echo err >&2; exit 3"}}, "out\n", "err\n",
			client.Exit{Code: 3}},
		"arguments":   {client.Command{Args: []string{"printf", "%s|", "a b", "$c", "\xff"}}, "a b|$c|\xff|", "", client.Exit{}},
		"a directory": {client.Command{Args: []string{"pwd"}, Cwd: dir}, dir + "\n", "", client.Exit{}},
		"a variable": {client.Command{Args: []string{"sh", "-c", `echo "$X"`}, Env: map[string]string{"X": "1 2"}}, "1 2\n", "",
			client.Exit{}},
		"no input": {client.Command{Args: []string{"cat"}}, "", "", client.Exit{}},
		"a signal": {client.Command{Args: []string{"sh", "-c", "kill -TERM $$"}}, "", "",
			client.Exit{Code: 143, Status: "signal: terminated"}},
	} {
		p, out := s.start(c, box, test.cmd)
		var stderr output
		exit, err := p.Follow(ctx, out, &stderr, nil)
		if err != nil || exit != test.exit || out.String() != test.out || stderr.String() != test.err {
			t.Errorf("%s: %q %q %+v %v", name, out, stderr.String(), exit, err)
		}
	}
	for name, want := range map[string]int{"no-such-program": 127, "/etc/hostname": 126} {
		_, err := c.Start(ctx, box.ID, client.Command{Args: []string{name}}, nil)
		if told := new(client.StartError); !errors.As(err, &told) || told.Exit != want || told.Error() == "" {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, cmd := range map[string]client.Command{"no such directory": {Args: []string{"true"}, Cwd: dir + "/no"},
		"no such user": {Args: []string{"true"}, User: "nobody-here"}, "nothing": {}} {
		if _, err := c.Start(ctx, box.ID, cmd, nil); err == nil || client.Unreachable(err) && name != "nothing" {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestSession writes to a program, resizes its terminal, signals and kills it; one that is left keeps running, and is found again with
// what it wrote meanwhile.
func TestSession(t *testing.T) {
	s := newSite(t)
	c, ctx := s.as("ann"), t.Context()
	box := s.create(c)
	p, out := s.start(c, box, client.Command{Args: []string{"cat"}, Stdin: true, Tag: "kept", Linger: time.Hour})
	if err := errors.Join(p.Write(ctx, []byte("one\n")), p.Release(ctx)); err != nil {
		t.Fatal(err)
	}
	left, cancel := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() {
		_, err := p.Follow(left, out, out, nil)
		done <- err
	}()
	sandboxtest.Eventually(t, "it has answered", func() bool { return out.String() == "one\n" })
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	all, err := c.Processes(ctx, box.ID)
	if err != nil || len(all) != 1 || all[0].Tag != "kept" || all[0].State != "running" || all[0].PID != p.PID ||
		all[0].ID != p.Process().ID ||
		!all[0].StdinOpen || all[0].Output != 4 {
		t.Fatalf("%+v %v", all, err)
	}
	again, err := c.Attach(ctx, box.ID, all[0], 2, func(context.Context) (*client.Client, error) { return c, nil })
	if err != nil {
		t.Fatal(err)
	}
	more := strings.Repeat("x", 3<<20) // than goes at once
	if err := errors.Join(again.Write(ctx, []byte(more)), again.CloseInput(ctx)); err != nil {
		t.Error(err)
	}
	var rest output
	if exit, err := again.Follow(ctx, &rest, &rest, nil); err != nil || exit != (client.Exit{}) || rest.String() != "e\n"+more {
		t.Errorf("%d bytes, %+v %v", len(rest.String()), exit, err)
	}
	if err := again.Write(ctx, []byte("late")); err == nil || client.Unreachable(err) {
		t.Errorf("to one that has ended: %v", err)
	}
	for name, end := range map[string]func(*client.ProcessHandle) error{
		"session": func(p *client.ProcessHandle) error { return p.Signal(ctx, syscall.SIGTERM) },
		"client":  func(p *client.ProcessHandle) error { return c.Signal(ctx, box.ID, p.Process(), syscall.SIGTERM) },
		"kill":    func(p *client.ProcessHandle) error { return p.Kill(ctx) },
	} {
		p, out := s.start(c, box, client.Command{Args: []string{"sleep", "600"}})
		if err := end(p); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		want := map[string]int{"session": 143, "client": 143, "kill": 137}[name]
		if exit, err := p.Follow(ctx, out, out, nil); err != nil || exit.Code != want {
			t.Errorf("%s: %+v %v", name, exit, err)
		}
	}
}

// TestTerminal is a program at a terminal, which gets another size.
func TestTerminal(t *testing.T) {
	s := newSite(t)
	c, ctx := s.as("ann"), t.Context()
	box := s.create(c)
	p, out := s.start(c, box, client.Command{Args: []string{"sh", "-c", "stty size; read x; stty size"},
		Terminal: &client.Size{Rows: 10, Cols: 20}})
	done := make(chan error, 1)
	go func() {
		_, err := p.Follow(ctx, out, nil, nil)
		done <- err
	}()
	sandboxtest.Eventually(t, "it has the first size", func() bool { return strings.Contains(out.String(), "10 20\r\n") })
	if err := errors.Join(p.Resize(ctx, client.Size{Rows: 33, Cols: 44}), p.Write(ctx, []byte("\n")), <-done); err != nil {
		t.Error(err)
	}
	if !strings.HasSuffix(out.String(), "33 44\r\n") {
		t.Errorf("%q", out)
	}
}

// TestComingBack: a session survives that its connections break, byte for byte; it ends with its sandbox, and when that is paused.
func TestComingBack(t *testing.T) {
	s := newSite(t)
	c, ctx, dir := s.as("ann"), t.Context(), t.TempDir()
	box := s.create(c)
	script := `i=0; while [ $i -lt 30 ]; do echo line $i; i=$((i+1)); [ $i -ne 10 ] || while [ ! -e go ]; do sleep 0.01; done; done`
	p, out := s.start(c, box, client.Command{Args: []string{"sh", "-c", script}, Cwd: dir})
	var told []bool
	done := make(chan error, 1)
	go func() {
		_, err := p.Follow(ctx, out, out, func(lost bool) {
			if told = append(told, lost); !lost {
				if err := os.WriteFile(filepath.Join(dir, "go"), nil, 0o644); err != nil {
					t.Error(err)
				}
			}
		})
		done <- err
	}()
	sandboxtest.Eventually(t, "ten lines", func() bool { return strings.Count(out.String(), "\n") == 10 })
	s.web.CloseClientConnections()
	if err := <-done; err != nil || !slices.Equal(told, []bool{true, false}) {
		t.Errorf("%v, %v", told, err)
	}
	if lines := strings.Split(out.String(), "\n"); len(lines) != 31 || lines[29] != "line 29" {
		t.Errorf("%q", out)
	}
	for name, test := range map[string]struct {
		do   func() error
		want func(error) bool
	}{
		"paused": {func() error { return nothing(c.Pause(ctx, box.ID, client.Pause{InMemory: true})) },
			func(err error) bool { return errors.Is(err, client.ErrPaused) }},
		"killed": {func() error { return c.Kill(ctx, box.ID) }, client.IsNotFound},
	} {
		box = s.create(c)
		p, out := s.start(c, box, client.Command{Args: []string{"sleep", "600"}})
		if err := test.do(); err != nil {
			t.Fatal(err)
		}
		s.web.CloseClientConnections()
		if _, err := p.Follow(ctx, out, out, nil); !test.want(err) {
			t.Errorf("%s: %v", name, err)
		}
		if err := p.Kill(ctx); !test.want(err) {
			t.Errorf("%s: kill: %v", name, err)
		}
		if name == "paused" { // what follows in the server writes to it, and ends once it is read, or gone
			if err := c.Kill(ctx, box.ID); err != nil {
				t.Error(err)
			}
		}
	}
}
