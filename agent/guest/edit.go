package guest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"unicode/utf8"

	"soulbox.dev/soulbox/agent"
)

const (
	maxEdit      = 16 << 20 // bytes of a file that can be edited
	snippetLines = 4        // around the first change
)

// editTries is how often an edit is tried again when others have changed the file meanwhile.
const editTries = 5

// edit replaces or inserts text in a file, while no other call changes the file.
func (s *Server) edit(r agent.EditRequest) (agent.EditResult, error) {
	if err := checkPath("edit", r.Path); err != nil {
		return agent.EditResult{}, err
	}
	if r.InsertLine == nil && r.Old == "" {
		return agent.EditResult{}, agent.Invalid("edit: the text to replace is empty")
	}
	if r.InsertLine != nil && r.Old != "" {
		return agent.EditResult{}, agent.Invalid("edit: give either a text to replace or a line to insert at")
	}
	done := s.turns.take(fileOf(r.Path))
	defer done()
	for range editTries {
		result, err := s.editOnce(r)
		if !errors.Is(err, agent.ErrChanging) {
			return result, err
		}
	}
	return agent.EditResult{}, fmt.Errorf("edit %s: %w", quoted(r.Path), agent.ErrChanging)
}

// editOnce edits the current content of a file. The caller has the turn of the file.
func (s *Server) editOnce(r agent.EditRequest) (agent.EditResult, error) {
	old, was, err := readText(r.Path)
	if err != nil {
		return agent.EditResult{}, err
	}
	var text string
	var at int
	result := agent.EditResult{Replaced: 1}
	if r.InsertLine != nil {
		text, at, result.CRLF, err = insertAt(old, *r.InsertLine, r.New)
	} else {
		text, at, result.CRLF, result.Replaced, err = replaceIn(old, r)
	}
	if err != nil {
		return agent.EditResult{}, fmt.Errorf("edit %s: %w", quoted(r.Path), err)
	}
	w, err := s.openWrite(agent.Header{Path: r.Path})
	if err != nil {
		return agent.EditResult{}, err
	}
	defer w.abort()
	if _, err := io.WriteString(w, text); err != nil {
		return agent.EditResult{}, err
	}
	if is, err := os.Stat(r.Path); err != nil || !os.SameFile(is, was) || is.Size() != was.Size() || !is.ModTime().Equal(was.ModTime()) {
		return agent.EditResult{}, errors.Join(agent.ErrChanging, err)
	}
	if err := w.commitNow(); err != nil {
		return agent.EditResult{}, err
	}
	result.Line = 1 + strings.Count(text[:at], "\n")
	result.Snippet = snippet(text, result.Line, strings.Count(r.New, "\n"))
	result.Info, err = s.stat(agent.PathRequest{Path: r.Path})
	return result, err
}

// snippet returns the lines around a change with their numbers.
func snippet(text string, line, extra int) string {
	lines := strings.Split(strings.TrimSuffix(text, "\n"), "\n")
	from, to := max(line-1-snippetLines, 0), min(line+min(extra, 40)+snippetLines, len(lines))
	var b strings.Builder
	for i := from; i < to; i++ {
		fmt.Fprintf(&b, "%6d\t%s\n", i+1, agent.Clip(strings.TrimSuffix(lines[i], "\r"), 500))
	}
	return b.String()
}

// readText reads a whole text file, and returns its FileInfo from before reading.
func readText(name string) (string, os.FileInfo, error) {
	f, err := openRegular(name)
	if err != nil {
		return "", nil, err
	}
	defer f.Close()
	was, err := f.Stat()
	if err != nil {
		return "", nil, err
	}
	body, err := io.ReadAll(io.LimitReader(f, maxEdit+1))
	if err != nil {
		return "", nil, err
	}
	if len(body) > maxEdit {
		return "", nil, fmt.Errorf("edit %s: it has more than %d bytes: %w", quoted(name), maxEdit, agent.ErrTooLarge)
	}
	if bytes.IndexByte(body, 0) >= 0 || !utf8.Valid(body) {
		return "", nil, fmt.Errorf("edit %s: %w", quoted(name), agent.ErrNotText)
	}
	return string(body), was, nil
}
