package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"soulbox.dev/soulbox/api/client"
	"soulbox.dev/soulbox/internal/names"
)

const (
	execLinger    = time.Minute     // how long a command without its soulbox runs before the server kills it, unless a client returns to it
	connectLinger = 5 * time.Minute // the same for a terminal
	killTime      = 5 * time.Second
)

// execName is the command whose exit codes are those of what it runs.
const execName = "exec"

// execution describes a command to run in a sandbox.
type execution struct {
	input, terminal, detach bool
	user, cwd               string
	env                     []string
}

func (e *execution) flags(c *cobra.Command) {
	f := c.Flags()
	f.StringVarP(&e.user, "user", "u", "", "`name` of the user; default the sandbox's user")
	f.StringVarP(&e.cwd, "cwd", "w", "", "`directory` to run in; default the user's home")
	f.StringArrayVarP(&e.env, "env", "e", nil, "`KEY=VALUE` of its environment; may be repeated")
}

func (a *app) execCommand() *cobra.Command {
	var e execution
	c := &cobra.Command{Use: execName + " ID [flags] [--] COMMAND [ARGUMENT]...", Short: "Run a command in a sandbox",
		ValidArgsFunction: a.completeExec,
		Long: `Run a command in a sandbox. soulbox prints its output and exits with its exit code; 125 is a failure of soulbox itself, 126
a command that cannot be run, 127 a command that does not exist, 128 and more a signal. Signals are passed on; Ctrl-C three times, or
SIGTERM twice, kills the command. Flags after COMMAND belong to it; "--" may stand before COMMAND. No output is lost with the connection
or the server: soulbox reconnects and continues where it was. If soulbox is killed with SIGKILL, the server kills the command after a
minute, unless it was started with --detach.`,
		Example: "  soulbox exec ID uname -a\n  soulbox exec ID -- sh -c 'echo $HOME'\n  tar cf - dir | soulbox exec -i ID -- tar xf " +
			"-\n  soulbox exec -it ID -- bash\n  soulbox exec ID --detach -- python3 -m http.server",
		Args: func(c *cobra.Command, args []string) error {
			if len(args) == 0 || c.ArgsLenAtDash() == 0 {
				return usageError{errors.New("ID is missing")}
			}
			return nil
		},
		RunE: func(c *cobra.Command, args []string) error {
			id := args[0]
			if err := c.Flags().Parse(args[1:]); err != nil { // those behind the id, as far as the command
				return flagError(c, err)
			}
			if help, err := c.Flags().GetBool("help"); err == nil && help {
				return c.Help()
			}
			if args = c.Flags().Args(); len(args) == 0 {
				return usageError{errors.New("give a command after the ID, such as: soulbox exec ID ls -l")}
			}
			return a.exec(c.Context(), id, args, e)
		}}
	f := c.Flags()
	f.SetInterspersed(false)
	f.BoolVarP(&e.input, "interactive", "i", false, "send stdin")
	f.BoolVarP(&e.terminal, "tty", "t", false, "give it a terminal")
	f.BoolVarP(&e.detach, "detach", "d", false, "start it in the background, and print its process number")
	e.flags(c)
	return c
}

// asExec gives failures of soulbox itself an exit code that no command has.
func asExec(err error) error {
	var start *client.StartError
	var exit exitError
	switch {
	case err == nil, errors.As(err, &exit), errors.As(err, new(usageError)):
		return err
	case errors.As(err, &start):
		return exitError{start.Exit, err}
	case isPipe(err):
		return exitError{code: exitPipe}
	}
	return exitError{exitExec, err}
}

