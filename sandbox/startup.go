package sandbox

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
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
		defer tellOutput(ctx, client, started.Process.ID, each, s.m.log.With("sandbox", s.id))()
	}
	ctx, cancel := context.WithTimeoutCause(ctx, readyTime, fmt.Errorf("the service of the template was not ready within %s", readyTime))
	defer cancel()
	if start.Ready != "" {
		err = awaitReady(ctx, client, start.Ready)
	} else {
		err = awaitAnyPort(ctx, client, s.Listening)
	}
	if err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return withOutput(client, err)
	}
	return nil
}

// tellOutput passes on what a process writes, until over is called, which passes on the rest.
func tellOutput(ctx context.Context, client *agent.Client, process string, each func(agent.OutputFrame), log *slog.Logger) (over func()) {
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
			log.Debug("read the output of a service", "error", err)
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

// awaitAnyPort waits until something listens on a port, or for silentTime.
func awaitAnyPort(ctx context.Context, client *agent.Client, listening func(context.Context) ([]int, error)) error {
	for end := time.Now().Add(silentTime); time.Now().Before(end); {
		ports, err := listening(ctx)
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
func withOutput(client *agent.Client, err error) error {
	ctx, cancel := context.WithTimeout(context.Background(), tellTime)
	defer cancel()
	got, werr := client.Wait(ctx, agent.WaitRequest{Process: StartTag, Window: agent.Window{Tail: 2000}})
	if werr != nil || len(got.Output.Tail)+len(got.Output.Head) == 0 {
		return err
	}
	return fmt.Errorf("%w; its output ends with:\n%s", err, agent.InertEnds(got.Output))
}
