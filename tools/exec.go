package tools

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/internal/names"
	"soulbox.dev/soulbox/sandbox"
)

const (
	defaultYield = 30_000 // milliseconds
	maxYield     = 50_000 // clients give up after 60 s
	defaultChars = 30_000
	maxChars     = 100_000
	maxStdin     = 256 << 10
	maxCommand   = 128<<10 - 1 // the longest argument that Linux accepts
	progressTick = 500 * time.Millisecond
	taskYield    = 24 * time.Hour  // no client waits for a task's answer
	ttyYield     = 2 * time.Second // at most; a call returns earlier, when the program at the terminal is silent
)

func (s *Toolbox) execTools() []tool {
	return []tool{
		define(s, "exec",
			"Run a shell command (bash) in the sandbox and return its output and exit code. After yield_ms it continues in the "+
				"background; its process_id is for process_wait, process_write and process_signal. Set background for servers.",
			hints{title: "Run a command", destructive: true, longResult: true, slow: true}, s.exec),
	}
}

type execInput struct {
	Command    string            `json:"command,omitempty" jsonschema:"optional with tty: a login shell"`
	Cwd        filename          `json:"cwd,omitempty" jsonschema:"absolute directory; default where the last command left the shell"`
	Env        map[string]string `json:"env,omitempty" jsonschema:"extra environment variables"`
	User       string            `json:"user,omitempty" jsonschema:"user name or uid; default user"`
	Stdin      string            `json:"stdin,omitempty" jsonschema:"text given to stdin"`
	Tag        string            `json:"tag,omitempty" jsonschema:"a name to find it by, unique among running ones"`
	YieldMS    *int64            `json:"yield_ms,omitempty" jsonschema:"0 to 50000; default 30000"`
	TimeoutMS  int64             `json:"timeout_ms,omitempty" jsonschema:"kill the command after this time; default never"`
	MaxChars   *int              `json:"max_output_chars,omitempty" jsonschema:"longer output is cut in the middle; default 30000"`
	Background bool              `json:"background,omitempty" jsonschema:"return at once, and keep its stdin open"`
	Isolated   bool              `json:"isolated,omitempty" jsonschema:"run without the shared shell state, and leave it unchanged"`
	TTY        bool              `json:"tty,omitempty" jsonschema:"give it a terminal, for interactive programs"`
	Rows       int               `json:"rows,omitempty" jsonschema:"of the terminal; default 24"`
	Cols       int               `json:"cols,omitempty" jsonschema:"default 80"`
	target
}

// execOutput is the state of a process and what it wrote.
type execOutput struct {
	SandboxID  string      `json:"sandbox_id"`
	ProcessID  string      `json:"process_id"`
	State      string      `json:"state" enum:"running,exited"`
	ExitCode   *int        `json:"exit_code,omitempty" jsonschema:"128+signal if a signal ended it"`
	Signal     string      `json:"signal,omitempty"`
	Cause      string      `json:"cause,omitempty" jsonschema:"oom, timeout or killed"`
	Output     string      `json:"output" jsonschema:"stdout and stderr as they came; bytes that are not text as \\xNN"`
	LeftOut    int64       `json:"left_out,omitempty" jsonschema:"bytes cut from the output"`
	Dropped    int64       `json:"dropped,omitempty" jsonschema:"bytes no longer kept"`
	NextOffset int64       `json:"next_offset" jsonschema:"give this to process_wait for what comes next"`
	DurationMS int64       `json:"duration_ms"`
	Children   int         `json:"children,omitempty" jsonschema:"processes it left running"`
	Note       string      `json:"note,omitempty" jsonschema:"what to do next"`
	Screen     *screenInfo `json:"screen,omitempty" jsonschema:"of the rendered screen, which output then is"`

	limitHit bool
	notices  []string
}

