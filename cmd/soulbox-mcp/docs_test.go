package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"soulbox.dev/soulbox/internal/sandboxtest"
)

// notRunHere are the blocks of commands that TestDocCommands does not run, by one of their lines, with the reason.
var notRunHere = map[string]string{
	"make demo":                      "TestDoctorAndDemo runs the demo; this is make test",
	"make lint":                      "this is make test",
	"claude mcp add":                 "a client's command; TestWork starts the program as it says",
	`{"mcpServers"`:                  "a configuration; TestWork starts the program as it says",
	"[mcp_servers.soulbox]":          "a configuration; TestWork starts the program as it says",
	"go test ":                       "a test, which runs with all tests",
	"npm install e2b":                "needs npm and its registry; make conformance",
	"bin/soulbox-mcp template base ": "needs Debian's archive; TestTemplatesOverStdio",
	"bin/soulbox-mcp template pull ": "needs a registry; TestPullErrors",
	"--listen 0.0.0.0:443":           "needs port 443 and a domain; TestTLSFlags",
	"export E2B_API_KEY=e2b_…":       "settings; make conformance",
}

// withoutExamples are the documents that have no example for a reader to run, with the reason. A name that ends in / is a directory.
var withoutExamples = map[string]string{
	"AGENTS.md":             "its commands are the targets of the Makefile, which run these tests",
	"CHANGELOG.md":          "a list of changes",
	"SECURITY.md":           "a policy",
	"agent/PROTOCOL.md":     "what is said on the pipe between host and agent",
	"docs/architecture.md":  "how the code is made; its blocks are a drawing and a list of files",
	"docs/gvisor.md":        "what gVisor does",
	"docs/protocol.md":      "what MCP and E2B demand",
	"docs/upstream/":        "reports for other projects, in their checkouts",
	"tools/instructions.md": "a text for models",
}