func (a *app) exec(ctx context.Context, id string, args []string, e execution) error {
	if e.detach && (e.input || e.terminal) {
		return usageError{errors.New("--detach has no stdin and no terminal")}
	}
	if e.terminal {
		if _, ok := terminalOf(a.stdin); e.input && !ok {
			return usageError{errors.New("stdin is not a terminal: leave -t out")}
		}
		if code, done := a.guard(); done {
			return code
		}
	}
	cmd, err := e.command(args)
	if err != nil {
		return err
	}
	b, err := a.liveSandbox(ctx, id)
	if err != nil {
		return asExec(err)
	}
	if e.detach {
		return asExec(a.detached(ctx, b, cmd))
	}
	cmd.Stdin, cmd.Linger = e.input, execLinger
	if e.terminal {
		cmd.Linger = connectLinger
		return asExec(a.atTerminal(ctx, b, func(ctx context.Context, size client.Size) (*client.ProcessHandle, error) {
			cmd.Terminal = &size
			cmd.Env["TERM"] = cmp.Or(cmd.Env["TERM"], a.getenv("TERM"), "xterm")
			return b.at.Start(ctx, b.ID, cmd, a.reconnector(b.ID))
		}, e.input, true))
	}
	return asExec(a.piped(ctx, b, cmd))
}

func (e execution) command(args []string) (client.Command, error) {
	env, err := readPairs("--env", e.env)
	return client.Command{Args: args, Env: env, Cwd: names.Parse(e.cwd), User: e.user}, err
}

func (a *app) detached(ctx context.Context, b box, cmd client.Command) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // it is not followed
	s, err := b.at.Start(ctx, b.ID, cmd, a.reconnector(b.ID))
	if err != nil {
		return err
	}
	return a.printf("%d\n", s.PID)
}

// piped runs a command with soulbox's own streams.
func (a *app) piped(outer context.Context, b box, cmd client.Command) error {
	a.release() // signals are for the command
	if outer.Err() != nil {
		return context.Cause(outer)
	}
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(outer))
	defer cancel(nil)
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGUSR1, syscall.SIGUSR2)
	defer signal.Stop(signals)
	begun := make(chan *client.ProcessHandle, 1)
	go a.passSignals(ctx, begun, signals, cancel)
	s, err := b.at.Start(ctx, b.ID, cmd, a.reconnector(b.ID))
	if err != nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err != nil {
		return err
	}
	begun <- s
	if cmd.Stdin {
		go func() {
			if err := send(ctx, s, a.stdin); err != nil {
				cancel(err)
			}
		}()
	}
	stdout, stderr := inertly(a.stdout), inertly(a.stderr)
	exit, err := s.Follow(ctx, stdout, stderr, nil)
	if err = errors.Join(err, writeRest(stdout), writeRest(stderr)); err != nil {
		return a.end(s, err)
	}
	return result(exit)
}

// send sends a whole stream to a process. A process that has ended, or has closed its stdin, takes no more, which is not an error.
func send(ctx context.Context, s *client.ProcessHandle, from io.Reader) error {
	in := newGathered(from)
	defer in.stop()
	for {
		part, err := in.take()
		if len(part) > 0 {
			if werr := s.Write(ctx, part); werr != nil {
				return unlessOver(werr)
			}
		}
		if err == io.EOF {
			return unlessOver(s.CloseInput(ctx))
		}
		if err != nil {
			return fmt.Errorf("read stdin: %w", err)
		}
	}
}

// gatherMost is how many bytes are read ahead.
const gatherMost = 2 << 20

// gathered reads ahead: what arrives while a part is being sent becomes the next part, because a small part takes as long as a large one.
type gathered struct {
	mu      sync.Mutex
	changed *sync.Cond
	buf     []byte
	err     error
	over    bool
}

func newGathered(from io.Reader) *gathered {
	g := &gathered{}
	g.changed = sync.NewCond(&g.mu)
	go func() {
		part := make([]byte, 64<<10)
		for {
			n, err := from.Read(part)
			g.mu.Lock()
			for len(g.buf) > 0 && len(g.buf)+n > gatherMost && !g.over {
				g.changed.Wait()
			}
			g.buf, g.err = append(g.buf, part[:n]...), err
			over := g.over
			g.changed.Broadcast()
			g.mu.Unlock()
			if err != nil || over {
				return
			}
		}
	}()
	return g
}

