package main

import (
	"fmt"
	"strings"
	"testing"

	"soulbox.dev/soulbox/internal/sandboxtest"
)

// halves writes the first bytes of a character, waits for a line, and then writes what follows, in which there is Latin-1, too.
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

// wrote waits until it has written so many bytes.
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

// goOn gives it the line that it waits for.
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
	r := w.p.await(w.p.request("resources/read", map[string]any{"uri": fmt.Sprintf("sandbox://%s/processes/%s/output?offset=%d", w.sandbox, w.id, from)}))
	if len(r.Result.Contents) != 1 || strings.ReplaceAll(r.Result.Contents[0].Text, "\r", "") != want {
		w.t.Errorf("the resource from %d has %q, want %q", from, r.Result.Contents, want)
	}
}

// TestCharactersCut: a character of which the rest is still to come is shown whole with it, in every answer that tells of output; what has no end
// when the process ends is shown as bytes, as Latin-1 is everywhere.
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

// TestCharactersOfStream: of one stream the offset to go on from is exact, though the other one has written behind it.
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

// TestCharactersFound: lines that a search shows are cut at whole characters.
func TestCharactersFound(t *testing.T) {
	p := launch(t, "")
	p.exec(`printf 'caf\351 %s\346\227\245%s\n' "$(head -c 293 /dev/zero | tr '\0' x)" "$(head -c 400 /dev/zero | tr '\0' y)" > /home/user/latin; printf 'caf\351 short\n' > /home/user/short`)
	m := p.call("file_search", map[string]any{"pattern": "^caf", "path": "/home/user"})
	if got := m.text(); !strings.Contains(got, `caf\xe9 xxx`) || !strings.Contains(got, "xxx…\n") || !strings.Contains(got, "short:1:caf\\xe9 short\n") {
		t.Error(got)
	}
}