func (o execOutput) text() string {
	status := fmt.Sprintf("process %s is still running after %d ms", o.ProcessID, o.DurationMS)
	if o.ExitCode != nil {
		status = fmt.Sprintf("exit code %d after %d ms, process %s", *o.ExitCode, o.DurationMS, o.ProcessID)
	}
	if o.Signal != "" {
		status += ", ended by " + o.Signal
	}
	if o.Cause != "" {
		status += ", cause: " + o.Cause
	}
	if o.Dropped > 0 {
		status += fmt.Sprintf(", %s no longer kept", plural(o.Dropped, "byte"))
	}
	status += fmt.Sprintf(", sandbox %s, next_offset %d", o.SandboxID, o.NextOffset)
	if s := o.Screen; s != nil {
		status += fmt.Sprintf(", screen of %d x %d, cursor in row %d, column %d", s.Rows, s.Cols, s.CursorRow, s.CursorCol)
		if s.Title != "" {
			status += ", title " + s.Title
		}
	}
	if o.Note != "" {
		status += "; " + o.Note
	}
	if o.Output == "" {
		return "[" + status + "]"
	}
	newline := "\n"
	if o.Output[len(o.Output)-1] == '\n' {
		newline = ""
	}
	return o.Output + newline + "[" + status + "]"
}

// check refuses arguments that are wrong whatever the sandbox.
func (in execInput) check() error {
	if in.Command == "" && !in.TTY {
		return badArgument("The argument \"command\" is missing. Give a shell command.")
	}
	if !in.TTY && (in.Rows != 0 || in.Cols != 0) {
		return badArgument("The arguments \"rows\" and \"cols\" need a terminal. Set tty, or leave them out.")
	}
	if len(in.Command) > maxCommand {
		return badArgument("The argument \"command\" has %d bytes, at most %d can be given. Write it to a file with file_write and run "+
			"that.", len(in.Command), maxCommand)
	}
	if len(in.Stdin) > maxStdin {
		return badArgument("The argument \"stdin\" has %d bytes, at most %d can be given. Write it to a file with file_write and "+
			"redirect it: command < file.", len(in.Stdin), maxStdin)
	}
	_, err := millis("timeout_ms", &in.TimeoutMS)
	return err
}

func (s *Toolbox) exec(ctx context.Context, in execInput) (execOutput, error) {
	if err := in.check(); err != nil {
		return execOutput{}, err
	}
	yield, chars, err := waitArguments(in.YieldMS, in.MaxChars)
	if err != nil {
		return execOutput{}, err
	}
	if in.YieldMS == nil {
		yield = in.ownYield(ctx, yield)
	}
	sb, client, err := s.agent(ctx, in.target, "run a command in")
	if err != nil {
		return execOutput{}, err
	}
	shell, err := s.shell(ctx, in.Isolated)
	if err != nil {
		return execOutput{}, err
	}
	w := agent.Window{Head: chars / 2, Tail: chars - chars/2}
	// The start itself is not cancelled, since then it would be unknown whether the process runs. A cancellation that comes meanwhile is
	// handled below.
	if ctx.Err() != nil {
		return execOutput{}, context.Cause(ctx)
	}
	startCtx, cancel := client.Patience(context.WithoutCancel(ctx), 0, agent.Silence)
	defer cancel()
	var terminal *agent.Terminal
	if in.TTY {
		terminal = &agent.Terminal{Rows: in.Rows, Cols: in.Cols}
	}
	snap, err := client.Start(startCtx, agent.StartRequest{
		Shell: shell, Fork: in.Background, Terminal: terminal, Command: in.Command, Cwd: string(in.Cwd), Env: in.Env, User: in.User,
		Stdin: []byte(in.Stdin), KeepStdin: in.Background, Tag: in.Tag,
		TimeoutMS: in.TimeoutMS, Window: w, WaitMS: min(yield, startSlice).Milliseconds(),
	})
	if err != nil {
		return execOutput{}, err
	}
	if in.TTY {
		var heard agent.InputResult
		if heard, err = listen(ctx, client, agent.InputRequest{Process: snap.Process.ID, Window: w}, yield); err == nil {
			snap = heard.Snapshot
		}
		if ctx.Err() != nil {
			err = nil // handled below
		}
	} else {
		snap, err = follow(ctx, client, snap, w, yield-startSlice)
	}
	if err == nil && ctx.Err() != nil {
		snap, err = giveUp(ctx, client, snap, w)
	}
	if err != nil {
		return execOutput{}, err
	}
	return s.show(ctx, client, sb.ID(), snap, w, chars, false)
}

