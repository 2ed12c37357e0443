package main

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"soulbox.dev/soulbox/internal/sandboxtest"
)

// screen is a user's terminal with a shell in it, driven by tmux.
type screen struct {
	*testing.T
	socket string
	s      surroundings
}

func newScreen(t *testing.T, s surroundings) *screen {
	t.Helper()
	if _, err := exec.LookPath("tmux"); err != nil {
		if os.Getenv("SOULBOX_TEST_ALL") != "" {
			t.Fatal(err)
		}
		t.Skip("tmux is not there")
	}
	c := &screen{t, filepath.Join(s.get("SOULBOX_RUNTIME_DIR"), "tmux"), s}
	c.tmux("new-session", "-d", "-x", "90", "-y", "24", "bash", "--norc", "--noprofile")
	t.Cleanup(func() {
		if err := c.cmd("kill-server").Run(); err != nil {
			t.Error(err)
		}
	})
	c.typed("PS1='ready> '; clear\n")
	c.shows("ready> $")
	return c
}

func (c *screen) cmd(args ...string) *exec.Cmd {
	cmd := exec.Command("tmux", append([]string{"-S", c.socket, "-f", "/dev/null"}, args...)...)
	cmd.Env, cmd.Dir = c.s.env, c.s.get("HOME")
	return cmd
}

func (c *screen) tmux(args ...string) string {
	c.Helper()
	out, err := c.cmd(args...).CombinedOutput()
	if err != nil {
		c.Fatalf("tmux %v: %v\n%s", args, err, out)
	}
	return string(out)
}

// typed types a text.
func (c *screen) typed(text string) {
	c.Helper()
	c.tmux("send-keys", "-l", text)
}

func (c *screen) keys(names ...string) {
	c.Helper()
	c.tmux(append([]string{"send-keys"}, names...)...)
}

// shows waits until a line of the screen matches.
func (c *screen) shows(pattern string) []string {
	c.Helper()
	re := regexp.MustCompile("(?m)" + pattern)
	var found []string
	last := ""
	defer func() {
		if found == nil {
			c.Logf("the screen:\n%s", last)
		}
	}()
	sandboxtest.Eventually(c, "the screen shows "+pattern, func() bool {
		last = c.tmux("capture-pane", "-p", "-J")
		found = re.FindStringSubmatch(last)
		return found != nil
	})
	return found
}

// sane checks that the terminal is in the state of a shell.
func (c *screen) sane() {
	c.Helper()
	c.typed("clear; stty -a | grep -o -w -e '-*icanon' -e '-*echo' -e '-*isig' -e '-*opost' | tr '\\n' ,; echo\n")
	c.shows("^opost,isig,icanon,echo,$|^opost,icanon,echo,isig,$|^isig,icanon,echo,opost,$|^opost,isig,icanon,echo")
}

// child returns the process below another one whose command line contains a text.
func child(t *testing.T, text string, of int) (pid int) {
	t.Helper()
	sandboxtest.Eventually(t, "there is a process "+text, func() bool {
		all, err := filepath.Glob("/proc/[0-9]*/stat")
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range all {
			stat, err := os.ReadFile(name)
			line, lerr := os.ReadFile(filepath.Join(filepath.Dir(name), "cmdline"))
			if err != nil || lerr != nil || !strings.Contains(strings.ReplaceAll(string(line), "\x00", " "), text) {
				continue
			}
			fields := strings.Fields(string(stat)[strings.LastIndex(string(stat), ")")+1:])
			if parent, err := strconv.Atoi(fields[1]); err == nil && parent == of {
				pid, err = strconv.Atoi(filepath.Base(filepath.Dir(name)))
				return err == nil
			}
		}
		return false
	})
	return pid
}

// gone tells whether a process has ended; nobody may have collected it yet.
func gone(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err != nil || strings.HasPrefix(string(stat)[strings.LastIndex(string(stat), ")")+1:], " Z")
}

func (c *screen) shell() int {
	c.Helper()
	pid, err := strconv.Atoi(strings.TrimSpace(c.tmux("display-message", "-p", "#{pane_pid}")))
	if err != nil {
		c.Fatal(err)
	}
	return pid
}

