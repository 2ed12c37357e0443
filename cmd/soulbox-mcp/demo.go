package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	"github.com/mark3labs/mcp-go/client"
	"github.com/mark3labs/mcp-go/client/transport"
	"github.com/mark3labs/mcp-go/mcp"

	"soulbox.dev/soulbox/template"
)

// step is one call of the demo; check is a text that its result must contain.
type step struct {
	say   string
	tool  string
	args  map[string]any
	check string
}

// demoSteps are the steps of the demo. A sandbox of the host template has the host's programs; one of the base template has its own, and a
// network for installing more.
func demoSteps(home string, hasBase bool) []step {
	compute, serve := demoPrograms(hasBase)
	return slices.Concat(workSteps(compute), serverSteps(serve), borderSteps(home), lastSteps(hasBase))
}

// demoPrograms are a program that computes and one that serves files. A bare Debian has perl but no python.
func demoPrograms(hasBase bool) (compute, serve string) {
	compute, serve = "python3 -c 'print(sum(i * i for i in range(10**6)))'", "python3 -u -m http.server 8000 --directory /home/user/site"
	if _, err := os.Stat("/usr/bin/python3"); err != nil && !hasBase {
		compute = `perl -e '$s += $_ * $_ for 0 .. 10**6 - 1; print "$s\n"'`
		serve = `perl -MIO::Socket::INET -e '$l = IO::Socket::INET->new(LocalAddr => "127.0.0.1", LocalPort => 8000, Listen => 5, ReuseAddr => 1) or die; $| = 1;
			while ($c = $l->accept) { print "127.0.0.1 ", scalar <$c>; open F, "/home/user/site/index.html"; print $c "HTTP/1.0 200 OK\r\n\r\n", <F>; close $c }'`
	}
	return compute, serve
}

// workSteps run commands and change files.
func workSteps(compute string) []step {
	return []step{
		{"Who am I, and where?", "exec", map[string]any{"command": "id; uname -sr; pwd; nproc"}, "uid=1000(user)"},
		{"Again: the sandbox is there now, and a command takes milliseconds.", "exec",
			map[string]any{"command": "echo hello from $(hostname)"}, "hello from"},
		{"Compute something.", "exec", map[string]any{"command": compute}, "333332833333500000"},
		{"Write a file ...", "file_write", map[string]any{"path": "/home/user/site/index.html",
			"content": "<h1>Hello</h1>\n<p>from nowhere</p>\n"}, "index.html"},
		{"... edit it ...", "file_edit", map[string]any{"path": "/home/user/site/index.html", "old_str": "from nowhere",
			"new_str": "from a gVisor sandbox"}, "1 change"},
		{"... and find it.", "file_search", map[string]any{"path": "/home/user", "pattern": "gVisor"}, "index.html:2"},
		{"Commands share a shell: go there, set a variable, define a function ...", "exec",
			map[string]any{"command": "cd site; export WHO=you; greet() { echo \"hello $1 in $(pwd)\"; }"},
			"the shell is now in /home/user/site"},
		{"... and the next one, even after an exit, has them.", "exec", map[string]any{"command": "greet $WHO; cd ..; exit 3"},
			"hello you in /home/user/site"},
		{"Watch the files ...", "file_watch", map[string]any{"path": "/home/user/site"}, "call file_watch with cursor"},
		{"... change some ...", "exec", map[string]any{"command": "mkdir site/img; touch site/img/a.png; mv site/img site/pictures"},
			"exit code 0"},
		{"... and see what has changed.", "file_watch", map[string]any{"cursor": lastCursor},
			"rename /home/user/site/pictures/ from /home/user/site/img"},
	}
}