// ownYield is how long a call waits that does not say it.
func (in execInput) ownYield(ctx context.Context, usual time.Duration) time.Duration {
	switch {
	case in.Background:
		return 0
	case in.TTY:
		return ttyYield
	case inTask(ctx):
		return taskYield
	}
	return usual
}

// startSlice bounds the round trip that starts a process and waits for it, since that round trip is not cancelled.
const startSlice = 200 * time.Millisecond

// waitArguments checks the two arguments that all waiting tools share.
func waitArguments(yieldMS *int64, maxOutput *int) (yield time.Duration, chars int, err error) {
	ms, chars := int64(defaultYield), defaultChars
	if yieldMS != nil {
		ms = *yieldMS
	}
	if maxOutput != nil {
		chars = *maxOutput
	}
	if ms < 0 || ms > maxYield {
		return 0, 0, badArgument("The argument \"yield_ms\" must be from 0 to %d; a longer command keeps running, and process_wait "+
			"waits for it.", maxYield)
	}
	if chars < 100 || chars > maxChars {
		return 0, 0, badArgument(
			"The argument \"max_output_chars\" must be from 100 to %d; process_wait gives the rest of a longer output.", maxChars)
	}
	return time.Duration(ms) * time.Millisecond, chars, nil
}

// follow waits for a process to end and reports its last line as progress meanwhile. When ctx ends it returns what it has.
func follow(ctx context.Context, client *agent.Client, snap agent.Snapshot, w agent.Window, yield time.Duration) (agent.Snapshot, error) {
	p := newProgress(ctx)
	for end := time.Now().Add(yield); snap.Process.State == agent.StateRunning && time.Now().Before(end); {
		p.tell(lastLine(progressText(snap)))
		slice := time.Until(end)
		if p.wanted() {
			slice = min(slice, progressTick)
		}
		next, err := client.Wait(ctx, agent.WaitRequest{Process: snap.Process.ID, WaitMS: max(1, slice.Milliseconds()), Window: w})
		if ctx.Err() != nil || errors.Is(err, sandbox.ErrState) { // paused: the process continues when the sandbox does
			return snap, nil
		}
		if err != nil {
			return snap, err
		}
		snap = next
	}
	return snap, nil
}

// giveUp handles the end of a call's context. A client that leaves gets the output so far; a client that cancels wants the command ended.
func giveUp(ctx context.Context, client *agent.Client, snap agent.Snapshot, w agent.Window) (agent.Snapshot, error) {
	cause := context.Cause(ctx)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	var leaving interface{ Yield() bool }
	if errors.As(cause, &leaving) && leaving.Yield() {
		return client.Wait(ctx, agent.WaitRequest{Process: snap.Process.ID, Window: w})
	}
	if _, err := client.Kill(ctx, snap.Process.ID); err != nil {
		return snap, fmt.Errorf("kill cancelled command: %w", err)
	}
	return snap, cause
}

