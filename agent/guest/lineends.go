package guest

import (
	"fmt"
	"strings"

	"soulbox.dev/soulbox/agent"
)

const (
	crlf    = "\r\n"
	byteBOM = "\ufeff" // may begin a file; it stays there
	endsIn  = 64 << 10 // bytes of a line in which its end is looked for
)

// replaceIn replaces what an edit asks for. A text whose lines end otherwise than the file's matches as well, and what is put there has the
// file's own ends: models and people write \n. It gives the first place that has changed, and whether ends were made CRLF.
func replaceIn(old string, r agent.EditRequest) (text string, at int, toCRLF bool, n int, err error) {
	m := matcher{text: old, find: r.Old}
	n = strings.Count(old, r.Old)
	exact := n == 1 && !r.All && !strings.HasPrefix(r.Old, "\n") // which may begin within an end
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

// matcher finds a text in another, which may have lost the \r of its CRLF.
type matcher struct {
	text, find string
	removed    []int32 // where in text a \r was before the \n, ascending
}

// flattened is a matcher to which all ends of lines are \n.
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
		m.removed = append(m.removed, int32(b.Len())) // below maxEdit
		b.WriteByte('\n')
		text = after
	}
}

// each gives the places of what is found, as they are in the text that nothing was removed from.
func (m matcher) each(yield func(start, end int) bool) {
	before := 0 // of m.removed
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

// endAt tells how the line at a place of a text ends, or, if it is the last one without an end, the line before it.
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

// withEnds gives the lines of a text a file's ends. A text that has CRLF on purpose keeps it.
func withEnds(text, end string) (_ string, changed bool) {
	if end != crlf || !strings.Contains(text, "\n") {
		return text, false
	}
	whole := strings.ReplaceAll(strings.ReplaceAll(text, crlf, "\n"), "\n", crlf)
	return whole, whole != text
}

// insertAt inserts text behind a line, with that line's end, and completes its last line.
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