// documents are the documents of the repository whose commands the test runs: all others.
func documents(t *testing.T) (all []string) {
	t.Helper()
	root := filepath.Dir(repository(t, "README.md"))
	var files []string
	if out, err := exec.Command("git", "-C", root, "-c", "safe.directory=*", "ls-files", "*.md").Output(); err == nil {
		files = strings.Fields(string(out))
	} else if err := fs.WalkDir(os.DirFS(root), ".", func(name string, entry fs.DirEntry, err error) error {
		if err == nil && entry.IsDir() && (entry.Name() == "node_modules" || name != "." && strings.HasPrefix(entry.Name(), ".")) {
			return fs.SkipDir
		}
		if err != nil && name != "." && errors.Is(err, fs.ErrPermission) { // the home of an ordinary user, who sees only copies
			return fs.SkipDir
		}
		if strings.HasSuffix(name, ".md") {
			files = append(files, name)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	for _, name := range files {
		if withoutExamples[name] == "" && withoutExamples[filepath.Dir(name)+"/"] == "" {
			all = append(all, name)
		}
	}
	return all
}

// TestDocExamples: every document has an example that TestDocCommands runs or says why not, or is one of those that have none; those show
// no command of ours either.
func TestDocExamples(t *testing.T) {
	for _, name := range documents(t) {
		if len(docBlocks(t, name)) == 0 {
			t.Errorf("%s has no example: give one, or say why not in withoutExamples", name)
		}
	}
	root := filepath.Dir(repository(t, "README.md"))
	for name, reason := range withoutExamples {
		if _, err := os.Stat(filepath.Join(root, "go.mod")); err != nil || strings.HasSuffix(name, "/") {
			continue // an ordinary user has only copies of some documents
		}
		for _, b := range docBlocks(t, name) {
			for _, line := range b.lines {
				if first, _, _ := strings.Cut(line, " "); strings.HasPrefix(line, "bin/") || first == "soulbox" || first == "curl" {
					t.Errorf("%s shows %q, and is said to have no examples: %s", name, line, reason)
				}
			}
		}
	}
}

// repository is the path of a file or directory of the repository that tests read; for an ordinary user it is a copy (sandboxtest.Main).
func repository(t *testing.T, name string) string {
	t.Helper()
	for _, root := range []string{"../..", "."} {
		path, err := filepath.Abs(filepath.Join(root, name))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(path); err == nil {
			return path
		} else if !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
	}
	t.Fatalf("%s is not in the repository", name)
	return ""
}

// block is a block of commands in a document.
type block struct {
	file  string
	lines []string
}

// docBlocks are the blocks of commands in a document: lines indented by four spaces.
func docBlocks(t *testing.T, name string) (all []block) {
	t.Helper()
	text, err := os.ReadFile(repository(t, name))
	if err != nil {
		t.Fatal(err)
	}
	open := false
	for line := range strings.Lines(string(text)) {
		command, ok := strings.CutPrefix(strings.TrimRight(line, "\n"), "    ")
		if ok && !open {
			all = append(all, block{file: name})
		}
		if open = ok; ok {
			b := &all[len(all)-1]
			if strings.HasPrefix(command, "  ") && len(b.lines) > 0 { // a continuation of the command before
				b.lines[len(b.lines)-1] += "\n" + command
				continue
			}
			b.lines = append(b.lines, command)
		}
	}
	return all
}

// TestDocCommands runs the commands of all documents as they are printed, each document's in one shell, in a checkout and a home of its
// own. Only the port of 'http' differs, as this machine may run a server.
func TestDocCommands(t *testing.T) {
	for _, name := range documents(t) {
		t.Run(name, func(t *testing.T) {
			var script strings.Builder
			ran := 0
			for _, b := range docBlocks(t, name) {
				whole := strings.Join(b.lines, "\n")
				if reason := skipped(whole); reason != "" {
					t.Logf("not run here (%s):\n%s", reason, whole)
					continue
				}
				for _, line := range b.lines {
					ran++
					script.WriteString(asPrinted(line))
				}
			}
			if ran > 0 {
				runDoc(t, script.String())
			}
		})
	}
}

func skipped(block string) string {
	for line, reason := range notRunHere {
		if strings.Contains(block, line) {
			return reason
		}
	}
	return ""
}

// asPrinted turns a line of a document into a line of a script: a server moves to the background once it answers, and a command that needs
// a terminal gets one.
func asPrinted(line string) string {
	command, _, _ := strings.Cut(line, " #")
	command = strings.TrimSuffix(strings.TrimSpace(command), " &")
	echo := fmt.Sprintf("echo '$' %s >&2\n", "'"+strings.ReplaceAll(command, "'", `'\''`)+"'")
	switch {
	case strings.HasPrefix(command, "bin/soulbox-mcp http"):
		return echo + "serve " + strings.TrimPrefix(command, "bin/soulbox-mcp ") + "\n"
	case strings.Contains(command, "sandbox connect"):
		// Input that is typed before the shell has started may be lost, so it is typed until the shell has ended. TestConnect types more.
		return echo + fmt.Sprintf("{ trap '' PIPE; while echo exit 2>/dev/null; do sleep 0.2; done; } | script -qec \"%s\" /dev/null "+
			">/dev/null\n", command)
	}
	return echo + command + "\n"
}

// runDoc runs a script in a checkout.
func runDoc(t *testing.T, script string) {
	t.Helper()
	dir := sandboxtest.Dir(t)
	if err := os.Mkdir(filepath.Join(dir, "run"), 0o700); err != nil {
		t.Fatal(err)
	}
	bin := filepath.Dir(sandboxtest.Program(t, "soulbox-mcp"))
	examples := repository(t, "examples")
	if err := errors.Join(os.Symlink(bin, filepath.Join(dir, "bin")), os.Symlink(examples, filepath.Join(dir, "examples"))); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(script, "template build") { // a small image stands for the base, which takes minutes to build
		sandboxtest.ImageTar(t, dir)
		script = "bin/soulbox-mcp template import image.tar base >/dev/null\n" + script
	}
	if !strings.Contains(script, "serve ") { // an IDE has a server; without one, soulbox would leave its own behind
		script = "serve http\n" + script
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := listener.Addr().String()
	if err := listener.Close(); err != nil {
		t.Fatal(err)
	}
	// The script keeps the pid of a server and ends the server by it; only after that can the next server have the port.
	prelude := fmt.Sprintf(`set -euo pipefail
stop() { if [ -n "${SERVER:-}" ]; then kill $SERVER; wait $SERVER || true; SERVER=; fi; }
trap stop EXIT
serve() {
	stop
	bin/soulbox-mcp "$@" --listen %s --on-exit kill 2>server.log &
	SERVER=$!
	scheme=http; case "$*" in *--tls-cert*) scheme=https;; esac
	for i in $(seq 600); do
		kill -0 $SERVER || { cat server.log >&2; return 1; }
		# Its port answers before it serves; soulbox would start a server of its own where it finds no socket.
		if test "$(answers $scheme)" = yes && test -n "$(find run -name $SERVER.sock)"; then return; fi
		sleep 0.1
	done
	cat server.log >&2
	return 1
}
answers() { (exec 3<>/dev/tcp/%s) 2>/dev/null && echo yes || echo no; }
`, address, strings.Replace(address, ":", "/", 1))
	script = strings.ReplaceAll(script, "127.0.0.1:8787", address)
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	c := exec.CommandContext(ctx, "bash", "-c", prelude+script)
	c.Dir, c.WaitDelay = dir, 10*time.Second
	c.Env = []string{"HOME=" + dir, "PATH=/usr/bin:/bin", "SOULBOX_STATE_DIR=" + filepath.Join(dir, "state"), "XDG_RUNTIME_DIR=" +
		filepath.Join(dir, "run"), "TERM=xterm", "SOULBOX_RUNTIME_DIR=" + filepath.Join(dir, "run")}
	out, err := os.Create(filepath.Join(dir, "out"))
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	c.Stdout, c.Stderr = out, out
	if err := c.Run(); err != nil {
		text, rerr := os.ReadFile(out.Name())
		t.Errorf("%v\n%s", errors.Join(err, rerr), text)
	}
}