// serverSteps have a server run while its sandbox is paused, resumed and copied.
func serverSteps(serve string) []step {
	// Asks as soon as the server listens.
	ask := "for i in $(seq 100); do (exec 3<>/dev/tcp/127.0.0.1/8000 && printf 'GET / HTTP/1.0\\r\\n\\r\\n' >&3 && cat <&3) 2>/dev/null " +
		"&& break; sleep 0.05; done"
	return []step{
		{"Start a web server in the background ...", "exec", map[string]any{"command": serve, "background": true, "tag": "web"},
			"is still running"},
		{"... and ask it.", "exec", map[string]any{"command": ask}, "from a gVisor sandbox"},
		{"Its log is kept.", "process_wait", map[string]any{"tag": "web", "yield_ms": 0}, "GET / HTTP/1.0"},
		{"What runs?", "process_list", map[string]any{}, "tag=web running"},
		{"Pause it all to disk: nothing runs any more ...", "sandbox_pause", map[string]any{"to_disk": true}, "paused on disk"},
		{"... and resume it: the server is there as it was.", "sandbox_resume", map[string]any{}, "is running"},
		{"Really?", "exec", map[string]any{"command": ask}, "from a gVisor sandbox"},
		{"Make a copy of it, with the server in it and its memory.", "sandbox_fork", map[string]any{}, "made: sb"},
		{"What has happened so far?", "sandbox_logs", map[string]any{"source": "system"}, "paused: by request"},
		{"Stop it.", "process_signal", map[string]any{"tag": "web"}, "has exited"},
	}
}

// borderSteps show what a sandbox cannot see.
func borderSteps(home string) []step {
	return []step{
		{"What can the sandbox not see? Your home and root's ...", "exec",
			map[string]any{"command": "ls /home; ls " + home + " 2>&1 | head -3; ls /root 2>&1 | tail -1"}, "user\n"},
		{"... your processes ...", "exec", map[string]any{"command": "cat /proc/[0-9]*/cmdline | tr '\\0' ' '", "user": "root"},
			"soulbox-agent init"},
		{"... any network ...", "exec",
			map[string]any{"command": "tail -n +3 /proc/net/dev | cut -d: -f1; (exec 3<>/dev/tcp/192.0.2.1/53) 2>&1 | tail -1"}, "lo"},
	}
}

// lastSteps show that it harms nobody, what it costs, and what a network is for.
func lastSteps(hasBase bool) []step {
	if hasBase {
		return []step{
			{"... and what it does to its programs, it does to its own.", "exec",
				map[string]any{"command": "rm -rf /usr/share; ls /usr/share 2>&1", "user": "root"}, "cannot access"},
			{"What does it cost?", "sandbox_get", map[string]any{}, "is running"},
			{"Another one, with a network ...", "sandbox_create", map[string]any{"network": "full"}, "is running"},
			{"... installs a package, where this machine has the network for it.", "exec",
				map[string]any{"command": installTree, "yield_ms": 50_000, "sandbox_id": lastSandbox}, "installed: "}}
	}
	return []step{
		{"... and it cannot harm your programs, not even as root.", "exec",
			map[string]any{"command": "rm -rf /usr/bin 2>&1 | tail -1; ls /usr/bin | wc -l", "user": "root"}, "Read-only file system"},
		{"What does it cost?", "sandbox_get", map[string]any{}, "is running"}}
}

// installTree installs a package, or says that this took longer than the demo's limit.
const installTree = `timeout 45 bash -c 'sudo apt-get update -qq && sudo apt-get install -qq -y tree' >log 2>&1
echo "installed: $(tree --version 2>/dev/null || tail -n 1 log | grep . || echo 'nothing, in 45 s')"`

