package main

import (
	"bufio"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"soulbox.dev/soulbox/internal/sandboxtest"
)

// web is a running soulbox-mcp http.
type web struct {
	t     testing.TB
	state string
	url   string // of the MCP endpoint
	cmd   *exec.Cmd
	log   *lockedBuffer
}

// lockedBuffer keeps what a process writes, and can be read meanwhile.
type lockedBuffer struct {
	mu sync.Mutex
	b  strings.Builder
}

// Write implements io.Writer.
func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// serve starts the server on a state directory, which is made if it is "".
func serve(t testing.TB, state string, flags ...string) *web {
	t.Helper()
	return serveBy(t, state, func(*exec.Cmd) {}, flags...)
}

// serveBy is serve with a command that is changed before it starts.
func serveBy(t testing.TB, state string, change func(*exec.Cmd), flags ...string) *web {
	t.Helper()
	if state == "" {
		state = sandboxtest.Dir(t)
	}
	w := &web{t: t, state: state, log: &lockedBuffer{}}
	w.cmd = exec.Command(sandboxtest.Program(t, "soulbox-mcp"),
		append([]string{"http", "--listen=127.0.0.1:0", "--state-dir=" + state, "--on-exit=kill"}, flags...)...)
	w.cmd.Env = []string{sandboxtest.RuntimeEnv(), "HOME=" + state, "PATH=/usr/bin:/bin"}
	w.cmd.Stderr = w.log
	out, err := w.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if change(w.cmd); w.cmd.Err != nil {
		t.Fatal(w.cmd.Err)
	}
	if err := w.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.stop)
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatalf("the server has not started: %v\n%s", err, w.log)
	}
	w.url = strings.TrimSpace(line)
	return w
}

// stop ends the server as an operator does. It may be called twice.
func (w *web) stop() {
	if w.cmd.ProcessState != nil {
		return
	}
	_ = w.cmd.Process.Signal(syscall.SIGTERM) // if it has already ended, that shows below
	if err := w.cmd.Wait(); err != nil {
		w.t.Errorf("the server ended with %v\n%s", err, w.log)
	}
}

func (w *web) client(key string, modern bool) *sandboxtest.MCP {
	c := &sandboxtest.MCP{URL: w.url, Key: key, Modern: modern}
	return c.Open(w.t)
}

// makeKey makes a key with the program itself.
func makeKey(t testing.TB, state, owner string) string {
	t.Helper()
	out, err := exec.Command(sandboxtest.Program(t, "soulbox-mcp"), "key", "create", "--owner="+owner, "--state-dir="+state).Output()
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(out))
}

func must(t testing.TB, a sandboxtest.Answer, err error) sandboxtest.Answer {
	t.Helper()
	if err != nil || a.Error != nil || strings.Contains(string(a.Result), `"isError":true`) {
		t.Fatalf("%v %+v %s", err, a.Error, a.Result)
	}
	return a
}

// get fetches a path of the server.
func (w *web) get(path, key string) (status int, body string) {
	w.t.Helper()
	r, err := http.NewRequest(http.MethodGet, strings.TrimSuffix(w.url, "/mcp")+path, nil)
	if err != nil {
		w.t.Fatal(err)
	}
	if key != "" {
		r.Header.Set("Authorization", "Bearer "+key)
	}
	res, err := http.DefaultClient.Do(r)
	if err != nil {
		w.t.Fatal(err)
	}
	defer res.Body.Close()
	all, err := io.ReadAll(res.Body)
	if err != nil {
		w.t.Fatal(err)
	}
	return res.StatusCode, string(all)
}

