package tools

import (
	"strings"
	"testing"
	"unicode/utf8"

	"soulbox.dev/soulbox/agent"
)

// TestTerminalPieces: a terminal's output that is read in pieces, cut anywhere, is shown as if it were read at once.
func TestTerminalPieces(t *testing.T) {
	out := "日本語 café 👨‍👩‍👧\r\n20%\r\n" +
		"\x1b[1;31mred\x1b[0m\x1b]0;日本\x07 \x1b(B\x1b[!1p\x1b[1?2hx\x1bP1q~\x1b\\\r\ncaf\xe9 \xff\r\nend\xe6\x97"
	want := "日本語 café 👨‍👩‍👧\n20%\nred x\n" + `caf\xe9 \xff` + "\n" + `end\xe6\x97`
	for cut := range len(out) + 1 {
		first, used := terminalHead([]byte(out[:cut]), 1000, cut == len(out))
		second, _ := terminalHead([]byte(out[used:]), 1000, true)
		if got := first + second; got != want {
			t.Errorf("cut at %d: %q, want %q", cut, got, want)
		}
		if !utf8.ValidString(first) || used < cut-20 {
			t.Errorf("cut at %d: %d are shown: %q", cut, used, first)
		}
	}
}

// TestTerminalRoom: what does not fit is left for later, and no part of it is lost.
func TestTerminalRoom(t *testing.T) {
	p := []byte(strings.Repeat("é\xe9\x1b[1m", 1000))
	want, got := terminalText(p), ""
	for len(p) > 0 {
		text, used := terminalHead(p, 100, true)
		if n := utf8.RuneCountInString(text); n > 100 || used == 0 {
			t.Fatalf("%d characters of %d bytes", n, used)
		}
		got += text
		p = p[used:]
	}
	if got != want {
		t.Errorf("%d characters, want %d", len(got), len(want))
	}
	text, skipped, later := terminalTail([]byte("\x97\xa5"+strings.Repeat("日", 100)+"\xe6\x97"), 50, false)
	if later != 2 || skipped < 2 || len(text) > 150 || strings.Trim(text, "日") != "" {
		t.Errorf("%q %d %d", text, skipped, later)
	}
}

// TestRenderTail: a character cut at the start of a tail is skipped; one cut at its end is left for later.
func TestRenderTail(t *testing.T) {
	text, skipped, later := renderTail([]byte("\x97\xa5a日\xe6\x97"), 100, true, false)
	if text != "a日" || skipped != 2 || later != 2 {
		t.Errorf("%q %d %d", text, skipped, later)
	}
	text, skipped, later = renderTail([]byte("\xa5a\xe6\x97"), 100, false, true)
	if text != `\xa5a\xe6\x97` || skipped != 0 || later != 0 {
		t.Errorf("%q %d %d", text, skipped, later)
	}
}

// TestProgressText: a progress notification has no incomplete characters.
func TestProgressText(t *testing.T) {
	snap := agent.Snapshot{Output: agent.Output{Head: []byte("caf\xe9 日\xe6\x97"), HeadEnd: 9, TailStart: 9, End: 9}}
	if got := progressText(snap); got != `caf\xe9 日` {
		t.Errorf("%q", got)
	}
	snap.Output = agent.Output{Head: []byte("a\xe6\x97"), Tail: []byte("\xa5b\x1b["), HeadEnd: 3, TailStart: 9, End: 12}
	if got := progressText(snap); got != "ab" {
		t.Errorf("%q", got)
	}
}
