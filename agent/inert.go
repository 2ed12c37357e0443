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
