package agent

import (
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Inert makes bytes of a guest safe and readable: valid UTF-8, no terminal escapes. Bytes that are not text, and control characters, are
// shown as \xNN; \n, \t and a line's \r\n stay.
func Inert(p []byte) string {
	var b strings.Builder
	for used := 0; used < len(p); {
		piece, n := InertRune(p[used:])
		b.WriteString(piece)
		used += n
	}
	return b.String()
}

// InertRune makes the first character of p inert, or byte where there is none.
func InertRune(p []byte) (text string, n int) {
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

// Whole is p without a character that its end cuts in two: who reads on gets it whole with the next piece.
func Whole(p []byte) []byte {
	for i := 1; i < utf8.UTFMax && i <= len(p); i++ {
		if tail := p[len(p)-i:]; utf8.RuneStart(tail[0]) {
			if !utf8.FullRune(tail) {
				return p[:len(p)-i]
			}
			break
		}
	}
	return p
}

// AfterCut is p without the rest of a character that was cut off before it.
func AfterCut(p []byte) []byte {
	n := 0
	for n < min(len(p), utf8.UTFMax-1) && !utf8.RuneStart(p[n]) {
		n++
	}
	return p[n:]
}

// InertEnds makes the beginning and the end of a text inert, between which something may be left out. A character that this cuts is left
// out, too.
func InertEnds(o Output) string {
	if o.TailStart <= o.HeadEnd { // nothing is
		return Inert(append(o.Head[:len(o.Head):len(o.Head)], o.Tail...))
	}
	return Inert(Whole(o.Head)) + Inert(AfterCut(o.Tail))
}
