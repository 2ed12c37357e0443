package guest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"soulbox.dev/soulbox/agent"
)

const (
	endedKept   = 256             // ended processes that are kept for queries
	killGrace   = 2 * time.Second // between SIGTERM and SIGKILL at a timeout
	maxTag      = 64
	commandEcho = 4 << 10 // bytes of a command line that answers repeat
)

// process is a process that a user asked for, and what it left behind.
type process struct {
	id        string
	seq       int
	req       agent.StartRequest
	user      identity
	cwd       string
	args      []string
	child     // the leader
	started   time.Time
	output    *spool
	group     *cgroup // nil outside a sandbox
	pipes     []*outputPipe
	collector *collector
	prepared  func()      // lets the next start begin
	release   func()      // undoes StartRequest.Hold; nil without it
	shell     *shellRun   // nil if no shell keeps its state
	stop      *countdown  // at its timeout
	ready     atomic.Bool // everything above is set, and others may see the process
	// namesake had the tag before; it gets the tag back if this process cannot be started.
	namesake *process
	done     chan struct{} // closed when the leader has ended and its output is drained

	writing chan struct{} // holds a token while a caller writes to stdin

	mu    sync.Mutex
	stdin *os.File // nil when closed; of a terminal it is our end
	// terminal is its size; nil without one.
	terminal  *agent.Terminal
	ended     time.Time
	status    syscall.WaitStatus
	usage     syscall.Rusage
	cause     string
	shellCwd  string
	forgotten bool
	// limitHit reports whether it tried to have more processes than it may.
	limitHit bool
	left     bool // it left processes behind when it ended
}

// running reports whether the leader is alive.
func (p *process) running() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// blame records why the process is about to end; the first cause counts.
func (p *process) blame(cause string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cause == "" && p.ended.IsZero() {
		p.cause = cause
	}
}

// finish records the end of the leader, and wakes the callers that wait for it.
func (p *process) finish(status exitStatus) {
	p.collector.drain(p.pipes...)
	// Reading cgroups takes a large part of a short command's time, so limitHit is not read if it ended well and left nothing behind.
	left := len(p.group.pids()) > 0
	limitHit := (left || status.status != 0) && p.group.hitLimit()
	cwd, err := p.shell.end()
	p.mu.Lock()
	p.ended, p.status, p.usage, p.limitHit, p.left = time.Now(), status.status, status.usage, limitHit, left
	p.shellCwd, p.forgotten = cwd, err != nil
	stdin := p.stdin
	p.stdin = nil
	p.mu.Unlock()
	if stdin != nil {
		_ = stdin.Close()
	}
	p.stop.stop()
	close(p.done)
}

// expire ends the process at its timeout: with SIGTERM and, after killGrace, with SIGKILL.
func (p *process) expire() {
	p.blame(agent.CauseTimeout)
	_ = p.signal(syscall.SIGTERM)
	over := make(chan struct{})
	grace := after(killGrace, func() { close(over) })
	defer grace.stop()
	select {
	case <-p.done:
	case <-over:
	}
	p.killAll()
}

// signal sends a signal to the process group of the leader or, if the leader has ended, to the processes that it left behind.
func (p *process) signal(sig syscall.Signal) error {
	if p.running() {
		done, err := p.signalTerminal(sig)
		if !done {
			err = ignoreGone(syscall.Kill(-p.PID, sig))
		}
		if err != nil {
			return fmt.Errorf("signal process %s: %w", p.id, err)
		}
		return nil
	}
	// The leader's pid may belong to another process by now, so go by the cgroup.
	if sig == syscall.SIGKILL && p.group != nil {
		p.group.kill() // all at once: a fork bomb is faster than a list of pids
		return nil
	}
	pids := p.group.pids()
	if len(pids) == 0 {
		return fmt.Errorf("signal process %s: %w", p.id, agent.ErrEnded)
	}
	for _, pid := range pids {
		if err := syscall.Kill(pid, sig); err != nil && err != syscall.ESRCH {
			return fmt.Errorf("signal process %s: %w", p.id, err)
		}
	}
	return nil
}

// killAll kills the leader's group and everything that left the group.
func (p *process) killAll() {
	// Outside a sandbox there is no cgroup, only the group. It may have members even if the leader has ended.
	if p.running() || p.group == nil {
		_ = syscall.Kill(-p.PID, syscall.SIGKILL) // ESRCH: it has just ended
	}
	p.group.kill()
}

