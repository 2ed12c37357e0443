package main

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"soulbox.dev/soulbox/api/client"
)

func (a *app) connectCommand() *cobra.Command {
	var e execution
	c := &cobra.Command{Use: "connect ID [PID|TAG]", Short: "Enter a sandbox with a terminal", Args: between(1, "ID", "PID or TAG"),
		ValidArgsFunction: a.completeSandboxes,
		Long: `Enter a sandbox: run a shell of its user at this terminal. Ctrl-P Ctrl-Q leaves the shell without ending it, and prints how
to return to it by its process number. The tag or number of any process with a terminal enters that process, also one of an agent; it
continues even if soulbox is killed. The shell and soulbox survive a lost connection and a restart of the server; if soulbox is killed, the
shell ends.`,
		Example: "  soulbox sandbox connect ID\n  soulbox sandbox connect ID --user root\n  soulbox sandbox connect ID 42",
		RunE: func(c *cobra.Command, args []string) error {
			if _, ok := terminalOf(a.stdin); !ok {
				return usageError{errors.New("stdin is not a terminal; 'soulbox exec -i' runs a command without one")}
			}
			if code, done := a.guard(); done {
				return code
			}
			b, err := a.liveSandbox(c.Context(), args[0])
			if err != nil {
				return err
			}
			return asExec(a.atTerminal(c.Context(), b, func(ctx context.Context, size client.Size) (*client.ProcessHandle, error) {
				if len(args) > 1 {
					return a.attach(ctx, b, args[1])
				}
				return a.shell(ctx, b, e, size)
			}, true, len(args) == 1))
		}}
	e.flags(c)
	return c
}

// shell starts a shell.
func (a *app) shell(ctx context.Context, b box, e execution, size client.Size) (s *client.ProcessHandle, err error) {
	for _, args := range [][]string{{"/bin/bash", "-l"}, {"/bin/sh", "-l"}} {
		cmd, cerr := e.command(args)
		if cerr != nil {
			return nil, cerr
		}
		cmd.Env["TERM"] = cmp.Or(cmd.Env["TERM"], a.getenv("TERM"), "xterm")
		cmd.Terminal, cmd.Linger = &size, connectLinger
		var start *client.StartError
		if s, err = b.at.Start(ctx, b.ID, cmd, a.reconnector(b.ID)); !errors.As(err, &start) {
			return s, err
		}
	}
	return nil, err
}

// shownAgain is how many bytes of a terminal's output are shown again to a user who returns.
const shownAgain = 16 << 10

// attach enters an existing terminal, and shows its last output again.
func (a *app) attach(ctx context.Context, b box, name string) (*client.ProcessHandle, error) {
	p, err := process(ctx, b, name)
	if err != nil {
		return nil, err
	}
	if !p.Terminal {
		return nil, fmt.Errorf("process %d has no terminal", p.PID)
	}
	if p.State != "running" {
		return nil, fmt.Errorf("process %d has ended", p.PID)
	}
	return b.at.Attach(ctx, b.ID, p, max(0, p.Output-shownAgain), a.reconnector(b.ID))
}

var errDetached = errors.New("detached")

// atTerminal connects to a process's terminal until the process ends or the user leaves. A process that we started (ours) ends with us.
func (a *app) atTerminal(outer context.Context, b box, begin func(context.Context, client.Size) (*client.ProcessHandle, error), input,
	ours bool) error {
	fd, here := terminalOf(a.stdin)
	size := client.Size{Rows: 24, Cols: 80}
	if out, ok := terminalOf(a.stdout); ok {
		if cols, rows, err := term.GetSize(out); err == nil {
			size = client.Size{Rows: rows, Cols: cols}
		}
	}
	ctx, cancel := context.WithCancelCause(outer)
	defer cancel(nil)
	s, err := begin(ctx, size)
	if err != nil {
		return err
	}
	if ours {
		a.tellGuard(b.ID, s.Process())
		defer a.tellGuard("", client.Process{})
	}
	raw := here && input
	if raw {
		// If our guard was killed, we are in the background, where reading or restoring the terminal would stop us (termios(3), tcsetattr).
		signal.Ignore(syscall.SIGTTIN, syscall.SIGTTOU)
		saved, err := term.MakeRaw(fd)
		if err != nil {
			return a.endOurs(s, ours, err)
		}
		defer func() { _ = term.Restore(fd, saved) }() // an error means that the terminal is gone
		go func() {
			cancel(typed(ctx, s, a.stdin, cancel))
		}()
	}
	go a.followSize(ctx, s, size)
	exit, err := s.Follow(ctx, a.stdout, a.stdout, func(lost bool) {
		text := "the connection is back"
		if lost {
			text = "the connection is lost; waiting for it"
		}
		fmt.Fprintf(a.stderr, "\r\n[%s]\r\n", text) // if stderr fails, the user is gone
	})
	if errors.Is(err, errDetached) {
		return a.leave(b, s, ours)
	}
	if err != nil {
		fmt.Fprint(a.stderr, "\r\n") // what follows begins a new line
		return a.endOurs(s, ours, err)
	}
	return result(exit)
}

