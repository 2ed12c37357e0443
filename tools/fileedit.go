package tools

import (
	"context"
	"fmt"

	"soulbox.dev/soulbox/agent"
)

type fileEditInput struct {
	Path       filename `json:"path" jsonschema:"absolute path"`
	OldStr     string   `json:"old_str,omitempty" jsonschema:"exactly as in the file"`
	NewStr     string   `json:"new_str,omitempty" jsonschema:"text to put there; empty removes"`
	ReplaceAll bool     `json:"replace_all,omitempty" jsonschema:"replace every occurrence"`
	InsertLine *int     `json:"insert_line,omitempty" jsonschema:"instead of old_str: behind this line, 0 is the start"`
	target
}

type fileEditOutput struct {
	Path     string `json:"path"`
	Replaced int    `json:"replaced"`
	Line     int    `json:"line" jsonschema:"of the first change"`
	Snippet  string `json:"snippet" jsonschema:"the lines around it, numbered"`
	Size     int64  `json:"size"`
	CRLF     bool   `json:"crlf,omitempty" jsonschema:"with the file's CRLF line ends"`
}

func (o fileEditOutput) text() string {
	ends := ""
	if o.CRLF {
		ends = ", with the file's CRLF line ends"
	}
	return fmt.Sprintf("%s[%s, %s%s, first at line %d, now %d bytes]", o.Snippet, o.Path, plural(int64(o.Replaced), "change"), ends, o.Line,
		o.Size)
}

func (s *Toolbox) fileEdit(ctx context.Context, in fileEditInput) (fileEditOutput, error) {
	_, client, err := s.agent(ctx, in.target, "edit a file in")
	if err != nil {
		return fileEditOutput{}, err
	}
	r, err := client.Edit(ctx, agent.EditRequest{Path: string(in.Path), Old: in.OldStr, New: in.NewStr, All: in.ReplaceAll,
		InsertLine: in.InsertLine})
	if err != nil {
		return fileEditOutput{}, err
	}
	return fileEditOutput{Path: in.Path.String(), Replaced: r.Replaced, Line: r.Line, Snippet: render([]byte(r.Snippet)), Size: r.Info.Size,
		CRLF: r.CRLF}, nil
}
