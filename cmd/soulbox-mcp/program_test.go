package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"soulbox.dev/soulbox/api"
	"soulbox.dev/soulbox/internal/sandboxtest"
	"soulbox.dev/soulbox/tools"
)

// TestWork is an ordinary hour of a model with the real program.
func TestWork(t *testing.T) {
	p := launch(t, "")
	if got := p.exec("id -un; pwd"); got != "user\n/home/user\n" {
		t.Fatalf("%q", got)
	}
	p.call("file_write", map[string]any{"path": "/home/user/a/b.txt", "content": "one\ntwo\n"})
	p.call("file_edit", map[string]any{"path": "/home/user/a/b.txt", "old_str": "two", "new_str": "three"})
	if got := p.exec("stat -c '%U %a' a/b.txt; cat a/b.txt"); got != "user 644\none\nthree\n" {
		t.Fatalf("%q", got)
	}
	p.call("file_write", map[string]any{"files": []map[string]any{{"path": "/home/user/x", "content": "AAEC", "encoding": "base64"},
		{"path": "/home/user/y", "content": "y"}}})
	if got := p.call("file_read", map[string]any{"path": "/home/user/x",
		"encoding": "base64"}); got.Result.StructuredContent["content"] != "AAEC" {
		t.Fatal(got.text())
	}
	if got := p.exec("printf '\\211PNG\\r\\n\\032\\n0000' > p.png; echo made"); got != "made\n" {
		t.Fatal(got)
	}
	if got := p.call("file_read", map[string]any{"path": "/home/user/p.png"}); got.Result.StructuredContent["encoding"] != "image" ||
		len(got.Result.Content) != 2 {
		t.Fatal(got.text())
	}
	if got := p.call("file_list", map[string]any{"depth": 2}).text(); !strings.Contains(got, "/home/user/a/b.txt") {
		t.Fatal(got)
	}
	if got := p.call("file_search", map[string]any{"pattern": "thr.e"}).text(); !strings.Contains(got, "b.txt:2:three") {
		t.Fatal(got)
	}
	p.call("file_move", map[string]any{"from": "/home/user/a", "to": "/tmp/a"})
	p.call("file_remove", map[string]any{"path": "/tmp/a", "recursive": true})
	shell := p.call("exec", map[string]any{"command": "bash", "background": true, "tag": "shell"})
	if shell.Result.StructuredContent["state"] != "running" {
		t.Fatal(shell.text())
	}
	if got := p.call("process_write", map[string]any{"tag": "shell",
		"input": "echo $((6*7))\n"}); got.Result.StructuredContent["output"] != "42\n" {
		t.Fatal(got.text())
	}
	if got := p.call("sandbox_get", nil).text(); !strings.Contains(got, "is running, this session's own") {
		t.Fatal(got)
	}
	second := p.call("sandbox_create", map[string]any{"env": map[string]string{"SECRET": "s3cret"}})
	id := second.Result.StructuredContent["sandbox_id"]
	if got := p.call("exec", map[string]any{"sandbox_id": id,
		"command": "echo $SECRET; ls /home/user"}).Result.StructuredContent["output"]; got != "s3cret\n" {
		t.Fatalf("%q", got)
	}
	// Secrets are in no file of the host.
	out, err := exec.Command("grep", "-rl", "--exclude-dir=templates", "--exclude-dir=disk", "s3cret", p.state).CombinedOutput()
	if err == nil {
		t.Fatalf("the secret is in %s", out)
	}
	p.call("sandbox_kill", map[string]any{"sandbox_id": id})
	gone := p.await(p.start("exec", map[string]any{"sandbox_id": id, "command": "true"}))
	if !gone.Result.IsError || !strings.Contains(gone.text(), "killed by request") || !strings.Contains(gone.text(), "sandbox_create") {
		t.Fatal(gone.text())
	}
}

