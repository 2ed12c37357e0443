package main

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"soulbox.dev/soulbox/internal/sandboxtest"
)

// tty is a process on a terminal of a sandbox, driven by the tools.
type tty struct {
	t  *testing.T
	p  *program
	id string
}

func openTTY(t *testing.T, p *program, args map[string]any) *tty {
	t.Helper()
	all := map[string]any{"tty": true, "rows": 24, "cols": 80}
	for k, v := range args {
		all[k] = v
	}
	m := p.call("exec", all)
	return &tty{t, p, fmt.Sprint(m.Result.StructuredContent["process_id"])}
}

func (y *tty) write(input string, keys ...string) string {
	y.t.Helper()
	return y.p.call("process_write", map[string]any{"process_id": y.id, "input": input, "keys": keys}).text()
}

func (y *tty) screen() string {
	y.t.Helper()
	return y.p.call("process_wait", map[string]any{"process_id": y.id, "screen": true}).text()
}

// shows waits until the screen shows a text, hides until it no longer does.
func (y *tty) shows(what string) { y.t.Helper(); y.await(what, true) }
func (y *tty) hides(what string) { y.t.Helper(); y.await(what, false) }

func (y *tty) await(what string, there bool) {
	y.t.Helper()
	last := ""
	for deadline := time.Now().Add(30 * time.Second); ; {
		if last = y.screen(); strings.Contains(last, what) == there {
			return
		}
		if time.Now().After(deadline) {
			y.t.Fatalf("that the screen shows %q is to be %v:\n%s", what, there, last)
		}
	}
}

// needs reports whether a program exists on this machine, and so in the sandbox. In CI every one must exist.
func needs(t *testing.T, program string) bool {
	t.Helper()
	_, err := os.Stat("/usr/bin/" + program)
	if err != nil && os.Getenv("SOULBOX_TEST_ALL") != "" {
		t.Errorf("%s is missing", program)
	}
	return err == nil
}