// TestConnect: a person types, changes the size, leaves and returns, and the server is killed in between.
func TestConnect(t *testing.T) {
	s := newSurroundings(t)
	id := strings.TrimSpace(s.run(t, "sandbox", "create"))
	c := newScreen(t, s)
	c.typed("clear; soulbox sandbox connect " + id + "\n")
	c.shows(`\$ $`)
	c.typed("echo $((6*7)); tty; A=kept\n")
	c.shows("^42$")
	c.tmux("resize-window", "-x", "77", "-y", "20")
	c.typed("clear; stty size\n")
	c.shows("^20 77$")
	c.typed("sh -c 'echo begun; exec sleep 1000'\n")
	c.shows("^begun$")
	c.keys("C-c")
	c.typed("echo after=$?\n")
	c.shows("^after=130$")

	c.keys("C-p", "C-q")
	pid := c.shows(`left; 'soulbox sandbox connect ` + id + ` (\d+)' comes back`)[1]
	c.sane()
	if ps := s.run(t, "ps", id); !strings.Contains(ps, pid) {
		t.Errorf("it does not go on:\n%s", ps)
	}
	c.typed("clear; soulbox sandbox connect " + id + " " + pid + "\n")
	c.typed("\n")
	c.shows(`\$ $`)
	c.typed("clear; echo $A\n")
	c.shows("^kept$")

	// What is written while no client is connected is not lost, and shown once.
	c.typed("clear; for i in $(seq 40); do echo line=$i; sleep 0.1; done; echo over=$A\n")
	c.shows("^line=5$")
	for _, pid := range s.servers(t) {
		stop(t, pid, syscall.SIGKILL)
	}
	c.shows(`\[the connection is lost`)
	s.run(t, "sandbox", "list") // starts another server
	c.shows("^over=kept$")
	text := c.tmux("capture-pane", "-p", "-J", "-S", "-100")
	for i := range 40 {
		if n := len(regexp.MustCompile(fmt.Sprintf(`(?m)^line=%d$`, i+1)).FindAllString(text, -1)); n != 1 {
			t.Errorf("line %d is there %d times:\n%s", i+1, n, text)
		}
	}
	c.typed("exit 7\n")
	c.shows(`ready> $`)
	c.typed("echo code=$?\n")
	c.shows("^code=7$")
	c.sane()
}

// TestKilledAtTerminal: whichever part is killed, and however, the terminal is sane and nothing continues in the sandbox.
func TestKilledAtTerminal(t *testing.T) {
	s := newSurroundings(t)
	id := strings.TrimSpace(s.run(t, "sandbox", "create"))
	c := newScreen(t, s)
	for _, sig := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM, syscall.SIGHUP} {
		for _, killInner := range []bool{false, true} {
			c.typed("clear; soulbox sandbox connect " + id + "\n")
			c.shows(`\$ $`)
			outer := child(t, "soulbox sandbox connect", c.shell())
			inner := child(t, "soulbox sandbox connect", outer)
			pid := outer
			if killInner {
				pid = inner
			}
			if err := syscall.Kill(pid, sig); err != nil {
				t.Fatal(err)
			}
			sandboxtest.Eventually(t, "both are gone", func() bool { // the inner one reads the terminal until it notices
				return gone(outer) && gone(inner)
			})
			c.typed("\n")
			c.shows(`ready> $`)
			c.sane()
			sandboxtest.Eventually(t, fmt.Sprintf("nothing goes on, after %s, inner %v", sig, killInner),
				func() bool { return strings.Count(s.run(t, "ps", id), "\n") == 1 })
		}
	}
	// What another program has begun, such as an agent, is not ours to end.
	c.typed("clear; soulbox sandbox connect " + id + "\n")
	c.shows(`\$ $`)
	c.keys("C-p", "C-q")
	theirs := c.shows(`left; 'soulbox sandbox connect ` + id + ` (\d+)' comes back`)[1]
	c.typed("clear; soulbox sandbox connect " + id + " " + theirs + "\n")
	inner := child(t, "soulbox sandbox connect", child(t, "soulbox sandbox connect", c.shell()))
	c.typed("echo $((40+2))\n")
	c.shows("^42$")
	if err := syscall.Kill(inner, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	c.shows(`ready> $`)
	c.sane()
	if ps := s.run(t, "ps", id); !strings.Contains(ps, theirs) {
		t.Errorf("it was ended:\n%s", ps)
	}
}

