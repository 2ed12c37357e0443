package tools

import (
	"context"
	"fmt"
	"strings"
	"time"

	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/internal/names"
)

func (s *Toolbox) processTools() []tool {
	return []tool{
		define(s, "process_wait",
			"Wait for a process to end and read its output, also later. Without offset: head and tail of it all. With the "+
				"next_offset of the last result: what came since.",
			hints{title: "Wait for a process", readOnly: true, idempotent: true, longResult: true}, s.processWait),
		define(s, "process_write", "Write to the stdin of a background or tty process, and return what it answers.",
			hints{title: "Write to a process"}, s.processWrite),
		define(s, "process_resize", "Change the size of a process's terminal.",
			hints{title: "Resize a terminal", idempotent: true}, s.processResize),
		define(s, "process_signal", "Send a signal to a process and its group.",
			hints{title: "Signal a process", destructive: true}, s.processSignal),
		define(s, "process_list", "List processes started by exec, also ended ones, newest first.",
			hints{title: "List processes", readOnly: true, idempotent: true}, s.processList),
	}
}

// processTarget names a process by its id or its tag.
type processTarget struct {
	ProcessID string `json:"process_id,omitempty" jsonschema:"from exec or process_list"`
	Tag       string `json:"tag,omitempty" jsonschema:"instead of process_id"`
}

func (t processTarget) name() (string, error) {
	switch {
	case t.ProcessID != "" && t.Tag != "":
		return "", badArgument("Give either \"process_id\" or \"tag\", not both.")
	case t.ProcessID != "":
		return t.ProcessID, nil
	case t.Tag != "":
		return t.Tag, nil
	}
	return "", badArgument("Give the argument \"process_id\" (from exec or process_list) or \"tag\".")
}

type processWaitInput struct {
	processTarget
	Offset   *int64 `json:"offset,omitempty" jsonschema:"byte offset to read from"`
	Stream   string `json:"stream,omitempty" enum:"stdout,stderr" jsonschema:"only this one; default both"`
	Screen   bool   `json:"screen,omitempty" jsonschema:"of a tty: its rendered screen as it is now; returns when it is silent"`
	Above    int    `json:"lines_above,omitempty" jsonschema:"with screen: lines that have scrolled away, up to 500"`
	Raw      bool   `json:"raw,omitempty" jsonschema:"of a tty: with its escapes"`
	YieldMS  *int64 `json:"yield_ms,omitempty" jsonschema:"0 to 50000; default 30000"`
	MaxChars *int   `json:"max_output_chars,omitempty" jsonschema:"default 30000"`
	target
}

func (s *Toolbox) processWait(ctx context.Context, in processWaitInput) (execOutput, error) {
	name, err := in.name()
	if err != nil {
		return execOutput{}, err
	}
	yield, chars, err := waitArguments(in.YieldMS, in.MaxChars)
	if err != nil {
		return execOutput{}, err
	}
	sb, client, err := s.agent(ctx, in.target, "wait in")
	if err != nil {
		return execOutput{}, err
	}
	w := agent.Window{Stream: in.Stream, Head: chars / 2, Tail: chars - chars/2}
	if in.Offset != nil {
		if *in.Offset < 0 {
			return execOutput{}, badArgument("The argument \"offset\" cannot be negative.")
		}
		w = agent.Window{Stream: in.Stream, Offset: *in.Offset, Head: min(chars, 60_000)}
	}
	snap, err := client.Wait(ctx, agent.WaitRequest{Process: name, Window: w})
	if err != nil {
		return execOutput{}, err
	}
	if in.Screen {
		return s.processScreen(ctx, client, sb.ID(), snap.Process, in, yield)
	}
	if in.Offset != nil && snap.Output.HeadEnd < snap.Output.End {
		yield = 0 // there is more output than is shown, so there is nothing to wait for
	}
	// Cancelling a wait ends the wait, never the process: this call did not start it.
	if snap, err = follow(ctx, client, snap, w, yield); err != nil {
		return execOutput{}, err
	}
	return s.show(ctx, client, sb.ID(), snap, w, chars, in.Raw)
}

