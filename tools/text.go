package tools

import (
	"encoding/json"
	"fmt"
	"strings"
	"unicode/utf8"

	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/internal/names"
)

// render makes bytes from a guest safe and readable.
func render(p []byte) string { return agent.Inert(p) }

// renderHead renders as much from the start of p as fits into room characters, and returns as used how many bytes that is. Unless p is
// whole, a character that is cut off at the end of p is left for later.
func renderHead(p []byte, room int, whole bool) (text string, used int) {
	var b strings.Builder
	for used < len(p) {
		piece, n := agent.InertRune(p[used:])
		if !whole && !utf8.FullRune(p[used:]) || room < utf8.RuneCountInString(piece) {
			break
		}
		room -= utf8.RuneCountInString(piece)
		b.WriteString(piece)
		used += n
	}
	return b.String(), used
}

// renderTail renders as much from the end of p as fits into room characters. skipped is how many bytes before that it left out, and later
// how many behind it: unless p is whole, a character that is cut off at the end of p is left for later. If cut, p may begin within a
// character, and the rest of that character is skipped.
func renderTail(p []byte, room int, cut, whole bool) (text string, skipped, later int) {
	if all := len(p); !whole {
		p = agent.Whole(p)
		later = all - len(p)
	}
	if cut {
		skipped = len(p) - len(agent.AfterCut(p))
	}
	over := utf8.RuneCountInString(render(p[skipped:])) - room
	for over > 0 {
		piece, n := agent.InertRune(p[skipped:])
		over -= utf8.RuneCountInString(piece)
		skipped += n
	}
	return render(p[skipped:]), skipped, later
}

// byteRune+0x80 to byteRune+0xff are characters that stand for bytes that are not text, for code that works on characters only. They are in
// the private use area of plane 16; a program that uses these characters for something else sees the bytes of them.
const byteRune = 0x10ff00

// appendBytes appends the characters that stand for bytes.
func appendBytes(out, p []byte) []byte {
	for _, b := range p {
		out = utf8.AppendRune(out, byteRune+rune(b))
	}
	return out
}

// renderRunes renders a text that contains such characters.
func renderRunes(text string) string {
	var b strings.Builder
	for _, r := range text {
		if r >= byteRune+0x80 {
			fmt.Fprintf(&b, `\x%02x`, r-byteRune)
		} else {
			b.WriteString(render(utf8.AppendRune(nil, r)))
		}
	}
	return b.String()
}

// renderLine renders a text from the guest as a single line.
func renderLine(text string) string {
	return strings.ReplaceAll(render([]byte(text)), "\n", `\x0a`)
}

// filename is the name of a file as bytes. Models read and write it in the notation of package names.
type filename string

// UnmarshalJSON implements json.Unmarshaler.
func (f *filename) UnmarshalJSON(body []byte) error {
	var shown string
	err := json.Unmarshal(body, &shown)
	*f = filename(names.Parse(shown))
	return err
}

// String implements fmt.Stringer.
func (f filename) String() string { return names.Show(string(f)) }

// lastLine is the last line that is not blank, for progress notifications.
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

// pluralAre is a number of things and the matching verb.
func pluralAre(n int, noun string) string {
	if n == 1 {
		return plural(1, noun) + " is"
	}
	return plural(int64(n), noun) + " are"
}
