package tools_test

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/mark3labs/mcp-go/mcp"
	"github.com/mark3labs/mcp-go/server"

	"soulbox.dev/soulbox/internal/sandboxtest"
	"soulbox.dev/soulbox/sandbox"
	"soulbox.dev/soulbox/tools"
)

// newServer returns the tools on a Fake: commands run on this machine.
func newServer(t *testing.T) (*server.MCPServer, *sandbox.Manager) {
	t.Helper()
	m, err := sandbox.NewManager(sandbox.Options{Dir: t.TempDir(), Runtime: &sandboxtest.Fake{}, Templates: sandboxtest.Templates{},
		MemoryBudget: 8 << 30, Cores: 4, Times: sandbox.Times{OnTimeout: sandbox.ActionPause}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	s := server.NewMCPServer("test", "1", server.WithOutputSchemaValidation())
	service, err := tools.New(tools.Options{Manager: m, FileURL: fileURL})
	if err != nil {
		t.Fatal(err)
	}
	service.Register(s)
	return s, m
}

func fileURL(sb *sandbox.Sandbox, path, operation string, until time.Time) string {
	return "http://127.0.0.1:8787/v1/sandboxes/" + sb.ID() + "/files?path=" + path
}

func listTools(t *testing.T, s *server.MCPServer) []mcp.Tool {
	t.Helper()
	response := s.HandleMessage(t.Context(), json.RawMessage(`{"jsonrpc":"2.0","id":1,"method":"tools/list"}`))
	body, err := json.Marshal(response)
	if err != nil {
		t.Fatal(err)
	}
	var list struct{ Result mcp.ListToolsResult }
	if err := json.Unmarshal(body, &list); err != nil {
		t.Fatal(err)
	}
	return list.Result.Tools
}

// golden compares an output with the recorded one, or records it.
func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if os.Getenv("UPDATE_GOLDEN") != "" {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatalf("%v: record it by 'make golden'", err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s differs; if that is meant, 'make golden' and review the diff.\n%s", path, firstDifference(got, want))
	}
}

func firstDifference(got, want []byte) string {
	g, w := strings.Split(string(got), "\n"), strings.Split(string(want), "\n")
	for i := range min(len(g), len(w)) {
		if g[i] != w[i] {
			return fmt.Sprintf("line %d: got  %s\nline %d: want %s", i+1, g[i], i+1, w[i])
		}
	}
	return fmt.Sprintf("got %d lines, want %d", len(g), len(w))
}

func TestGoldenList(t *testing.T) {
	s, _ := newServer(t)
	list := listTools(t, s)
	sent, err := json.Marshal(s.HandleMessage(t.Context(), json.RawMessage(`{"jsonrpc":"2.0","id":1,"method":"tools/list"}`)))
	if err != nil {
		t.Fatal(err)
	}
	if len(sent) > 26_000 {
		t.Errorf("tools/list has %d bytes; it is to stay under 26 KB", len(sent))
	}
	pretty, err := json.MarshalIndent(list, "", " ")
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "tools.json", append(pretty, '\n'))
}

// TestEveryTool: every tool has what docs/protocol.md requires of tools.
func TestEveryTool(t *testing.T) {
	s, _ := newServer(t)
	name := regexp.MustCompile(`^[a-z]+(_[a-z]+)*$`)
	for _, tool := range listTools(t, s) {
		a := tool.Annotations
		if a.Title == "" || a.ReadOnlyHint == nil || a.DestructiveHint == nil || a.IdempotentHint == nil || a.OpenWorldHint == nil {
			t.Errorf("%s: not all annotations are there", tool.Name)
		}
		if *a.ReadOnlyHint && *a.DestructiveHint {
			t.Errorf("%s: read-only and destructive", tool.Name)
		}
		if tool.Description == "" || tool.OutputSchema.Type != "object" || len(tool.OutputSchema.Properties) == 0 {
			t.Errorf("%s: no description or no typed output", tool.Name)
		}
		if !name.MatchString(tool.Name) || len(tool.Name) > 24 {
			t.Errorf("%s: not a name", tool.Name)
		}
		for arg, property := range tool.InputSchema.Properties {
			p, ok := property.(map[string]any)
			if !ok || p["type"] == nil {
				t.Errorf("%s: argument %s has no type", tool.Name, arg)
			}
		}
	}
	if len(tools.Instructions) >= 2048 {
		t.Errorf("the instructions have %d bytes", len(tools.Instructions))
	}
}

// TestWholeNumbers: every integer argument of every tool takes 1.0 for 1, as JSON Schema does, and refuses 1.5.
func TestWholeNumbers(t *testing.T) {
	s, _ := newServer(t)
	for _, tool := range listTools(t, s) {
		for name, property := range tool.InputSchema.Properties {
			if p, ok := property.(map[string]any); !ok || p["type"] != "integer" {
				continue
			}
			for value, refused := range map[string]bool{"1.0": false, "1e0": false, `"1.0"`: false, "1.5": true} {
				call := fmt.Sprintf(`{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":%q,"arguments":{%q:%s}}}`, tool.Name,
					name, value)
				body, err := json.Marshal(s.HandleMessage(t.Context(), json.RawMessage(call)))
				if err != nil {
					t.Fatal(err)
				}
				if strings.Contains(string(body), "must be a whole number") != refused {
					t.Errorf("%s: %s %s: %s", tool.Name, name, value, body)
				}
			}
		}
	}
}

// steady replaces what differs from run to run, beside what the conversation itself knows.
func steady(out []byte, known map[string]string) []byte {
	if port := known["port"]; port != "" {
		out = regexp.MustCompile(`\b`+port+`\b`).ReplaceAll(out, []byte("PORT"))
	}
	out = regexp.MustCompile(`(?m)^[^>].*$`).ReplaceAllFunc(out, readCursors)
	for _, r := range []struct{ pattern, with string }{
		{`sb[a-z2-7]{20}`, "SANDBOX"}, {`\d{19}\.SANDBOX`, "TIME.SANDBOX"},
		{`/tmp/[^ "'\n\\]*?/sandboxes/SANDBOX`, "HOME"},
		{`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z`, "TIME"},
		{`"life_left_ms":\d+`, `"life_left_ms":N`}, {`"saved_age_s":\d+`, `"saved_age_s":N`}, {`leaves [0-9hms.]+ from`, "leaves N from"},
		{`127\.0\.0\.1:\d{4,5}`, "127.0.0.1:N"}, {`[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f-]{21}`, "BUILD"},
		{`"took_ms":\d+`, `"took_ms":N`}, {`MB, \d+\.\d s\.`, "MB, N s."},
		{`(\(watch \d+ |Watch ")w[a-z2-7]{8}`, "${1}WATCH"},
		{`ended after [0-9.]+m?s`, "ended after N"}, {`after \d+ ms`, "after N ms"}, {`"duration_ms":\d+`, `"duration_ms":N`},
		{`cpu \d+ ms, memory \d+ MB`, "cpu N ms, memory N MB"}, {`"cpu_ms":\d+`, `"cpu_ms":N`}, {`,"memory_mb":\d+,"output`, `,"output`},
		{`,"listening_ports":\[[^\]]*\]`, ""}, {`usage: .*`, "usage: N"}, {`"usage":\{[^}]*\}`, `"usage":{}`},
		{fmt.Sprintf(`user %d`, os.Getuid()), "user ME"}, {fmt.Sprintf(`"user":"%d"`, os.Getuid()), `"user":"ME"`},
		{`(0\d{3}) (root|[a-z0-9]+) +(\d+)`, "$1 OWNER $3"}, {`"owner":"[^"]*"`, `"owner":"OWNER"`},
		{`"(ends|created|started|ended|paused|updated|ready)_at":"[^"]*"`, `"${1}_at":"TIME"`},
	} {
		out = regexp.MustCompile(r.pattern).ReplaceAll(out, []byte(r.with))
	}
	return out
}

// readCursors shows what is in the cursors of an answer.
func readCursors(line []byte) []byte {
	return regexp.MustCompile(`(cursor |cursor":")[A-Za-z0-9_-]+`).ReplaceAllFunc(line, func(found []byte) []byte {
		at := bytes.LastIndexAny(found, ` "`) + 1
		place, err := base64.RawURLEncoding.DecodeString(string(found[at:]))
		if err != nil || !regexp.MustCompile(`^(watch|logs|sandboxes) `).Match(place) {
			return found
		}
		return fmt.Appendf(nil, "%s(%s)", found[:at], place)
	})
}

// TestGoldenConversations replays every testdata/*.txt.
func TestGoldenConversations(t *testing.T) {
	scripts, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(scripts) == 0 {
		t.Fatal("no conversations", err)
	}
	for _, name := range scripts {
		t.Run(filepath.Base(name), func(t *testing.T) {
			body, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			golden(t, filepath.Base(name), conversation(t, string(body)))
		})
	}
}

// TestToolsets: only the requested toolsets are offered, and a read-only server offers nothing that changes anything. A call of a tool that
// is not offered says why.
func TestToolsets(t *testing.T) {
	_, m := newServer(t)
	register := func(o tools.Options) *server.MCPServer {
		o.Manager = m
		service, err := tools.New(o)
		if err != nil {
			t.Fatal(err)
		}
		s := server.NewMCPServer("test", "1")
		service.Register(s)
		return s
	}
	offered := func(o tools.Options) string {
		s := register(o)
		var names []string
		for _, tool := range listTools(t, s) {
			if o.ReadOnly && !*tool.Annotations.ReadOnlyHint {
				t.Errorf("%s does not only read", tool.Name)
			}
			names = append(names, tool.Name)
		}
		return strings.Join(names, " ")
	}
	if got := offered(tools.Options{Toolsets: []string{"files"}}); strings.Contains(got, "exec") || !strings.Contains(got, "file_edit") {
		t.Error(got)
	}
	if got := offered(tools.Options{ReadOnly: true}); !strings.Contains(got, "file_read") || strings.Contains(got, "file_write") {
		t.Error(got)
	}
	if a, b := offered(tools.Options{}), offered(tools.Options{}); a != b || strings.Contains(a, "file_url") {
		t.Errorf("the order differs, or there is a tool too many: %s, %s", a, b)
	}
	for tool, c := range map[string]struct {
		o   tools.Options
		why string
	}{"file_watch": {tools.Options{Toolsets: []string{"files", "core"}}, `it is in the toolset \"watch\",` +
		` and this server was started with ` +
		`--toolsets files,core`}, "sandbox_kill": {tools.Options{ReadOnly: true}, "--read-only"}, "nothing": {tools.Options{}, "not found"},
		"file_url": {tools.Options{}, "file_read with encoding base64"}} {
		answer, err := json.Marshal(register(c.o).HandleMessage(t.Context(),
			json.RawMessage(`{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"`+tool+`","arguments":{}}}`)))
		if err != nil || !strings.Contains(string(answer), `"error"`) || !strings.Contains(string(answer), c.why) {
			t.Errorf("%s: %s %v", tool, answer, err)
		}
	}
	if _, err := tools.New(tools.Options{Toolsets: []string{"nope"}}); err == nil || !strings.Contains(err.Error(), "core") {
		t.Error(err)
	}
}

// TestPrompts: every prompt names only existing tools, and says which argument is missing.
func TestPrompts(t *testing.T) {
	s, _ := newServer(t)
	get := func(method, params string) string {
		body, err := json.Marshal(s.HandleMessage(t.Context(),
			json.RawMessage(`{"jsonrpc":"2.0","id":1,"method":"`+method+`","params":`+params+`}`)))
		if err != nil {
			t.Fatal(err)
		}
		return string(body)
	}
	names := map[string]bool{}
	for _, tool := range listTools(t, s) {
		names[tool.Name] = true
	}
	list := regexp.MustCompile(`"name":"([a-z]+_[a-z_]+)"`).FindAllStringSubmatch(get("prompts/list", "{}"), -1)
	if len(list) < 3 {
		t.Fatal(list)
	}
	for _, p := range []string{"set_up_project", "debug_failing_test", "review_repository"} {
		text := get("prompts/get", `{"name":"`+p+`","arguments":{"project":"MINE","command":"MINE","subject":"MINE"}}`)
		if !strings.Contains(text, "MINE") || strings.Contains(text, "{sandbox_id}") || strings.Contains(text, "{goal}") {
			t.Error(text)
		}
		for _, tool := range regexp.MustCompile(`\b(sandbox|process|file)_[a-z]+\b`).FindAllString(text, -1) {
			if !names[tool] && tool != "sandbox_id" && tool != "process_id" {
				t.Errorf("%s names %s, which does not exist", p, tool)
			}
		}
	}
	if got := get("prompts/get", `{"name":"set_up_project"}`); !strings.Contains(got, "is missing") {
		t.Error(got)
	}
}
