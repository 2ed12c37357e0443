package sandbox

import (
	"context"
	"fmt"
)

// Bind gives a context that also ends with the sandbox, and when this server leaves it to another.
func (s *Sandbox) Bind(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(s.ctx, func() { cancel(context.Cause(s.ctx)) })
	return ctx, func() {
		stop()
		cancel(nil)
	}
}

// Gone says whether the sandbox has ended, or this server has left it to another.
func (s *Sandbox) Gone() bool { return s.ctx.Err() != nil }

// AddEnv adds to the environment of processes that are started from now on. It wakes no sandbox, and one that boots anew has forgotten it.
func (s *Sandbox) AddEnv(ctx context.Context, env map[string]string) error {
	if err := checkEnv(env); err != nil {
		return fmt.Errorf("update sandbox %s: %w", s.id, err)
	}
	client, err := s.Look("tell")
	if err != nil {
		return err
	}
	config := s.current().configuration()
	config.Env = env
	return client.Configure(ctx, config)
}

// Env is the environment that processes are given beside what each of them names.
func (s *Sandbox) Env(ctx context.Context) (map[string]string, error) {
	client, err := s.Agent(ctx, "look at")
	if err != nil {
		return nil, err
	}
	return client.Environment(ctx)
}
