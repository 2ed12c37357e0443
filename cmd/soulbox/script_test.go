package main

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"soulbox.dev/soulbox/api/client"
	"soulbox.dev/soulbox/internal/sandboxtest"
)

func TestMain(m *testing.M) {
	sandboxtest.Main(m, "TestWithoutServer", "TestConnect", "TestHelpGolden", "TestUnpackHostile", "TestVersions")
}

// surroundings are a user's machine: a home, a state directory and the programs, but no server yet.
type surroundings struct {
	dir string
	env []string
}

func newSurroundings(t testing.TB) surroundings {
	t.Helper()
	dir := sandboxtest.Dir(t)
	run, err := os.MkdirTemp("", "run-") // paths of sockets must be short (unix(7))
	if err != nil {
		t.Fatal(err)
	}
	s := surroundings{dir: dir, env: []string{"HOME=" + filepath.Join(dir, "home"), "SOULBOX_STATE_DIR=" + filepath.Join(dir, "state"),
		"SOULBOX_RUNTIME_DIR=" + run,
		"PATH=" + filepath.Dir(sandboxtest.Program(t, "soulbox")) + ":/usr/bin:/bin", "TERM=xterm", "LANG=C.UTF-8"}}
	if err := os.Mkdir(filepath.Join(dir, "home"), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.end(t)
		if err := os.RemoveAll(run); err != nil {
			t.Error(err)
		}
	})
	return s
}

func (s surroundings) get(name string) string {
	for _, e := range s.env {
		if v, ok := strings.CutPrefix(e, name+"="); ok {
			return v
		}
	}
	return ""
}

// command returns the program as a command with this user's environment.
func (s surroundings) command(args ...string) *exec.Cmd {
	cmd := exec.Command(filepath.Join(strings.Split(s.get("PATH"), ":")[0], "soulbox"), args...)
	cmd.Env, cmd.Dir = s.env, s.get("HOME")
	return cmd
}

// run runs the program, which must succeed, and returns its output.
func (s surroundings) run(t testing.TB, args ...string) string {
	t.Helper()
	var stderr strings.Builder
	cmd := s.command(args...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("soulbox %s: %v\n%s%s", strings.Join(args, " "), err, out, stderr.String())
	}
	return string(out)
}

// servers returns the process numbers of the servers that were started.
func (s surroundings) servers(t testing.TB) (pids []int) {
	t.Helper()
	paths, err := client.Sockets(s.get("SOULBOX_RUNTIME_DIR"))
	if err != nil {
		t.Error(err)
	}
	for _, path := range paths {
		if pid, err := strconv.Atoi(strings.TrimSuffix(filepath.Base(path), ".sock")); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

// end ends all sandboxes and servers.
func (s surroundings) end(t testing.TB) {
	t.Helper()
	if _, err := os.Stat(s.get("SOULBOX_STATE_DIR")); err != nil {
		return // no server was ever started
	}
	if ids := strings.Fields(s.run(t, "sandbox", "list", "-o", "name")); len(ids) > 0 {
		s.run(t, append([]string{"sandbox", "kill"}, ids...)...)
	}
	for _, pid := range s.servers(t) {
		stop(t, pid, syscall.SIGTERM)
	}
}

// stop ends a server that a command has started, and that is not our child.
func stop(t testing.TB, pid int, sig syscall.Signal) {
	t.Helper()
	if err := syscall.Kill(pid, sig); err != nil && !errors.Is(err, syscall.ESRCH) {
		t.Error(err)
	}
	sandboxtest.Eventually(t, "the server has ended", func() bool {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		return err != nil || strings.Contains(string(stat), ") Z ") // no parent may reap it here
	})
}

// TestScripts runs every command with real servers and sandboxes.
func TestScripts(t *testing.T) {
	all, err := filepath.Glob("testdata/script/*.txtar")
	if err != nil || len(all) == 0 {
		t.Fatal(all, err)
	}
	for _, file := range all {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			s := newSurroundings(t)
			testscript.Run(t, testscript.Params{
				Files: []string{file},
				Setup: func(env *testscript.Env) error {
					for _, e := range s.env {
						name, value, _ := strings.Cut(e, "=")
						if name != "HOME" {
							env.Setenv(name, value)
						}
					}
					env.Setenv("HOME", env.WorkDir)
					return nil
				},
				Cmds: map[string]func(*testscript.TestScript, bool, []string){
					"take":    take,
					"within":  within,
					"web":     func(ts *testscript.TestScript, _ bool, args []string) { web(t, ts, s, args) },
					"fetch":   fetch,
					"upload":  upload,
					"image":   func(ts *testscript.TestScript, _ bool, args []string) { image(t, ts, args) },
					"servers": func(ts *testscript.TestScript, _ bool, args []string) { count(t, ts, s, args) },
				},
				RequireExplicitExec: true,
			})
		})
	}
}

// take sets a variable to the last output on stdout, without the end of the line.
func take(ts *testscript.TestScript, _ bool, args []string) {
	ts.Setenv(args[0], strings.TrimSpace(ts.ReadFile("stdout")))
}

// within repeats a command until it succeeds and prints a text: within TEXT COMMAND...
func within(ts *testscript.TestScript, neg bool, args []string) {
	for end := time.Now().Add(60 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		err := ts.Exec(args[1], args[2:]...)
		if has := err == nil && strings.Contains(ts.ReadFile("stdout"), args[0]); has != neg {
			return
		}
		if time.Now().After(end) {
			ts.Fatalf("not within 60 s: %q of %v; at last %v, %q", args[0], args[1:], err, ts.ReadFile("stdout"))
		}
	}
}