// processScreen waits until a terminal is silent and renders it.
func (s *Toolbox) processScreen(ctx context.Context, client *agent.Client, sandboxID string, p agent.Process, in processWaitInput,
	yield time.Duration) (execOutput, error) {
	if p.Terminal == nil {
		return execOutput{}, badArgument("Process %s has no terminal, so it has no screen. Start it with tty.", p.ID)
	}
	if in.YieldMS == nil {
		yield = settleTerminal // what is on the screen now, once the program is silent
	}
	heard, err := listen(ctx, client, agent.InputRequest{Process: p.ID, Window: agent.Window{Offset: p.Output}}, yield)
	if err != nil {
		return execOutput{}, err
	}
	snap := heard.Snapshot
	out := describe(sandboxID, snap)
	chars := defaultChars
	if in.MaxChars != nil {
		chars = *in.MaxChars
	}
	err = s.screen(ctx, client, sandboxID, snap.Process, func(sc *screen) error {
		out.Output, out.Screen = sc.text(min(max(in.Above, 0), scrollLines), chars)
		return nil
	})
	return out, err
}

type processResizeInput struct {
	processTarget
	Rows int `json:"rows" jsonschema:"1 to 300"`
	Cols int `json:"cols" jsonschema:"1 to 500"`
	target
}

type processResizeOutput struct {
	ProcessID string `json:"process_id"`
	Rows      int    `json:"rows"`
	Cols      int    `json:"cols"`
}

func (o processResizeOutput) text() string {
	return fmt.Sprintf("The terminal of process %s has %d rows and %d columns.", o.ProcessID, o.Rows, o.Cols)
}

func (s *Toolbox) processResize(ctx context.Context, in processResizeInput) (processResizeOutput, error) {
	name, err := in.name()
	if err != nil {
		return processResizeOutput{}, err
	}
	_, client, err := s.agent(ctx, in.target, "resize a terminal in")
	if err != nil {
		return processResizeOutput{}, err
	}
	p, err := client.Resize(ctx, agent.ResizeRequest{Process: name, Terminal: agent.Terminal{Rows: in.Rows, Cols: in.Cols}})
	return processResizeOutput{ProcessID: p.ID, Rows: in.Rows, Cols: in.Cols}, err
}

type processWriteInput struct {
	processTarget
	Input   string   `json:"input,omitempty" jsonschema:"text to write; end a line with \\n"`
	Keys    []string `json:"keys,omitempty" jsonschema:"of a tty, pressed after input: enter, esc, tab, up, ctrl-c, f1, alt-x, …"`
	Paste   bool     `json:"paste,omitempty" jsonschema:"of a tty: input comes as a paste"`
	EOF     bool     `json:"eof,omitempty" jsonschema:"close stdin after it; at a tty, type ctrl-d"`
	YieldMS *int64   `json:"yield_ms,omitempty" jsonschema:"how long to wait for an answer, 0 to 50000; default 2000"`
	target
}

// settleTerminal is how long a process must be silent before its answer counts as complete: programs pause briefly while they start and
// draw.
const settleTerminal = 120 * time.Millisecond

func (s *Toolbox) processWrite(ctx context.Context, in processWriteInput) (execOutput, error) {
	name, err := in.name()
	if err != nil {
		return execOutput{}, err
	}
	if in.Input == "" && !in.EOF && len(in.Keys) == 0 {
		return execOutput{}, badArgument("Give the argument \"input\", \"keys\" or \"eof\".")
	}
	if in.YieldMS == nil {
		in.YieldMS = new(int64)
		*in.YieldMS = 2000
	}
	yield, chars, err := waitArguments(in.YieldMS, nil)
	if err != nil {
		return execOutput{}, err
	}
	sb, client, err := s.agent(ctx, in.target, "write in")
	if err != nil {
		return execOutput{}, err
	}
	if in.Input, err = s.typed(ctx, client, sb.ID(), name, in); err != nil {
		return execOutput{}, err
	}
	w := agent.Window{Offset: -1, Head: chars}
	written, early := int64(0), max(0, len(in.Input)-agent.MaxInput) // early bytes are written before the one call that also listens
	if early > 0 {
		before, err := client.Wait(ctx, agent.WaitRequest{Process: name})
		if err != nil {
			return execOutput{}, err
		}
		w.Offset = before.Process.Output
		begin := time.Now()
		writeCtx, cancel := context.WithTimeoutCause(ctx, max(yield, time.Second), errSlowReader)
		written, err = client.WriteStdin(writeCtx, name, []byte(in.Input[:early]), false)
		cancel()
		if err != nil && (ctx.Err() != nil || context.Cause(writeCtx) != errSlowReader) {
			return execOutput{}, err
		}
		yield = max(0, yield-time.Since(begin))
	}
	req := agent.InputRequest{Process: name, Window: w}
	if written == int64(early) {
		req.Data, req.EOF = []byte(in.Input[early:]), in.EOF
	}
	r, err := listen(ctx, client, req, yield)
	if err != nil {
		return execOutput{}, err
	}
	w.Offset = r.Offset
	written += r.Written
	snap := r.Snapshot
	out, serr := s.show(ctx, client, sb.ID(), snap, w, chars, false)
	if serr != nil {
		return execOutput{}, serr
	}
	if written < int64(len(in.Input)) {
		out.Note = fmt.Sprintf("only %d of %d bytes were taken: the process does not read; write the rest later", written, len(in.Input))
	}
	return out, nil
}

