package main

import (
	"context"
	"errors"
	"io"

	"soulbox.dev/soulbox/mcpserver"
)

// runStdio serves one client until it closes stdin or a signal comes.
func runStdio(ctx context.Context, args []string, getenv func(string) string, stdin io.Reader, stdout, stderr io.Writer) (err error) {
	c := config{onExit: "kill"}
	if err := c.parse("stdio", args, getenv, stderr, c.serving); err != nil {
		return err
	}
	s, err := newService(c, stderr)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	s.log.Info("serving", "version", version, "state_dir", c.stateDir, "runsc", c.runsc)
	return mcpserver.Stdio{Server: s.mcp}.Serve(ctx, stdin, stdout)
}