// TestOneOwnersThings: bob, who knows every name of ann's things, finds none of them by any tool, resource, subscription, completion, task,
// session or path, and gets the same answer as for what does not exist.
func TestOneOwnersThings(t *testing.T) {
	state := sandboxtest.Dir(t)
	annKey, bobKey := makeKey(t, state, "ann"), makeKey(t, state, "bob")
	w := serve(t, state)
	tasks := map[string]any{"extensions": map[string]any{"io.modelcontextprotocol/tasks": map[string]any{}}}
	annModern := &sandboxtest.MCP{URL: w.url, Key: annKey, Modern: true, Capabilities: tasks}
	ann := w.client(annKey, false)
	a, err := ann.Call(t.Context(), "exec", map[string]any{"command": "echo ann-secret | tee /home/user/f; sleep 600", "tag": "anns",
		"yield_ms": 300})
	id := must(t, a, err).Field("sandbox_id")
	process := a.Field("process_id")
	a, err = annModern.Call(t.Context(), "exec", map[string]any{"sandbox_id": id, "command": "sleep 600"})
	var task struct{ TaskID string }
	if err := json.Unmarshal(must(t, a, err).Result, &task); err != nil || task.TaskID == "" {
		t.Fatal(err, string(a.Result))
	}
	const none = "sbaaaaaaaaaaaaaaaaaaaa"
	same := func(what string, hers, missing sandboxtest.Answer) {
		t.Helper()
		h, m := strings.ReplaceAll(hers.Text(), id, none), missing.Text()
		if h != m || hers.Status != missing.Status || strings.Contains(string(hers.Result), "ann-secret") {
			t.Errorf("%s: of hers %d %q, of none %d %q", what, hers.Status, h, missing.Status, m)
		}
	}
	eras := []*sandboxtest.MCP{{URL: w.url, Key: bobKey, Modern: true, Capabilities: tasks}, w.client(bobKey, false)}
	for _, bob := range eras {
		do := func(method string, params map[string]any) sandboxtest.Answer {
			t.Helper()
			a, err := bob.Do(t.Context(), method, params)
			if err != nil {
				t.Fatal(err)
			}
			return a
		}
		var list struct {
			Tools []struct {
				Name        string
				InputSchema struct {
					Properties map[string]struct{ Type string }
					Required   []string
				}
			}
		}
		if err := json.Unmarshal(do("tools/list", nil).Result, &list); err != nil || len(list.Tools) < 15 {
			t.Fatal(err, len(list.Tools))
		}
		for _, tool := range list.Tools {
			if _, names := tool.InputSchema.Properties["sandbox_id"]; !names {
				continue
			}
			args := map[string]any{}
			for _, r := range tool.InputSchema.Required {
				switch args[r] = "/home/user/f"; tool.InputSchema.Properties[r].Type {
				case "integer":
					args[r] = 1
				case "boolean":
					args[r] = true
				}
			}
			if _, ok := tool.InputSchema.Properties["process_id"]; ok {
				args["process_id"] = process
			}
			for name, value := range map[string]string{"path": "/home/user/f", "content": "x", "input": "x", "command": "true"} {
				if _, ok := tool.InputSchema.Properties[name]; ok {
					args[name] = value
				}
			}
			if tool.Name == "sandbox_kill" {
				args["confirm"] = true
			}
			if tool.Name == "template_build" { // it reads files of the sandbox
				args["name"], args["dockerfile"], args["context_path"] = "stolen", "FROM scratch", "/home/user"
			}
			if tool.Name == "sandbox_update" {
				args["extend_ms"] = 1000
			}
			call := func(sb string) sandboxtest.Answer {
				args["sandbox_id"] = sb
				return do("tools/call", map[string]any{"name": tool.Name, "arguments": args})
			}
			hers := call(id)
			if !strings.Contains(hers.Text(), "o such sandbox") {
				t.Errorf("%s: %s", tool.Name, hers.Text())
			}
			same(tool.Name, hers, call(none))
		}
		for _, path := range []string{"", "/logs", "/metrics", "/files/home/user/f", "/files/home/user", "/processes/" + process +
			"/output"} {
			for _, method := range []string{"resources/read", "resources/subscribe"} {
				if bob.Modern && method == "resources/subscribe" {
					continue
				}
				hers, missing := do(method, map[string]any{"uri": "sandbox://" + id + path}),
					do(method, map[string]any{"uri": "sandbox://" + none + path})
				if hers.Error == nil {
					t.Errorf("%s %s: %s", method, path, hers.Result)
				}
				same(method+path, hers, missing)
			}
		}
		if got := string(do("resources/list", nil).Result) +
			string(do("tools/call", map[string]any{"name": "sandbox_list", "arguments": map[string]any{}}).Result); strings.Contains(got,
			id) {
			t.Errorf("a list has it: %s", got)
		}
		for _, variable := range []string{"id", "process_id", "path"} {
			a := do("completion/complete", map[string]any{"ref": map[string]any{"type": "ref/resource", "uri": "sandbox://{id}"},
				"argument": map[string]any{"name": variable, "value": ""},
				"context":  map[string]any{"arguments": map[string]any{"id": id}}})
			if !strings.Contains(string(a.Result), `"values":[]`) {
				t.Errorf("completion of %s: %s", variable, a.Result)
			}
		}
		for _, method := range []string{"tasks/get", "tasks/update", "tasks/cancel"} {
			same(method, do(method, map[string]any{"taskId": task.TaskID, "inputResponses": map[string]any{}}),
				do(method, map[string]any{"taskId": "nope", "inputResponses": map[string]any{}}))
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	messages, err := eras[0].Listen(ctx, map[string]any{"resourcesListChanged": true,
		"resourceSubscriptions": []string{"sandbox://" + id, "sandbox://" + id + "/files/home/user"}})
	if err != nil {
		t.Fatal(err)
	}
	if ack := fmt.Sprint((<-messages).Params); strings.Contains(ack, id) {
		t.Errorf("bob listens to ann's: %s", ack)
	}
	for key, want := range map[string]int{"": http.StatusUnauthorized, bobKey: http.StatusForbidden,
		makeKey(t, state, "operator"): http.StatusOK} {
		if status, _ := w.get("/metrics", key); status != want {
			t.Errorf("/metrics: %d, want %d", status, want)
		}
	}
	thief := &sandboxtest.MCP{URL: w.url, Key: bobKey, Session: ann.Session}
	if a, err := thief.Do(t.Context(), "tools/list", nil); err != nil || a.Status != http.StatusNotFound {
		t.Errorf("ann's session: %d %v", a.Status, err)
	}
	a, err = ann.Call(t.Context(), "exec", map[string]any{"command": "cat /home/user/f"})
	if must(t, a, err); !strings.Contains(a.Text(), "ann-secret") {
		t.Fatal(a.Text())
	}
	select {
	case m := <-messages:
		t.Errorf("bob is told of what ann does: %+v", m)
	default:
	}
	for _, secret := range []string{annKey, bobKey, "ann-secret"} {
		if strings.Contains(w.log.String(), secret) {
			t.Error("the log tells a secret")
		}
	}
}

// TestUpdates: 500 writes to a file in a watched directory cause at least one update after the last one, in both eras and transports.
func TestUpdates(t *testing.T) {
	const writes = "for i in $(seq 500); do echo $i > /home/user/d/f$((i % 7)); done; echo last > /home/user/d/f0"
	w := serve(t, "")
	for _, modern := range []bool{false, true} {
		c := w.client("", modern)
		c.Name = fmt.Sprint(modern)
		a, err := c.Call(t.Context(), "exec", map[string]any{"command": "mkdir -p /home/user/d"})
		dir := "sandbox://" + must(t, a, err).Field("sandbox_id") + "/files/home/user/d"
		ctx, cancel := context.WithCancel(t.Context())
		if !modern {
			a, err := c.Do(t.Context(), "resources/subscribe", map[string]any{"uri": dir})
			must(t, a, err)
		}
		messages, err := c.Listen(ctx, map[string]any{"resourceSubscriptions": []string{dir}})
		if err != nil {
			t.Fatal(err)
		}
		if modern {
			<-messages
		}
		a, err = c.Call(t.Context(), "exec", map[string]any{"command": writes})
		must(t, a, err)
		drainUpdates(messages)
		a, err = c.Call(t.Context(), "file_write", map[string]any{"path": "/home/user/d/f1", "content": "after"})
		must(t, a, err)
		if m := awaitUpdate(t, messages); m.Params["uri"] != dir {
			t.Fatalf("%+v", m)
		}
		cancel()
		for range messages { // it ends
		}
	}
	for _, modern := range []bool{false, true} {
		updatesOnStdio(t, modern, writes)
	}
}

// updatesOnStdio is TestUpdates on stdio.
func updatesOnStdio(t *testing.T, modern bool, writes string) {
	p := launch(t, "")
	home := p.await(p.request("tools/call", map[string]any{"name": "exec",
		"arguments": map[string]any{"command": "mkdir -p /home/user/d"}}))
	dir := "sandbox://" + fmt.Sprint(home.Result.StructuredContent["sandbox_id"]) + "/files/home/user/d"
	told := func(method string) int {
		p.mu.Lock()
		defer p.mu.Unlock()
		count := 0
		for _, n := range p.notes {
			if n.Method == method {
				count++
			}
		}
		return count
	}
	await := func(method string, above int) {
		t.Helper()
		for deadline := time.Now().Add(30 * time.Second); told(method) <= above; time.Sleep(5 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("no %s came on stdio", method)
			}
		}
	}
	if modern {
		p.request("subscriptions/listen", map[string]any{"notifications": map[string]any{"resourceSubscriptions": []string{dir}},
			"_meta": map[string]any{
				"io.modelcontextprotocol/protocolVersion":    sandboxtest.ModernVersion,
				"io.modelcontextprotocol/clientCapabilities": map[string]any{}}})
		await("notifications/subscriptions/acknowledged", 0)
	} else if m := p.await(p.request("resources/subscribe", map[string]any{"uri": dir})); m.Error != nil {
		t.Fatal(m.Error)
	}
	p.exec(writes)
	await("notifications/resources/updated", 0)
	// Updates that are still to come may belong to the writes, too.
	for before := -1; before != told("notifications/resources/updated"); time.Sleep(100 * time.Millisecond) {
		before = told("notifications/resources/updated")
	}
	before := told("notifications/resources/updated")
	p.call("file_write", map[string]any{"path": "/home/user/d/f1", "content": "after"})
	await("notifications/resources/updated", before)
}

func drainUpdates(messages <-chan sandboxtest.Message) {
	for {
		select {
		case <-messages:
		case <-time.After(100 * time.Millisecond): // updates that are still to come may belong to the writes, too
			return
		}
	}
}

func awaitUpdate(t *testing.T, messages <-chan sandboxtest.Message) sandboxtest.Message {
	t.Helper()
	for {
		select {
		case m, open := <-messages:
			if !open {
				t.Fatal("the stream has ended")
			}
			if m.Method == "notifications/resources/updated" {
				return m
			}
		case <-time.After(30 * time.Second):
			t.Fatal("no update came")
		}
	}
}

// TestResources: every kind of resource can be listed and read, and reports its changes.
func TestResources(t *testing.T) {
	w := serve(t, "")
	c := w.client("", true)
	a, err := c.Call(t.Context(), "exec", map[string]any{"yield_ms": 50_000,
		"command": `printf '\000\001' > bin; echo text > 'a b.txt'; head -c 1500000 /dev/zero | tr '\0' x > big`})
	must(t, a, err)
	a, err = c.Call(t.Context(), "exec", map[string]any{"command": `printf 'a\033[31mb'; sleep 600`, "yield_ms": 1000})
	id, process := must(t, a, err).Field("sandbox_id"), a.Field("process_id")
	base := "sandbox://" + id
	list, err := c.Do(t.Context(), "resources/list", nil)
	must(t, list, err)
	read := func(uri string) string {
		t.Helper()
		a, err := c.Do(t.Context(), "resources/read", map[string]any{"uri": uri})
		return string(must(t, a, err).Result)
	}
	sandboxtest.Eventually(t, "the process has written", func() bool {
		return strings.Contains(read(base+"/processes/"+process+"/output"), `a\\x1b[31mb`)
	})
	for uri, want := range map[string]string{
		base: `\"running\"`, base + "/logs": "running", base + "/metrics": "memory_bytes", base + "/files/home/user": "a b.txt", base +
			"/files/home/user/a%20b.txt": `"text":"text\n"`,
		base + "/files/home/user/bin": `"blob":"AAE="`, base + "/processes/" + process + "/output": `a\\x1b[31mb`,
		"template://host": "host",
		base + "/processes/" + process + "/output?offset=1&limit=4": `"text":"\\x1b[31"`,
		base + "/files/home/user/big":                               `"next":"` + base + `/files/home/user/big?offset=1048576"`,
		base + "/files/home/user/big?offset=1499999":                `"text":"x"`,
	} {
		if got := read(uri); !strings.Contains(got, want) {
			t.Errorf("%s: %.300s; want %s", uri, got, want)
		}
		if plain, _, ranged := strings.Cut(uri, "?"); !ranged && !strings.Contains(plain, "/user/") &&
			!strings.Contains(string(list.Result), `"`+plain+`"`) {
			t.Errorf("%s is not listed", uri)
		}
	}
	for _, uri := range []string{base + "/files/no/such", base + "/nothing", base + "/processes/p999/output", "template://no", base +
		"/files/home/user/../../etc/passwd", "sandbox://" + id + ":1/logs", "file:///etc/passwd", base + "/logs?x=1"} {
		if a, err := c.Do(t.Context(), "resources/read", map[string]any{"uri": uri}); err != nil || a.Error == nil ||
			a.Error.Code != -32602 {
			t.Errorf("%s: %v %+v", uri, err, a)
		}
	}
	complete := func(variable, value string) string {
		a, err := c.Do(t.Context(), "completion/complete",
			map[string]any{"ref": map[string]any{"type": "ref/resource", "uri": "sandbox://{id}/files/{+path}"},
				"argument": map[string]any{"name": variable, "value": value},
				"context":  map[string]any{"arguments": map[string]any{"id": id}}})
		return string(must(t, a, err).Result)
	}
	if got := complete("id", id[:4]) + complete("path", "home/user/a") + complete("process_id", "p"); !strings.Contains(got, id) ||
		!strings.Contains(got, `"home/user/a b.txt"`) || !strings.Contains(got, `"`+process+`"`) {
		t.Error(got)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	watched := []string{base, base + "/logs", base + "/processes/" + process + "/output", base + "/files/home/user/a%20b.txt"}
	messages, err := c.Listen(ctx, map[string]any{"resourceSubscriptions": watched})
	if err != nil {
		t.Fatal(err)
	}
	<-messages
	drainUpdates(messages) // what the commands before have changed
	a, err = c.Call(t.Context(), "exec", map[string]any{"command": "echo new > 'a b.txt.tmp'; mv 'a b.txt.tmp' 'a b.txt'"})
	must(t, a, err)
	for awaitUpdate(t, messages).Params["uri"] != watched[3] { // a busy machine may add to the log meanwhile
	}
	a, err = c.Call(t.Context(), "sandbox_kill", map[string]any{"sandbox_id": id})
	if err != nil || !strings.Contains(a.Text(), "Set \"confirm\"") {
		t.Fatalf("a sandbox with processes is killed unasked: %v %s", err, a.Text())
	}
	a, err = c.Call(t.Context(), "sandbox_kill", map[string]any{"sandbox_id": id, "confirm": true})
	must(t, a, err)
	told := map[string]bool{}
	for !told[base] || !told[base+"/logs"] || !told[watched[2]] {
		told[fmt.Sprint(awaitUpdate(t, messages).Params["uri"])] = true
	}
}

// TestConfirm: a client that can ask its user must do so, in both eras; the answer to one question is not accepted for another.
func TestConfirm(t *testing.T) {
	w := serve(t, "")
	c := w.client("", true)
	c.Capabilities = map[string]any{"elicitation": map[string]any{}}
	var ids []string
	for range 2 {
		a, err := c.Call(t.Context(), "sandbox_create", nil)
		id := must(t, a, err).Field("sandbox_id")
		a, err = c.Call(t.Context(), "exec", map[string]any{"sandbox_id": id, "command": "sleep 600", "background": true})
		must(t, a, err)
		ids = append(ids, id)
	}
	var asked struct{ ResultType, RequestState string }
	a, err := c.Call(t.Context(), "sandbox_kill", map[string]any{"sandbox_id": ids[0]})
	if err := json.Unmarshal(must(t, a, err).Result, &asked); err != nil || asked.ResultType != "input_required" {
		t.Fatal(err, string(a.Result))
	}
	answer := func(id, state, action string) sandboxtest.Answer {
		a, err := c.Do(t.Context(), "tools/call", map[string]any{"name": "sandbox_kill", "arguments": map[string]any{"sandbox_id": id},
			"requestState":   state,
			"inputResponses": map[string]any{"confirm": map[string]any{"action": action, "content": map[string]any{"confirm": true}}}})
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	for what, a := range map[string]sandboxtest.Answer{"for another": answer(ids[1], asked.RequestState, "accept"),
		"made up": answer(ids[0], "x"+asked.RequestState, "accept"), "none": answer(ids[0], "", "accept")} {
		if a.Error == nil || a.Error.Code != -32602 {
			t.Errorf("a state %s: %+v", what, a)
		}
	}
	if a := answer(ids[0], asked.RequestState, "decline"); !strings.Contains(a.Text(), "does not want") {
		t.Error(a.Text())
	}
	if a := answer(ids[0], asked.RequestState, "accept"); !strings.Contains(a.Text(), "is killed") {
		t.Error(a.Text())
	}
	legacy := (&sandboxtest.MCP{URL: w.url, Capabilities: map[string]any{"elicitation": map[string]any{}}}).Open(t)
	r, id, err := legacy.Prepare(t.Context(), "tools/call",
		map[string]any{"name": "sandbox_kill", "arguments": map[string]any{"sandbox_id": ids[1]}})
	if err != nil {
		t.Fatal(err)
	}
	res, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	text := ""
	err = sandboxtest.Events(res.Body, func(_ string, m sandboxtest.Message) error {
		if m.Method == "elicitation/create" {
			return legacy.Tell(t.Context(), map[string]any{"jsonrpc": "2.0", "id": m.ID,
				"result": map[string]any{"action": "accept", "content": map[string]any{"confirm": true}}})
		}
		if string(m.ID) == fmt.Sprint(id) {
			text = sandboxtest.Answer{Message: m}.Text()
		}
		return nil
	})
	if err != nil || !strings.Contains(text, "is killed") {
		t.Fatal(err, text)
	}
}

// TestManySessions: 200 sessions at once, each with a command in a sandbox, lose none.
func TestManySessions(t *testing.T) {
	w := serve(t, "")
	first := w.client("", false)
	a, err := first.Call(t.Context(), "sandbox_create", map[string]any{"metadata": map[string]any{"shared": "yes"}})
	id := must(t, a, err).Field("sandbox_id")
	var calls sync.WaitGroup
	for i := range 200 {
		calls.Go(func() {
			c := w.client("", i%2 == 0)
			a, err := c.Call(t.Context(), "exec", map[string]any{"sandbox_id": id,
				"command": fmt.Sprintf("echo session-%d-$((%d + 1))", i, i)})
			if err != nil || !strings.Contains(a.Text(), fmt.Sprintf("session-%d-%d\n", i, i+1)) {
				t.Errorf("session %d: %v %s", i, err, a.Text())
			}
		})
	}
	calls.Wait()
}

// TestKeptSandboxes: an HTTP server leaves its sandboxes to the next one, whether it ends in good order or is killed.
func TestKeptSandboxes(t *testing.T) {
	state := sandboxtest.Dir(t)
	w := serve(t, state, "--on-exit=keep")
	c := w.client("", true)
	a, err := c.Call(t.Context(), "exec", map[string]any{"command": "echo kept > f; while :; do date >> log; sleep 0.1; done",
		"tag": "loop", "yield_ms": 200})
	id := must(t, a, err).Field("sandbox_id")
	for _, end := range []func(){w.stop, func() {
		_ = w.cmd.Process.Kill()
		_ = w.cmd.Wait() // an error, since it was killed
	}} {
		end()
		w = serve(t, state, "--on-exit=keep")
		c.URL = w.url
		var text string
		for deadline := time.Now().Add(60 * time.Second); !strings.Contains(text, "kept"); time.Sleep(20 * time.Millisecond) {
			a, err := c.Call(t.Context(), "exec", map[string]any{"sandbox_id": id,
				"command": "cat f; a=$(wc -l < log); sleep 0.5; echo $(($(wc -l < log) - a))"})
			if text = a.Text(); err != nil || time.Now().After(deadline) {
				t.Fatal(err, text, w.log)
			}
		}
		if !regexp.MustCompile(`kept\n[1-9]`).MatchString(text) {
			t.Fatal("its processes do not go on: ", text)
		}
		a, err := c.Call(t.Context(), "process_wait", map[string]any{"sandbox_id": id, "tag": "loop", "yield_ms": 0})
		if must(t, a, err); !strings.Contains(a.Text(), "still running") {
			t.Fatal(a.Text())
		}
	}
	a, err = c.Call(t.Context(), "sandbox_kill", map[string]any{"sandbox_id": id, "confirm": true})
	must(t, a, err)
}

// TestRefusesToServe: a server with settings that would serve strangers does not start.
func TestRefusesToServe(t *testing.T) {
	state := sandboxtest.Dir(t)
	for flags, want := range map[string]string{
		"--listen=:8787":                                               "name a host and a port",
		"--listen=0.0.0.0:0":                                           "--allow-remote",
		"--listen=0.0.0.0:0 --allow-remote":                            "--origin",
		"--listen=0.0.0.0:0 --allow-remote --origin=x":                 "give scheme and host",
		"--listen=0.0.0.0:0 --allow-remote --origin=https://a.example": "needs a key",
		"--listen=127.0.0.1:0 --toolsets=core,nothing":                 "there is no toolset",
		"--on-exit=explode":                                            "keep or kill",
		"--oidc-issuer=https://a.example":                              "go together",
	} {
		out, err := exec.Command(sandboxtest.Program(t, "soulbox-mcp"),
			append([]string{"http", "--state-dir=" + state}, strings.Fields(flags)...)...).CombinedOutput()
		if err == nil || !strings.Contains(string(out), want) {
			t.Errorf("%s: %v %s", flags, err, out)
		}
	}
}

// TestHealthAndMetrics: the names of all metrics are recorded; a client cannot create one.
func TestHealthAndMetrics(t *testing.T) {
	w := serve(t, "")
	c := w.client("", false)
	a, err := c.Call(t.Context(), "exec", map[string]any{"command": "true"})
	must(t, a, err)
	for _, method := range []string{"made/up", "tools/call"} {
		if _, err := c.Do(t.Context(), method, map[string]any{"name": "made_up"}); err != nil {
			t.Fatal(err)
		}
	}
	status, body := w.get("/health", "")
	var health struct {
		Status  string
		Version string
		Free    int64 `json:"free_memory_mb"`
	}
	if err := json.Unmarshal([]byte(body), &health); err != nil || status != 200 || health.Status != "ok" || health.Free <= 0 {
		t.Fatal(status, body, err)
	}
	_, body = w.get("/metrics", "")
	var names []string
	for _, m := range regexp.MustCompile(`(?m)^# TYPE (soulbox_\S+ \S+)$`).FindAllStringSubmatch(body, -1) {
		names = append(names, m[1])
	}
	names = slices.DeleteFunc(names, func(n string) bool {
		return strings.HasPrefix(n,
			"soulbox_account_")
	}) // these exist once something is used
	const want = "soulbox_agent_round_trip_seconds histogram\nsoulbox_descriptors gauge\nsoulbox_http_bytes_total " +
		"counter\nsoulbox_http_sessions gauge\nsoulbox_mcp_request_seconds histogram\nsoulbox_mcp_requests_total counter\n" +
		"soulbox_memory_free_bytes gauge\nsoulbox_sandbox_operation_seconds histogram\nsoulbox_sandbox_operations_total " +
		"counter\nsoulbox_sandboxes gauge\nsoulbox_sandboxes_cpu_seconds_total counter\nsoulbox_sandboxes_disk_bytes gauge\n" +
		"soulbox_sandboxes_memory_bytes gauge\nsoulbox_sandboxes_memory_gb_seconds_total counter\nsoulbox_sandboxes_port_bytes_total " +
		"counter\nsoulbox_sandboxes_processes gauge\nsoulbox_sandboxes_running_seconds_total counter\nsoulbox_saved_bytes gauge"
	if got := strings.Join(names, "\n"); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	for _, line := range []string{`soulbox_mcp_requests_total{method="tools/call",outcome="ok",tool="exec"} 1`,
		`soulbox_mcp_requests_total{method="other",outcome="refused",tool=""} 1`,
		`soulbox_mcp_requests_total{method="tools/call",outcome="refused",tool="other"} 1`, `soulbox_sandboxes{state="running"} 1`,
		`soulbox_sandbox_operations_total{operation="create",outcome="ok"} 1`} {
		if !strings.Contains(body, line+"\n") {
			t.Errorf("%s is missing", line)
		}
	}
	if strings.Contains(body, "made") {
		t.Error("a client's word is a label")
	}
	dashboard, err := os.ReadFile(repository(t, "docs/grafana.json"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range regexp.MustCompile(`soulbox_[a-z_]+`).FindAllString(string(dashboard), -1) {
		name = regexp.MustCompile(`_(bucket|sum|count)$`).ReplaceAllString(name, "")
		if !strings.Contains(want, name+" ") {
			t.Errorf("the dashboard shows %s, which does not exist", name)
		}
	}
}

// TestConnect: an IDE that only knows stdio uses a server with a key, and the key is never shown.
func TestConnect(t *testing.T) {
	state := sandboxtest.Dir(t)
	key := makeKey(t, state, "ann")
	w := serve(t, state)
	file := state + "/key"
	if err := os.WriteFile(file, []byte(key+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	p := launch(t, "", "--connect="+w.url, "--key-file="+file)
	if got := p.exec("echo over there"); got != "over there\n" {
		t.Fatal(got)
	}
	cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", p.cmd.Process.Pid))
	if err != nil || strings.Contains(string(cmdline), key) || strings.Contains(w.log.String(), key) {
		t.Fatal("the key can be seen", err)
	}
	list := must2(t)(w.client(key, true).Call(t.Context(), "sandbox_list", nil))
	if !strings.Contains(list.Text(), "is running") {
		t.Fatal("the sandbox is not the key's owner's: ", list.Text())
	}
}

func must2(t testing.TB) func(sandboxtest.Answer, error) sandboxtest.Answer {
	return func(a sandboxtest.Answer, err error) sandboxtest.Answer { t.Helper(); return must(t, a, err) }
}

// TestOpenID: tokens of the provider are accepted; those of another issuer, for another audience or out of date are not.
func TestOpenID(t *testing.T) {
	private, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	other, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	issuer := httptest.NewServer(mux)
	defer issuer.Close()
	answer := func(path string, v any) {
		mux.HandleFunc(path, func(w http.ResponseWriter, _ *http.Request) { _ = json.NewEncoder(w).Encode(v) })
	}
	answer("/.well-known/openid-configuration", map[string]any{"issuer": issuer.URL, "jwks_uri": issuer.URL + "/keys",
		"authorization_endpoint": issuer.URL + "/a",
		"token_endpoint":         issuer.URL + "/t", "id_token_signing_alg_values_supported": []string{"RS256"}})
	answer("/keys", jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: &private.PublicKey, KeyID: "k", Algorithm: "RS256", Use: "sig"}}})
	token := func(key *rsa.PrivateKey, iss, aud, sub string, left time.Duration) string {
		signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.RS256, Key: jose.JSONWebKey{Key: key, KeyID: "k"}}, nil)
		if err != nil {
			t.Fatal(err)
		}
		claims, err := json.Marshal(map[string]any{"iss": iss, "aud": aud, "sub": sub, "exp": time.Now().Add(left).Unix(),
			"iat": time.Now().Unix()})
		if err != nil {
			t.Fatal(err)
		}
		signed, err := signer.Sign(claims)
		if err != nil {
			t.Fatal(err)
		}
		text, err := signed.CompactSerialize()
		if err != nil {
			t.Fatal(err)
		}
		return text
	}
	w := serve(t, "", "--oidc-issuer="+issuer.URL, "--oidc-audience=soulbox")
	status := func(key string) int {
		a, err := (&sandboxtest.MCP{URL: w.url, Key: key, Modern: true}).Call(t.Context(), "sandbox_list", nil)
		if err != nil {
			t.Fatal(err)
		}
		return a.Status
	}
	if got := status(token(private, issuer.URL, "soulbox", "ann", time.Hour)); got != http.StatusOK {
		t.Fatal(got, w.log)
	}
	for what, bad := range map[string]string{
		"of another key":    token(other, issuer.URL, "soulbox", "ann", time.Hour),
		"for another":       token(private, issuer.URL, "other", "ann", time.Hour),
		"out of date":       token(private, issuer.URL, "soulbox", "ann", -time.Hour),
		"of another issuer": token(private, "https://evil.example", "soulbox", "ann", time.Hour),
		"none":              "", "made up": "a.b.c", "without a subject": token(private, issuer.URL, "soulbox", "", time.Hour),
	} {
		if got := status(bad); got != http.StatusUnauthorized {
			t.Errorf("a token %s: %d", what, got)
		}
	}
	code, body := w.get("/.well-known/oauth-protected-resource", "")
	if code != http.StatusOK || !strings.Contains(body, issuer.URL) {
		t.Error(code, body)
	}
}

// TestIdleConnections: a thousand connections that send nothing, or very slowly, disturb no client and cost little.
func TestIdleConnections(t *testing.T) {
	w := serve(t, "")
	at := strings.TrimSuffix(strings.TrimPrefix(w.url, "http://"), "/mcp")
	before := rssOf(t, w.cmd.Process.Pid)
	for i := range 1000 {
		conn, err := net.Dial("tcp", at)
		if err != nil {
			t.Fatal(i, err)
		}
		defer conn.Close()
		if i%2 == 0 {
			fmt.Fprintf(conn, "POST /mcp HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{")
		}
	}
	c := w.client("", true)
	must2(t)(c.Call(t.Context(), "exec", map[string]any{"command": "true"}))
	if cost := rssOf(t, w.cmd.Process.Pid) - before; cost > 64<<20 {
		t.Errorf("they cost %d MB", cost>>20)
	}
}