// show turns a snapshot into a result with at most chars characters of output. What it leaves out can be read from the offset it names.
func (s *Toolbox) show(ctx context.Context, client *agent.Client, sandboxID string, snap agent.Snapshot, w agent.Window, chars int,
	raw bool) (execOutput, error) {
	if snap.Process.Terminal != nil && !raw {
		return showTerminal(sandboxID, snap, w, chars), nil
	}
	room := chars
	if len(snap.Output.Tail) > 0 {
		room = chars / 2
	}
	head := snap.Output.Head
	left, used := renderHead(head, room, lastOf(snap.Output, w, snap.Process.State == agent.StateExited))
	if used < len(head) {
		// Not all of it fits, since an escape is longer than the byte it stands for, or it ends within a character. Ask again for exactly
		// what is shown, so that the offset behind it is exact.
		w.Head = used
		var err error
		if snap, err = client.Wait(ctx, agent.WaitRequest{Process: snap.Process.ID, Window: w}); err != nil {
			return execOutput{}, err
		}
	}
	o := snap.Output
	right, skipped, later := renderTail(o.Tail, chars-utf8.RuneCountInString(left), o.TailStart > o.HeadEnd,
		snap.Process.State == agent.StateExited)
	out := describe(sandboxID, snap)
	if o.HeadEnd >= o.End {
		out.Output = left
		return out, nil
	}
	if later > 0 {
		var err error
		if out.NextOffset, err = behind(ctx, client, snap, w, len(o.Tail)-later); err != nil {
			return execOutput{}, err
		}
	}
	out.LeftOut = o.TailStart + int64(skipped) - o.HeadEnd
	switch {
	case w.Tail == 0:
		out.Output, out.NextOffset = left, o.HeadEnd
		if out.LeftOut <= int64(len(head)-len(agent.Whole(head))) { // no more than a character that is not complete yet
			out.LeftOut = 0
			break
		}
		out.leaveOut(out.LeftOut, o.HeadEnd)
	case out.LeftOut == 0:
		out.Output = left + right
	default:
		out.Output = fmt.Sprintf("%s\n[… %s left out; %s …]\n%s", left, plural(out.LeftOut, "byte"), rest(snap.Process.ID, o.HeadEnd),
			right)
	}
	return out, nil
}

// behind is the offset behind the first n bytes of a tail. It asks the agent, because bytes of the other stream may lie between those of
// one stream.
func behind(ctx context.Context, client *agent.Client, snap agent.Snapshot, w agent.Window, n int) (int64, error) {
	w.Offset, w.Head, w.Tail = snap.Output.TailStart, n, 0
	again, err := client.Wait(ctx, agent.WaitRequest{Process: snap.Process.ID, Window: w})
	return again.Output.HeadEnd, err
}

// describe returns a snapshot without its output.
func describe(sandboxID string, snap agent.Snapshot) execOutput {
	p := snap.Process
	out := execOutput{
		SandboxID: sandboxID, ProcessID: p.ID, State: p.State, Signal: render([]byte(p.Signal)), Cause: render([]byte(p.Cause)),
		Dropped: snap.Output.Dropped, NextOffset: snap.Output.End, Children: p.Children, DurationMS: time.Since(p.Started).Milliseconds(),
		limitHit: p.LimitHit,
	}
	if p.State == agent.StateExited {
		out.ExitCode = &p.ExitCode
		out.DurationMS = p.Ended.Sub(p.Started).Milliseconds()
	}
	out.notices = shellNotices(p)
	out.Note = strings.Join(out.notes(), "; ")
	return out
}

// shellNotices says what a model should know about the shell that its commands share.
func shellNotices(p agent.Process) []string {
	var notices []string
	if p.ShellCwd != "" {
		notices = append(notices, "the shell is now in "+names.Show(p.ShellCwd))
	}
	if p.GoneCwd != "" {
		notices = append(notices, fmt.Sprintf("the shell's directory %s is gone, the command ran in %s", names.Show(p.GoneCwd),
			names.Show(p.Cwd)))
	}
	if p.Forgotten {
		notices = append(notices, "its changes to the shell are not remembered: at most 256 KB of variables and functions are")
	}
	return notices
}

// notes says what a model should know besides the output.
func (o execOutput) notes() []string {
	notes := slices.Clone(o.notices)
	if o.limitHit {
		notes = append(notes, "it tried to start more processes than a command may have")
	}
	if o.Children > 0 {
		notes = append(notes, fmt.Sprintf("%s it started still running, process_signal reaches them", plural(int64(o.Children), "process")))
	}
	return notes
}
