package sandbox

import (
	"context"
	"errors"
	"fmt"
	"time"

	"soulbox.dev/soulbox/agent"
)

// Service is what runs in every sandbox of a template.
type Service struct {
	Start string // a command of the shell, as the template's user
	Ready string // one that succeeds once the service is ready; "" waits until something listens on a port, or a short while
	// Saved is the directory of a checkpoint in which it is ready already, of a sandbox with these Limits; "" is none.
	Saved   string
	Limits  Limits
	Network bool // that one has a network, which its processes know of
}

// service is the service of a sandbox' template, which is not saved; nil is none.
func (r record) service() *Service {
	if r.StartCmd == "" {
		return nil
	}
	return &Service{Start: r.StartCmd, Ready: r.ReadyCmd}
}

// ServiceTag is the tag of a service's process.
const ServiceTag = "start"

// Bounds of the wait for a service.
const (
	readyTime  = 60 * time.Second
	readyPoll  = 50 * time.Millisecond
	silentTime = 5 * time.Second // of one of which nobody knows when it is ready
)

// errService is of a service that ended before it was ready.
var errService = errors.New("the service of the template has ended before it was ready")

// StartService starts a service in the sandbox and waits until it is ready. Its error has the last of its output.
func (s *Sandbox) StartService(ctx context.Context, service Service) error {
	client, err := s.Agent(ctx, "start the service of")
	if err != nil {
		return err
	}
	if _, err := client.Start(ctx, agent.StartRequest{Command: service.Start, Tag: ServiceTag}); err != nil {
		return fmt.Errorf("start service: %w", err)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, readyTime, fmt.Errorf("the service of the template was not ready within %s", readyTime))
	defer cancel()
	began := time.Now()
	for {
		ready, err := s.isReady(ctx, client, service)
		if err == nil && ready || err == nil && service.Ready == "" && time.Since(began) > silentTime {
			return nil
		}
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		if err != nil {
			return s.withOutput(client, err)
		}
		select {
		case <-time.After(readyPoll):
		case <-ctx.Done():
		}
	}
}

// isReady says whether the service is. One that has ended is none, unless it did what it was for and ended well.
func (s *Sandbox) isReady(ctx context.Context, client *agent.Client, service Service) (bool, error) {
	if service.Ready != "" {
		got, err := client.Start(ctx, agent.StartRequest{Command: service.Ready, WaitMS: readyTime.Milliseconds(), TimeoutMS: readyTime.Milliseconds()})
		if err == nil && got.Process.State == agent.StateExited && got.Process.ExitCode == 0 {
			return true, nil
		}
		if err != nil {
			return false, err
		}
	} else if ports, err := s.Listening(ctx); err != nil || len(ports) > 0 {
		return err == nil, err
	}
	got, err := client.Wait(ctx, agent.WaitRequest{Process: ServiceTag})
	if err == nil && got.Process.State == agent.StateExited && got.Process.ExitCode != 0 {
		err = fmt.Errorf("%w: exit code %d", errService, got.Process.ExitCode)
	}
	return false, err
}

// withOutput adds what the service has said to an error.
func (s *Sandbox) withOutput(client *agent.Client, err error) error {
	ctx, cancel := context.WithTimeout(context.Background(), tellTime)
	defer cancel()
	got, werr := client.Wait(ctx, agent.WaitRequest{Process: ServiceTag, Window: agent.Window{Tail: 2000}})
	if werr != nil || len(got.Output.Tail)+len(got.Output.Head) == 0 {
		return err
	}
	return fmt.Errorf("%w; its output ends with:\n%s", err, agent.Inert(append(got.Output.Head, got.Output.Tail...)))
}

// SaveTo saves the sandbox, memory and processes too, in a directory that is made; it goes on. What is begun from there needs the same template and
// the same limits.
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

// bootWithService boots a new sandbox with the service of its template as it was saved, where that is possible; else it is to be started.
func (s *Sandbox) bootWithService(ctx context.Context, template Template) (served bool, err error) {
	service := *template.Service
	r := s.current()
	if service.Saved != "" && service.Limits == r.Limits && service.Network == r.Network.On() {
		err := s.start(ctx, template, service.Saved, true)
		if err == nil {
			err = s.skip(ctx)
		}
		if err == nil || ctx.Err() != nil {
			return true, err
		}
		s.note(LevelWarn, "the service of template %s cannot be restored here, so it is started anew: %v", template.Name, err)
		if err := s.clear(ctx); err != nil {
			return false, err
		}
	}
	return false, s.start(ctx, template, "", false)
}

// clear takes away what a failed start has left.
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
