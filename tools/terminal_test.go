package tools

import (
	"strings"
	"testing"
	"time"

	"soulbox.dev/soulbox/agent"
)

func TestTerminalText(t *testing.T) {
	for in, want := range map[string]string{
		"plain\r\nlines\r\n": "plain\nlines\n", "\x1b[1;31mred\x1b[0m": "red", "10%\r20%\r30%\r\n": "30%\n", "abc\b\bX": "aX",
		"\x1b]0;title\x07x": "x", "\b\bx": "x",
		"\x1b]52;c;ZXZpbA==\x07safe": "safe", "\xff\xfe": `\xff\xfe`, "é\b": "", "\xe9\bx": "x", "\x1b]0;日本語\x07x": "x", "\x1b(Bx": "x",
		"\x1bPq\x07#\x1b\\x": "x", "\x1bP\x1b\\x": "x", "\x1b]0;t\x1b\\x": "x", "\x1b\nx": "\nx", "\x1b[3\x18x": "x", "\x1b[1<2mx": "x",
		"\x1b[3é": "é", "\x1b[" + strings.Repeat("9;", 200) + "mx": "x",
		"\x1b[!1px": "x", "\x1b[1?25hx": "x", "\x1b[!1 1;<?1;\x7f!mx": "x", "\x1b[??1hx": "x", "\x1b[!1\x1b[1mx": "x",
		"\x1b[!1\x18px": "px", "\x1b[!1\nmx": "x", "\x1b[!1éx": "éx", "\x1b[!1\x1b]0;t\x07x": "x", "\x1b[!p\x1b[0 qx": "x",
	} {
		if got := terminalText([]byte(in)); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}

func TestEncodeKeys(t *testing.T) {
	for _, c := range []struct {
		keys string
		app  bool
		want string
	}{
		{"ctrl-c", false, "\x03"}, {"Ctrl+D", false, "\x04"}, {"up", false, "\x1b[A"}, {"up", true, "\x1bOA"},
		{"f1 f12", false, "\x1bOP\x1b[24~"}, {"alt-x", false, "\x1bx"},
		{"Escape : w q Return", false, "\x1b:wq\r"}, {"shift-tab", false, "\x1b[Z"}, {"page-up", true, "\x1b[5~"}, {"A é", false, "Aé"},
		{"alt-enter", false, "\x1b\r"},
	} {
		if got, err := encodeKeys(strings.Fields(c.keys), c.app); err != nil || got != c.want {
			t.Errorf("%s: %q %v, want %q", c.keys, got, err, c.want)
		}
	}
	if _, err := encodeKeys([]string{"ctrl-alt-wrong"}, false); err == nil || !strings.Contains(err.Error(), "page-up") {
		t.Error(err)
	}
}

// rendered is what a screen shows after some output.
func rendered(t *testing.T, size agent.Terminal, output string) (string, *screenInfo, *screen) {
	t.Helper()
	sc := &screen{}
	sc.reset(size, 0)
	for i := 0; i < len(output); i += 3 { // cut anywhere
		if err := sc.write([]byte(output[i:min(i+3, len(output))])); err != nil {
			t.Fatal(err)
		}
	}
	text, info := sc.text(scrollLines, 100_000)
	return text, info, sc
}

func TestScreen(t *testing.T) {
	small := agent.Terminal{Rows: 3, Cols: 10}
	for _, c := range []struct{ in, want string }{
		{"one\r\ntwo", "one\ntwo"}, {"\x1b[2;3Hhere", "\n  here"}, {"\x1b[31mred\x1b[0m", "red"}, {"a\x1b[3bb", "aaaab"}, {"日本", "日本"},
		{"main\x1b[?1049hfull\x1b[2J\x1b[Hscreen", "screen"}, {"main\x1b[?1049hfull\x1b[?1049l!", "main!"}, {"\x1b[?25;1049hx", "x"},
		{"\x1b[6n\x1b[c\x1b]10;?\x07after", "after"},
		{"1\r\n2\r\n3\r\n4\r\n5", "1\n2\n3\n4\n5"}, {"ě2024", "ě2024"}, {"\x1b]0;a title\x07x", "x"},
		{"caf\xe9 \xfft\xe9\r\nx\x1b[1;6H!", `caf\xe9 !t\xe9` + "\nx"}, {"\U0010ffe9", `\xf4\x8f\xbf\xa9`}, {"\xe6\x1b[1;4Hx", `\xe6  x`},
		{"\x1bP1;2q\x07#~\x1b\\x", "x"}, {"\x1bP\x1b\\x", "x"}, {"\x1b]2;日本\x1b\\x", "x"}, {"\x1b[3é", "é"},
		{"\x1b[!1px", "x"}, {"\x1b[1?3Cx", "x"}, {"\x1b[1?3;4\x1b[3Cx", "   x"}, {"\x1b[!1\x18px", "px"}, {"\x1b[?3?4Cx\x1b[3Cy", "x   y"},
		{"\x1b[1?1049hmain", "main"}, {"\x1b[0!1\nCx", "\nx"}, {"\x1b[!1éx", "éx"}, {"\x1b[1\n;3Hx", "  x"}, {"\x1b(\x1b[2;2Hx", "\n x"},
		{"\x1b]0;title\x1b\\x", "x"}, {"\x1b]0;title\x1b(Bx", "x"}, {"\x1b]0;title\x1b7x", "x"}, {"\x1b]7;y\x9b99999999by\x1b\\x", "x"},
	} {
		if got, _, _ := rendered(t, small, c.in); got != c.want {
			t.Errorf("%q: %q, want %q", c.in, got, c.want)
		}
	}
	for _, c := range []struct {
		in, want string
		row, col int
	}{
		{"あいうえおかきくけこ", "あいうえお\nかきくけこ", 2, 10}, {"aあいうえおか", "aあいうえ\nおか", 2, 5}, {"あいうえおx", "あいうえお\nx", 2, 2},
		{"あいうえお\r\nx", "あいうえお\nx", 2, 2},
		{"あいうえお\x1b[31mか", "あいうえお\nか", 2, 3}, {"あいうえお\x1b(Bか", "あいうえお\nか", 2, 3}, {"あいうえお\x1b[1Gか", "かいうえお", 1, 3},
		{"\x1b[?7lあいうえお\x1b[1Gか", "かいうえお", 1, 3},
		{"e\u0301x", "e\u0301x", 1, 3}, {"日\u0301x", "日\u0301x", 1, 4}, {"\u0301x", "x", 1, 2},
		{"123456789e\u0301x", "123456789e\u0301\nx", 2, 2}, {"あいうえお\u3099か", "あいうえお\u3099\nか", 2, 3},
		{"👨\u200d👩\u200d👧y", "👨\u200d👩\u200d👧y", 1, 8}, {"🇩🇪🇫🇷x", "🇩🇪🇫🇷x", 1, 6}, {"123456789🇩🇪", "123456789🇩\n🇪", 2, 2},
		{"❤\ufe0fx", "❤\ufe0fx", 1, 3}, {"日\x1b[1;2HX", " X", 1, 3},
		{"1\r\n2\r\n123456789日", "1\n2\n123456789\n日", 3, 3}, {"é\x1b[1;1HE", "E", 1, 2}, {"\u05d0\u05b7x", "\u05d0\u05b7x", 1, 3},
		{"\x1b(0qx\x1b(Bq", "─│q", 1, 4},
	} {
		if got, info, _ := rendered(t, small, c.in); got != c.want || info.CursorRow != c.row || info.CursorCol != c.col {
			t.Errorf("%q: %q at %d, %d; want %q at %d, %d", c.in, got, info.CursorRow, info.CursorCol, c.want, c.row, c.col)
		}
	}
	if _, info, _ := rendered(t, small, "\x1b]2;日本 caf\xe9\x1b\\"); info.Title != `日本 caf\xe9` {
		t.Errorf("%+v", info)
	}
	_, info, sc := rendered(t, small, "\x1b]0;a title\x07\x1b[?1h\x1b[?2004h\x1b[2;4H")
	if info.Title != "a title" || info.CursorRow != 2 || info.CursorCol != 4 || !sc.appCursor || !sc.brackets {
		t.Errorf("%+v %v %v", info, sc.appCursor, sc.brackets)
	}
}

// TestScreenHostile: output that is meant to cost us time or memory costs little.
func TestScreenHostile(t *testing.T) {
	for name, one := range map[string]string{
		"repeat": "x\x1b[2147483646b", "erase": "\x1b[2147483646X", "tabs": "\x1b[2147483646I", "back tabs": "\x1b[2147483646Z",
		"insert": "\x1b[2147483646@", "scroll": "\x1b[2147483646S",
		"lines": "\x1b[2147483646L", "C1": "x\x9b2147483646b", "parameters": "\x1b[" + strings.Repeat("9;", 10_000) + "m",
		"alternate": "\x1b[?1049hx\x1b[499b\r\n", "switches": "\x1b[?1049h\x1b[?1049l", "combining": "e" + strings.Repeat("\u0301", 20_000),
		"flags": strings.Repeat("🇩", 20_000),
	} {
		begin := time.Now()
		rendered(t, agent.Terminal{Rows: 300, Cols: 500}, strings.Repeat(one, 3))
		if d := time.Since(begin); d > 20*time.Second {
			t.Errorf("%s took %s", name, d)
		}
	}
	if got := terminalText([]byte(strings.Repeat("x", 30_000) + strings.Repeat("\b", 30_000))); got != "" {
		t.Error(len(got))
	}
}

func FuzzScreen(f *testing.F) {
	f.Add([]byte("\x1b[?1049h\x1b[2J\x1b[3;4Hx\x1b[99999b\x1b[?1049l"))
	f.Fuzz(func(t *testing.T, p []byte) {
		sc := &screen{}
		sc.reset(agent.Terminal{Rows: 5, Cols: 20}, 0)
		defer func() { _ = recover() }() // update recovers, too
		_ = sc.write(p)
		sc.text(10, 1000)
	})
}
