package sandbox

import (
	"context"
	"errors"
	"fmt"
	"time"

	"soulbox.dev/soulbox/agent"
)

// StartCommand starts the service of a template, a program that runs in every sandbox of that template.
type StartCommand struct {
	Command string // for a shell, run as the template's user
	Ready   string // a command that succeeds once the service is ready; "" waits until something listens on a port, or a short while
	// Saved is the directory of a checkpoint in which the service is ready already, of a sandbox with these Limits; "" if there is none.
	Saved   string
	Limits  Limits
	Network bool // the saved sandbox has a network, and its processes know that
}

// startCommand returns the start command of a sandbox's template, without a checkpoint; nil if there is none.
func (r record) startCommand() *StartCommand {
	if r.StartCmd == "" {
		return nil
	}
	return &StartCommand{Command: r.StartCmd, Ready: r.ReadyCmd}
}

// StartTag is the tag of the process of a start command.
const StartTag = "start"

// Bounds of the wait for a service.
const (
	readyTime  = 60 * time.Second
	readyLook  = 500 * time.Millisecond // interval of the checks whether the service still runs
	readyPoll  = 50 * time.Millisecond
	silentTime = 5 * time.Second // wait for a service that opens no port and has no Ready
)

// errService means that the service ended before it was ready.
var errService = errors.New("the service of the template has ended before it was ready")

// RunStartCommand starts a service in the sandbox and waits until it is ready. Its error includes the end of the service's output; each,
// if not nil, gets all of the output.
func (s *Sandbox) RunStartCommand(ctx context.Context, start StartCommand, each func(agent.OutputFrame)) error {
	client, err := s.Agent(ctx, "start the service of")
	if err != nil {
		return err
	}
	started, err := client.Start(ctx, agent.StartRequest{Command: start.Command, Tag: StartTag})
	if err != nil {
		return fmt.Errorf("start service: %w", err)
	}
	if each != nil {
		defer s.tellOutput(ctx, client, started.Process.ID, each)()
	}
	ctx, cancel := context.WithTimeoutCause(ctx, readyTime, fmt.Errorf("the service of the template was not ready within %s", readyTime))
	defer cancel()
	await := s.awaitPort
	if start.Ready != "" {
		await = func(ctx context.Context, client *agent.Client) error { return awaitReady(ctx, client, start.Ready) }
	}
	if err := await(ctx, client); err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return s.withOutput(client, err)
	}
	return nil
}

// tellOutput passes on what a process writes, until over is called, which passes on the rest.
func (s *Sandbox) tellOutput(ctx context.Context, client *agent.Client, process string, each func(agent.OutputFrame)) (over func()) {
	var next int64
	tell := func(f agent.OutputFrame) error {
		if f.End == nil {
			each(f)
			next = f.Offset + int64(len(f.Data))
		}
		return nil
	}
	following, stop := context.WithCancel(ctx)
	told := make(chan struct{})
	go func() {
		defer close(told)
		_ = client.Output(following, process, 0, true, tell) // until it is stopped; over reads the rest
	}()
	return func() {
		stop()
		<-told
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), tellTime)
		defer cancel()
		if err := client.Output(ctx, process, next, false, tell); err != nil {
			s.m.log.Debug("read the output of a service", "sandbox", s.id, "error", err)
		}
	}
}

// awaitReady waits until a command succeeds in the sandbox. The loop runs inside, so that it is one process and not one for each attempt.
func awaitReady(ctx context.Context, client *agent.Client, ready string) error {
	asking, err := client.Start(ctx, agent.StartRequest{Command: "until (\n" + ready + "\n) > /dev/null 2>&1; do sleep 0.1; done",
		TimeoutMS: readyTime.Milliseconds()})
	for {
		if err != nil {
			return err
		}
		if asking.Process.State == agent.StateExited {
			if asking.Process.ExitCode != 0 { // the shell cannot run it, or it timed out
				return fmt.Errorf("the command that says whether the service is ready has ended with exit code %d", asking.Process.ExitCode)
			}
			return nil
		}
		if err := hasEnded(ctx, client); err != nil {
			return err
		}
		asking, err = client.Wait(ctx, agent.WaitRequest{Process: asking.Process.ID, WaitMS: readyLook.Milliseconds()})
	}
}

// awaitPort waits until something listens on a port, or for silentTime.
func (s *Sandbox) awaitPort(ctx context.Context, client *agent.Client) error {
	for end := time.Now().Add(silentTime); time.Now().Before(end); {
		ports, err := s.Listening(ctx)
		if err != nil || len(ports) > 0 {
			return err
		}
		if err := hasEnded(ctx, client); err != nil {
			return err
		}
		select {
		case <-time.After(readyPoll):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

// hasEnded returns an error if the service has ended, unless it ended with exit code 0, having done its work.
func hasEnded(ctx context.Context, client *agent.Client) error {
	got, err := client.Wait(ctx, agent.WaitRequest{Process: StartTag})
	if err == nil && got.Process.State == agent.StateExited && got.Process.ExitCode != 0 {
		err = fmt.Errorf("%w: exit code %d", errService, got.Process.ExitCode)
	}
	return err
}

// withOutput adds the end of the service's output to an error.
func (s *Sandbox) withOutput(client *agent.Client, err error) error {
	ctx, cancel := context.WithTimeout(context.Background(), tellTime)
	defer cancel()
	got, werr := client.Wait(ctx, agent.WaitRequest{Process: StartTag, Window: agent.Window{Tail: 2000}})
	if werr != nil || len(got.Output.Tail)+len(got.Output.Head) == 0 {
		return err
	}
	return fmt.Errorf("%w; its output ends with:\n%s", err, agent.InertEnds(got.Output))
}

// SaveTo saves the sandbox, including memory and processes, in a directory that it creates; the sandbox continues. A sandbox that begins
// from there needs the same template and the same limits.
func (s *Sandbox) SaveTo(ctx context.Context, dir string) error {
	ctx, over, err := s.takeTurn(ctx, "save")
	if err != nil {
		return err
	}
	defer over()
	if _, _, err := s.save(ctx, dir, false); err != nil {
		return fmt.Errorf("save sandbox %s: %w", s.id, s.whyEnded(noDisk(err)))
	}
	return nil
}

// bootWithStartCommand boots a new sandbox from its template's saved service if possible; otherwise the service is still to be started.
func (s *Sandbox) bootWithStartCommand(ctx context.Context, template Template) (served bool, err error) {
	saved := *template.Start
	r := s.current()
	if saved.Saved != "" && saved.Limits.fits(r.Limits) && saved.Network == r.Network.On() {
		err := s.start(ctx, template, saved.Saved, true)
		if err == nil {
			err = s.skip(ctx)
		}
		if err == nil || ctx.Err() != nil {
			return true, err
		}
		s.log.note(LevelWarn, "the service of template %s cannot be restored here, so it is started again: %v", template.Name, err)
		if err := s.clear(ctx); err != nil {
			return false, err
		}
	}
	return false, s.start(ctx, template, "", false)
}

// clear removes what a failed start left.
func (s *Sandbox) clear(ctx context.Context) error {
	s.mu.Lock()
	machine, client := s.machine, s.client
	s.machine, s.client = nil, nil
	s.mu.Unlock()
	if client != nil {
		_ = client.Close()
	}
	if machine != nil {
		if err := s.endMachine(machine); err != nil {
			return err
		}
	}
	return s.m.opts.Runtime.Reap(ctx, s.m.store.path(s.id))
}