// TestTerminals: real programs at a terminal in a real sandbox, driven by the tools that a model has.
func TestTerminals(t *testing.T) {
	p := launch(t, "")
	sh := openTTY(t, p, nil)
	sh.write("PS1='$ '; stty size; echo $TERM; tty; touch $(tty)\n")
	sh.shows("24 80")
	sh.shows("xterm-256color")
	if out := sh.screen(); strings.Contains(out, "ermission denied") {
		t.Error(out)
	}
	p.call("process_resize", map[string]any{"process_id": sh.id, "rows": 30, "cols": 100})
	sh.write("trap 'echo got WINCH' WINCH; stty size\n")
	sh.shows("30 100")
	p.call("process_resize", map[string]any{"process_id": sh.id, "rows": 24, "cols": 80})
	sh.write("", "enter")
	sh.shows("got WINCH")

	// Job control: ctrl-c ends the foreground process and not the shell, ctrl-z stops it, bg and fg resume it.
	// Each says that it runs: a key that is typed before that is the shell's.
	sh.write("clear; sh -c 'echo runs-$((50 + 1)); exec sleep 600'\n")
	sh.shows("runs-51")
	sh.write("", "ctrl-c")
	sh.write("echo alive-$((40 + 2))\n")
	sh.shows("alive-42")
	sh.write("sh -c 'echo runs-$((50 + 2)); exec sleep 601'\n")
	sh.shows("runs-52")
	sh.write("", "ctrl-z")
	sh.shows("Stopped")
	sh.write("bg; jobs; kill %1; wait; echo done-$((1 + 1))\n")
	sh.shows("done-2")
	sh.write("sh -c 'echo runs-$((50 + 3)); exec sleep 602'\n")
	sh.shows("runs-53")
	p.call("process_signal", map[string]any{"process_id": sh.id, "signal": "SIGINT"})
	sh.write("echo alive-$((40 + 3))\n")
	sh.shows("alive-43")

	// A prompt without echo: what is typed does not appear.
	sh.write("clear; read -s -p 'Password: ' x; echo; echo got ${#x}\n")
	sh.shows("Password:")
	sh.write("secret\n")
	sh.shows("got 6")
	if out := sh.screen(); strings.Contains(out, "secret") {
		t.Error("the password is on the screen:", out)
	}
	if needs(t, "vim") {
		sh.write("clear; vim -u NONE -N notes.txt\n")
		sh.shows("notes.txt")
		sh.write("ihello from vim", "esc")
		sh.write("yyp:s/hello/goodbye/", "enter")
		sh.shows("goodbye from vim")
		sh.write("", "up", "home", "x")
		sh.shows("ello from vim")
		sh.write(":wq", "enter")
		sh.hides("from vim")
		if got := p.exec("cat /home/user/notes.txt"); got != "ello from vim\ngoodbye from vim\n" {
			t.Errorf("vim wrote %q", got)
		}
	}
	if needs(t, "less") {
		sh.write("clear; seq 1000 | less\n")
		sh.shows("\n23\n")
		sh.write("", "page-down")
		sh.shows("\n46\n")
		sh.write("G")
		sh.shows("1000")
		sh.write("q")
		sh.hides("1000")
	}
	if needs(t, "top") {
		sh.write("clear; top\n")
		sh.shows("soulbox-a")
		sh.write("q")
		sh.hides("load average")
		sh.shows("$")
	}
	if needs(t, "htop") {
		sh.write("clear; htop\n")
		sh.shows("F10")
		p.call("process_resize", map[string]any{"process_id": sh.id, "rows": 12, "cols": 60})
		// Once its line of keys is the last row, it has seen the new size.
		sandboxtest.Eventually(t, "htop in its new size", func() bool {
			rows := strings.Split(sh.screen(), "\n")
			return len(rows) >= 12 && strings.Contains(rows[11], "F1")
		})
		p.call("process_resize", map[string]any{"process_id": sh.id, "rows": 24, "cols": 80})
		sh.write("", "f10")
		sh.hides("F10")
	}
	if needs(t, "python3") {
		sh.write("clear; /usr/bin/python3 -q\n")
		sh.shows(">>>")
		sh.write("print(6 * 7)\n")
		sh.shows("42")
		sh.write("", "ctrl-d")
		sh.write("echo python-$((1 + 1))\n")
		sh.shows("python-2")
	}
	if needs(t, "tmux") {
		sh.write("clear; tmux -f /dev/null new 'echo in tmux; cat'\n")
		sh.shows("in tmux")
		sh.shows("[0]")
		sh.write("", "ctrl-d")
		sh.shows("[exited]")
	}
	sh.write("clear; PS1='$ '; echo back\n")
	sh.shows("back")
	p.call("process_signal", map[string]any{"process_id": sh.id, "signal": "SIGHUP"})
	m := p.call("process_wait", map[string]any{"process_id": sh.id})
	if m.Result.StructuredContent["state"] != "exited" {
		t.Error(m.text())
	}
}

// TestTerminalFlood: 100 MB through a terminal arrive as they were written, and other calls are not held up meanwhile.
func TestTerminalFlood(t *testing.T) {
	p := launch(t, "")
	y := openTTY(t, p, map[string]any{"command": "stty raw; head -c 100000000 /dev/zero | tr '\\0' x; echo; echo the-end; sleep 600",
		"yield_ms": 0})
	for deadline := time.Now().Add(100 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		begin := time.Now()
		if p.exec("echo beside") != "beside\n" {
			t.Fatal("another command is disturbed")
		}
		if d := time.Since(begin); d > 10*time.Second {
			t.Fatalf("another command took %s", d)
		}
		m := p.call("process_wait", map[string]any{"process_id": y.id, "yield_ms": 0, "max_output_chars": 200})
		if strings.Contains(m.text(), "the-end") {
			if n := m.Result.StructuredContent["next_offset"]; n != float64(100_000_000+len("\nthe-end\n")) {
				t.Errorf("%v bytes arrived", n)
			}
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(m.text())
		}
	}
}