// describe returns the process in the protocol's form.
func (p *process) describe() agent.Process {
	d := agent.Process{
		ID: p.id, Tag: p.req.Tag, State: agent.StateRunning, Command: agent.Clip(p.req.Command, commandEcho), Cwd: p.cwd,
		User: p.user.name, PID: p.PID, Started: p.started,
	}
	if d.Command == "" {
		d.Command = agent.Clip(strings.Join(p.args, " "), commandEcho)
	}
	d.Output, d.Dropped = p.output.sizes()
	if p.shell != nil {
		d.GoneCwd = p.shell.gone
	}
	done := !p.running()
	p.mu.Lock()
	defer p.mu.Unlock()
	d.StdinOpen, d.Cause, d.LimitHit, d.Terminal = p.stdin != nil, p.cause, p.limitHit, p.terminal
	if !done || p.left {
		d.LimitHit = p.limitHit || p.group.hitLimit()
	}
	if !done {
		d.CPUMS, d.Memory = p.group.usage(p.PID)
		return d
	}
	d.ShellCwd, d.Forgotten = p.shellCwd, p.forgotten
	d.State, d.Ended = agent.StateExited, p.ended
	d.ExitCode, d.Signal = exitCode(p.status)
	d.CPUMS = (p.usage.Utime.Nano() + p.usage.Stime.Nano()) / 1e6
	if peak := p.usage.Maxrss << 10; peak > agentPeak() {
		d.Memory = peak // a smaller peak is the agent's own, with which the fork began
	}
	if p.left {
		d.Children = len(p.group.pids())
	}
	return d
}

// exitCode returns the exit code as in a shell, and the signal if one ended the process.
func exitCode(status syscall.WaitStatus) (code int, signal string) {
	if status.Signaled() {
		return 128 + int(status.Signal()), unix.SignalName(status.Signal())
	}
	return status.ExitStatus(), ""
}

// agentPeak returns the agent's own peak resident memory, in bytes.
func agentPeak() int64 {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u) // cannot fail
	return u.Maxrss << 10
}

// wait waits at most that long for the process to end or, if beyond is set, for output beyond it; then it describes the process.
func (p *process) wait(ctx context.Context, wait time.Duration, beyond *int64, w agent.Window) (agent.Snapshot, error) {
	if wait > 0 && p.running() {
		timer := time.NewTimer(wait)
		defer timer.Stop()
		for waiting := true; waiting; {
			var more <-chan struct{} // nil: wait for the end only
			if beyond != nil {
				written, changed := p.output.progress()
				if written > *beyond {
					break
				}
				more = changed
			}
			select {
			case <-more:
				continue
			case <-p.done:
			case <-timer.C:
			case <-ctx.Done():
			}
			waiting = false
		}
	}
	s := agent.Snapshot{Process: p.describe()} // before the output: later output must not appear in a snapshot that says "exited"
	var err error
	s.Output, err = p.output.window(w)
	return s, err
}

// writeStdin writes everything from r to stdin, and closes stdin if eof is set. It blocks while the process does not read.
func (p *process) writeStdin(ctx context.Context, r io.Reader, eof bool) (int64, error) {
	p.mu.Lock()
	stdin, terminal := p.stdin, p.terminal != nil
	p.mu.Unlock()
	if !p.running() {
		return 0, fmt.Errorf("write to process %s: %w", p.id, agent.ErrEnded)
	}
	if stdin == nil {
		return 0, fmt.Errorf("write to process %s: %w", p.id, agent.ErrStdin)
	}
	select { // one writer at a time, so that their bytes and deadlines do not mix
	case p.writing <- struct{}{}:
		defer func() { <-p.writing }()
	case <-ctx.Done():
		return 0, context.Cause(ctx)
	case <-p.done:
		return 0, fmt.Errorf("write to process %s: %w", p.id, agent.ErrEnded)
	}
	late := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		_ = stdin.SetWriteDeadline(time.Unix(1, 0))
		close(late)
	})
	typed := int64(0)
	if eof && terminal { // at a terminal ctrl-d ends the input
		r, typed = io.MultiReader(r, bytes.NewReader([]byte{4})), 1
	}
	n, err := io.Copy(onlyWriter{stdin}, r)
	if err == nil {
		n -= typed
	}
	if !stop() {
		<-late
		_ = stdin.SetWriteDeadline(time.Time{}) // the next writer has no deadline
	}
	if errors.Is(err, syscall.EPIPE) || errors.Is(err, os.ErrClosed) {
		err = fmt.Errorf("write to process %s: %w", p.id, agent.ErrStdin)
	}
	if err == nil && eof && !terminal {
		p.mu.Lock()
		p.stdin = nil
		p.mu.Unlock()
		_ = stdin.Close()
	}
	return n, err
}

