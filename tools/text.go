package tools

import (
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

// render makes bytes of a guest safe and readable: valid UTF-8, no terminal escapes. Bytes that are not text, and control
// characters, are shown as \xNN; \n, \t and a line's \r\n stay.
func render(p []byte) string {
	text, _ := renderHead(p, len(p)*6, true)
	return text
}

// renderHead renders as much from the start of p as fits into room characters, and tells how many bytes that is. Unless p is whole, a
// character that p cuts off at its end is left for later.
func renderHead(p []byte, room int, whole bool) (text string, used int) {
	var b strings.Builder
	for used < len(p) {
		piece, n := renderOne(p[used:])
		if !whole && !utf8.FullRune(p[used:]) || room < utf8.RuneCountInString(piece) {
			break
		}
		room -= utf8.RuneCountInString(piece)
		b.WriteString(piece)
		used += n
	}
	return b.String(), used
}

// renderTail renders as much of the end of p as fits into room characters, and tells how many bytes before that it skipped. A character
// that p begins within is skipped.
func renderTail(p []byte, room int) (text string, skipped int) {
	for skipped < min(len(p), utf8.UTFMax-1) && !utf8.RuneStart(p[skipped]) {
		skipped++
	}
	over := utf8.RuneCountInString(render(p[skipped:])) - room
	for over > 0 {
		piece, n := renderOne(p[skipped:])
		over -= utf8.RuneCountInString(piece)
		skipped += n
	}
	return render(p[skipped:]), skipped
}

// renderOne renders the first character of p, or byte where there is none.
func renderOne(p []byte) (text string, n int) {
	r, n := utf8.DecodeRune(p)
	switch {
	case r == utf8.RuneError && n <= 1:
		return fmt.Sprintf(`\x%02x`, p[0]), 1
	case r == '\r' && len(p) > 1 && p[1] == '\n':
		return "\r", 1
	case unicode.IsControl(r) && r != '\n' && r != '\t':
		if r < 0x80 {
			return fmt.Sprintf(`\x%02x`, r), 1
		}
		return fmt.Sprintf(`\u%04x`, r), n
	}
	return string(p[:n]), n
}

// renderName renders the name of a file for a line of its own.
func renderName(name string) string {
	return strings.ReplaceAll(render([]byte(name)), "\n", `\x0a`)
}

// lastLine is the last line that says something, for progress notes.
func lastLine(text string) string {
	text = strings.TrimRight(text, "\n\t ")
	if i := strings.LastIndexByte(text, '\n'); i >= 0 {
		text = text[i+1:]
	}
	return shorten(text, 200)
}

func plural(n int64, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	if strings.HasSuffix(noun, "s") {
		noun += "e"
	}
	return fmt.Sprintf("%d %ss", n, noun)
}
