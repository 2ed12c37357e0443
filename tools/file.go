package tools

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/mark3labs/mcp-go/mcp"

	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/internal/names"
)

const (
	maxFile     = 1 << 20  // bytes of a file in one call
	maxSkip     = 64 << 20 // bytes that are read to find a line
	defaultTree = 500      // entries in a listing
)

func (s *Toolbox) fileTools() []tool {
	return []tool{
		define(s, "file_read", "Read a text file by lines, an image as an image, or any file as base64. Directories: file_list.",
			hints{title: "Read a file", readOnly: true, idempotent: true, longResult: true}, s.fileRead),
		define(s, "file_write",
			"As root, create, replace (atomically) or append to files. New ones belong to user. Missing directories are made.",
			hints{title: "Write a file", destructive: true, idempotent: true}, s.fileWrite),
		define(s, "file_edit",
			"Change a text file: replace old_str, which must occur once, by new_str; or insert new_str behind insert_line.",
			hints{title: "Edit a file", destructive: true}, s.fileEdit),
		define(s, "file_list", "List a directory as a tree, or describe a file.",
			hints{title: "List files", readOnly: true, idempotent: true}, s.fileList),
		define(s, "file_search", "Find files by name (glob, ** spans directories) and, with pattern, the lines in them that match.",
			hints{title: "Search files", readOnly: true, idempotent: true}, s.fileSearch),
		define(s, "file_move", "Move or rename a file or directory; an existing file at the target is replaced.",
			hints{title: "Move a file", destructive: true}, s.fileMove),
		define(s, "file_remove", "Remove a file, or with recursive a directory and all in it.",
			hints{title: "Remove a file", destructive: true}, s.fileRemove),
	}
}

type fileReadInput struct {
	Path     filename `json:"path" jsonschema:"absolute path"`
	Offset   int64    `json:"offset,omitempty" jsonschema:"first line, from 1; with base64 the first byte, from 0"`
	Limit    int64    `json:"limit,omitempty" jsonschema:"lines, or bytes with base64; default what fits 30000 characters"`
	Encoding string   `json:"encoding,omitempty" enum:"text,base64" jsonschema:"default text"`
	target
}

type fileReadOutput struct {
	Path       string `json:"path"`
	Content    string `json:"content"`
	Encoding   string `json:"encoding" enum:"text,base64,image"`
	Size       int64  `json:"size" jsonschema:"bytes of the whole file"`
	FirstLine  int64  `json:"first_line,omitempty"`
	LastLine   int64  `json:"last_line,omitempty"`
	NextOffset int64  `json:"next_offset,omitempty" jsonschema:"where to go on; absent at the end"`
	CRLF       bool   `json:"crlf,omitempty" jsonschema:"lines end in CRLF"`

	image *mcp.ImageContent
}

func (o fileReadOutput) text() string {
	status := fmt.Sprintf("%s, %d bytes", o.Path, o.Size)
	switch {
	case o.Encoding == "image":
		return "[" + status + ", shown as an image]"
	case o.LastLine > 0:
		status += fmt.Sprintf(", lines %d to %d", o.FirstLine, o.LastLine)
	}
	if o.CRLF {
		status += ", CRLF line ends"
	}
	if o.NextOffset > 0 {
		status += fmt.Sprintf("; more: call file_read with offset %d", o.NextOffset)
	} else {
		status += ", to the end"
	}
	newline := "\n"
	if o.Content == "" || strings.HasSuffix(o.Content, "\n") {
		newline = ""
	}
	return o.Content + newline + "[" + status + "]"
}

func (o fileReadOutput) content() []mcp.Content {
	if o.image == nil {
		return nil
	}
	return []mcp.Content{*o.image}
}

func (s *Toolbox) fileRead(ctx context.Context, in fileReadInput) (fileReadOutput, error) {
	if in.Offset < 0 || in.Limit < 0 {
		return fileReadOutput{}, badArgument("The arguments \"offset\" and \"limit\" cannot be negative.")
	}
	_, client, err := s.agent(ctx, in.target, "read a file in")
	if err != nil {
		return fileReadOutput{}, err
	}
	if in.Encoding == "base64" {
		return readBytes(ctx, client, in)
	}
	r, info, err := client.ReadFile(ctx, string(in.Path), 0, maxSkip+1)
	if err != nil {
		return fileReadOutput{}, err
	}
	defer r.Close()
	br := bufio.NewReaderSize(r, 64<<10)
	start, err := br.Peek(8 << 10)
	if err != nil && !errors.Is(err, io.EOF) {
		return fileReadOutput{}, err
	}
	kind := http.DetectContentType(start)
	if slices.Contains([]string{"image/png", "image/jpeg", "image/gif", "image/webp"}, kind) {
		return readImage(br, info, kind)
	}
	if bytes.IndexByte(start, 0) >= 0 {
		return fileReadOutput{},
			badArgument("The file %s is not text (%s, %d bytes). Read it with encoding base64, or work with it by exec.", in.Path, kind,
				info.Size)
	}
	return readLines(br, info, in)
}