// TestKilledExec: a command without a terminal is killed with its soulbox by the signals that soulbox gets, and the exit code says which
// one.
func TestKilledExec(t *testing.T) {
	s := newSurroundings(t)
	id := strings.TrimSpace(s.run(t, "sandbox", "create"))
	for sig, script := range map[syscall.Signal]string{
		syscall.SIGINT:  "exec sleep 1000",
		syscall.SIGTERM: "exec sleep 1000",
		syscall.SIGHUP:  "exec sleep 1000",
	} {
		cmd := s.command("exec", id, "--", "sh", "-c", script)
		var stderr strings.Builder
		cmd.Stderr = &stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		sandboxtest.Eventually(t, "it runs", func() bool { return strings.Contains(s.run(t, "ps", id), "running") })
		if err := cmd.Process.Signal(sig); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Wait(); err == nil || cmd.ProcessState.ExitCode() != 128+int(sig) {
			t.Errorf("%s: %v %s", sig, err, stderr.String())
		}
		sandboxtest.Eventually(t, "nothing goes on", func() bool { return strings.Count(s.run(t, "ps", id), "\n") == 1 })
	}
	// A command that ignores signals: the second SIGTERM kills it, and the third Ctrl-C. A SIGHUP for a reload does not end it.
	for _, steps := range [][]step{
		{{"begun", syscall.SIGHUP}, {"reloaded", syscall.SIGTERM}, {"again", syscall.SIGTERM}},
		{{"begun", syscall.SIGINT}, {"again", syscall.SIGINT}, {"again", syscall.SIGINT}},
	} {
		stubborn := s.command("exec", id, "--", "sh", "-c",
			"trap 'echo again' TERM INT; trap 'echo reloaded' HUP; echo begun; while :; do sleep 0.1; done")
		out, err := stubborn.StdoutPipe()
		if err == nil {
			err = stubborn.Start()
		}
		if err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		for _, step := range steps {
			if !lines.Scan() || lines.Text() != step.says {
				t.Fatalf("%q, want %q", lines.Text(), step.says)
			}
			if err := stubborn.Process.Signal(step.then); err != nil {
				t.Fatal(err)
			}
		}
		if err := stubborn.Wait(); err == nil || stubborn.ProcessState.ExitCode() != 128+int(steps[2].then) {
			t.Errorf("%v", err)
		}
		sandboxtest.Eventually(t, "nothing goes on", func() bool { return strings.Count(s.run(t, "ps", id), "\n") == 1 })
	}
	// A reader that stops early.
	cmd := exec.Command("sh", "-c", "soulbox exec "+id+" -- yes | head -1")
	cmd.Env = s.env
	if out, err := cmd.CombinedOutput(); err != nil || string(out) != "y\n" {
		t.Errorf("%v %q", err, out)
	}
	sandboxtest.Eventually(t, "nothing goes on", func() bool { return strings.Count(s.run(t, "ps", id), "\n") == 1 })
}

type step struct {
	says string
	then syscall.Signal
}

// TestPausedExec: a client that follows a process neither undoes a pause of the sandbox nor kills the process.
func TestPausedExec(t *testing.T) {
	s := newSurroundings(t)
	id := strings.TrimSpace(s.run(t, "sandbox", "create"))
	for name, args := range map[string][]string{"no input": {"exec", id, "--", "sleep", "1000"},
		"much input": {"exec", "-i", id, "--", "sh", "-c", "cat >/dev/null; sleep 1000"}} {
		follower := s.command(args...)
		follower.Stdin = endless{}
		var said strings.Builder
		follower.Stderr = &said
		follower.WaitDelay = time.Second // for what still reads its output
		if err := follower.Start(); err != nil {
			t.Fatal(err)
		}
		sandboxtest.Eventually(t, "it runs", func() bool { return strings.Contains(s.run(t, "ps", id), "running") })
		s.run(t, "sandbox", "pause", id)
		if err := follower.Wait(); err == nil || follower.ProcessState.ExitCode() != exitExec ||
			!strings.Contains(said.String(), "was paused") {
			t.Errorf("%s: %v %s", name, err, said.String())
		}
		if list := s.run(t, "sandbox", "list"); !strings.Contains(list, "paused") {
			t.Error(name, list)
		}
		s.run(t, "sandbox", "resume", id)
		if list := s.run(t, "ps", id); strings.Count(list, "running") != 1 {
			t.Error(name, list)
		}
		s.run(t, "kill", id, strings.Fields(strings.Split(s.run(t, "ps", id), "\n")[1])[0], "-s", "KILL")
		sandboxtest.Eventually(t, "it is over", func() bool { return !strings.Contains(s.run(t, "ps", id), "running") })
	}
}

// endless is input without end.
type endless struct{}

func (endless) Read(p []byte) (int, error) { return copy(p, bytes.Repeat([]byte("x"), len(p))), nil }
