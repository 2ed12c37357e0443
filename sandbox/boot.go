package sandbox

import (
	"context"
	"fmt"

	"soulbox.dev/soulbox/agent"
)

// bootPlan says what a machine is booted from, and how.
type bootPlan struct {
	template Template
	limits   Limits
	from     string // a checkpoint; "" boots from scratch
	whole    bool   // the checkpoint has memory
	foreign  bool   // that memory is of another sandbox: what its agent has counted there is not this sandbox's
	hurry    bool   // wait only a short time for the agent
}

// boot boots a new sandbox, from a checkpoint if there is one, and reports whether the service of its template already runs in it.
func (s *Sandbox) boot(ctx context.Context, template Template, from string, whole bool) (served bool, err error) {
	defer close(s.booted)
	plan := bootPlan{template: template, limits: s.current().Limits, from: from, whole: whole, foreign: whole}
	if from == "" && template.Start != nil {
		served, err = s.bootServed(ctx, plan)
	} else {
		err = s.start(ctx, plan)
	}
	if err != nil {
		return false, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.become("start", Running, nil, nil); err != nil {
		return false, err // killed meanwhile
	}
	s.begin()
	s.m.work.Go(s.keeper.run)
	return served, nil
}

// bootServed boots a new sandbox from its template's saved service if possible; otherwise the service is still to be started.
func (s *Sandbox) bootServed(ctx context.Context, plan bootPlan) (served bool, err error) {
	saved := *plan.template.Start
	if saved.Saved != "" && saved.Limits.fits(plan.limits) && saved.Network == s.current().Network.On() {
		ready := plan
		ready.from, ready.whole, ready.foreign = saved.Saved, true, true
		if err = s.start(ctx, ready); err == nil || ctx.Err() != nil {
			return true, err
		}
		s.log.note(LevelWarn, "the service of template %s cannot be restored here, so it is started again: %v", plan.template.Name, err)
		if err := s.clear(ctx); err != nil {
			return false, err
		}
	}
	return false, s.start(ctx, plan)
}

// errNotReady means that an agent has not responded in time: the host may have been busy.
var errNotReady = fmt.Errorf("the sandbox was not ready in time: %w", context.DeadlineExceeded)

// start boots the machine and connects to its agent. s holds whatever was started, even if start fails.
func (s *Sandbox) start(ctx context.Context, plan bootPlan) error {
	outer := ctx
	ctx, cancel := context.WithTimeoutCause(ctx, s.m.opts.BootTimeout, errNotReady)
	defer cancel()
	r := s.current()
	r.Limits = plan.limits
	machine, err := s.m.opts.Runtime.Boot(ctx, Spec{ID: s.id, Dir: s.m.store.path(s.id), Template: plan.template, Limits: plan.limits,
		From: plan.from})
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.machine = machine
	s.mu.Unlock()
	if plan.hurry {
		var done context.CancelFunc
		ctx, done = context.WithTimeoutCause(ctx, min(secondChance, s.m.opts.BootTimeout), agent.ErrLost)
		defer done()
	}
	greet := agent.NewClient
	if plan.whole {
		greet = agent.Rejoin
	} else {
		s.meter.see(seen{}) // a new agent counts from zero
	}
	client, err := greet(ctx, machine.Pipe(), s.m.opts.Version)
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.client = client
	s.mu.Unlock()
	config := r.configuration()
	config.Env = s.env
	if err := client.Configure(ctx, config); err != nil {
		return err
	}
	if plan.from != "" {
		afterRestore(ctx, client, plan.whole, s.log)
	}
	if plan.foreign {
		ctx, cancel := context.WithTimeoutCause(outer, s.m.opts.BootTimeout, errNotReady)
		defer cancel()
		return s.meter.skipPast(ctx, client)
	}
	return nil
}

// configuration is what the agent is told when it starts and after changes.
func (r record) configuration() agent.Config {
	return agent.Config{
		User: r.User, Cwd: r.Cwd, MaxProcesses: r.Limits.Processes, MaxMemory: r.Limits.Memory, MaxCPU: r.Limits.CPU,
		OrphanMS: r.orphanTime().Milliseconds(),
	}
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
		if err := endMachine(machine); err != nil {
			return err
		}
	}
	return s.m.opts.Runtime.Reap(ctx, s.m.store.path(s.id))
}
