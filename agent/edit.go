package agent

import (
	"bytes"
	"fmt"
	"io"
	"strings"
	"unicode/utf8"
)

const (
	maxEdit      = 16 << 20 // bytes of a file that can be edited
	snippetLines = 4        // around the first change
)

// edit replaces or inserts text in a file.
func (s *Server) edit(r EditRequest) (EditResult, error) {
	if err := checkPath("edit", r.Path); err != nil {
		return EditResult{}, err
	}
	if r.InsertLine == nil && r.Old == "" {
		return EditResult{}, invalid("edit: the text to replace is empty")
	}
	if r.InsertLine != nil && r.Old != "" {
		return EditResult{}, invalid("edit: give either a text to replace or a line to insert at")
	}
	old, err := readText(r.Path)
	if err != nil {
		return EditResult{}, err
	}
	var text string
	result := EditResult{Replaced: 1}
	at := 0
	if r.InsertLine != nil {
		if text, at, err = insertAt(old, *r.InsertLine, r.New); err != nil {
			return EditResult{}, fmt.Errorf("edit %q: %w", r.Path, err)
		}
	} else {
		n := strings.Count(old, r.Old)
		switch {
		case n == 0:
			return EditResult{}, fmt.Errorf("edit %q: %w", r.Path, ErrNoMatch)
		case n > 1 && !r.All:
			return EditResult{}, fmt.Errorf("edit %q: %d times: %w", r.Path, n, ErrAmbiguous)
		}
		if size := len(old) + n*(len(r.New)-len(r.Old)); size > maxEdit {
			return EditResult{}, fmt.Errorf("edit %q: it would have %d bytes, more than %d: %w", r.Path, size, maxEdit, ErrTooLarge)
		}
		result.Replaced = n
		at = strings.Index(old, r.Old)
		text = strings.ReplaceAll(old, r.Old, r.New)
	}
	w, err := s.openWrite(header{Path: r.Path})
	if err != nil {
		return EditResult{}, err
	}
	defer w.abort()
	if _, err := io.WriteString(w.file, text); err != nil {
		return EditResult{}, err
	}
	if err := w.commit(); err != nil {
		return EditResult{}, err
	}
	result.Line = 1 + strings.Count(text[:at], "\n")
	result.Snippet = snippet(text, result.Line, strings.Count(r.New, "\n"))
	result.Info, err = s.stat(PathRequest{Path: r.Path})
	return result, err
}

// insertAt inserts text behind a line, and completes its last line.
func insertAt(old string, line int, add string) (text string, at int, err error) {
	lines := strings.SplitAfter(old, "\n")
	if lines[len(lines)-1] == "" {
		lines = lines[:len(lines)-1]
	}
	if line < 0 || line > len(lines) {
		return "", 0, invalid("line %d is outside the file, which has %d lines", line, len(lines))
	}
	end := "\n"
	if len(lines) > 0 && strings.HasSuffix(lines[0], "\r\n") {
		end = "\r\n" // as the file has it
		add = strings.ReplaceAll(strings.ReplaceAll(add, "\r\n", "\n"), "\n", end)
	}
	before := strings.Join(lines[:line], "")
	if before != "" && !strings.HasSuffix(before, "\n") {
		before += end
	}
	if !strings.HasSuffix(add, "\n") {
		add += end
	}
	return before + add + strings.Join(lines[line:], ""), len(before), nil
}

// snippet shows the lines around a change with their numbers.
func snippet(text string, line, extra int) string {
	lines := strings.Split(strings.TrimSuffix(text, "\n"), "\n")
	from, to := max(line-1-snippetLines, 0), min(line+min(extra, 40)+snippetLines, len(lines))
	var b strings.Builder
	for i := from; i < to; i++ {
		fmt.Fprintf(&b, "%6d\t%s\n", i+1, clip(lines[i], 500))
	}
	return b.String()
}

// readText reads a whole text file.
func readText(name string) (string, error) {
	f, err := openRegular(name)
	if err != nil {
		return "", err
	}
	defer f.Close()
	body, err := io.ReadAll(io.LimitReader(f, maxEdit+1))
	if err != nil {
		return "", err
	}
	if len(body) > maxEdit {
		return "", fmt.Errorf("edit %q: it has more than %d bytes: %w", name, maxEdit, ErrTooLarge)
	}
	if bytes.IndexByte(body, 0) >= 0 || !utf8.Valid(body) {
		return "", fmt.Errorf("edit %q: %w", name, ErrNotText)
	}
	return string(body), nil
}
