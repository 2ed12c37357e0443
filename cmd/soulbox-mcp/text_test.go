package main

import (
	"fmt"
	"strings"
	"testing"

	"soulbox.dev/soulbox/internal/sandboxtest"
)

// halves writes the first bytes of a character, waits for a line, and then writes the rest, in which there is also Latin-1.
const halves = `printf 'caf\351 \346\227'; read x; printf '\245!\n'; read x; printf 'end\360\237'`

// piecewise is a process whose output is read in pieces.
type piecewise struct {
	t       *testing.T
	p       *program
	sandbox any
	id      any
}

func startPiecewise(t *testing.T, p *program, command string, tty bool) piecewise {
	t.Helper()
	m := p.call("exec", map[string]any{"command": command, "background": true, "tty": tty, "yield_ms": 0})
	return piecewise{t, p, m.Result.StructuredContent["sandbox_id"], m.Result.StructuredContent["process_id"]}
}

// wrote waits until the process has written n bytes.
func (w piecewise) wrote(n int) {
	w.t.Helper()
	sandboxtest.Eventually(w.t, fmt.Sprintf("%d bytes are written", n), func() bool {
		for _, one := range w.p.call("process_list", nil).Result.StructuredContent["processes"].([]any) {
			if one := one.(map[string]any); one["process_id"] == w.id {
				return one["output_bytes"] == float64(n)
			}
		}
		return false
	})
}

// goOn sends the line that the process waits for.
func (w piecewise) goOn() {
	w.p.call("process_write", map[string]any{"process_id": w.id, "input": "\n", "yield_ms": 0})
}

func (w piecewise) wait(args map[string]any) map[string]any {
	w.t.Helper()
	args["process_id"] = w.id
	return w.p.call("process_wait", args).Result.StructuredContent
}

func (w piecewise) expect(args map[string]any, output string, next int) {
	w.t.Helper()
	args["yield_ms"] = 0
	if s := w.wait(args); s["output"] != output || s["next_offset"] != float64(next) || s["left_out"] != nil {
		w.t.Errorf("%v: %q up to %v, left out %v; want %q up to %d", args, s["output"], s["next_offset"], s["left_out"], output, next)
	}
}

func (w piecewise) expectResource(from int, want string) {
	w.t.Helper()
	r := w.p.await(w.p.request("resources/read", map[string]any{"uri": fmt.Sprintf("sandbox://%s/processes/%s/output?offset=%d", w.sandbox,
		w.id, from)}))
	if len(r.Result.Contents) != 1 || strings.ReplaceAll(r.Result.Contents[0].Text, "\r", "") != want {
		w.t.Errorf("the resource from %d has %q, want %q", from, r.Result.Contents, want)
	}
}

// TestCharactersCut: a character that is not complete yet is shown whole once it is, in every answer that shows output. If it is incomplete
// when the process ends, it is shown as bytes, as Latin-1 is everywhere.
func TestCharactersCut(t *testing.T) {
	p := launch(t, "")
	for _, tty := range []bool{false, true} {
		command, end := halves, 0
		if tty {
			command, end = "stty -echo; "+halves, 1 // its lines end in two bytes
		}
		w := startPiecewise(t, p, command, tty)
		w.wrote(7)
		w.expect(map[string]any{}, `caf\xe9 `, 5)
		w.expect(map[string]any{"offset": 0}, `caf\xe9 `, 5)
		w.expectResource(0, `caf\xe9 `)
		if tty && w.wait(map[string]any{"screen": true})["output"] != `caf\xe9` {
			t.Error(w.wait(map[string]any{"screen": true}))
		}
		w.goOn()
		w.wrote(10 + end)
		w.expect(map[string]any{"offset": 5}, "日!\n", 10+end)
		w.expectResource(5, "日!\n")
		w.goOn()
		if got := w.wait(map[string]any{}); got["state"] != "exited" {
			t.Fatal(got)
		}
		w.expect(map[string]any{"offset": 10 + end}, `end\xf0\x9f`, 15+end)
		w.expect(map[string]any{}, "caf\\xe9 日!\nend\\xf0\\x9f", 15+end)
		w.expectResource(10+end, `end\xf0\x9f`)
		if tty && w.wait(map[string]any{"screen": true})["output"] != "caf\\xe9 日!\nend\\xf0\\x9f" {
			t.Error(w.wait(map[string]any{"screen": true}))
		}
	}
}