// take waits for data, and returns everything available.
func (g *gathered) take() ([]byte, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for len(g.buf) == 0 && g.err == nil {
		g.changed.Wait()
	}
	part := g.buf
	g.buf = nil
	g.changed.Broadcast()
	return part, g.err
}

// stop ends the reading, at the latest after the next read.
func (g *gathered) stop() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.over = true
	g.changed.Broadcast()
}

// unlessOver returns nil for the errors of a process that reads no more.
func unlessOver(err error) error {
	var told *client.Error
	if errors.As(err, &told) && (told.Status == 404 || told.Status == 409) || errors.Is(err, context.Canceled) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("send stdin: %w", err)
	}
	return nil
}

// passSignals passes signals on, as if the command ran here. The third Ctrl-C, the second SIGTERM and the end of our terminal kill the
// command. Signals that come before the command has started wait killTime for it.
func (a *app) passSignals(ctx context.Context, begun <-chan *client.ProcessHandle, signals <-chan os.Signal,
	cancel context.CancelCauseFunc) {
	var s *client.ProcessHandle
	counts := map[syscall.Signal]int{}
	_, atTerminal := terminalOf(a.stdin)
	for {
		var sig syscall.Signal
		select {
		case <-ctx.Done():
			return
		case one := <-signals:
			sig = one.(syscall.Signal)
		}
		over := exitError{code: 128 + int(sig)}
		if s == nil {
			select {
			case s = <-begun:
			case <-time.After(killTime):
				cancel(over)
				return
			case <-ctx.Done():
				return
			}
		}
		counts[sig]++
		if sig == syscall.SIGINT && counts[sig] == 3 || sig == syscall.SIGTERM && counts[sig] == 2 {
			cancel(over)
			time.AfterFunc(2*killTime, func() { os.Exit(over.code) }) // the reader of our output may block forever
			return
		}
		if sig == syscall.SIGHUP && atTerminal {
			time.AfterFunc(killTime, func() { cancel(over) })
		}
		go func() {
			ctx, stop := context.WithTimeout(ctx, killTime)
			defer stop()
			if err := s.Signal(ctx, sig); err != nil && unlessOver(err) != nil {
				fmt.Fprintf(inertly(a.stderr), "soulbox: pass %s on: %v\n", unix.SignalName(sig), err) // the command continues to run
			}
		}()
	}
}

// end kills a process that soulbox no longer follows, and returns why. A process in a paused sandbox is left as it is.
func (a *app) end(s *client.ProcessHandle, why error) error {
	if errors.Is(why, client.ErrPaused) {
		return why
	}
	ctx, cancel := context.WithTimeout(context.Background(), killTime)
	defer cancel()
	err := s.Kill(ctx)
	if errors.Is(err, client.ErrPaused) {
		return err
	}
	if err != nil && unlessOver(err) != nil {
		// If stderr fails, there is no other place to report.
		fmt.Fprintf(inertly(a.stderr), "soulbox: process %d could not be killed, and may run for a while: %v\n", s.PID, err)
	}
	return why
}

// result turns the end of a command into our own.
func result(e client.Exit) error {
	if e.Code == 0 {
		return nil
	}
	var err error
	if text, more := strings.CutPrefix(e.Status, "signal: killed: "); more { // the reason, which the code does not tell
		err = fmt.Errorf("the command was killed: %s", text)
	}
	return exitError{e.Code, err}
}

