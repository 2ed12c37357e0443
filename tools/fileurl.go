package tools

import (
	"context"
	"fmt"
	"path"
	"strings"
	"time"
)

const (
	urlLife    = time.Hour
	maxURLLife = 7 * 24 * time.Hour
)

// urlTool is offered only if the server has a URL of its own.
const urlTool = "file_url"

func (s *Toolbox) urlTools() []tool {
	return []tool{
		define(s, urlTool, "Make a URL to download one file (GET) or upload it (POST), of any size, without a key.",
			hints{title: "Link to a file", idempotent: true}, s.fileURL),
	}
}

type fileURLInput struct {
	Path      filename `json:"path"`
	Operation string   `json:"operation,omitempty" jsonschema:"read (default) or write"`
	ExpiresS  int64    `json:"expires_s,omitempty" jsonschema:"default 3600"`
	target
}

type fileURLOutput struct {
	SandboxID string    `json:"sandbox_id"`
	URL       string    `json:"url"`
	Expires   time.Time `json:"expires_at"`
	operation string
}

func (o fileURLOutput) text() string {
	if o.operation == "write" {
		return fmt.Sprintf("POST the file to %s as form field \"file\" or application/octet-stream, until %s.", o.URL,
			o.Expires.Format(time.RFC3339))
	}
	return fmt.Sprintf("%s downloads the file until %s.", o.URL, o.Expires.Format(time.RFC3339))
}

func (s *Toolbox) fileURL(ctx context.Context, in fileURLInput) (fileURLOutput, error) {
	if !path.IsAbs(string(in.Path)) || strings.ContainsRune(string(in.Path), 0) {
		return fileURLOutput{}, badArgument("The argument \"path\" must be an absolute path.")
	}
	switch in.Operation {
	case "":
		in.Operation = "read"
	case "read", "write":
	default:
		return fileURLOutput{}, badArgument("The argument \"operation\" is read or write, not %q.", in.Operation)
	}
	if in.ExpiresS < 0 || in.ExpiresS > int64(maxURLLife.Seconds()) {
		return fileURLOutput{}, badArgument("The argument \"expires_s\" must be from 1 to %d.", int64(maxURLLife.Seconds()))
	}
	life := urlLife
	if in.ExpiresS > 0 {
		life = time.Duration(in.ExpiresS) * time.Second
	}
	sb, err := s.sandbox(ctx, in.SandboxID)
	if err != nil {
		return fileURLOutput{}, err
	}
	if state := sb.Info().State; state.Ended() {
		_, err := sb.Look("link to a file of")
		return fileURLOutput{}, err
	}
	until := time.Now().Add(life).Truncate(time.Second)
	return fileURLOutput{SandboxID: sb.ID(), URL: s.FileURL(sb, string(in.Path), in.Operation, until), Expires: until.UTC(),
		operation: in.Operation}, nil
}