func readBytes(ctx context.Context, client *agent.Client, in fileReadInput) (fileReadOutput, error) {
	if in.Limit == 0 {
		in.Limit = defaultChars * 3 / 4
	}
	if in.Limit > maxFile {
		return fileReadOutput{}, badArgument("The argument \"limit\" can be at most %d bytes; read the file in parts.", maxFile)
	}
	r, info, err := client.ReadFile(ctx, string(in.Path), in.Offset, in.Limit)
	if err != nil {
		return fileReadOutput{}, err
	}
	defer r.Close()
	body, err := io.ReadAll(r)
	if err != nil {
		return fileReadOutput{}, err
	}
	out := fileReadOutput{Path: in.Path.String(), Content: base64.StdEncoding.EncodeToString(body), Encoding: "base64", Size: info.Size}
	if next := in.Offset + int64(len(body)); next < info.Size && len(body) > 0 {
		out.NextOffset = next
	}
	return out, nil
}

func readImage(r io.Reader, info agent.FileInfo, kind string) (fileReadOutput, error) {
	body, err := io.ReadAll(io.LimitReader(r, maxFile+1))
	if err != nil {
		return fileReadOutput{}, err
	}
	if len(body) > maxFile {
		return fileReadOutput{},
			badArgument("The image %s is larger than %d bytes. Make it smaller with exec, or read it in parts with encoding base64.",
				filename(info.Path), maxFile)
	}
	image := mcp.NewImageContent(base64.StdEncoding.EncodeToString(body), kind)
	return fileReadOutput{Path: names.Show(info.Path), Encoding: "image", Size: info.Size, image: &image}, nil
}

// readLines reads whole lines, beginning with line in.Offset. Only the first line shown is cut, if it alone is too long.
func readLines(r *bufio.Reader, info agent.FileInfo, in fileReadInput) (fileReadOutput, error) {
	first := max(in.Offset, 1)
	room, lines := defaultChars, in.Limit
	if in.Limit > 0 {
		room = maxFile
	} else {
		lines = 1 << 40
	}
	out := fileReadOutput{Path: in.Path.String(), Encoding: "text", Size: info.Size}
	var b strings.Builder
	var line, read int64
	for line = 1; ; line++ {
		part, n, err := readPart(r, room-b.Len())
		read += n
		if read > maxSkip {
			return out, badArgument("The lines lie beyond the first %d MB of the file, which has %d bytes. Use exec, such as: sed -n "+
				"'%d,%dp' FILE.", maxSkip>>20, info.Size, first, first+200)
		}
		if err != nil && !errors.Is(err, io.EOF) {
			return out, err
		}
		if n == 0 {
			break // the end of the file
		}
		if line < first {
			continue
		}
		if line >= first+lines || b.Len() > 0 && n > int64(room-b.Len()) {
			out.NextOffset = line
			break
		}
		text, used := renderHead(part, room-b.Len(), int64(len(part)) == n)
		b.WriteString(text)
		out.CRLF = out.CRLF || bytes.HasSuffix(part, []byte("\r\n"))
		out.FirstLine, out.LastLine = first, line
		if left := n - int64(used); left > 0 {
			fmt.Fprintf(&b, "[… %s of this line left out …]\n", plural(left, "byte"))
		}
	}
	if out.LastLine == 0 && first > 1 {
		return out, badArgument("The file has %d lines; offset %d is behind its end.", line-1, first)
	}
	out.Content = b.String()
	return out, nil
}

// readPart reads a line, keeps at most room bytes of it (at least 1), and returns its full length as n.
func readPart(r *bufio.Reader, room int) (part []byte, n int64, err error) {
	for {
		piece, err := r.ReadSlice('\n')
		n += int64(len(piece))
		part = append(part, piece[:max(0, min(len(piece), max(room, 1)-len(part)))]...)
		if !errors.Is(err, bufio.ErrBufferFull) {
			return part, n, err
		}
	}
}

type fileWriteInput struct {
	Path     filename    `json:"path,omitempty" jsonschema:"absolute path"`
	Content  *string     `json:"content,omitempty"`
	Encoding string      `json:"encoding,omitempty" enum:"text,base64" jsonschema:"default text"`
	Mode     string      `json:"mode,omitempty" enum:"replace,append,create" jsonschema:"default replace; create refuses an existing file"`
	Files    []fileToPut `json:"files,omitempty" jsonschema:"several files, instead of path and content"`
	target
}

