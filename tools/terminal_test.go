package tools

import (
	"strings"
	"testing"
)

func TestTerminalText(t *testing.T) {
	for in, want := range map[string]string{
		"plain\r\nlines\r\n": "plain\nlines\n", "\x1b[1;31mred\x1b[0m": "red", "10%\r20%\r30%\r\n": "30%\n", "abc\b\bX": "aX", "\x1b]0;title\x07x": "x", "\b\bx": "x",
		"\x1b]52;c;ZXZpbA==\x07safe": "safe", "\xff\xfe": "\uFFFD", "é\b": "",
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
		{"ctrl-c", false, "\x03"}, {"Ctrl+D", false, "\x04"}, {"up", false, "\x1b[A"}, {"up", true, "\x1bOA"}, {"f1 f12", false, "\x1bOP\x1b[24~"}, {"alt-x", false, "\x1bx"},
		{"Escape : w q Return", false, "\x1b:wq\r"}, {"shift-tab", false, "\x1b[Z"}, {"page-up", true, "\x1b[5~"}, {"A é", false, "Aé"}, {"alt-enter", false, "\x1b\r"},
	} {
		if got, err := encodeKeys(strings.Fields(c.keys), c.app); err != nil || got != c.want {
			t.Errorf("%s: %q %v, want %q", c.keys, got, err, c.want)
		}
	}
	if _, err := encodeKeys([]string{"ctrl-alt-wrong"}, false); err == nil || !strings.Contains(err.Error(), "page-up") {
		t.Error(err)
	}
}
