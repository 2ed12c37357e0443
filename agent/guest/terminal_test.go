package guest

import (
	"errors"
	"strings"
	"testing"
	"time"

	"soulbox.dev/soulbox/agent"
)

// terminal is a process on a terminal, and its output.
type terminal struct {
	t  *testing.T
	c  *agent.Client
	id string
}

func openTerminal(t *testing.T, c *agent.Client, req agent.StartRequest) *terminal {
	t.Helper()
	if req.Terminal == nil {
		req.Terminal = &agent.Terminal{}
	}
	s, err := c.Start(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	return &terminal{t, c, s.Process.ID}
}

func (p *terminal) output() string {
	p.t.Helper()
	s, err := p.c.Wait(p.t.Context(), agent.WaitRequest{Process: p.id, Window: agent.Window{Head: agent.MaxWindow}})
	if err != nil {
		p.t.Fatal(err)
	}
	return string(s.Output.Head)
}

func (p *terminal) process() agent.Process {
	p.t.Helper()
	s, err := p.c.Wait(p.t.Context(), agent.WaitRequest{Process: p.id})
	if err != nil {
		p.t.Fatal(err)
	}
	return s.Process
}

func (p *terminal) typed(text string) {
	p.t.Helper()
	if _, err := p.c.WriteStdin(p.t.Context(), p.id, []byte(text), false); err != nil {
		p.t.Fatal(err)
	}
}

func (p *terminal) shows(what string) {
	p.t.Helper()
	eventually(p.t, what, func() bool { return strings.Contains(p.output(), what) })
}

// TestTerminal: a login shell with job control, as at a terminal.
func TestTerminal(t *testing.T) {
	c, _ := pair(t)
	p := openTerminal(t, c, agent.StartRequest{Terminal: &agent.Terminal{Rows: 30, Cols: 100}, Env: map[string]string{"PS1": "$ "}})
	p.typed("stty size; tty; echo $TERM\n")
	p.shows("30 100")
	p.shows("/dev/pts/")
	p.shows("xterm-256color")
	if _, err := c.Resize(t.Context(), agent.ResizeRequest{Process: p.id, Terminal: agent.Terminal{Rows: 40, Cols: 120}}); err != nil {
		t.Fatal(err)
	}
	p.typed("stty size\n")
	p.shows("40 120")
	if got := p.process().Terminal; got == nil || got.Rows != 40 {
		t.Fatal(got)
	}
	runs := func(command string) {
		p.typed(command + "\n")
		eventually(t, command+" in the foreground", func() bool {
			out := run(t, c, agent.StartRequest{Command: "cat /proc/[0-9]*/cmdline | tr '\\0' ' '"}).Output.Head
			return strings.Contains(string(out), " "+command+" ")
		})
	}
	runs("sleep 600")
	p.typed("\x03") // ctrl-c ends sleep but not bash
	p.typed("echo still-$((40 + 2))\n")
	p.shows("still-42")
	runs("sleep 601")
	if _, err := c.Signal(t.Context(), p.id, "INT"); err != nil {
		t.Fatal(err)
	}
	p.typed("echo again-$((40 + 3))\n")
	p.shows("again-43")
	if p.process().State != agent.StateRunning {
		t.Fatal("bash has ended")
	}
	eventually(t, "the end of bash", func() bool {
		_, err := c.WriteStdin(t.Context(), p.id, nil, true) // ctrl-d, which is lost if bash is just about to read
		if err != nil && !errors.Is(err, agent.ErrEnded) &&
			!errors.Is(err, agent.ErrStdin) { // of a bash that is about to end
			t.Fatal(err)
		}
		return p.process().State == agent.StateExited
	})
}

// TestTerminalHangUp: SIGHUP ends the shell and its foreground programs.
func TestTerminalHangUp(t *testing.T) {
	c, _ := pair(t)
	p := openTerminal(t, c, agent.StartRequest{Env: map[string]string{"PS1": "$ "}})
	p.typed("sleep 602\n")
	if _, err := c.Signal(t.Context(), p.id, "HUP"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the end", func() bool { return p.process().State == agent.StateExited })
}

// TestTerminalOutput: everything that is written before the end is in the output.
func TestTerminalOutput(t *testing.T) {
	c, _ := pair(t)
	for range 20 {
		s := run(t, c, agent.StartRequest{Command: "seq 1 2000; printf the-end", Terminal: &agent.Terminal{}})
		eventually(t, "all output", func() bool {
			again, err := c.Wait(t.Context(), agent.WaitRequest{Process: s.Process.ID, Window: agent.Window{Head: agent.MaxWindow}})
			return err == nil && strings.HasSuffix(string(again.Output.Head), "2000\r\nthe-end")
		})
	}
}

func TestTerminalRefuses(t *testing.T) {
	c, _ := pair(t)
	for _, size := range []agent.Terminal{{Rows: -1, Cols: 80}, {Rows: 24, Cols: 501}, {Rows: 301, Cols: 80}} {
		if _, err := c.Start(t.Context(), agent.StartRequest{Terminal: &size}); !errors.Is(err, agent.ErrInvalid) {
			t.Errorf("%v: %v", size, err)
		}
	}
	s, err := c.Start(t.Context(), agent.StartRequest{Command: "sleep 60"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Resize(t.Context(), agent.ResizeRequest{Process: s.Process.ID,
		Terminal: agent.Terminal{Rows: 24, Cols: 80}}); !errors.Is(err,
		agent.ErrNoTerminal) {
		t.Fatal(err)
	}
}

// TestInputBlocked: if a terminal accepts no more input, the call ends in its time, even with end of input, and the next call is not
// delayed.
func TestInputBlocked(t *testing.T) {
	c, _ := pair(t)
	p := openTerminal(t, c, agent.StartRequest{Command: "stty raw -echo; echo ready; sleep 600"})
	p.shows("ready")
	const wait = 1500
	for _, eof := range []bool{false, true} {
		begin := time.Now()
		r, err := c.Input(t.Context(), agent.InputRequest{Process: p.id, Data: make([]byte, agent.MaxInput), EOF: eof, WaitMS: wait,
			SettleMS: 10,
			Window:   agent.Window{Offset: -1}})
		if err != nil || !r.Blocked || r.Written >= agent.MaxInput {
			t.Fatalf("%+v %v", r, err)
		}
		if took := time.Since(begin); took > 10*wait*time.Millisecond {
			t.Fatalf("it took %s", took)
		}
	}
	if _, err := c.Kill(t.Context(), p.id); err != nil {
		t.Fatal(err)
	}
}
