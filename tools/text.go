package tools

import (
	"encoding/json"
	"fmt"
	"strings"
	"unicode/utf8"

	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/internal/names"
)

// render makes bytes of a guest safe and readable.
func render(p []byte) string { return agent.Inert(p) }

// renderHead renders as much from the start of p as fits into room characters, and tells how many bytes that is. Unless p is whole, a
// character that p cuts off at its end is left for later.
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

// renderTail renders as much of the end of p as fits into room characters, and tells how many bytes before that it skipped, and how many
// behind that it left for later: unless p is whole, a character that p cuts off at its end. One that was cut before p is skipped.
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

// byteRune+0x80 to byteRune+0xff are characters that stand for bytes that are not text, where only characters can be worked with. They are
// of the private use area of plane 16; who uses them for something else finds the bytes of them.
const byteRune = 0x10ff00

// appendBytes adds characters that stand for bytes.
func appendBytes(out, p []byte) []byte {
	for _, b := range p {
		out = utf8.AppendRune(out, byteRune+rune(b))
	}
	return out
}

// renderRunes renders a text in which such characters are.
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

// renderLine renders a text of the guest's for a line of its own.
func renderLine(text string) string {
	return strings.ReplaceAll(render([]byte(text)), "\n", `\x0a`)
}

// filename is a name of a file: the bytes that it is. Models give it, and are given it, in the notation of package names.
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

// are is a number of things and the verb that goes with it.
func are(n int, noun string) string {
	if n == 1 {
		return plural(1, noun) + " is"
	}
	return plural(int64(n), noun) + " are"
}
