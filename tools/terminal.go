package tools

import (
	"strings"

	uv "github.com/charmbracelet/ultraviolet"
)

// keyBytes are the bytes that keys send (xterm's control sequences, "PC-Style Function Keys").
var keyBytes = map[string]string{
	"enter": "\r", "tab": "\t", "shift-tab": "\x1b[Z", "esc": "\x1b", "space": " ", "backspace": "\x7f", "delete": "\x1b[3~",
	"insert": "\x1b[2~",
	"up":     "\x1b[A", "down": "\x1b[B", "right": "\x1b[C", "left": "\x1b[D", "home": "\x1b[H", "end": "\x1b[F", "page-up": "\x1b[5~",
	"page-down": "\x1b[6~",
	"f1":        "\x1bOP", "f2": "\x1bOQ", "f3": "\x1bOR", "f4": "\x1bOS", "f5": "\x1b[15~", "f6": "\x1b[17~", "f7": "\x1b[18~",
	"f8": "\x1b[19~", "f9": "\x1b[20~",
	"f10": "\x1b[21~", "f11": "\x1b[23~", "f12": "\x1b[24~", "ctrl-space": "\x00", "ctrl-[": "\x1b", "ctrl-\\": "\x1c", "ctrl-]": "\x1d",
	"ctrl-^": "\x1e", "ctrl-_": "\x1f",
	"ctrl-up": "\x1b[1;5A", "ctrl-down": "\x1b[1;5B", "ctrl-right": "\x1b[1;5C", "ctrl-left": "\x1b[1;5D",
}

// keyNames are alternative names of keys.
var keyNames = map[string]string{"return": "enter", "escape": "esc", "pgup": "page-up", "pageup": "page-up", "pgdn": "page-down",
	"pagedown": "page-down", "del": "delete", "bs": "backspace"}

// encodeKeys turns names of keys into the bytes they send. appCursor is the mode in which programs want other codes for the arrow keys.
func encodeKeys(keys []string, appCursor bool) (string, error) {
	var b strings.Builder
	for _, key := range keys {
		name := strings.ToLower(strings.ReplaceAll(strings.TrimSpace(key), "+", "-"))
		if other, ok := keyNames[name]; ok {
			name = other
		}
		alt := false
		if rest, ok := strings.CutPrefix(name, "alt-"); ok {
			alt, name = true, rest
		}
		text, ok := keyBytes[name]
		switch {
		case ok && appCursor && len(text) == 3 && text[1] == '[' && strings.ContainsRune("ABCDHF", rune(text[2])):
			text = "\x1bO" + text[2:]
		case ok:
		case strings.HasPrefix(name, "ctrl-") && len(name) == 6 && name[5] >= 'a' && name[5] <= 'z':
			text = string(rune(name[5] - 'a' + 1))
		case len([]rune(strings.TrimSpace(key))) == 1 || alt && len([]rune(name)) == 1:
			letters := []rune(strings.TrimSpace(key)) // with its case: A is not a
			text = string(letters[len(letters)-1])
		default:
			return "", badArgument("There is no key %q. Keys are: enter, tab, shift-tab, esc, backspace, delete, insert, space, up, "+
				"down, left, right, home, end, page-up, page-down, f1 to f12, ctrl-a to ctrl-z, alt- before another; text goes into "+
				"\"input\".", shorten(key, 40))
		}
		if alt {
			text = "\x1b" + text
		}
		b.WriteString(text)
	}
	return b.String(), nil
}

func cellOf(c *uv.Cell) (content string, width int) {
	if c == nil {
		return "", 1
	}
	return c.Content, c.Width
}