type fileToPut struct {
	Path     filename `json:"path"`
	Content  string   `json:"content"`
	Encoding string   `json:"encoding,omitempty" enum:"text,base64"`
}

// fileInfo describes a file in results.
type fileInfo struct {
	Path     string `json:"path"`
	Type     string `json:"type"`
	Size     int64  `json:"size"`
	Mode     string `json:"mode"`
	Owner    string `json:"owner"`
	Modified string `json:"modified"`
	Target   string `json:"target,omitempty" jsonschema:"of a symlink"`
}

func describeFile(f agent.FileInfo) fileInfo {
	return fileInfo{
		Path: names.Show(f.Path), Type: f.Type, Size: f.Size, Mode: f.Mode, Owner: render([]byte(f.Owner)),
		Modified: f.MTime.UTC().Format(time.RFC3339),
		Target:   names.Show(f.Target),
	}
}

func (f fileInfo) text() string {
	name := f.Path
	switch f.Type {
	case agent.TypeDir:
		name = strings.TrimSuffix(name, "/") + "/"
	case agent.TypeSymlink:
		name += " -> " + f.Target
	}
	return fmt.Sprintf("%s %-8s %10d %s %s", f.Mode, f.Owner, f.Size, f.Modified, name)
}

type filesOutput struct {
	Files []fileInfo `json:"files"`
	More  bool       `json:"more,omitempty" jsonschema:"entries were left out"`
}

func (o filesOutput) text() string {
	lines := []string{}
	for _, f := range o.Files {
		lines = append(lines, f.text())
	}
	if o.More {
		lines = append(lines, "[more were left out: list a smaller directory, less depth, or raise limit]")
	}
	if len(lines) == 0 {
		return "The directory is empty."
	}
	return strings.Join(lines, "\n")
}

// written is a file that a tool has changed.
type written struct {
	Path string `json:"path"`
	Size int64  `json:"size"`
}

func (w written) text() string { return fmt.Sprintf("%s, now %d bytes", w.Path, w.Size) }

type fileWriteOutput struct {
	Files []written `json:"files"`
}

func (o fileWriteOutput) text() string {
	var lines []string
	for _, w := range o.Files {
		lines = append(lines, "Wrote "+w.text()+".")
	}
	return strings.Join(lines, "\n")
}

func (s *Toolbox) fileWrite(ctx context.Context, in fileWriteInput) (fileWriteOutput, error) {
	puts := in.Files
	switch {
	case len(puts) > 0 && (in.Path != "" || in.Content != nil):
		return fileWriteOutput{}, badArgument("Give either \"path\" and \"content\", or \"files\".")
	case len(puts) == 0 && in.Path == "":
		return fileWriteOutput{}, badArgument("The argument \"path\" is missing: the absolute path of the file.")
	case len(puts) == 0 && in.Content == nil: // the file would be emptied
		return fileWriteOutput{}, badArgument("The argument \"content\" is missing; \"\" makes an empty file.")
	case len(puts) == 0:
		puts = []fileToPut{{Path: in.Path, Content: *in.Content, Encoding: in.Encoding}}
	}
	// Everything is checked before anything is written.
	bodies := make([][]byte, len(puts))
	for i, f := range puts {
		bodies[i] = []byte(f.Content)
		if f.Encoding == "base64" {
			var err error
			if bodies[i], err = base64.StdEncoding.DecodeString(f.Content); err != nil {
				return fileWriteOutput{}, badArgument("The content of %s is not base64: %v.", f.Path, err)
			}
		}
		if len(bodies[i]) > maxFile {
			return fileWriteOutput{},
				badArgument("The content of %s has %d bytes, at most %d can be written in one call. Write it in parts with mode append.",
					f.Path, len(bodies[i]), maxFile)
		}
	}
	_, client, err := s.agent(ctx, in.target, "write a file in")
	if err != nil {
		return fileWriteOutput{}, err
	}
	out := fileWriteOutput{Files: []written{}}
	for i, f := range puts {
		info, err := client.WriteFile(ctx, string(f.Path), bytes.NewReader(bodies[i]), agent.WriteOptions{Mode: in.Mode})
		if err != nil && len(out.Files) > 0 {
			err = fmt.Errorf("%w (the %d files before it are written)", err, len(out.Files))
		}
		if err != nil {
			return fileWriteOutput{}, err
		}
		out.Files = append(out.Files, written{Path: names.Show(info.Path), Size: info.Size})
	}
	return out, nil
}

type fileListInput struct {
	Path  filename `json:"path,omitempty" jsonschema:"absolute path; default /home/user"`
	Depth int      `json:"depth,omitempty" jsonschema:"levels of directories; default 1"`
	Limit int      `json:"limit,omitempty" jsonschema:"entries; default 500"`
	target
}