// TestCharactersOfStream: the offset at which to continue one stream is exact, even if the other stream has written behind it.
func TestCharactersOfStream(t *testing.T) {
	p := launch(t, "")
	w := startPiecewise(t, p, `printf 'a\346\227'; read x; printf XY >&2; read x; printf '\245b'`, false)
	w.wrote(3)
	w.goOn()
	w.wrote(5)
	w.expect(map[string]any{"stream": "stdout"}, "a", 1)
	w.expect(map[string]any{"stream": "stderr"}, "XY", 5)
	w.goOn()
	if got := w.wait(map[string]any{"stream": "stdout", "offset": 1}); got["output"] != "日b" {
		t.Error(got)
	}
}

// TestCharactersFound: lines shown by a search are cut only between whole characters.
func TestCharactersFound(t *testing.T) {
	p := launch(t, "")
	p.exec(`printf 'caf\351 %s\346\227\245%s\n' "$(head -c 293 /dev/zero | tr '\0' x)" "$(head -c 400 /dev/zero | ` +
		`tr '\0' y)" > /home/user/latin; printf 'caf\351 short\n' > /home/user/short`)
	m := p.call("file_search", map[string]any{"pattern": "^caf", "path": "/home/user"})
	if got := m.text(); !strings.Contains(got, `caf\xe9 xxx`) || !strings.Contains(got, "xxx…\n") ||
		!strings.Contains(got, "short:1:caf\\xe9 short\n") {
		t.Error(got)
	}
}

// oddNames are names of files that are not harmless text, in the notation in which they are shown and given back.
var oddNames = []string{`caf\xe9.txt`, `two\x0alines`, `\x1b[31mred`, `\x5cxe9`, `back\slash\n`, `日本 é`, `a\xe2\x80\xaeb`}

// TestOddNames: every answer shows a name in one notation that stays on its line, and every tool that takes a path accepts that notation
// for the same file.
func TestOddNames(t *testing.T) {
	p := launch(t, "")
	ok := func(tool string, args map[string]any) message {
		t.Helper()
		m := p.call(tool, args)
		for _, line := range strings.Split(m.text(), "\n") {
			if strings.ContainsAny(line, "\x1b\u202e\uFFFD") || line == "lines" || strings.HasPrefix(line, "lines,") {
				t.Errorf("%s: %q", tool, m.text())
			}
		}
		return m
	}
	dir := "/home/user/odd"
	cursor := ok("exec", map[string]any{"command": "mkdir " + dir})
	cursor = ok("file_watch", map[string]any{"path": dir})
	for i, name := range oddNames {
		ok("file_write", map[string]any{"path": dir + "/" + name, "content": fmt.Sprintf("text %d\n", i)})
	}
	// What programs find are exactly these bytes.
	if got := p.exec("cd " + dir +
		`; cat $'caf\xe9.txt' $'two\nlines' $'\e[31mred' '\xe9' 'back\slash\n' '日本 é' $'a\xe2\x80\xaeb'; ls | ` +
		`wc -l`); got != "text 0\ntext 1\ntext 2\ntext 3\ntext 4\ntext 5\ntext 6\n8\n" {
		t.Errorf("%q", got)
	}
	list, found := ok("file_list", map[string]any{"path": dir}).text(), ok("file_search", map[string]any{"path": dir, "glob": "*"}).text()
	lines := ok("file_search", map[string]any{"path": dir, "pattern": "text"}).text()
	events := ok("file_watch", map[string]any{"cursor": cursor.Result.StructuredContent["cursor"], "limit": 100}).text()
	for i, name := range oddNames {
		file := dir + "/" + name
		for what, text := range map[string]string{"file_list": list + "\n", "file_search": found, "file_watch": events} {
			if !strings.Contains(text, file+"\n") {
				t.Errorf("%s does not have %s: %q", what, name, text)
			}
		}
		if !strings.Contains(lines, fmt.Sprintf("%s:1:text %d\n", file, i)) {
			t.Errorf("%q", lines)
		}
		if m := ok("file_read", map[string]any{"path": file}); m.text() != fmt.Sprintf("text %d\n[%s, 7 bytes, lines 1 to 1, to the end]",
			i, file) || m.Result.StructuredContent["path"] != file {
			t.Errorf("%q", m.text())
		}
		if m := ok("file_edit", map[string]any{"path": file, "old_str": "text",
			"new_str": "changed"}); m.Result.StructuredContent["path"] != file {
			t.Error(m.text())
		}
		if m := ok("file_move", map[string]any{"from": file, "to": file + `.\xff`}); m.Result.StructuredContent["path"] != file+`.\xff` {
			t.Error(m.text())
		}
		if m := p.await(p.request("tools/call", map[string]any{"name": "file_read",
			"arguments": map[string]any{"path": file}})); !m.Result.IsError || !strings.Contains(m.text(), file+": no such file") {
			t.Errorf("%q", m.text())
		}
		if m := ok("file_remove", map[string]any{"path": file + `.\xff`}); m.Result.StructuredContent["removed"] != file+`.\xff` {
			t.Error(m.text())
		}
	}
	if got := p.exec("ls -A " + dir + " | wc -l"); got != "0\n" {
		t.Errorf("%q are left", got)
	}
}

