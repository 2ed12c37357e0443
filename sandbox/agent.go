package sandbox

import (
	"context"
	"fmt"

	"soulbox.dev/soulbox/agent"
)

// Agent returns the client for the sandbox's agent, for the verb that the caller is about to do. It wakes a paused sandbox if calls may
// wake it.
func (s *Sandbox) Agent(ctx context.Context, verb string) (*agent.Client, error) {
	return s.agentFor(ctx, verb, true)
}

// AgentIfAwake is Agent for a caller that returns to something it began earlier: it does not wake a sandbox that was paused meanwhile.
func (s *Sandbox) AgentIfAwake(ctx context.Context, verb string) (*agent.Client, error) {
	return s.agentFor(ctx, verb, false)
}

// agentFor waits for a change that is under way, and wakes a sandbox that calls may wake if wake says so.
func (s *Sandbox) agentFor(ctx context.Context, verb string, wake bool) (*agent.Client, error) {
	for {
		s.mu.Lock()
		changing, state, auto := s.changing, s.rec.State, s.rec.Pause != nil && s.rec.Pause.AutoResume
		switch {
		case s.isLeft():
			s.mu.Unlock()
			return nil, fmt.Errorf("%s sandbox %s: %w", verb, s.id, ErrClosed)
		case changing != nil && !state.Ended():
			s.mu.Unlock()
			select {
			case <-changing:
			case <-ctx.Done():
				return nil, context.Cause(ctx)
			}
		case state == Running:
			defer s.mu.Unlock()
			if s.client == nil && s.unfit == nil { // it is about to be saved
				return nil, fmt.Errorf("%s sandbox %s: %w", verb, s.id, agent.ErrSilent)
			}
			return s.client, s.unfit
		case state == Paused && auto && wake:
			s.mu.Unlock()
			if err := s.Resume(ctx); err != nil && !s.runs() {
				return nil, err
			}
		default:
			defer s.mu.Unlock()
			return nil, s.wrong(verb)
		}
	}
}

// Look is Agent for a caller that only wants to know something about a running sandbox: it wakes no sandbox.
func (s *Sandbox) Look(verb string) (*agent.Client, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.unfit != nil {
		return nil, s.unfit
	}
	if s.rec.State != Running || s.changing != nil || s.client == nil {
		return nil, s.wrong(verb)
	}
	return s.client, nil
}

// Bind returns a context that also ends when the sandbox ends or when this server leaves it to another.
func (s *Sandbox) Bind(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(s.ctx, func() { cancel(context.Cause(s.ctx)) })
	return ctx, func() {
		stop()
		cancel(nil)
	}
}

// Gone reports whether the sandbox has ended or this server has left it to another.
func (s *Sandbox) Gone() bool { return s.ctx.Err() != nil }

// AddEnv adds to the environment of processes that are started from now on. It wakes no sandbox, and the addition is lost when the sandbox
// boots again.
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
