// Command soulbox-mcp is the MCP server: it gives the AI agent of its client sandboxes to work in.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"
)

// version is set by the linker.
var version = "dev"

const usage = `soulbox-mcp gives AI agents computers of their own: isolated Linux sandboxes, through MCP.

Usage:
  soulbox-mcp stdio [flags]    serve one MCP client on stdin and stdout
  soulbox-mcp http [flags]     serve many MCP clients, and E2B's SDKs, over HTTP
  soulbox-mcp local [flags]    serve only the command line 'soulbox', which starts it if there is no server
  soulbox-mcp envd [flags]     serve one sandbox to an E2B SDK in debug mode, in the foreground
  soulbox-mcp cert [flags]     make a certificate authority and a certificate for a domain of yours
  soulbox-mcp key create|list|revoke [flags]
                               make and end the keys that clients of 'http' need
  soulbox-mcp template base|list|pull|… [flags]
                               make the base of sandboxes; show, move and remove templates
  soulbox-mcp demo [flags]     show a sandbox at work, through a real MCP client
  soulbox-mcp doctor [flags]   check this machine, and say what is missing
  soulbox-mcp version          print the version

Run 'soulbox-mcp COMMAND -h' for the flags of a command. A wrong command line ends with exit code 2.
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	// A client that is gone makes a write fail, which ends the server in good order; the signal would kill it at once.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
	err := run(ctx, os.Args[1:], os.Getenv, os.Stdin, os.Stdout, os.Stderr)
	stop()
	if isPipe(err) && os.Args[1] != "stdio" {
		os.Exit(128 + int(syscall.SIGPIPE)) // the reader has read enough, such as grep -q
	}
	if err == nil || errors.Is(err, flag.ErrHelp) {
		return
	}
	fmt.Fprintln(os.Stderr, "soulbox-mcp:", err)
	if errors.As(err, new(usageError)) {
		os.Exit(exitUsage)
	}
	os.Exit(1)
}

// exitUsage is the exit code for a wrong command line.
const exitUsage = 2

// isPipe reports whether an error comes from our stdout, which is no longer read.
func isPipe(err error) bool {
	var pe *fs.PathError
	return errors.Is(err, syscall.EPIPE) && errors.As(err, &pe) && pe.Path == os.Stdout.Name()
}

// run is main with its environment as arguments.
func run(ctx context.Context, args []string, getenv func(string) string, stdin io.Reader, stdout, stderr io.Writer) error {
	// What a sandbox may read must not depend on our caller's umask; private files are made 0600 and 0700 explicitly.
	syscall.Umask(0o022)
	debug.SetMemoryLimit(48 << 20) // soft: the server must stay small compared with its sandboxes
	command := ""
	if len(args) > 0 {
		command, args = args[0], args[1:]
	}
	switch command {
	case "stdio":
		return runStdio(ctx, args, getenv, stdin, stdout, stderr)
	case "http":
		return runHTTP(ctx, args, getenv, stdout, stderr)
	case "local":
		return runLocal(ctx, args, getenv, stderr)
	case "envd":
		return runEnvd(ctx, args, getenv, stdout, stderr)
	case "cert":
		return runCert(args, getenv, stdout, stderr)
	case "key":
		return runKey(args, getenv, stdout, stderr)
	case "demo":
		return runDemo(ctx, args, getenv, stdout, stderr)
	case "template":
		return runTemplate(ctx, args, getenv, stdout, stderr)
	case "doctor":
		return runDoctor(ctx, args, getenv, stdout, stderr)
	case "version", "--version":
		_, err := fmt.Fprintln(stdout, "soulbox-mcp", version)
		return err
	case "":
		_, err := fmt.Fprint(stderr, usage)
		return errors.Join(usageError{errors.New("name a command; MCP clients start 'soulbox-mcp stdio'")}, err)
	case "help", "--help", "-h":
		_, err := fmt.Fprint(stdout, usage)
		return err
	}
	return noCommand(command, "soulbox-mcp help")
}
