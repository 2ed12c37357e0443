package guest

import (
	"errors"
	"io/fs"
	"os"
	"strings"

	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/internal/names"
)

// quoted returns a name for the text of an error.
func quoted(name string) string { return `"` + names.Show(agent.Clip(name, 200)) + `"` }

// errorText returns the text of an error with its file names in the notation.
func errorText(err error) string {
	text := err.Error()
	var in []string
	var path *fs.PathError
	if errors.As(err, &path) {
		in = append(in, path.Path)
	}
	var link *os.LinkError
	if errors.As(err, &link) {
		in = append(in, link.Old, link.New)
	}
	for _, name := range in {
		if shown := names.Show(name); shown != name {
			text = strings.ReplaceAll(text, name, shown)
		}
	}
	return agent.Inert([]byte(text))
}