func (a *app) endOurs(s *client.ProcessHandle, ours bool, why error) error {
	if ours {
		return a.end(s, why)
	}
	return why
}

// leave lets a process continue without us.
func (a *app) leave(b box, s *client.ProcessHandle, ours bool) error {
	ctx, cancel := context.WithTimeout(context.Background(), killTime)
	defer cancel()
	if ours {
		if err := s.Release(ctx); err != nil {
			return fmt.Errorf("process %d may be killed after a while: %w", s.PID, err)
		}
	}
	_, err := fmt.Fprintf(a.stderr, "\r\n[left; 'soulbox sandbox connect %s %d' comes back]\r\n", b.ID, s.PID)
	return err
}

// Keys that leave a terminal, as docker's.
const (
	keyLeave = 'P' & 0x1f
	keyNow   = 'Q' & 0x1f
)

// maxTyped is how many typed bytes may wait for a process that does not read; more are lost, as at a terminal.
const maxTyped = 1 << 20

// typed sends what is typed, and recognizes the keys that leave, even while nothing can be sent; for them it returns errDetached. It calls
// failed when nothing can be sent any more.
func typed(ctx context.Context, s *client.ProcessHandle, from io.Reader, failed context.CancelCauseFunc) error {
	keys := &queue{changed: make(chan struct{}, 1)}
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		if err := keys.send(ctx, s); err != nil {
			failed(err)
		}
	}()
	part := make([]byte, 4096)
	held := false // keyLeave was typed and may begin the sequence
	for {
		n, err := from.Read(part)
		left := false
		for _, key := range part[:n] {
			switch {
			case held && key == keyNow:
				left = true
			case key == keyLeave && !held:
				held = true
				continue
			case held && key != keyLeave:
				keys.add(keyLeave)
				held = false
			}
			if left {
				break
			}
			keys.add(key)
		}
		if left {
			keys.end()
			select { // wait until what was typed before is sent
			case <-sent:
			case <-time.After(time.Second):
			}
			return errDetached
		}
		if err != nil {
			return fmt.Errorf("the terminal is gone: %w", err)
		}
	}
}

// queue holds typed keys that are to be sent.
type queue struct {
	mu      sync.Mutex
	keys    []byte
	over    bool
	changed chan struct{}
}

func (q *queue) add(key byte) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.keys) < maxTyped {
		q.keys = append(q.keys, key)
	}
	q.tell()
}

func (q *queue) end() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.over = true
	q.tell()
}

func (q *queue) tell() {
	select {
	case q.changed <- struct{}{}:
	default:
	}
}

func (q *queue) take() (keys []byte, over bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	keys, q.keys = q.keys, nil
	return keys, q.over
}

// send sends the keys until the queue ends. Keys in transit when the connection breaks may be lost; the user types them again.
func (q *queue) send(ctx context.Context, s *client.ProcessHandle) error {
	for {
		select {
		case <-q.changed:
		case <-ctx.Done():
			return nil
		}
		keys, over := q.take()
		if len(keys) > 0 {
			err := s.Write(ctx, keys)
			var told *client.Error
			if errors.Is(err, client.ErrPaused) || errors.As(err, &told) && unlessOver(err) != nil {
				return err
			}
		}
		if over {
			return nil
		}
	}
}

// followSize sends our terminal's size to the process whenever it changes, and once at the start: a user who returns may have another
// terminal.
func (a *app) followSize(ctx context.Context, s *client.ProcessHandle, size client.Size) {
	fd, ok := terminalOf(a.stdout)
	if !ok {
		return
	}
	changed := make(chan os.Signal, 1)
	signal.Notify(changed, syscall.SIGWINCH)
	defer signal.Stop(changed)
	for {
		_ = s.Resize(ctx, size) // after an error, the next change tries again
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
		if cols, rows, err := term.GetSize(fd); err == nil {
			size = client.Size{Rows: rows, Cols: cols}
		}
	}
}