// takeTime is the least time that a process has to take its input.
const takeTime = time.Second

// input writes to a process and waits for its answer.
func (s *Server) input(ctx context.Context, r agent.InputRequest) (agent.InputResult, error) {
	p, err := s.processByName(r.Process)
	if err != nil {
		return agent.InputResult{}, err
	}
	if len(r.Data) > agent.MaxInput {
		return agent.InputResult{}, agent.Invalid("input: %d bytes, at most %d are allowed", len(r.Data), agent.MaxInput)
	}
	if r.Window.Offset < 0 {
		r.Window.Offset, _ = p.output.sizes()
	}
	begin, wait := time.Now(), time.Duration(r.WaitMS)*time.Millisecond
	var result agent.InputResult
	if len(r.Data) > 0 || r.EOF {
		taking, cancel := context.WithTimeout(ctx, max(wait, takeTime))
		result.Written, err = p.writeStdin(taking, bytes.NewReader(r.Data), r.EOF)
		result.Blocked = taking.Err() != nil // also before a pause: then the answer says how much was written
		cancel()
		if err != nil && !result.Blocked {
			return agent.InputResult{}, err
		}
	}
	settle := time.Duration(r.SettleMS) * time.Millisecond
	if p.req.Terminal == nil {
		settle /= 3 // at a terminal programs pause between parts of the screen
	}
	result.Offset = r.Window.Offset
	p.listen(ctx, r.Window.Offset, max(0, wait-time.Since(begin)), settle) // writing and listening share one wait
	result.Snapshot, err = p.wait(ctx, 0, nil, r.Window)
	return result, err
}

// listen waits until the process has written beyond an offset and is then silent, until it has ended, or until the time is over.
func (p *process) listen(ctx context.Context, heard int64, wait, settle time.Duration) {
	end := time.NewTimer(wait)
	defer end.Stop()
	var quiet <-chan time.Time // nil: no output yet
	for p.running() {
		written, changed := p.output.progress()
		if written > heard {
			heard, quiet = written, time.After(settle)
		}
		select {
		case <-changed:
			select { // do not check a process that writes all the time at each write
			case <-time.After(settle / 4):
			case <-end.C:
				return
			}
		case <-quiet:
			return
		case <-p.done:
		case <-end.C:
			return
		case <-ctx.Done():
			return
		}
	}
}

// onlyWriter hides ReadFrom, which would splice and ignore deadlines.
type onlyWriter struct{ io.Writer }

// parseSignal accepts "SIGTERM", "term" or "15".
func parseSignal(name string) (syscall.Signal, error) {
	if n, err := strconv.Atoi(name); err == nil && n > 0 && n <= 64 {
		return syscall.Signal(n), nil
	}
	upper := strings.ToUpper(strings.TrimSpace(name))
	if !strings.HasPrefix(upper, "SIG") {
		upper = "SIG" + upper
	}
	if sig := unix.SignalNum(upper); sig != 0 {
		return sig, nil
	}
	return 0, fmt.Errorf("signal %q: %w", agent.Clip(name, 40), agent.ErrNoSignal)
}

// list describes the selected processes, as many as fit into a message.
func (s *Server) list(r agent.ListRequest) ([]agent.Process, error) {
	list := []agent.Process{}
	size := 0
	all := s.all()
	for i := len(all) - 1; i >= 0; i-- { // newest first, so that the oldest are left out
		d := all[i].describe()
		if r.Tag != "" && d.Tag != r.Tag || r.State != "" && d.State != r.State {
			continue
		}
		if size += encodedSize(d.Command, d.Cwd, d.Tag, d.User) + 500; size > agent.MaxMessage*9/10 {
			break
		}
		list = append(list, d)
	}
	return list, nil
}

// signal sends a signal to the named process.
func (s *Server) signal(r agent.SignalRequest) (agent.Process, error) {
	sig, err := parseSignal(r.Signal)
	if err != nil {
		return agent.Process{}, err
	}
	p, err := s.processByName(r.Process)
	if err != nil {
		return agent.Process{}, err
	}
	return p.describe(), p.signal(sig)
}

// kill kills the named process and everything it started.
func (s *Server) kill(r agent.WaitRequest) (agent.Process, error) {
	p, err := s.processByName(r.Process)
	if err != nil {
		return agent.Process{}, err
	}
	p.blame(agent.CauseKilled)
	p.killAll()
	return p.describe(), nil
}
