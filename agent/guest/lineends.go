package guest

import (
	"fmt"
	"strings"

	"soulbox.dev/soulbox/agent"
)

const (
	crlf    = "\r\n"
	byteBOM = "\ufeff" // may begin a file, and stays there
	endsIn  = 64 << 10 // bytes of a line that are searched for its end
)

// replaceIn does the replacement of an edit. A text matches even if its line ends differ from the file's, and the new text gets the file's
// line ends: models and people write \n. It returns the offset of the first change, and whether line ends were made CRLF.
func replaceIn(old string, r agent.EditRequest) (text string, at int, toCRLF bool, n int, err error) {
	m := matcher{text: old, find: r.Old}
	n = strings.Count(old, r.Old)
	exact := n == 1 && !r.All && !strings.HasPrefix(r.Old, "\n") // a \n at its start may be a part of a CRLF
	if !exact && strings.Contains(r.Old, "\n") && (strings.Contains(old, crlf) || strings.Contains(r.Old, crlf)) {
		m = flattened(old, r.Old)
		n = strings.Count(m.text, m.find)
	}
	switch {
	case n == 0:
		return "", 0, false, 0, agent.ErrNoMatch
	case n > 1 && !r.All:
		return "", 0, false, 0, fmt.Errorf("%d times: %w", n, agent.ErrAmbiguous)
	}
	if size := len(old) + n*(len(r.New)+strings.Count(r.New, "\n")-len(m.find)); size > maxEdit {
		return "", 0, false, 0, fmt.Errorf("it would have %d bytes, more than %d: %w", size, maxEdit, agent.ErrTooLarge)
	}
	var b strings.Builder
	from, at := 0, -1
	for start, end := range m.each {
		if at < 0 {
			at = start
		}
		add, changed := withEnds(r.New, endAt(old, start))
		toCRLF = toCRLF || changed
		b.WriteString(old[from:start])
		b.WriteString(add)
		from = end
	}
	b.WriteString(old[from:])
	return b.String(), at, toCRLF || len(m.removed) > 0 && strings.Contains(m.find, "\n"), n, nil
}

// matcher finds a text in another one, whose CRLF may have lost their \r.
type matcher struct {
	text, find string
	removed    []int32 // offsets in text of each \n that had a \r before it, ascending
}

// flattened returns a matcher to which all line ends are \n.
func flattened(text, find string) matcher {
	m := matcher{find: strings.ReplaceAll(find, crlf, "\n")}
	var b strings.Builder
	for {
		before, after, found := strings.Cut(text, crlf)
		b.WriteString(before)
		if !found {
			m.text = b.String()
			return m
		}
		m.removed = append(m.removed, int32(b.Len())) // fits: text is at most maxEdit bytes
		b.WriteByte('\n')
		text = after
	}
}

// each yields the matches, with their offsets in the original text.
func (m matcher) each(yield func(start, end int) bool) {
	before := 0 // number of removed \r before the offset
	whole := func(at int) int {
		for before < len(m.removed) && int(m.removed[before]) < at {
			before++
		}
		return at + before
	}
	for from := 0; ; {
		i := strings.Index(m.text[from:], m.find)
		if i < 0 {
			return
		}
		start := whole(from + i)
		from += i + len(m.find)
		if !yield(start, whole(from)) {
			return
		}
	}
}

// endAt returns how the line at an offset of a text ends; for a last line without an end, it looks at the line before.
func endAt(text string, at int) string {
	i := strings.IndexByte(text[at:min(len(text), at+endsIn)], '\n')
	if i < 0 {
		i = strings.LastIndexByte(text[max(0, at-endsIn):at], '\n') - min(at, endsIn)
	}
	if at += i; at > 0 && at < len(text) && text[at] == '\n' && text[at-1] == '\r' {
		return crlf
	}
	return "\n"
}

// withEnds gives the lines of a text the line ends of the file. A text with CRLF keeps it in a file with \n.
func withEnds(text, end string) (_ string, changed bool) {
	if end != crlf || !strings.Contains(text, "\n") {
		return text, false
	}
	whole := strings.ReplaceAll(strings.ReplaceAll(text, crlf, "\n"), "\n", crlf)
	return whole, whole != text
}

// insertAt inserts text after a line, with that line's end, and ends the last line of the text.
func insertAt(old string, line int, add string) (text string, at int, toCRLF bool, err error) {
	mark := ""
	if strings.HasPrefix(old, byteBOM) {
		mark, old = byteBOM, old[len(byteBOM):]
	}
	lines := strings.SplitAfter(old, "\n")
	if lines[len(lines)-1] == "" {
		lines = lines[:len(lines)-1]
	}
	if line < 0 || line > len(lines) {
		return "", 0, false, agent.Invalid("line %d is outside the file, which has %d lines", line, len(lines))
	}
	before := strings.Join(lines[:line], "")
	end := endAt(old, max(len(before)-1, 0))
	if before != "" && !strings.HasSuffix(before, "\n") {
		before += end
	}
	if !strings.HasSuffix(add, "\n") {
		add += end
	}
	add, toCRLF = withEnds(add, end)
	before = mark + before
	return before + add + strings.Join(lines[line:], ""), len(before), toCRLF || end == crlf, nil
}