// runDemo connects a real MCP client to this program in a process of its own, as an IDE does, and prints the conversation.
func runDemo(ctx context.Context, args []string, getenv func(string) string, stdout, stderr io.Writer) (err error) {
	c, err := parseConfig("demo", args, getenv, stderr)
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	begin := time.Now()
	var server *exec.Cmd
	stdio := transport.NewStdioWithOptions(self, nil, append([]string{"stdio", "--log-level=warn", "--on-exit=kill", "--state-dir=" +
		c.stateDir}, args...),
		transport.WithCommandFunc(func(ctx context.Context, name string, env []string, args []string) (*exec.Cmd, error) {
			server = exec.CommandContext(ctx, name, args...)
			server.Env = append(os.Environ(), env...)
			return server, nil
		}))
	mc := client.NewClient(stdio)
	if err := mc.Start(ctx); err != nil {
		return fmt.Errorf("start server: %w", err)
	}
	defer func() { err = errors.Join(err, mc.Close()) }()
	go func() { _, _ = io.Copy(stderr, stdio.Stderr()) }() // ends with the server
	var init mcp.InitializeRequest
	init.Params.ProtocolVersion = mcp.LATEST_PROTOCOL_VERSION
	init.Params.ClientInfo = mcp.Implementation{Name: "soulbox-demo", Version: version}
	hello, err := mc.Initialize(ctx, init)
	if err != nil {
		return fmt.Errorf("initialize: %w", err)
	}
	list, err := mc.ListTools(ctx, mcp.ListToolsRequest{})
	if err != nil {
		return fmt.Errorf("list tools: %w", err)
	}
	fmt.Fprintf(stdout, "An MCP client (protocol %s) talks over stdio to %s %s, which offers %d tools.\n", hello.ProtocolVersion,
		hello.ServerInfo.Name, hello.ServerInfo.Version, len(list.Tools))
	store, err := c.newStore()
	if err != nil {
		return err
	}
	_, err = store.Get("", template.BaseName)
	steps, given := demoSteps(getenv("HOME"), err == nil), map[string]any{}
	for _, s := range steps {
		for name, value := range s.args {
			if value == lastCursor || value == lastSandbox {
				s.args[name] = given[name]
			}
		}
		if err := runStep(ctx, mc, s, stdout, given); err != nil {
			return err
		}
	}
	fmt.Fprintf(stdout, "\nDone in %.1f s: %d steps, all as expected. The sandboxes end with their client, which asked for that; else "+
		"they would be paused to disk.\n", time.Since(begin).Seconds(), len(steps))
	return nil
}

// lastCursor stands for the last cursor that a step returned, lastSandbox for the sandbox of the last step.
const (
	lastCursor  = "the last cursor"
	lastSandbox = "the last sandbox"
)

// runStep makes one call, shows it, and keeps what later steps may need of its result.
func runStep(ctx context.Context, mc *client.Client, s step, stdout io.Writer, given map[string]any) error {
	var call mcp.CallToolRequest
	call.Params.Name, call.Params.Arguments = s.tool, s.args
	begin := time.Now()
	result, err := mc.CallTool(ctx, call)
	took := time.Since(begin)
	if err != nil {
		return fmt.Errorf("%s: %w", s.tool, err)
	}
	if fields, ok := result.StructuredContent.(map[string]any); ok {
		for _, name := range []string{"cursor", "sandbox_id"} {
			if fields[name] != nil {
				given[name] = fields[name]
			}
		}
	}
	var text strings.Builder
	for _, c := range result.Content {
		if t, ok := c.(mcp.TextContent); ok {
			text.WriteString(t.Text)
		}
	}
	fmt.Fprintf(stdout, "\n# %s\n  %s %s   (%.1f ms)\n", s.say, s.tool, describeArgs(s.args), float64(took.Microseconds())/1000)
	for line := range strings.Lines(text.String()) {
		fmt.Fprintf(stdout, "  | %s\n", strings.TrimRight(line, "\n"))
	}
	if result.IsError || !strings.Contains(text.String(), s.check) {
		return fmt.Errorf("demo: %s did not give %q", s.tool, s.check)
	}
	return nil
}

// describeArgs shows the arguments that matter, on one line.
func describeArgs(args map[string]any) string {
	var parts []string
	for _, name := range []string{"command", "path", "cursor", "old_str", "new_str", "pattern", "tag", "user", "background", "network"} {
		if v, ok := args[name]; ok {
			text := strings.ReplaceAll(fmt.Sprint(v), "\n", "; ")
			if r := []rune(text); len(r) > 100 {
				text = string(r[:100]) + "…"
			}
			parts = append(parts, name+"="+text)
		}
	}
	return strings.Join(parts, " ")
}