// TestDefaultSandboxEnds: the model is told once, and continues with a new sandbox.
func TestDefaultSandboxEnds(t *testing.T) {
	p := launch(t, "")
	id := p.call("exec", map[string]any{"command": "true"}).Result.StructuredContent["sandbox_id"]
	p.call("sandbox_kill", map[string]any{"sandbox_id": id})
	told := p.await(p.start("exec", map[string]any{"command": "true"}))
	if !told.Result.IsError || !strings.Contains(told.text(), "makes a new one") {
		t.Fatal(told.text())
	}
	if again := p.call("exec", map[string]any{"command": "true"}).Result.StructuredContent["sandbox_id"]; again == id {
		t.Fatal("the same sandbox came back")
	}
}

// TestEndUnderCall: if a sandbox ends during a call, the call's error says why.
func TestEndUnderCall(t *testing.T) {
	p := launch(t, "")
	id := p.call("sandbox_create", map[string]any{"timeout_ms": 2000, "on_timeout": "kill"}).Result.StructuredContent["sandbox_id"]
	m := p.await(p.start("exec", map[string]any{"sandbox_id": id, "command": "sleep 600", "yield_ms": 50_000}))
	if !m.Result.IsError || !strings.Contains(m.text(), "its life time was over") || !strings.Contains(m.text(), "sandbox_create") {
		t.Fatal(m.text())
	}
}

// TestUmask: the umask of the user who starts the server does not affect sandboxes.
func TestUmask(t *testing.T) {
	defer syscall.Umask(syscall.Umask(0o077))
	p := launch(t, "")
	if got := p.exec("whoami; head -c 4 /etc/passwd"); got != "user\nroot" {
		t.Fatalf("%q", got)
	}
}

// TestFiftyInFlight: one long call delays none of the others; cancelling it ends its whole process group, and it gets no answer.
func TestFiftyInFlight(t *testing.T) {
	p := launch(t, "")
	p.exec("true")
	long := p.start("exec", map[string]any{"command": "sleep 60 & sleep 60; sleep 60", "tag": "long", "yield_ms": 50_000})
	var others []pending
	for i := range 49 {
		others = append(others, p.start("exec", map[string]any{"command": fmt.Sprintf("echo %d", i)}))
	}
	for i, o := range others {
		if m := p.await(o); m.Result.StructuredContent["output"] != fmt.Sprintf("%d\n", i) {
			t.Fatalf("call %d got %s", i, m.text())
		}
	}
	sandboxtest.Eventually(t, "three sleeps of a shell run",
		func() bool { return strings.Count(p.exec("cat /proc/[0-9]*/cmdline | tr '\\0' ' '"), "sleep 60 ") >= 2 })
	p.send(map[string]any{"jsonrpc": "2.0", "method": "notifications/cancelled", "params": map[string]any{"requestId": long.id}})
	begin := time.Now()
	sandboxtest.Eventually(t, "the whole group is gone", func() bool {
		return p.call("process_list", map[string]any{"tag": "long",
			"state": "exited"}).Result.StructuredContent["processes"].([]any) != nil &&
			!strings.Contains(p.exec("cat /proc/[0-9]*/cmdline | tr '\\0' ' ' | grep -o '[s]leep 6[0]' | head -1"), "sleep")
	})
	t.Logf("gone after %s", time.Since(begin))
	p.close() // an answer to the cancelled call would be a read error
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.waiting[fmt.Sprint(long.id)] == nil {
		t.Fatal("a cancelled call was answered")
	}
}