func (s *Toolbox) fileList(ctx context.Context, in fileListInput) (filesOutput, error) {
	if in.Path == "" {
		in.Path = "/home/user"
	}
	if in.Limit <= 0 {
		in.Limit = defaultTree
	}
	_, client, err := s.agent(ctx, in.target, "list files in")
	if err != nil {
		return filesOutput{}, err
	}
	info, err := client.Stat(ctx, string(in.Path))
	if err != nil {
		return filesOutput{}, err
	}
	if info.Type != agent.TypeDir {
		return filesOutput{Files: []fileInfo{describeFile(info)}}, nil
	}
	dir, err := client.Dir(ctx, agent.DirRequest{Path: string(in.Path), Depth: in.Depth, Limit: in.Limit})
	if err != nil {
		return filesOutput{}, err
	}
	out := filesOutput{Files: []fileInfo{}, More: dir.More}
	for _, f := range dir.Entries {
		out.Files = append(out.Files, describeFile(f))
	}
	return out, nil
}

type fileSearchInput struct {
	Path    filename `json:"path,omitempty" jsonschema:"where to search; default /home/user"`
	Pattern string   `json:"pattern,omitempty" jsonschema:"regular expression (RE2) for lines"`
	Glob    string   `json:"glob,omitempty" jsonschema:"such as *.go or src/**/*.ts"`
	Limit   int      `json:"limit,omitempty" jsonschema:"matches; default 200"`
	target
}

type fileSearchOutput struct {
	Matches []searchMatch `json:"matches"`
	Files   int           `json:"files" jsonschema:"files looked at"`
	More    bool          `json:"more,omitempty" jsonschema:"there are more matches, or the time was over"`
}

type searchMatch struct {
	Path string `json:"path"`
	Line int    `json:"line,omitempty"`
	Text string `json:"text,omitempty"`
}

func (o fileSearchOutput) text() string {
	var b strings.Builder
	for _, m := range o.Matches {
		if m.Line > 0 {
			fmt.Fprintf(&b, "%s:%d:%s\n", m.Path, m.Line, m.Text)
		} else {
			b.WriteString(m.Path + "\n")
		}
	}
	status := fmt.Sprintf("%d found in %s", len(o.Matches), plural(int64(o.Files), "file"))
	if o.More {
		status += "; there may be more: narrow the search or raise limit"
	}
	return b.String() + "[" + status + "]"
}

func (s *Toolbox) fileSearch(ctx context.Context, in fileSearchInput) (fileSearchOutput, error) {
	if in.Path == "" {
		in.Path = "/home/user"
	}
	if in.Limit <= 0 {
		in.Limit = 200
	}
	_, client, err := s.agent(ctx, in.target, "search files in")
	if err != nil {
		return fileSearchOutput{}, err
	}
	found, err := client.Search(ctx, agent.SearchRequest{Path: string(in.Path), Pattern: in.Pattern, Glob: in.Glob, Limit: in.Limit})
	if err != nil {
		return fileSearchOutput{}, err
	}
	out := fileSearchOutput{Matches: []searchMatch{}, Files: found.Files, More: found.More}
	for _, m := range found.Matches {
		out.Matches = append(out.Matches, searchMatch{Path: names.Show(m.Path), Line: m.Line, Text: render([]byte(m.Text))})
	}
	return out, nil
}

type fileMoveInput struct {
	From filename `json:"from" jsonschema:"absolute path"`
	To   filename `json:"to" jsonschema:"absolute path, with the new name"`
	target
}

func (s *Toolbox) fileMove(ctx context.Context, in fileMoveInput) (written, error) {
	_, client, err := s.agent(ctx, in.target, "move a file in")
	if err != nil {
		return written{}, err
	}
	info, err := client.Move(ctx, agent.MoveRequest{From: string(in.From), To: string(in.To)})
	if err != nil {
		return written{}, err
	}
	return written{Path: names.Show(info.Path), Size: info.Size}, nil
}

type fileRemoveInput struct {
	Path      filename `json:"path" jsonschema:"absolute path"`
	Recursive bool     `json:"recursive,omitempty"`
	target
}

type fileRemoveOutput struct {
	Removed string `json:"removed"`
}

func (o fileRemoveOutput) text() string { return "Removed " + o.Removed + "." }

func (s *Toolbox) fileRemove(ctx context.Context, in fileRemoveInput) (fileRemoveOutput, error) {
	_, client, err := s.agent(ctx, in.target, "remove a file in")
	if err != nil {
		return fileRemoveOutput{}, err
	}
	if err := client.Remove(ctx, agent.PathRequest{Path: string(in.Path), Recursive: in.Recursive}); err != nil {
		return fileRemoveOutput{}, err
	}
	return fileRemoveOutput{Removed: in.Path.String()}, nil
}
