// Command soulbox is the command line for people: it shows, enters and controls the sandboxes of this machine's servers, or of a team's
// server. It is a client of the HTTP API and knows nothing else.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/signal"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"soulbox.dev/soulbox/api/client"
)

// version is set by the linker.
var version = "dev"

// app is one run of the program: its surroundings, and the flags that all commands have.
type app struct {
	stdin          *os.File
	stdout, stderr io.Writer
	getenv         func(string) string

	release func() // leaves signals to the caller: they no longer end the context

	context string // as named by --context
	owner   string
	debug   bool
}

func main() {
	a := &app{stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr, getenv: os.Getenv}
	os.Exit(a.run(os.Args[1:]))
}

// Exit codes of soulbox itself, as docker uses them. A command in a sandbox has its own exit code.
const (
	exitFailed = 1   // a command of soulbox has failed
	exitUsage  = 2   // the command line is wrong
	exitExec   = 125 // exec failed before its command started, or lost the command
	exitPipe   = 128 + int(syscall.SIGPIPE)
)

// exitError ends the program with a code. If err is nil, the reason was already printed.
type exitError struct {
	code int
	err  error
}

// Error implements error.
func (e exitError) Error() string {
	if e.err == nil {
		return ""
	}
	return e.err.Error()
}

// Unwrap makes errors.Is see the cause.
func (e exitError) Unwrap() error { return e.err }

// usageError is the error of a wrong flag or argument.
type usageError struct{ error }

// run is main, with the surroundings as its receiver.
func (a *app) run(args []string) int {
	// A closed reader shows as an error of a write, after which cleanup follows.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
	if a.getenv(guardVar) != "" {
		syscall.CloseOnExec(guardFile) // a server that is started must not inherit it
	}
	root := a.root()
	root.SetArgs(args)
	ctx, signalled, stop := interruptible()
	defer stop()
	a.release = stop
	ran, err := root.ExecuteContextC(ctx)
	var exit exitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit) && (ctx.Err() == nil || exit.code != exitExec && !errors.Is(err, context.Canceled)):
	case isPipe(err):
		return exitPipe
	case ctx.Err() != nil:
		return 128 + int(signalled())
	case errors.As(err, new(usageError)), strings.HasPrefix(err.Error(), "unknown "):
		if exit.code, exit.err = exitUsage, err; ran.Name() == execName {
			exit.code = exitExec // 2 may be its command's
		}
	default:
		exit.code, exit.err = exitFailed, err
	}
	if exit.err != nil {
		fmt.Fprintf(inertly(a.stderr), "soulbox: %s\n", a.explain(exit.err)) // if stderr fails, there is no other place to report
	}
	return exit.code
}

// interruptible returns a context that ends with the first signal. A second Ctrl-C ends the program at once; other signals may come many
// times, for example from the kernel for each thread of a parent that dies.
func interruptible() (ctx context.Context, signalled func() syscall.Signal, stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	var which atomic.Int64
	go func() {
		for s := range signals {
			if ctx.Err() != nil && s == syscall.SIGINT {
				os.Exit(128 + int(syscall.SIGINT))
			}
			which.CompareAndSwap(0, int64(s.(syscall.Signal)))
			cancel()
		}
	}()
	return ctx, func() syscall.Signal { return syscall.Signal(which.Load()) }, func() { signal.Stop(signals) }
}

// isPipe reports whether an error says that the reader of stdout has closed it.
func isPipe(err error) bool {
	var pe *fs.PathError
	return errors.Is(err, syscall.EPIPE) && errors.As(err, &pe) && pe.Path == "/dev/stdout"
}

// explain adds to an error what to do, if that is known.
func (a *app) explain(err error) string {
	text := strings.TrimSuffix(err.Error(), "\n")
	var told *client.Error
	switch {
	case errors.As(err, &told) && told.Status == 401:
		text += "; log in with 'soulbox auth login --url URL'"
	case errors.Is(err, syscall.ECONNREFUSED), errors.As(err, new(*net.DNSError)):
		text += "; " + a.elsewhere()
	case errors.As(err, new(usageError)):
		text += "; --help shows how"
	}
	return text
}

