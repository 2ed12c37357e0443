// Package names writes file names, whatever their bytes, in a notation that is one line of text, and parses that notation. Names that are
// harmless text stay unchanged. The package knows nothing about files.
package names

import (
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Show writes a name: bytes that are not UTF-8, control characters, line separators and characters that change the direction of text become
// \xNN; a backslash that Parse would take for the start of such an escape becomes \x5c. Everything else stays unchanged.
func Show(name string) string {
	if isPlain(name) {
		return name
	}
	var b strings.Builder
	for i := 0; i < len(name); {
		r, n := utf8.DecodeRuneInString(name[i:])
		switch _, escaped := escape(name[i:]); {
		case escaped:
			b.WriteString(`\x5c`)
		case r == utf8.RuneError && n == 1, acts(r):
			for _, c := range []byte(name[i : i+n]) {
				fmt.Fprintf(&b, `\x%02x`, c)
			}
		default:
			b.WriteString(name[i : i+n])
		}
		i += n
	}
	return b.String()
}

// Text writes a name for a place where text may have many lines, such as JSON: it uses Show only for names that are not valid UTF-8 or that
// Parse would change.
func Text(name string) string {
	if utf8.ValidString(name) && Parse(name) == name {
		return name
	}
	return Show(name)
}

// Parse reads what Show wrote: Parse(Show(name)) is name. In other text it replaces only what looks like one of Show's escapes.
func Parse(shown string) string {
	if !strings.Contains(shown, `\x`) {
		return shown
	}
	b := make([]byte, 0, len(shown))
	for i := 0; i < len(shown); {
		c, n := shown[i], 1
		if of, ok := escape(shown[i:]); ok {
			c, n = of, len(`\xNN`)
		}
		b = append(b, c)
		i += n
	}
	return string(b)
}

// escape returns the byte that the escape at the beginning of a text stands for. Only bytes that Show escapes have one, in lower-case hex.
func escape(text string) (c byte, ok bool) {
	if len(text) < 4 || text[0] != '\\' || text[1] != 'x' {
		return 0, false
	}
	high, low := digit(text[2]), digit(text[3])
	if high < 0 || low < 0 {
		return 0, false
	}
	c = byte(high<<4 | low)
	if c == '\\' { // only before what would otherwise be an escape
		return c, len(text) >= 7 && text[4] == 'x' && digit(text[5]) >= 0 && digit(text[6]) >= 0
	}
	return c, c < 0x20 || c >= 0x7f
}

func digit(c byte) int { return strings.IndexByte("0123456789abcdef", c) }

// acts reports whether a character has an effect besides being shown.
func acts(r rune) bool {
	return unicode.IsControl(r) || r == '\u2028' || r == '\u2029' || unicode.Is(unicode.Bidi_Control, r)
}

// isPlain reports whether a name obviously needs no escapes.
func isPlain(name string) bool {
	for i := range len(name) {
		if c := name[i]; c < 0x20 || c >= 0x7f || c == '\\' {
			return false
		}
	}
	return true
}
