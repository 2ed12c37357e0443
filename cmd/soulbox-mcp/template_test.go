package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"soulbox.dev/soulbox/internal/sandboxtest"
)

// importMini makes a state directory with the template "mini", made of this machine's shell and tools.
func importMini(t testing.TB) (state string) {
	t.Helper()
	state = sandboxtest.Dir(t)
	tar := sandboxtest.ImageTar(t, sandboxtest.Dir(t))
	if out, err := exec.Command(sandboxtest.Program(t, "soulbox-mcp"), "template", "import", tar, "mini", "--state-dir="+
		state).CombinedOutput(); err != nil || !strings.Contains(string(out), "mini is there") {
		t.Fatalf("%v: %s", err, out)
	}
	return state
}

const sitesDockerfile = `FROM mini
COPY . /site
RUN wc -l < /site/index.html > /lines
USER user
WORKDIR /site
`

// TestTemplatesOverStdio: a template is built from files in the call, from a directory of a sandbox and from one of the host, and sandboxes
// start from it.
func TestTemplatesOverStdio(t *testing.T) {
	state := importMini(t)
	allowed := sandboxtest.Dir(t)
	if err := os.WriteFile(filepath.Join(allowed, "index.html"), []byte("1\n2\n3\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	p := launch(t, state, "--on-exit=kill", "--build-contexts="+allowed)
	ask := p.request("tools/call", map[string]any{"name": "template_build", "_meta": map[string]any{"progressToken": "b"},
		"arguments": map[string]any{"name": "site", "dockerfile": sitesDockerfile,
			"files": map[string]any{"index.html": "one\ntwo\n", "css/a.css": "x"}}})
	m := p.await(ask)
	if m.Error != nil || m.Result.IsError || !strings.Contains(m.text(), "Template site is built: 5 steps, 0 of them cached") &&
		!strings.Contains(m.text(), "Template site is built: 4 steps, 0 of them cached") {
		t.Fatalf("%s %+v", m.text(), m.Error)
	}
	p.mu.Lock()
	told := ""
	for _, n := range p.notes[:m.notesBefore] {
		told += fmt.Sprint(n.Params["message"], "\n")
	}
	p.mu.Unlock()
	if !strings.Contains(told, "RUN wc -l") {
		t.Errorf("the steps are not told: %q", told)
	}
	build := fmt.Sprint(m.Result.StructuredContent["build_id"])
	id := p.call("sandbox_create", map[string]any{"template": "site"}).Result.StructuredContent["sandbox_id"]
	got := p.call("exec", map[string]any{"sandbox_id": id, "command": "pwd; id -un; cat /lines; find . | sort | tr '\\n' ' '"})
	if got := got.Result.StructuredContent["output"]; got != "/site\nuser\n2\n. ./css ./css/a.css ./index.html " {
		t.Errorf("%q", got)
	}
	for uri, want := range map[string]string{"template://site": `"layers"`, "template://site/builds/" + build + "/log": "built site in"} {
		got := p.await(p.request("resources/read", map[string]any{"uri": uri}))
		if got.Error != nil || len(got.Result.Contents) == 0 || !strings.Contains(got.Result.Contents[0].Text, want) {
			t.Errorf("%s: %+v", uri, got)
		}
	}
	p.call("exec", map[string]any{"sandbox_id": id, "user": "root",
		"command": "mkdir -p /ctx/sub; echo only > /ctx/index.html; ln -s index.html /ctx/l"})
	p.call("template_build", map[string]any{"name": "inside", "dockerfile": sitesDockerfile, "context_path": "/ctx", "sandbox_id": id})
	p.call("template_build", map[string]any{"name": "hosted", "dockerfile": sitesDockerfile, "host_path": allowed})
	for name, want := range map[string]string{"inside": "1\n", "hosted": "3\n"} {
		id := p.call("sandbox_create", map[string]any{"template": name}).Result.StructuredContent["sandbox_id"]
		if got := p.call("exec", map[string]any{"sandbox_id": id,
			"command": "cat /lines"}).Result.StructuredContent["output"]; got != want {
			t.Errorf("%s: %q", name, got)
		}
	}
	if err := os.Symlink("/etc", filepath.Join(allowed, "out")); err != nil {
		t.Fatal(err)
	}
	for want, args := range map[string]map[string]any{
		"is not one that builds may read":     {"host_path": "/etc"},
		"\"" + allowed + "/out\" of the host": {"host_path": allowed + "/out"},
		"Give only one of":                    {"host_path": allowed, "files": map[string]any{"a": "b"}},
		"line 1: unknown instruction: FRUM":   {"dockerfile": "FRUM x"},
		"Call template_list to see":           {"dockerfile": "FROM nothere"},
		"a name is 1 to 63 lower-case":        {"name": "Not A Name"},
	} {
		call := map[string]any{"name": "wrong", "dockerfile": sitesDockerfile}
		for k, v := range args {
			call[k] = v
		}
		if m := p.await(p.start("template_build", call)); !m.Result.IsError || !strings.Contains(m.text(), want) {
			t.Errorf("%v: %s", args, m.text())
		}
	}
	list := p.call("template_list", nil).text()
	if !strings.Contains(list, "template site") || !strings.Contains(list, "MB of disk]") || !strings.Contains(list, "template mini") ||
		strings.Contains(list, "wrong") {
		t.Error(list)
	}
	// A cancelled build leaves nothing.
	ask = p.start("template_build", map[string]any{"name": "slow", "dockerfile": "FROM mini\nRUN sleep 1000\n"})
	sandboxtest.Eventually(t, "the build runs", func() bool {
		return strings.Contains(p.call("sandbox_list", map[string]any{"metadata": map[string]any{"template": "slow"}}).text(), "is running")
	})
	p.send(map[string]any{"jsonrpc": "2.0", "method": "notifications/cancelled", "params": map[string]any{"requestId": ask.id}})
	sandboxtest.Eventually(t, "nothing of it is left", func() bool {
		return !strings.Contains(p.call("sandbox_list", map[string]any{"metadata": map[string]any{"template": "slow"}}).text(),
			"is running")
	})
	p.call("template_delete", map[string]any{"name": "site"})
	if got := p.call("exec", map[string]any{"sandbox_id": id, "command": "cat /lines"}).Result.StructuredContent["output"]; got != "2\n" {
		t.Errorf("a sandbox of a template that is deleted: %q", got)
	}
}

// TestTemplatesOverHTTP: an owner's templates are visible only to that owner, the operator's to all.
func TestTemplatesOverHTTP(t *testing.T) {
	state := importMini(t)
	ann, bob := makeKey(t, state, "ann"), makeKey(t, state, "bob")
	w := serve(t, state)
	a, b := w.client(ann, true), w.client(bob, true)
	built, err := a.Call(t.Context(), "template_build", map[string]any{"name": "mine", "dockerfile": "FROM mini\nRUN echo ann > /who\n"})
	must(t, built, err)
	id, log := "", "template://mine/builds/"+built.Field("build_id")+"/log"
	made, err := a.Call(t.Context(), "sandbox_create", map[string]any{"template": "mine"})
	id = must(t, made, err).Field("sandbox_id")
	got, err := a.Call(t.Context(), "exec", map[string]any{"sandbox_id": id, "command": "cat /who"})
	if must(t, got, err).Field("output") != "ann\n" {
		t.Error(got.Text())
	}
	for tool, args := range map[string]map[string]any{"sandbox_create": {"template": "mine"}, "template_delete": {"name": "mine"}} {
		if got, err := b.Call(t.Context(), tool, args); err != nil || !strings.Contains(string(got.Result), `"isError":true`) {
			t.Errorf("bob's %s: %v %s", tool, err, got.Result)
		}
	}
	if got, err := b.Call(t.Context(), "template_delete", map[string]any{"name": "mini"}); err != nil ||
		!strings.Contains(got.Text(), "operator") {
		t.Errorf("%v %s", err, got.Text())
	}
	for _, uri := range []string{"template://mine", log} {
		if got, err := b.Do(t.Context(), "resources/read", map[string]any{"uri": uri}); err != nil || got.Error == nil {
			t.Errorf("bob reads %s: %s", uri, got.Result)
		}
		got, err := a.Do(t.Context(), "resources/read", map[string]any{"uri": uri})
		must(t, got, err)
	}
	if got, err := b.Call(t.Context(), "template_list", nil); strings.Contains(must(t, got, err).Text(), "mine") ||
		!strings.Contains(got.Text(), "mini") {
		t.Error(got.Text())
	}
	// What one owner's build has cached is not used for another owner.
	if same, err := b.Call(t.Context(), "template_build",
		map[string]any{"name": "same", "dockerfile": "FROM mini\nRUN echo ann > /who\n"}); must(t, same, err).Field("cached") != "0" {
		t.Error(same.Text())
	}
	other, err := b.Call(t.Context(), "template_build", map[string]any{"name": "mine", "dockerfile": "FROM mini\nRUN echo bob > /who\n"})
	must(t, other, err)
	for c, want := range map[*sandboxtest.MCP]string{a: "ann\n", b: "bob\n"} {
		made, err := c.Call(t.Context(), "sandbox_create", map[string]any{"template": "mine"})
		got, gerr := c.Call(t.Context(), "exec", map[string]any{"sandbox_id": must(t, made, err).Field("sandbox_id"),
			"command": "cat /who"})
		if must(t, got, gerr).Field("output") != want {
			t.Error(got.Text())
		}
	}
}

// TestTemplateCommands runs the commands that an operator uses by hand.
func TestTemplateCommands(t *testing.T) {
	state := importMini(t)
	run := func(args ...string) (string, error) {
		out, err := exec.Command(sandboxtest.Program(t, "soulbox-mcp"),
			append(append([]string{"template"}, args...), "--state-dir="+state)...).CombinedOutput()
		return string(out), err
	}
	to := filepath.Join(sandboxtest.Dir(t), "layout")
	for _, args := range [][]string{{"export", "mini", to}, {"import", to, "again"}, {"delete", "mini"}} {
		if out, err := run(args...); err != nil {
			t.Fatalf("%v: %v %s", args, err, out)
		}
	}
	if out, err := run("list"); err != nil || !strings.Contains(out, "again") || strings.Contains(out, "mini") ||
		!strings.Contains(out, "host") || !strings.Contains(out, " MB of disk (--template-budget-mb)") {
		t.Error(err, out)
	}
	for want, args := range map[string][]string{"needs 1 arguments": {"delete"}, "no such template": {"delete", "nothere"},
		"there is no command": {"frob"}, "cannot be reached": {"pull", "127.0.0.1:1/x", "y"}} {
		if out, err := run(args...); err == nil || !strings.Contains(out, want) {
			t.Errorf("%v: %v %s", args, err, out)
		}
	}
}

// TestKilledInBuild: if a server is killed in the middle of a build, the next one removes everything it left.
func TestKilledInBuild(t *testing.T) {
	state := importMini(t)
	p := launch(t, state, "--on-exit=keep")
	p.start("template_build", map[string]any{"name": "slow", "dockerfile": "FROM mini\nRUN echo first > /first\nRUN sleep 1000\n",
		"files": map[string]any{"a": "a"}})
	sandboxtest.Eventually(t, "the build runs", func() bool { return strings.Contains(p.call("sandbox_list", nil).text(), "is running") })
	if err := p.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-p.ended
	_ = p.cmd.Wait() // an error, since it was killed
	if left, err := filepath.Glob(filepath.Join(state, "templates", "*", ".*")); err != nil || len(left) < 3 {
		t.Errorf("the build has left %v, %v: of its files, its step and itself", left, err)
	}
	next := launch(t, state, "--on-exit=kill")
	sandboxtest.Eventually(t, "nothing runs", func() bool { return len(sandboxtest.Processes(state)) == 0 })
	sandboxtest.Eventually(t, "nothing half made is left", func() bool {
		left, err := filepath.Glob(filepath.Join(state, "templates", "*", ".*"))
		return err == nil && len(left) == 0
	})
	if list := next.call("template_list", nil).text(); strings.Contains(list, "slow") {
		t.Error(list)
	}
	next.call("template_build", map[string]any{"name": "slow", "dockerfile": "FROM mini\nRUN echo first > /first\n"})
}

// BenchmarkTemplates measures builds, compared with buildah's if run as root, and sandboxes that start from them.
func BenchmarkTemplates(b *testing.B) {
	if b.N > 1 {
		return // as in BenchmarkSoulBox
	}
	t := &table{}
	defer func() { t.print() }()
	state := importMini(b)
	p := launch(b, state, "--on-exit=kill", "--memory-mb=256")
	defer p.close()
	dockerfile := "FROM mini\nRUN seq 100000 > /a\nRUN mkdir /d && cd /d && touch $(seq 1000)\nRUN rm -r /d && head -c 10000000 " +
		"/dev/zero | tr '\\0' x > /big\nCOPY f /f\n"
	n := 0
	build := func() time.Duration {
		n++
		return timed(func() {
			p.call("template_build", map[string]any{"name": "bench",
				"dockerfile": strings.ReplaceAll(dockerfile, "seq 100000", fmt.Sprint("seq ", 100000+n)),
				"files":      map[string]any{"f": "f"}})
		})
	}
	var cold, cached []time.Duration
	for range 5 {
		cold = append(cold, build())
		n--
		cached = append(cached, build())
	}
	t.record("template_build, 3 RUN and COPY, cold", cold)
	t.record("template_build, all cached", cached)
	benchBuildah(b, t, dockerfile)
	p.call("template_build", map[string]any{"name": "service", "dockerfile": "FROM mini\n", "start_cmd": fmt.Sprintf(helloServer, 8000),
		"ready_cmd": "(exec 3<>/dev/tcp/127.0.0.1/8000)"})
	var first []time.Duration
	for range 10 {
		first = append(first, timed(func() {
			id := p.call("sandbox_create", map[string]any{"template": "service"}).Result.StructuredContent["sandbox_id"]
			url := fmt.Sprint(p.call("port_expose", map[string]any{"port": 8000, "sandbox_id": id}).Result.StructuredContent["url"])
			if n, _ := load(1, time.Millisecond, url); n == 0 {
				b.Fatal("the service does not answer")
			}
		}))
	}
	t.record("sandbox_create from a template with a service, to its first answer", first)
	for _, s := range p.call("sandbox_list", nil).Result.StructuredContent["sandboxes"].([]any) {
		p.call("sandbox_kill", map[string]any{"sandbox_id": s.(map[string]any)["sandbox_id"], "confirm": true})
	}
	const idle = 20
	var all float64
	var ids []any
	for range idle {
		ids = append(ids, p.call("sandbox_create", map[string]any{"template": "mini",
			"disk_in_memory": true}).Result.StructuredContent["sandbox_id"])
	}
	for _, id := range ids {
		all += p.call("sandbox_get",
			map[string]any{"sandbox_id": id}).Result.StructuredContent["usage"].(map[string]any)["host_memory_mb"].(float64)
	}
	t.say(fmt.Sprintf("memory of an idle sandbox of an image, in memory, %d at once", idle),
		fmt.Sprintf("PSS %.1f MB; %.1f MB with what of its memory is not mapped", pssOf(b, state)/idle, all/idle))
	host := p.call("sandbox_create", map[string]any{"template": "host"}).Result.StructuredContent["sandbox_id"]
	var times [2][]time.Duration
	for range 300 { // in turn, so that both see the same load of the machine
		for i, id := range []any{host, ids[0]} {
			times[i] = append(times[i], timed(func() {
				p.call("exec",
					map[string]any{"sandbox_id": id, "command": "/bin/true", "isolated": true})
			}))
		}
	}
	t.record("exec of true in a sandbox of the host template", times[0])
	t.record("exec of true in a sandbox of an image, in memory", times[1])
}

// pssOf is the memory of all processes of sandboxes in a state directory, with shared pages counted in part, in MB (proc(5), smaps_rollup).
func pssOf(b *testing.B, state string) (sum float64) {
	for _, pid := range sandboxtest.Processes(state) {
		body, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
		if err != nil {
			continue // it has ended
		}
		for line := range strings.Lines(string(body)) {
			var kb float64
			if n, _ := fmt.Sscanf(line, "Pss: %f kB", &kb); n == 1 {
				sum += kb / 1024
			}
		}
	}
	return sum
}

// benchBuildah builds the same with buildah, which needs root.
func benchBuildah(b *testing.B, t *table, dockerfile string) {
	if _, err := exec.LookPath("buildah"); err != nil || os.Geteuid() != 0 {
		t.say("the same by buildah", "not measured: it is not installed, or this is not root")
		return
	}
	dir := sandboxtest.Dir(b)
	run := func(args ...string) time.Duration {
		return timed(func() {
			out, err := exec.Command("buildah", append([]string{"--root", dir + "/root", "--runroot", dir + "/run", "--storage-driver",
				"vfs"}, args...)...).CombinedOutput()
			if err != nil {
				b.Fatalf("%v: %s", err, out)
			}
		})
	}
	write := func(name, text string) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			b.Fatal(err)
		}
	}
	sandboxtest.ImageTar(b, dir)
	write("f", "f")
	write("Base", "FROM scratch\nADD image.tar /\n")
	run("bud", "--isolation", "chroot", "-t", "mini", "-f", filepath.Join(dir, "Base"), dir)
	write(".dockerignore", "image.*\nroot\nrun\n")
	var cold, cached []time.Duration
	for i := range 5 {
		write("Dockerfile", strings.ReplaceAll(dockerfile, "seq 100000", fmt.Sprint("seq ", 200000+i)))
		for _, times := range []*[]time.Duration{&cold, &cached} {
			*times = append(*times, run("bud", "--isolation", "chroot", "--pull-never", "--layers", "-t", "bench", dir))
		}
	}
	t.record("the same by buildah (chroot, vfs, layers), cold", cold)
	t.record("the same by buildah, all cached", cached)
}
