package guest

import (
	"errors"
	"io/fs"
	"os"

	"github.com/sourcegraph/jsonrpc2"
	"soulbox.dev/soulbox/agent"
)

// wireError turns any error into one that can cross the pipe. The text is bounded, because it may contain file names.
func wireError(err error) *agent.Error {
	var e *agent.Error
	if errors.As(err, &e) {
		return e
	}
	e = &agent.Error{Message: agent.Clip(errorText(err), 2000)}
	errors.As(err, &e.Errno)
	var path *fs.PathError
	if errors.As(err, &path) {
		e.Op, e.Path = path.Op, agent.Clip(path.Path, 1000)
	}
	var link *os.LinkError
	if errors.As(err, &link) {
		e.Op, e.Path = link.Op, agent.Clip(link.Old, 1000)
	}
	for kind, sentinel := range agent.Kinds {
		if errors.Is(err, sentinel) {
			e.Kind = kind
		}
	}
	return e
}

// replyError turns an error into the answer of a call.
func replyError(err error) *jsonrpc2.Error {
	e := wireError(err)
	reply := &jsonrpc2.Error{Code: jsonrpc2.CodeInternalError, Message: e.Message}
	reply.SetError(agent.ForWire(e))
	return reply
}