// restoreAtSignal restores the terminal when a signal ends the program, until done is called.
func restoreAtSignal(fd int, saved *term.State) (done func()) {
	signals := make(chan os.Signal, 1)
	over := make(chan struct{})
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGTSTP)
	go func() {
		select {
		case s := <-signals:
			_ = term.Restore(fd, saved) // an error means that the terminal is gone
			os.Exit(128 + int(s.(syscall.Signal)))
		case <-over:
		}
	}()
	return sync.OnceFunc(func() {
		signal.Stop(signals)
		close(over)
	})
}

// guardVar tells this program that a parent guards its terminal, and reads from descriptor 3 what it runs.
const (
	guardVar  = "SOULBOX_GUARDED"
	guardFile = 3
)

// guard runs this program again as a child and watches it: however the child ends, even by SIGKILL, the terminal is restored and nothing
// that the child started continues in the sandbox. done is false in the child.
func (a *app) guard() (err error, done bool) {
	fd, ok := terminalOf(a.stdin)
	if !ok || a.getenv(guardVar) != "" {
		return nil, false
	}
	saved, err := term.GetState(fd)
	if err != nil {
		return nil, false // not a terminal, so there is nothing to restore
	}
	self, err := os.Executable()
	if err != nil {
		return asExec(err), true
	}
	r, w, err := os.Pipe()
	if err != nil {
		return asExec(err), true
	}
	defer r.Close()
	runtime.LockOSThread() // the child is killed when the thread that started it ends (prctl(2), PR_SET_PDEATHSIG)
	defer runtime.UnlockOSThread()
	cmd := exec.Command(self, os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Stdin, cmd.Stdout, cmd.Stderr = a.stdin, a.stdout, a.stderr
	cmd.Env = append(os.Environ(), guardVar+"=1")
	cmd.ExtraFiles = []*os.File{w}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	if err := errors.Join(cmd.Start(), w.Close()); err != nil {
		return asExec(err), true
	}
	a.release()
	defer passOn(cmd.Process)()
	told := make(chan string, 1)
	go func() { told <- lastLine(r) }()
	werr := cmd.Wait()
	_ = term.Restore(fd, saved) // an error means that the terminal is gone
	var died *exec.ExitError
	if werr == nil {
		return nil, true
	}
	if !errors.As(werr, &died) {
		return asExec(werr), true
	}
	code := died.ExitCode()
	if status, ok := died.Sys().(syscall.WaitStatus); ok && status.Signaled() {
		code = 128 + int(status.Signal())
	}
	select {
	case text := <-told:
		a.tidyUp(text)
	case <-time.After(killTime): // another process holds the pipe open
	}
	return exitError{code: code}, true
}

// passOn passes those signals on to the child that the terminal does not send to both, until stop is called.
func passOn(to *os.Process) (stop func()) {
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTERM, syscall.SIGHUP)
	over := make(chan struct{})
	go func() {
		for {
			select {
			case s := <-signals:
				if s == syscall.SIGTERM || s == syscall.SIGHUP {
					_ = to.Signal(s) // an error means that it has ended
				}
			case <-over:
				return
			}
		}
	}()
	return func() {
		signal.Stop(signals)
		close(over)
	}
}

func lastLine(r io.Reader) (last string) {
	for lines := bufio.NewScanner(r); lines.Scan(); {
		last = lines.Text()
	}
	return last
}

// tellGuard tells the guard which process runs in which sandbox; an empty id means none.
func (a *app) tellGuard(id string, p client.Process) {
	if a.getenv(guardVar) == "" {
		return
	}
	text := "\n"
	if id != "" {
		text = fmt.Sprintf("%s %d %s\n", id, p.PID, p.ID)
	}
	_, _ = syscall.Write(guardFile, []byte(text)) // an error means that the guard is gone
}

// tidyUp ends the process that the child has left in a sandbox, and resets the screen.
func (a *app) tidyUp(told string) {
	var id string
	var p client.Process
	if _, err := fmt.Sscan(told, &id, &p.PID, &p.ID); err != nil {
		return // nothing runs
	}
	fmt.Fprint(a.stderr, "\x1b[?1049l\x1b[?25h\x1b[0m\r\n[soulbox was killed]\r\n") // if stderr fails, the user is gone
	ctx, cancel := context.WithTimeout(context.Background(), killTime)
	defer cancel()
	b, err := a.liveSandbox(ctx, id)
	if err == nil {
		err = b.at.Signal(ctx, b.ID, p, syscall.SIGKILL)
	}
	if err != nil && unlessOver(err) != nil {
		fmt.Fprintf(inertly(a.stderr), "soulbox: process %d of sandbox %s may run for a while: %v\n", p.PID, id, err)
	}
}

// tick is how often a state is polled that has no notification.
const tick = 500 * time.Millisecond