// typed is what to write for an input: keys as the program wants them, and a paste in brackets if the program asked for them.
func (s *Toolbox) typed(ctx context.Context, client *agent.Client, sandboxID, name string, in processWriteInput) (string, error) {
	if len(in.Keys) == 0 && !in.Paste {
		return in.Input, nil
	}
	snap, err := client.Wait(ctx, agent.WaitRequest{Process: name})
	if err != nil {
		return "", err
	}
	p := snap.Process
	if p.Terminal == nil {
		return "", badArgument("Process %s has no terminal, so it takes no keys. Give \"input\", or start it with tty.", p.ID)
	}
	input := in.Input
	err = s.screen(ctx, client, sandboxID, p, func(sc *screen) error {
		keys, err := encodeKeys(in.Keys, sc.appCursor)
		if in.Paste && sc.brackets {
			input = "\x1b[200~" + strings.ReplaceAll(input, "\x1b[201~", "") + "\x1b[201~"
		}
		input += keys
		return err
	})
	return input, err
}

var errSlowReader = badArgument("The process does not read its stdin.")

// listen writes to a process, if there is something to write, and waits until the process has answered and is silent, has ended, or the
// time is over. A short yield also shortens the silence that it waits for.
func listen(ctx context.Context, client *agent.Client, req agent.InputRequest, yield time.Duration) (agent.InputResult, error) {
	quiet := min(settleTerminal, max(time.Millisecond, yield/25))
	req.WaitMS, req.SettleMS = yield.Milliseconds(), quiet.Milliseconds()
	ctx, cancel := client.Patience(ctx, yield, agent.Silence)
	defer cancel()
	return client.Input(ctx, req)
}

type processSignalInput struct {
	processTarget
	Signal string `json:"signal,omitempty" jsonschema:"such as SIGINT, SIGTERM, SIGKILL; default SIGTERM"`
	target
}

// processInfo is a process in a list.
type processInfo struct {
	ProcessID string `json:"process_id"`
	Tag       string `json:"tag,omitempty"`
	State     string `json:"state"`
	Command   string `json:"command"`
	User      string `json:"user"`
	Cwd       string `json:"cwd"`
	StartedAt string `json:"started_at"`
	EndedAt   string `json:"ended_at,omitempty"`
	ExitCode  *int   `json:"exit_code,omitempty"`
	Signal    string `json:"signal,omitempty"`
	Cause     string `json:"cause,omitempty"`
	Children  int    `json:"children,omitempty" jsonschema:"processes it left running"`
	CPUMS     int64  `json:"cpu_ms"`
	MemoryMB  int64  `json:"memory_mb,omitempty"`
	Output    int64  `json:"output_bytes"`
}

func describeProcess(p agent.Process) processInfo {
	info := processInfo{
		ProcessID: p.ID, Tag: renderLine(p.Tag), State: render([]byte(p.State)),
		Command: shorten(strings.ReplaceAll(render([]byte(p.Command)), "\n", "; "), 200), User: render([]byte(p.User)),
		Cwd:       names.Show(p.Cwd),
		StartedAt: p.Started.UTC().Format(time.RFC3339Nano), Signal: render([]byte(p.Signal)), Cause: render([]byte(p.Cause)),
		Children: p.Children,
		CPUMS:    p.CPUMS, MemoryMB: (p.Memory + 1<<19) >> 20, Output: p.Output,
	}
	if p.State == agent.StateExited {
		info.ExitCode, info.EndedAt = &p.ExitCode, p.Ended.UTC().Format(time.RFC3339Nano)
	}
	return info
}

