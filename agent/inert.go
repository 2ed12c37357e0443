package agent

import (
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Inert makes bytes of a guest safe and readable: valid UTF-8 without terminal escapes. Bytes that are not text, and control characters,
// become \xNN (\uNNNN above 0x7f); \n, \t and the \r of \r\n stay.
func Inert(p []byte) string {
	var b strings.Builder
	for used := 0; used < len(p); {
		piece, n := InertRune(p[used:])
		b.WriteString(piece)
		used += n
	}
	return b.String()
}

// InertRune makes the first character of p inert, or its first byte if that begins no character.
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

// Whole returns p without an incomplete character at its end: a caller that reads on gets that character whole with the next piece.
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

// AfterCut returns p without the rest of a character that was cut off before it.
func AfterCut(p []byte) []byte {
	n := 0
	for n < min(len(p), utf8.UTFMax-1) && !utf8.RuneStart(p[n]) {
		n++
	}
	return p[n:]
}

// InertEnds makes the head and the tail of an output inert. If output between them is left out, so is a character that the cut splits.
func InertEnds(o Output) string {
	if o.TailStart <= o.HeadEnd { // nothing is left out
		return Inert(append(o.Head[:len(o.Head):len(o.Head)], o.Tail...))
	}
	return Inert(Whole(o.Head)) + Inert(AfterCut(o.Tail))
}