// elsewhere says what to do where no server answers.
func (a *app) elsewhere() string {
	_, name, _, err := a.chosen()
	if err == nil && name == "SOULBOX_URL" {
		return "start that server with 'soulbox-mcp http', or correct or unset SOULBOX_URL"
	}
	return "start that server with 'soulbox-mcp http', or use another with 'soulbox auth use NAME' ('soulbox auth use local')"
}

// root returns the tree of commands.
func (a *app) root() *cobra.Command {
	root := group(&cobra.Command{
		Use:   "soulbox",
		Short: "Show, enter and control the sandboxes of AI agents",
		Long: `soulbox shows, enters and controls the sandboxes of AI agents: on this machine those of every soulbox-mcp that this user
runs, such as one that an IDE has started; after 'soulbox auth login', those of a team's server.`,
		Example:           "  soulbox sandbox create\n  soulbox exec ID -- uname -a\n  soulbox sandbox connect ID",
		Version:           version,
		SilenceUsage:      true,
		SilenceErrors:     true,
		DisableAutoGenTag: true,
	})
	root.SetOut(a.stdout)
	root.SetErr(a.stderr)
	root.SetIn(a.stdin)
	root.SetVersionTemplate("soulbox {{.Version}}\n")
	root.SetFlagErrorFunc(flagError)
	// A group does nothing by itself.
	runnable := "{{if and .Runnable (ne .UseLine .CommandPath)}}"
	root.SetUsageTemplate(strings.Replace(root.UsageTemplate(), "{{if .Runnable}}", runnable, 1))
	flags := root.PersistentFlags()
	flags.StringVar(&a.context, "context", "",
		"use the server with this `name`, which 'auth login' gave it; \"local\" is this machine (SOULBOX_CONTEXT)")
	flags.StringVar(&a.owner, "owner", "", "act as this `owner` of a server on this machine that has keys")
	flags.BoolVar(&a.debug, "debug", false, "show requests on stderr, without secrets")
	check(root.RegisterFlagCompletionFunc("context", func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		c, err := a.readContexts()
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return append(c.names(), localContext), cobra.ShellCompDirectiveNoFileComp
	}))
	root.AddCommand(a.sandboxCommand(), a.execCommand(), a.psCommand(), a.killCommand(), a.copyCommand(), a.watchCommand(), a.portCommand(),
		a.urlCommand(), a.templateCommand(), a.authCommand(), a.manCommand())
	root.InitDefaultCompletionCmd()
	if c, _, err := root.Find([]string{"completion"}); err == nil {
		group(c)
	}
	root.InitDefaultHelpCmd()
	if c, _, err := root.Find([]string{"help"}); err == nil {
		c.Args = helpArgs
	}
	return root
}

// check panics on wiring errors, which every test would show.
func check(err error) {
	if err != nil {
		panic(err)
	}
}

// exactly requires these arguments, and names the one that is missing or too many.
func exactly(names ...string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		if len(args) < len(names) {
			return usageError{fmt.Errorf("%s is missing", names[len(args)])}
		}
		if len(args) > len(names) {
			return usageError{fmt.Errorf("there is one argument too many: %q", args[len(names)])}
		}
		return nil
	}
}

// atLeast requires one argument or more.
func atLeast(name string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		if len(args) == 0 {
			return usageError{fmt.Errorf("%s is missing", name)}
		}
		return nil
	}
}

// terminalOf reports whether a stream is a terminal, and returns its descriptor.
func terminalOf(stream any) (fd int, ok bool) {
	f, isFile := stream.(*os.File)
	if !isFile {
		return 0, false
	}
	return int(f.Fd()), term.IsTerminal(int(f.Fd()))
}

// colours reports whether to colour the output to stdout (no-color.org).
func (a *app) colours() bool {
	_, ok := terminalOf(a.stdout)
	return ok && a.getenv("NO_COLOR") == "" && a.getenv("TERM") != "dumb"
}

// soon bounds a call that should return at once.
const soon = 30 * time.Second

func (a *app) printf(format string, args ...any) error {
	_, err := fmt.Fprintf(a.stdout, format, args...)
	return err
}