func (p processInfo) text() string {
	state := p.State
	if p.ExitCode != nil {
		state = fmt.Sprintf("exited %d", *p.ExitCode)
	}
	for _, more := range []string{p.Signal, p.Cause} {
		if more != "" {
			state += " " + more
		}
	}
	if p.Children > 0 {
		state += fmt.Sprintf(" (%d left running)", p.Children)
	}
	tag := ""
	if p.Tag != "" {
		tag = " tag=" + p.Tag
	}
	times := p.StartedAt
	if p.EndedAt != "" {
		times += " to " + p.EndedAt
	}
	return fmt.Sprintf("%s%s %s, user %s, cwd %s, cpu %d ms, memory %d MB, output %d bytes, %s: %s",
		p.ProcessID, tag, state, p.User, p.Cwd, p.CPUMS, p.MemoryMB, p.Output, times, p.Command)
}

type processSignalOutput struct {
	ProcessID string `json:"process_id"`
	State     string `json:"state"`
	ExitCode  *int   `json:"exit_code,omitempty"`
	Children  int    `json:"children,omitempty"`
}

func (o processSignalOutput) text() string {
	switch {
	case o.ExitCode == nil:
		return "Process " + o.ProcessID + " got the signal and is still running."
	case o.Children > 0:
		return fmt.Sprintf("Process %s has exited with %d; %d of the processes it started still run.", o.ProcessID, *o.ExitCode, o.Children)
	}
	return fmt.Sprintf("Process %s has exited with %d.", o.ProcessID, *o.ExitCode)
}

func (s *Toolbox) processSignal(ctx context.Context, in processSignalInput) (processSignalOutput, error) {
	name, err := in.name()
	if err != nil {
		return processSignalOutput{}, err
	}
	if in.Signal == "" {
		in.Signal = "SIGTERM"
	}
	_, client, err := s.agent(ctx, in.target, "signal in")
	if err != nil {
		return processSignalOutput{}, err
	}
	before, err := client.Signal(ctx, name, in.Signal)
	if err != nil {
		return processSignalOutput{}, err
	}
	// Most signals end a process at once, so report the state that the model will find.
	after, err := client.Wait(ctx, agent.WaitRequest{Process: before.ID, WaitMS: 100})
	if err != nil {
		return processSignalOutput{}, err
	}
	out := processSignalOutput{ProcessID: after.Process.ID, State: after.Process.State, Children: after.Process.Children}
	if out.State == agent.StateExited {
		out.ExitCode = &after.Process.ExitCode
	}
	return out, nil
}

type processListInput struct {
	Tag   string `json:"tag,omitempty"`
	State string `json:"state,omitempty" enum:"running,exited"`
	Limit int    `json:"limit,omitempty" jsonschema:"default 50"`
	target
}

type processListOutput struct {
	SandboxID string        `json:"sandbox_id"`
	Processes []processInfo `json:"processes"`
	More      int           `json:"more,omitempty" jsonschema:"left out by limit"`
}

func (o processListOutput) text() string {
	if len(o.Processes) == 0 {
		return "No processes in sandbox " + o.SandboxID + "."
	}
	var b strings.Builder
	for _, p := range o.Processes {
		b.WriteString(p.text() + "\n")
	}
	if o.More > 0 {
		fmt.Fprintf(&b, "[%d more; raise limit to see them]\n", o.More)
	}
	fmt.Fprintf(&b, "[sandbox %s]", o.SandboxID)
	return b.String()
}

func (s *Toolbox) processList(ctx context.Context, in processListInput) (processListOutput, error) {
	sb, client, err := s.agent(ctx, in.target, "list processes in")
	if err != nil {
		return processListOutput{}, err
	}
	if in.Limit <= 0 {
		in.Limit = 50
	}
	list, err := client.List(ctx, agent.ListRequest{Tag: in.Tag, State: in.State})
	if err != nil {
		return processListOutput{}, err
	}
	out := processListOutput{SandboxID: sb.ID(), Processes: []processInfo{}}
	for _, p := range list[:min(in.Limit, len(list))] {
		out.Processes = append(out.Processes, describeProcess(p))
	}
	out.More = len(list) - len(out.Processes)
	return out, nil
}