// TestOddDirectories: a directory may have such a name as the cwd of a command or a shell, in a listing and in a resource.
func TestOddDirectories(t *testing.T) {
	p := launch(t, "")
	dir := `/home/user/d\xe9\x0ax`
	id := p.call("exec",
		map[string]any{"command": `mkdir -p $'d\xe9\nx/sub'; echo hi > $'d\xe9\nx/sub/f'; ` +
			`ln -s $'d\xe9\nx' link`}).Result.StructuredContent["sandbox_id"]
	if m := p.call("exec", map[string]any{"command": "cat sub/f", "cwd": dir}); m.Result.StructuredContent["output"] != "hi\n" {
		t.Error(m.text())
	}
	if m := p.call("exec", map[string]any{"command": "cd sub", "cwd": dir}); !strings.Contains(m.text(), "the shell is now in "+dir+
		"/sub") {
		t.Errorf("%q", m.text())
	}
	if got := p.exec("cat f"); got != "hi\n" {
		t.Errorf("%q", got)
	}
	if m := p.call("sandbox_get", nil); !strings.Contains(m.text(), "shell is in "+dir+"/sub") {
		t.Errorf("%q", m.text())
	}
	if m := p.call("process_list", nil); !strings.Contains(m.text(), "cwd "+dir+"/sub,") {
		t.Errorf("%q", m.text())
	}
	if m := p.call("file_list", map[string]any{"path": "/home/user"}); !strings.Contains(m.text(), dir+"/\n") ||
		!strings.Contains(m.text(), `link -> d\xe9\x0ax`) {
		t.Errorf("%q", m.text())
	}
	if m := p.call("file_list", map[string]any{"path": dir, "depth": 2}); !strings.Contains(m.text(), dir+"/sub/f") {
		t.Errorf("%q", m.text())
	}
	for _, path := range []string{"d%E9%0Ax", `d%5Cxe9%5Cx0ax`} { // as in a URI, and as it is shown
		r := p.await(p.request("resources/read", map[string]any{"uri": fmt.Sprintf("sandbox://%s/files/home/user/%s/sub/f", id, path)}))
		if len(r.Result.Contents) != 1 || r.Result.Contents[0].Text != "hi\n" {
			t.Errorf("%s: %+v", path, r)
		}
	}
	m := p.await(p.request("tools/call", map[string]any{"name": "exec",
		"arguments": map[string]any{"command": "true", "cwd": `/gone\xff`}}))
	if !m.Result.IsError || !strings.Contains(m.text(), `"/gone\xff"`) {
		t.Errorf("%q", m.text())
	}
}