// web starts an HTTP server with the given flags, and sets URL to its address. The server ends with the test.
func web(t *testing.T, ts *testscript.TestScript, s surroundings, args []string) {
	cmd := exec.Command(filepath.Join(strings.Split(s.get("PATH"), ":")[0], "soulbox-mcp"),
		append([]string{"http", "--listen", "127.0.0.1:0", "--log-level", "warn"}, args...)...)
	cmd.Env = s.env
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	ts.Check(err)
	ts.Check(cmd.Start())
	ts.Defer(func() {
		if err := errors.Join(cmd.Process.Signal(syscall.SIGTERM), cmd.Wait()); err != nil {
			t.Error(err)
		}
	})
	line := make([]byte, 200)
	n, err := out.Read(line)
	ts.Check(err)
	ts.Setenv("URL", strings.TrimSuffix(strings.TrimSpace(string(line[:n])), "/mcp"))
}

// image makes a tar of a small file system: image FILE.
func image(t *testing.T, ts *testscript.TestScript, args []string) {
	dir := t.TempDir()
	ts.Check(os.Rename(sandboxtest.ImageTar(t, dir), ts.MkAbs(args[0])))
}

// fetch requests a URL until the answer contains a text: fetch TEXT URL.
func fetch(ts *testscript.TestScript, _ bool, args []string) {
	last := ""
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		res, err := http.Get(args[1])
		if err != nil {
			last = err.Error()
			continue
		}
		body, err := io.ReadAll(res.Body)
		_ = res.Body.Close()
		if last = fmt.Sprint(res.Status, string(body), err); err == nil && res.StatusCode == http.StatusOK &&
			strings.Contains(string(body), args[0]) {
			return
		}
	}
	ts.Fatalf("not within 30 s: %q of %s; at last %s", args[0], args[1], last)
}

// upload sends a file to a URL: upload FILE URL.
func upload(ts *testscript.TestScript, _ bool, args []string) {
	res, err := http.Post(args[1], "application/octet-stream", strings.NewReader(ts.ReadFile(args[0])))
	ts.Check(err)
	_ = res.Body.Close()
	if res.StatusCode != http.StatusOK {
		ts.Fatalf("%s", res.Status)
	}
}

// count checks the number of servers: servers N.
func count(t *testing.T, ts *testscript.TestScript, s surroundings, args []string) {
	if got := s.servers(t); strconv.Itoa(len(got)) != args[0] {
		ts.Fatalf("there are %d servers", len(got))
	}
}

// TestWithoutServer: a sandbox paused on disk is shown and resumed when no server runs, and the sandboxes of two servers are one list.
func TestWithoutServer(t *testing.T) {
	s := newSurroundings(t)
	id := strings.TrimSpace(s.run(t, "sandbox", "create"))
	s.run(t, "exec", id, "--", "sh", "-c", "echo kept > kept")
	s.run(t, "sandbox", "pause", id)
	for _, pid := range s.servers(t) {
		stop(t, pid, syscall.SIGTERM)
	}
	if left := s.servers(t); len(left) > 0 {
		t.Errorf("sockets are left: %v", left)
	}
	if list := s.run(t, "sandbox", "list"); !strings.Contains(list, id) || !strings.Contains(list, "paused") {
		t.Error(list)
	}
	// Next to it an IDE's server: its sandboxes are found, too.
	ide := exec.Command(filepath.Join(filepath.Dir(s.command().Path), "soulbox-mcp"), "stdio", "--log-level", "error")
	ide.Env, ide.Stderr = s.env, os.Stderr
	in, err := ide.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := ide.StdoutPipe()
	if err == nil {
		err = ide.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	_, err = io.WriteString(in,
		`{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-06-18","capabilities":{},"clientInfo":{"name":"ide","version":"1"}}}
{"jsonrpc":"2.0","method":"notifications/initialized"}
{"jsonrpc":"2.0","id":2,"method":"tools/call","params":{"name":"exec","arguments":{"command":"echo agent > work"}}}
`)
	if err != nil {
		t.Fatal(err)
	}
	go func() { _, _ = io.Copy(io.Discard, out) }() // the effect is checked below
	other := ""
	sandboxtest.Eventually(t, "the agent's sandbox is listed", func() bool {
		for _, one := range strings.Fields(s.run(t, "sandbox", "list", "-o", "name")) {
			if one != id {
				other = one
			}
		}
		return other != ""
	})
	sandboxtest.Eventually(t, "what the agent did is seen", func() bool {
		text, err := s.command("exec", other, "--", "cat", "/home/user/work").Output()
		return err == nil && string(text) == "agent\n"
	})
	if text := s.run(t, "exec", id, "--", "cat", "kept"); text != "kept\n" {
		t.Error(text)
	}
	if err := errors.Join(in.Close(), ide.Wait()); err != nil {
		t.Error(err)
	}
	if list := s.run(t, "sandbox", "list"); strings.Count(list, "paused") != 1 || strings.Count(list, "running") != 1 {
		t.Errorf("the agent's is paused on disk by its server, and the other runs:\n%s", list)
	}
}
