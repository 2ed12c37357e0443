package tools

import (
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

// render makes bytes of a guest safe and readable: valid UTF-8, no terminal escapes. Bytes that are not text, and control
// characters, are shown as \xNN; a line's \r\n becomes \n.
func render(p []byte) string {
	clean := true
	for _, r := range string(p) {
		if r == utf8.RuneError || unicode.IsControl(r) && r != '\n' && r != '\t' {
			clean = false
			break
		}
	}
	if clean {
		return string(p)
	}
	var b strings.Builder
	for i := 0; i < len(p); {
		r, n := utf8.DecodeRune(p[i:])
		switch {
		case r == utf8.RuneError && n <= 1:
			fmt.Fprintf(&b, `\x%02x`, p[i])
		case r == '\r' && i+1 < len(p) && p[i+1] == '\n':
		case unicode.IsControl(r) && r != '\n' && r != '\t':
			if r < 0x80 {
				fmt.Fprintf(&b, `\x%02x`, r)
			} else {
				fmt.Fprintf(&b, `\u%04x`, r)
			}
		default:
			b.Write(p[i : i+n])
		}
		i += n
	}
	return b.String()
}

// wholeRunes cuts the part of a character off the end of a head, where the rest of it was not read.
func wholeRunes(head []byte) []byte {
	for i := 1; i <= utf8.UTFMax && i <= len(head); i++ {
		if c := head[len(head)-i]; utf8.RuneStart(c) {
			if !utf8.FullRune(head[len(head)-i:]) {
				return head[:len(head)-i]
			}
			return head
		}
	}
	return head
}

// fromRune cuts the rest of a character off the start of a tail.
func fromRune(tail []byte) []byte {
	for i := 0; i < utf8.UTFMax && i < len(tail); i++ {
		if utf8.RuneStart(tail[i]) {
			return tail[i:]
		}
	}
	return tail
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
