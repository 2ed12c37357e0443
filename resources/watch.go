package resources

import (
	"context"
	"time"

	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/sandbox"
)

const (
	metricsEvery = 5 * time.Second
	outputPause  = 50 * time.Millisecond // between two reads of a process that writes without end
	filePause    = 20 * time.Millisecond // between two batches of changed files
	rewatchPause = time.Second           // before a watch that has ended is started again
)

// Watch reports every change of a resource until ctx ends. When it returns, no later change is missed.
func (s *Catalog) Watch(ctx context.Context, uri string, changed func()) error {
	n, sb, err := s.resolve(ctx, uri)
	if err != nil {
		return err
	}
	switch n.kind {
	case kindTemplate:
		_, err := s.Read(ctx, uri) // templates never change, but must exist
		return err
	case kindSandbox, kindLogs:
		go watchState(ctx, sb, changed, sb.Changed(), 0)
		return nil
	case kindMetrics:
		go watchState(ctx, sb, changed, sb.Changed(), metricsEvery)
		return nil
	}
	watch := func(ctx context.Context) (over <-chan struct{}, err error) {
		client, err := sb.Agent(ctx, "watch")
		if err != nil {
			return nil, err
		}
		if n.kind == kindOutput {
			return watchOutput(ctx, client, n.process, changed)
		}
		return watchFile(ctx, client, n.path, changed)
	}
	over, err := watch(ctx)
	if err != nil {
		return s.missing(uri, err)
	}
	go keepWatching(ctx, sb, over, watch, changed)
	return nil
}

// keepWatching restarts a watch that ended because the sandbox was paused to disk, once the sandbox runs again. It then reports a change,
// because anything may have changed meanwhile.
func keepWatching(ctx context.Context, sb *sandbox.Sandbox, over <-chan struct{}, watch func(context.Context) (<-chan struct{}, error),
	changed func()) {
	for {
		select {
		case <-over:
		case <-ctx.Done():
			return
		}
		changed()
		select { // a guest that ends each watch at once is asked no faster than this
		case <-time.After(rewatchPause):
		case <-ctx.Done():
			return
		}
		next := sb.Changed()
		for state := sb.Info().State; state != sandbox.Running; state = sb.Info().State {
			if state.Ended() {
				return
			}
			select {
			case <-next:
				next = sb.Changed()
			case <-ctx.Done():
				return
			}
		}
		var err error
		if over, err = watch(ctx); err != nil { // the resource is gone; the client sees that when it reads
			return
		}
		changed()
	}
}

// watchState reports changes of the sandbox itself; if every is not 0, also one at that interval while the sandbox runs.
func watchState(ctx context.Context, sb *sandbox.Sandbox, changed func(), next <-chan struct{}, every time.Duration) {
	var tick <-chan time.Time
	if every > 0 {
		ticker := time.NewTicker(every)
		defer ticker.Stop()
		tick = ticker.C
	}
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick:
			changed()
		case <-next:
			next = sb.Changed()
			changed()
			if sb.Info().State.Ended() {
				return
			}
		}
	}
}

// watchOutput reports that a process has written more, and that it has ended, until over is closed. What it wrote meanwhile is not read
// separately and does not pile up: while we pause, the agent waits.
func watchOutput(ctx context.Context, client *agent.Client, process string, changed func()) (<-chan struct{}, error) {
	begin, cancel := client.Patience(ctx, 0, agent.Silence)
	defer cancel()
	snap, err := client.Wait(begin, agent.WaitRequest{Process: process})
	if err != nil {
		return nil, err
	}
	over := make(chan struct{})
	go func() {
		err := client.Output(ctx, process, snap.Process.Output, true, func(agent.OutputFrame) error {
			changed()
			select {
			case <-time.After(outputPause):
				return nil
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		})
		if err != nil { // without an error the process has ended, and no more follows
			close(over)
		}
	}()
	return over, nil
}

// watchFile returns when the agent has started to watch; over is closed when the watch ends.
func watchFile(ctx context.Context, client *agent.Client, path string, changed func()) (<-chan struct{}, error) {
	began, over := make(chan error, 1), make(chan struct{})
	ctx, cancel := context.WithCancelCause(ctx)
	go func() {
		defer close(over)
		defer cancel(nil)
		started := false
		err := client.Watch(ctx, path, func() { started = true; began <- nil }, func(agent.WatchBatch) error {
			changed()
			select {
			case <-time.After(filePause):
				return nil
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		})
		if !started {
			began <- err
		}
	}()
	begin, stop := client.Patience(ctx, 0, agent.Silence)
	defer stop()
	select {
	case err := <-began:
		return over, err
	case <-begin.Done():
		cancel(context.Cause(begin))
	}
	return nil, context.Cause(ctx)
}
