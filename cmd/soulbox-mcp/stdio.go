package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/url"
	"os"
	"strings"

	"soulbox.dev/soulbox/mcpserver"
)

// runStdio serves one client until the client closes stdin or a signal comes.
func runStdio(ctx context.Context, args []string, getenv func(string) string, stdin io.Reader, stdout, stderr io.Writer) (err error) {
	c := config{onExit: "pause"}
	var remote, keyFile string
	err = c.parse("stdio", args, getenv, stderr, c.serving, func(f *flag.FlagSet) {
		f.StringVar(&remote, "connect", getenv("SOULBOX_URL"),
			"`URL` of a SoulBox server to use instead of this machine, such as https://box.example.com/mcp (SOULBOX_URL)")
		f.StringVar(&keyFile, "key-file", "", "`path` of a file with the key for --connect; default the environment's SOULBOX_KEY")
	})
	if err != nil {
		return err
	}
	if remote != "" {
		return c.connect(ctx, remote, keyFile, cmp.Or(getenv("SOULBOX_KEY"), getenv("SOULBOX_API_KEY")), stdin, stdout, stderr)
	}
	s, err := newService(c, stderr)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	defer s.alsoLocal("stdio", getenv)()
	s.log.Info("serving", "version", version, "state_dir", c.stateDir, "runsc", c.runsc)
	return mcpserver.Stdio{Server: s.mcp}.Serve(ctx, stdin, stdout)
}

// connect passes all messages on to a remote server.
func (c config) connect(ctx context.Context, remote, keyFile, key string, stdin io.Reader, stdout, stderr io.Writer) (err error) {
	u, err := url.Parse(remote)
	if err != nil || !isWeb(u) {
		return usageError{errors.New("--connect: give the URL of the server's endpoint, such as https://box.example.com/mcp")}
	}
	if strings.Trim(u.Path, "/") == "" { // the server's URL, as for the command line
		u.Path = "/mcp"
		remote = u.String()
	}
	if keyFile != "" {
		body, err := os.ReadFile(keyFile)
		if err != nil {
			return fmt.Errorf("--key-file: %w", err)
		}
		key = strings.TrimSpace(string(body))
	}
	log, closeLog, err := c.openLog(stderr)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeLog()) }()
	log.Info("connecting", "version", version, "url", (&url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path}).String())
	return mcpserver.Bridge{URL: remote, Key: key, Log: log,
		NewKey: "set SOULBOX_KEY, or --key-file, to a key that 'soulbox-mcp key create' made on the server"}.Serve(ctx, stdin, stdout)
}
