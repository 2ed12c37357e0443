package tools

import (
	"io"

	"github.com/charmbracelet/x/ansi"
)

// Characters that are not ASCII are placed here, one by one, because the emulator differs from what programs expect. Programs count columns
// as wcwidth does, and so does xterm: each character by itself. The emulator joins characters that come in one write, gives a flag or an
// emoji with joiners two columns, drops a combining character that comes alone, and loses a wide character at the margin
// (docs/upstream/x-vt.md).

// nextLine moves to the start of the next line, as a character does that has no room left in its own.
const nextLine = "\r\x1bD"

// placeholder is a character of one column. It is written first, and the real character then replaces it in its cell.
const placeholder = "x"

// char renders a character that is not ASCII. atMargin says that the character before it is wide and ends at the margin; margin says the
// same of this one.
func (sc *screen) char(c rune, atMargin bool) (margin bool, err error) {
	e, width := sc.shown(), charWidth(c)
	if width == 0 {
		sc.combine(c, atMargin)
		return atMargin, nil
	}
	last := sc.size.Cols - 1
	if !sc.noWrap && last > 0 && (atMargin || width == 2 && e.CursorPosition().X == last) {
		if _, err := io.WriteString(e, nextLine); err != nil {
			return false, err
		}
	}
	before := e.CursorPosition().X
	if !isRegional(c) {
		_, err := io.WriteString(e, string(c))
		return !sc.noWrap && width == 2 && before == last-1, err
	}
	if _, err := io.WriteString(e, placeholder); err != nil {
		return false, err
	}
	at := e.CursorPosition()
	if !(before == last && at.X == last) { // if the cursor stays, it is behind what was written
		at.X--
	}
	if cell := e.CellAt(at.X, at.Y); cell != nil {
		with := *cell
		with.Content = string(c)
		e.SetCell(at.X, at.Y, &with)
	}
	return false, nil
}

// combine adds a character that has no width of its own to the one before it.
func (sc *screen) combine(c rune, atMargin bool) {
	e := sc.shown()
	at, last := e.CursorPosition(), sc.size.Cols-1
	cell := e.CellAt(at.X, at.Y)
	switch {
	case atMargin:
		at.X = last - 1
	case at.X == last && cell != nil && cell.Content != "" && cell.Content != " ": // the last column is written, and the cursor stays on it
	default:
		at.X--
	}
	if cell = e.CellAt(at.X, at.Y); cell != nil && cell.Width == 0 { // the second half of a wide character
		at.X--
		cell = e.CellAt(at.X, at.Y)
	}
	if cell == nil || cell.Width == 0 || len(cell.Content)+len(string(c)) > maxCell {
		return
	}
	with := *cell
	with.Content += string(c)
	e.SetCell(at.X, at.Y, &with)
}

// isRegional reports whether a character is half of a flag.
func isRegional(c rune) bool { return c >= 0x1f1e6 && c <= 0x1f1ff }

// charWidth is how many columns a character takes by itself, as in wcwidth and xterm.
func charWidth(c rune) int {
	switch {
	case isRegional(c):
		return 1
	case c >= 0x1160 && c < 0x1200: // vowels and final consonants of Korean syllables, which combine
		return 0
	}
	_, width := ansi.FirstGraphemeCluster(string(c), ansi.GraphemeWidth)
	return min(max(width, 0), 2)
}