func (a *app) psCommand() *cobra.Command {
	var all bool
	var out format
	c := &cobra.Command{Use: "ps ID", Short: "List the processes of a sandbox", Args: exactly("ID"), ValidArgsFunction: a.completeSandboxes,
		Long: "List the running processes that were started in a sandbox; with --all also those that have ended and are still known. " +
			"This does not wake a paused sandbox.",
		Example: "  soulbox ps ID\n  soulbox ps ID --all -o json",
		RunE: func(c *cobra.Command, args []string) error {
			b, err := a.liveSandbox(c.Context(), args[0])
			if err != nil {
				return err
			}
			list, err := b.at.Processes(c.Context(), b.ID)
			if err != nil {
				return err
			}
			shown := []client.Process{}
			for _, p := range list {
				if all || p.State == "running" {
					shown = append(shown, p)
				}
			}
			if out == formatJSON {
				return a.json(shown)
			}
			t := a.table("PID", "TAG", "USER", "STATE", "AGE", "CPU", "MEMORY", "TTY", "COMMAND")
			for _, p := range shown {
				state, tty, age := p.State, "", short(time.Since(p.Started))
				if p.State != "running" {
					state = "exit " + strconv.Itoa(p.ExitCode)
					if p.Signal != "" {
						state = p.Signal
					}
				}
				if p.Terminal {
					tty = "yes"
				}
				t.row(strconv.Itoa(p.PID), p.Tag, p.User, state, age, fmt.Sprintf("%.1fs", float64(p.CPUMS)/1000), bytesOf(p.Memory), tty,
					clip(p.Command, 80))
			}
			return t.flush()
		}}
	c.Flags().BoolVarP(&all, "all", "a", false, "also processes that have ended")
	out.flag(c, formatTable, formatJSON)
	return c
}

func clip(text string, most int) string {
	if r := []rune(text); len(r) > most {
		return string(r[:most-1]) + "…"
	}
	return text
}

// process finds a process by its number or tag. A running process is preferred to one that has ended.
func process(ctx context.Context, b box, name string) (client.Process, error) {
	list, err := b.at.Processes(ctx, b.ID)
	if err != nil {
		return client.Process{}, err
	}
	pid, _ := strconv.Atoi(name) // 0 matches none
	var found *client.Process
	for i, p := range list {
		if (p.PID == pid || p.Tag == name && name != "") &&
			(found == nil || p.State == "running" || found.State != "running" && p.Started.After(found.Started)) {
			found = &list[i]
		}
	}
	if found == nil {
		return client.Process{}, fmt.Errorf("there is no process %q in sandbox %s; 'soulbox ps %s --all' lists them", name,
			b.ID, b.ID)
	}
	return *found, nil
}

func (a *app) killCommand() *cobra.Command {
	var name string
	c := &cobra.Command{Use: "kill ID PID|TAG", Short: "Send a signal to a process of a sandbox", Args: exactly("ID", "PID or TAG"),
		ValidArgsFunction: a.completeSandboxes,
		Long: "Send a signal to a process of a sandbox and its group. KILL also kills everything it has started. ('soulbox sandbox " +
			"kill' ends sandboxes.)", Example: "  soulbox kill ID 42\n  soulbox kill ID server -s HUP",
		RunE: func(c *cobra.Command, args []string) error {
			sig, err := signalOf(name)
			if err != nil {
				return err
			}
			b, err := a.liveSandbox(c.Context(), args[0])
			if err != nil {
				return err
			}
			p, err := process(c.Context(), b, args[1])
			if err != nil {
				return err
			}
			return b.at.Signal(c.Context(), b.ID, p, sig)
		}}
	c.Flags().StringVarP(&name, "signal", "s", "TERM", "`name` or number of the signal")
	return c
}

func signalOf(name string) (syscall.Signal, error) {
	if n, err := strconv.Atoi(name); err == nil && n > 0 && n < 65 {
		return syscall.Signal(n), nil
	}
	upper := strings.ToUpper(name)
	if !strings.HasPrefix(upper, "SIG") {
		upper = "SIG" + upper
	}
	if n := unix.SignalNum(upper); n != 0 {
		return n, nil
	}
	return 0, usageError{fmt.Errorf("there is no signal %q", name)}
}

// counter counts the bytes written to it.
type counter struct{ n atomic.Int64 }

// Write implements io.Writer.
func (c *counter) Write(p []byte) (int, error) {
	c.n.Add(int64(len(p)))
	return len(p), nil
}