// TestProgress: while a command runs, its last line is reported, before the answer.
func TestProgress(t *testing.T) {
	p := launch(t, "")
	m := p.await(p.request("tools/call", map[string]any{
		"name": "exec", "arguments": map[string]any{"command": "for i in 1 2 3 4; do echo line $i; sleep 0.6; done"},
		"_meta": map[string]any{"progressToken": "tok"},
	}))
	if m.Error != nil || m.Result.IsError {
		t.Fatal(m.text())
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	isProgress := func(n message) bool { return n.Method == "notifications/progress" }
	if slices.ContainsFunc(p.notes[m.notesBefore:], isProgress) {
		t.Fatalf("progress came after the answer: %+v", p.notes[m.notesBefore:])
	}
	notes := slices.DeleteFunc(slices.Clone(p.notes), func(n message) bool { return !isProgress(n) })
	if len(notes) == 0 {
		t.Fatal("no progress was told")
	}
	for i, n := range notes {
		if n.Params["progressToken"] != "tok" || n.Params["progress"] != float64(i+1) ||
			!strings.HasPrefix(fmt.Sprint(n.Params["message"]), "line ") {
			t.Errorf("%+v", n)
		}
	}
}

// TestPipeIntoStdio is `printf … | soulbox-mcp stdio`, 100 times: every request is answered, whether stdin or the work ends first.
func TestPipeIntoStdio(t *testing.T) {
	state := sandboxtest.Dir(t)
	var input strings.Builder
	for i := range 5 {
		fmt.Fprintf(&input, `{"jsonrpc":"2.0","id":%d,"method":"tools/call","params":{"name":"sandbox_list","arguments":{}}}`+"\n", i)
	}
	for i := range 100 {
		if i == 50 { // also with a sandbox that does not exist yet when stdin ends
			input.WriteString(`{"jsonrpc":"2.0","id":5,"method":"tools/call","params":{"name":"exec","arguments":{"command":"echo hi"}}}` +
				"\n")
		}
		if i > 52 {
			input.Reset()
			input.WriteString(strings.Repeat(`{"jsonrpc":"2.0","id":1,"method":"ping"}`+"\n", 5))
		}
		cmd := exec.Command(sandboxtest.Program(t, "soulbox-mcp"), "stdio", "--state-dir="+state, "--log-level=warn")
		cmd.Stdin = strings.NewReader(input.String())
		out, err := cmd.Output()
		if err != nil {
			t.Fatal(err)
		}
		if asked, answered := strings.Count(input.String(), "\n"), bytes.Count(out, []byte("\n")); answered != asked ||
			bytes.Contains(out, []byte(`"isError"`)) {
			t.Fatalf("run %d: asked %d, answered %d:\n%s", i, asked, answered, out)
		}
	}
}

// TestFloods: much output and many commands cost neither server nor agent much memory. `make bench` does it with 2 GB and 10,000.
func TestFloods(t *testing.T) {
	const limit = 64 << 20
	p := launch(t, "")
	p.exec("yes | head -c 300M")
	if got := p.exec("yes a line | head -c 100M | tail -c 12; printf '%090000000d' 7 | tail -c 3"); !strings.HasSuffix(got, "007") {
		t.Fatalf("%q", got)
	}
	for range 300 {
		p.exec("/bin/true")
	}
	usage := p.call("sandbox_get", nil).Result.StructuredContent["usage"].(map[string]any)
	agent := int64(usage["agent_memory_mb"].(float64)) << 20
	if rss := p.rss(); rss > limit || agent > limit {
		t.Fatalf("the server takes %d MB, the agent %d MB", rss>>20, agent>>20)
	}
}

// TestServerKilled: after kill -9 at random moments and the next start, nothing is left of sandboxes that must not outlive their server.
func TestServerKilled(t *testing.T) {
	state := sandboxtest.Dir(t)
	for i := range 20 {
		p := launch(t, state, "--on-exit=kill")
		p.start("exec", map[string]any{"command": "sleep 600 & sleep 600"})
		p.start("sandbox_create", nil)
		p.start("file_write", map[string]any{"path": "/home/user/x", "content": strings.Repeat("x", 100_000)})
		time.Sleep(time.Duration(rand.IntN(250)) * time.Millisecond) // the random moment is what is tested; this is not a wait
		if err := p.cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = p.cmd.Wait() // an error, since it was killed
		<-p.ended
		if i%5 != 4 {
			continue // leave it to a later start
		}
		next := launch(t, state, "--on-exit=kill")
		sandboxtest.Eventually(t, "nothing is left", func() bool {
			return len(sandboxtest.Processes(state)) == 0 &&
				len(directories(t, state)) == 0
		})
		if next.exec("echo alive") != "alive\n" {
			t.Fatal("the next server does not work")
		}
		next.close()
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil || bytes.Contains(mounts, []byte(state)) {
		t.Fatalf("a mount is left: %v", err)
	}
	if left := directories(t, state); len(left) > 0 {
		t.Fatalf("left: %v", left)
	}
	for _, pattern := range []string{"*/.new-*", ".*", "*/*/.*-*"} {
		if left, err := filepath.Glob(filepath.Join(state, pattern)); err != nil || len(left) > 0 {
			t.Fatalf("left: %v %v", left, err)
		}
	}
}

// TestClientGone: when a client ends and closes all its pipes, or its terminal is closed, its sandboxes are paused to disk, and the next
// client has them.
func TestClientGone(t *testing.T) {
	for name, leave := range map[string]func(*exec.Cmd, ...*os.File){
		"pipes closed": func(_ *exec.Cmd, ends ...*os.File) {
			for _, f := range ends {
				_ = f.Close()
			}
		},
		"hangup": func(cmd *exec.Cmd, _ ...*os.File) { _ = cmd.Process.Signal(syscall.SIGHUP) },
	} {
		state := sandboxtest.Dir(t)
		inR, inW, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		outR, outW, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(sandboxtest.Program(t, "soulbox-mcp"), "stdio", "--state-dir="+state)
		cmd.Stdin, cmd.Stdout, cmd.Stderr = inR, outW, outW
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		_, _ = inR.Close(), outW.Close()
		for i := range 3 {
			fmt.Fprintf(inW, `{"jsonrpc":"2.0","id":%d,"method":"tools/call","params":{"name":"sandbox_create","arguments":{}}}`+"\n", i)
		}
		answers := bufio.NewReader(outR) // log lines come through the same pipe
		for told := 0; told < 3; {
			line, err := answers.ReadString('\n')
			if err != nil {
				t.Fatal(err)
			}
			if strings.Contains(line, `"sandbox_id"`) {
				told++
			}
		}
		leave(cmd, inW, outR)
		_ = cmd.Wait() // the error may be that the client is gone
		_, _ = inW.Close(), outR.Close()
		if left := sandboxtest.Processes(state); len(left) > 0 || len(directories(t, state)) != 3 {
			t.Errorf("%s: left: %v %v", name, left, directories(t, state))
		}
		p := launch(t, state, "--on-exit=kill")
		for _, id := range directories(t, state) {
			if got := p.call("exec", map[string]any{"sandbox_id": id, "command": "echo alive"}).text(); !strings.HasPrefix(got, "alive") {
				t.Errorf("%s: %s", name, got)
			}
		}
		p.close()
		if left := directories(t, state); len(left) > 0 {
			t.Errorf("%s: left: %v", name, left)
		}
	}
}

func directories(t *testing.T, state string) []string {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(state, "sandboxes"))
	if err != nil {
		t.Fatal(err)
	}
	var dirs []string
	for _, e := range entries {
		if e.IsDir() {
			dirs = append(dirs, e.Name())
		}
	}
	return dirs
}

// TestTwoServers: two servers share a state directory, and neither touches the other's sandboxes.
func TestTwoServers(t *testing.T) {
	state := sandboxtest.Dir(t)
	a := launch(t, state)
	a.exec("echo kept > kept")
	b := launch(t, state)
	b.exec("true")
	b.close()
	if got := a.exec("cat kept"); got != "kept\n" {
		t.Fatalf("%q", got)
	}
}

func TestSignalEndsServer(t *testing.T) {
	for _, sig := range []os.Signal{syscall.SIGTERM, syscall.SIGINT} {
		p := launch(t, "")
		p.exec("true")
		running := p.start("exec", map[string]any{"command": "sleep 600", "yield_ms": 50_000})
		sandboxtest.Eventually(t, "it runs", func() bool {
			return strings.Contains(p.call("process_list", map[string]any{"state": "running"}).text(), "sleep 600")
		})
		if err := p.cmd.Process.Signal(sig); err != nil {
			t.Fatal(err)
		}
		if m := p.await(running); m.Result.StructuredContent["state"] != "running" {
			t.Fatalf("%s: the call in flight got %s", sig, m.text())
		}
		p.close()
		if left := sandboxtest.Processes(p.state); len(left) > 0 {
			t.Fatalf("%s: left: %v", sig, left)
		}
	}
}

// TestMissingPrograms: the server still answers, and says what to do.
func TestMissingPrograms(t *testing.T) {
	dir := sandboxtest.Dir(t)
	alone := filepath.Join(dir, "soulbox-mcp")
	body, err := os.ReadFile(sandboxtest.Program(t, "soulbox-mcp"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(alone, body, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(alone, "stdio", "--state-dir="+filepath.Join(dir, "state"), "--log-level=error")
	cmd.Env = []string{sandboxtest.RuntimeEnv(), "PATH=/usr/bin:/bin"}
	cmd.Stdin = strings.NewReader(`{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"exec","arguments":{"command":"true"}}}` +
		"\n")
	out, err := cmd.Output()
	if err != nil || !bytes.Contains(out, []byte("is not found; run 'soulbox-mcp doctor'")) {
		t.Fatalf("%s %v", out, err)
	}
	cmd = exec.Command(alone, "doctor", "--state-dir="+filepath.Join(dir, "state"))
	cmd.Env = []string{sandboxtest.RuntimeEnv(), "PATH=/usr/bin:/bin"}
	out, err = cmd.CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || !regexp.MustCompile(`(?s)FAIL  runsc.*make build.*FAIL  agent.*checks failed`).Match(out) {
		t.Fatalf("%s %v", out, err)
	}
}

func TestDoctorAndDemo(t *testing.T) {
	for command, want := range map[string]string{"doctor": "This machine can run sandboxes.", "demo": "all as expected"} {
		cmd := exec.Command(sandboxtest.Program(t, "soulbox-mcp"), command, "--state-dir="+sandboxtest.Dir(t))
		out, err := cmd.CombinedOutput()
		if err != nil || !bytes.Contains(out, []byte(want)) {
			t.Errorf("%s: %v\n%s", command, err, out)
		} else if command == "demo" {
			checkPicture(t, string(out))
		}
	}
}

func TestCommandLine(t *testing.T) {
	for _, test := range []struct {
		args []string
		code int
		want string
	}{
		{nil, 2, "name a command"}, {[]string{"help"}, 0, "Usage:"}, {[]string{"version"}, 0, "soulbox-mcp "},
		{[]string{"bogus"}, 2, "there is no command"},
		{[]string{"stdio", "--bogus"}, 2, "soulbox-mcp: there is no option --bogus; 'soulbox-mcp stdio -h' lists the options\n"},
		{[]string{"cert", "--bo\ngus"}, 2, "soulbox-mcp: there is no option --bo\\ngus; 'soulbox-mcp cert -h' lists the options\n"},
		{[]string{"cert", "--bogus"}, 2, "soulbox-mcp: there is no option --bogus; 'soulbox-mcp cert -h' lists the options\n"},
		{[]string{"template", "copy", "a", "b", "-x"}, 2, "no option --x; 'soulbox-mcp template copy -h' lists"},
		{[]string{"template", "copy", "-h"}, 0, "-state-dir"}, {[]string{"template", "copy", "a"}, 2, "needs 2 arguments"},
		{[]string{"template", "bogus", "-x"}, 2, "'soulbox-mcp template help' lists the commands\n"},
		{[]string{"key", "bogus"}, 2, "'soulbox-mcp key help' lists the commands\n"}, {[]string{"key"}, 0, "key create --owner NAME"},
		{[]string{"http", "--listen", "8787"}, 2, "name a host and a port"}, {[]string{"http", "--rate"}, 2, "needs an argument: -rate; "},
		{[]string{"stdio", "more"}, 2, "there is no argument"},
		{[]string{"stdio", "--memory-mb=-1"}, 2, "must be positive"},
		{[]string{"stdio", "--lifetime", "5"}, 2, "for flag -lifetime: parse error; give a time such as 90s, 5m or 2h"},
		{[]string{"stdio", "--toolsets", "core,nope"}, 2, `--toolsets: there is no toolset "nope"; there are core`},
		{[]string{"stdio", "--cpu=NaN"}, 2, "must be positive"}, {[]string{"stdio", "--memory-mb=9223372036854775807"}, 2, "at most"},
		{[]string{"key", "create"}, 2, "--owner is missing"},
		{[]string{"key", "create", "--owner", "a b"}, 2, "an owner is 1 to 64 letters"},
		{[]string{"key", "create", "--owner", "a", "--expires=-1h"}, 2, "positive"}, {[]string{"key", "revoke"}, 2, "--id is missing"},
		{[]string{"key", "revoke", "--id", "nope"}, 1, "no such key"}, {[]string{"http", "--rate=-1"}, 2, "must not be negative"},
		{[]string{"http", "--rate=NaN"}, 2, "must not be negative"}, {[]string{"http", "--session-idle=-1s"}, 2, "must not be negative"},
		{[]string{"http", "--oidc-issuer=nope", "--oidc-audience=x"}, 2, "give the URL of an OpenID provider"},
		{[]string{"http", "--listen=127.0.0.1:nope"}, 2, "a port is a number"},
		{[]string{"http", "--listen=127.0.0.1:0", "--domain=a_b"}, 2, "is not a domain"},
		{[]string{"envd", "--listen=127.0.0.1:99999"}, 2, "a port is a number"}, {[]string{"envd", "--listen=nope"}, 2, "--listen"},
		{[]string{"local", "--idle-exit=-1s"}, 2, "must not be negative"},
		{[]string{"template", "base", "--variant=rust"}, 2, "--variant: there is no variant"},
		{[]string{"stdio", "--help"}, 0, "-state-dir"}, {[]string{"stdio", "--log-level=loud"}, 2, "loud"},
	} {
		cmd := exec.Command(sandboxtest.Program(t, "soulbox-mcp"), test.args...)
		cmd.Env = []string{sandboxtest.RuntimeEnv(), "HOME=" + sandboxtest.Dir(t)}
		out, _ := cmd.CombinedOutput()
		if cmd.ProcessState.ExitCode() != test.code || !strings.Contains(string(out), test.want) {
			t.Errorf("%v: exit %d, %s", test.args, cmd.ProcessState.ExitCode(), out)
		}
		if lines := strings.Count(string(out), "\n"); test.code != 0 && test.args != nil && lines > 1 {
			t.Errorf("%v: %d lines say what is wrong", test.args, lines)
		}
	}
}

// TestToolsDoc: the table of tools in docs/tools.md equals the program's list, and the toolsets there are the program's.
func TestToolsDoc(t *testing.T) {
	text, err := os.ReadFile(repository(t, "docs/tools.md"))
	if err != nil {
		t.Fatal(err)
	}
	var named, offered []string
	for _, row := range regexp.MustCompile("(?m)^\\| `([a-z_]+)` \\|").FindAllStringSubmatch(string(text), -1) {
		named = append(named, row[1])
	}
	server, err := newMCP(tools.Options{FileURL: (&api.Gateway{}).FileURL}, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	for name := range server.MCP.ListTools() {
		offered = append(offered, name)
	}
	slices.Sort(named)
	slices.Sort(offered)
	if !slices.Equal(named, offered) {
		t.Errorf("docs/tools.md has %v\nthe program has %v", named, offered)
	}
	if sets := "`--toolsets " + strings.Join(tools.Toolsets(), ",") + "`"; !strings.Contains(string(text), sets) {
		t.Errorf("docs/tools.md does not have %s", sets)
	}
}
