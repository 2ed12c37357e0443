package tools

import (
	"io"

	"github.com/charmbracelet/x/ansi"
)

// The emulator joins characters that come in one write, gives a flag and emoji with joiners two columns, forgets what is combined when it
// comes alone, and loses a wide character at the margin (docs/upstream/x-vt.md). Programs count as wcwidth does, and xterm with them: each
// character by itself. So characters that are not ASCII are placed here, one by one.

// nextLine goes to the begin of the next line, as a character does that has no room in its own.
const nextLine = "\r\x1bD"

// placeholder is a character of one column, in whose place another is put.
const placeholder = "x"

// char renders a character that is not ASCII. atMargin says that the one before it was wide and ends at the margin, and margin that this
// one is such.
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
	if !(before == last && at.X == last) { // where it stays, it is behind what was written
		at.X--
	}
	if cell := e.CellAt(at.X, at.Y); cell != nil {
		with := *cell
		with.Content = string(c)
		e.SetCell(at.X, at.Y, &with)
	}
	return false, nil
}

// combine adds a character without a width of its own to the one before it.
func (sc *screen) combine(c rune, atMargin bool) {
	e := sc.shown()
	at, last := e.CursorPosition(), sc.size.Cols-1
	cell := e.CellAt(at.X, at.Y)
	switch {
	case atMargin:
		at.X = last - 1
	case at.X == last && cell != nil && cell.Content != "" && cell.Content != " ": // written, and the cursor stays on it
	default:
		at.X--
	}
	if cell = e.CellAt(at.X, at.Y); cell != nil && cell.Width == 0 { // the second half of a wide one
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

// charWidth is how many columns a character has by itself, as wcwidth and xterm have it.
func charWidth(c rune) int {
	switch {
	case isRegional(c):
		return 1
	case c >= 0x1160 && c < 0x1200: // vowels and ends of Korean syllables, which are combined
		return 0
	}
	_, width := ansi.FirstGraphemeCluster(string(c), ansi.GraphemeWidth)
	return min(max(width, 0), 2)
}
