package sandbox

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"syscall"
	"time"

	"soulbox.dev/soulbox/agent"
)

const (
	// containTries is how many failed attempts to pause a sandbox that must not continue make it fail. containPause is the time between the
	// first two attempts; it doubles.
	containTries = 3
	containPause = 5 * time.Second
	// filesTime bounds how long saving the files of a sandbox that is about to fail may take.
	filesTime = 2 * time.Minute
)

// tries counts failed attempts. It is safe for concurrent use.
type tries struct {
	mu    sync.Mutex
	count int
	next  time.Time // no attempt before this time
}

func (t *tries) reset() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.count, t.next = 0, time.Time{}
}

func (t *tries) due() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return !time.Now().Before(t.next)
}

// wait delays the next attempt without counting a failure.
func (t *tries) wait() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.next = time.Now().Add(containPause)
}

// failed counts one more failure, and reports whether that was the last attempt.
func (t *tries) failed() (last bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.next = time.Now().Add(containPause << t.count)
	t.count++
	return t.count >= containTries
}

// contain deals with a machine that is over its bounds or silent. If ending processes inside is enough, the sandbox continues; otherwise it
// is paused to disk, or in memory if that fails. Only if it cannot be paused several times does the sandbox fail, with its files if they
// can be saved.
func (c *link) contain(over *OverError) {
	s := c.s
	if over.Used <= 2*over.Limit && !s.contained.due() { // a machine at more than twice its limit does not wait
		return
	}
	if over.Kind == OverStopped {
		if r, ok := s.m.opts.Runtime.(Continuer); ok {
			if err := r.Continue(s.m.store.path(s.id)); err != nil {
				s.m.log.Warn("continue the processes of a sandbox", "sandbox", s.id, "error", err)
			}
		}
	}
	if c.relieve(over) {
		return
	}
	cause := over.cause()
	s.m.log.Warn("a sandbox is paused, because it must not continue", "sandbox", s.id, "cause", cause)
	o := PauseOptions{ToDisk: true, Cause: cause, forced: true, silent: over.Kind == OverSilent}
	err := s.pause(s.ctx, o)
	if err == nil || !s.runs() || s.ctx.Err() != nil {
		return
	}
	s.log.note(LevelError, "it could not be paused to disk: %v", err)
	o.ToDisk = false
	if err = s.pause(s.ctx, o); err == nil || !s.runs() || s.ctx.Err() != nil {
		return
	}
	s.m.log.Error("a sandbox that must not continue could not be paused", "sandbox", s.id, "error", err)
	if isOfHost(err) && over.Used <= 2*over.Limit { // a fault of the host says nothing about the sandbox
		s.contained.wait()
		return
	}
	if s.contained.failed() {
		if c.saveFiles(); s.runs() {
			_ = s.end(Failed, cause) // end logs its error
		}
	}
}

// saveFiles saves what it can of a sandbox that is about to fail: its files.
func (c *link) saveFiles() {
	s := c.s
	ctx, over, err := s.takeTurn(s.ctx, "save the files of")
	if err != nil {
		return // it has ended
	}
	defer over()
	ctx, cancel := context.WithTimeout(ctx, filesTime)
	defer cancel()
	if err := s.copies.make(ctx, true); err != nil {
		s.m.log.Error("save the files of a sandbox that has failed", "sandbox", s.id, "error", err)
	}
}

// isOfHost reports whether an error comes from the host, which is out of descriptors, memory or disk space for the moment.
func isOfHost(err error) bool {
	for _, e := range []error{syscall.EMFILE, syscall.ENFILE, syscall.ENOMEM, syscall.EAGAIN, syscall.EINTR, syscall.EIO, syscall.ENOSPC,
		syscall.EDQUOT} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// cause is why the sandbox is paused, in words for its owner.
func (e *OverError) cause() Cause {
	switch e.Kind {
	case OverMemory:
		return Cause(e.Error() + "; resume it with more memory, or end processes")
	case OverKernel:
		return Cause(e.Error() + "; resume it with more memory, or delete files and close connections")
	case OverStopped:
		return CauseStopped
	}
	return CauseSilent
}

// relieveTime bounds how long the agent may take to end processes, and how long their memory may take to be freed.
const relieveTime = 5 * time.Second

// relieve makes the agent end what takes most of a machine that is over its bounds, and reports whether that was enough.
func (c *link) relieve(over *OverError) bool {
	s := c.s
	s.mu.Lock()
	client := s.client
	s.mu.Unlock()
	if client == nil || over.Kind != OverMemory && over.Kind != OverKernel || over.Used > 2*over.Limit {
		return false
	}
	ctx, cancel := context.WithTimeout(s.ctx, relieveTime)
	defer cancel()
	result, err := client.Relieve(ctx, agent.RelieveRequest{Kind: string(over.Kind), Target: over.Used - over.Limit + over.Limit/4})
	if err != nil {
		s.m.log.Warn("relieve a sandbox", "sandbox", s.id, "error", err)
		return false
	}
	over.Detail = plain(result.Detail)
	if len(result.Killed) == 0 {
		return false
	}
	s.log.note(LevelWarn, "%v: these were ended to make room: %s", over, describeRelieved(result.Killed))
	for sleepFor(ctx, gracePoll) {
		now := c.machine.Check()
		var still *OverError
		if !errors.As(now, &still) {
			return true // if the machine is gone or cannot be asked about, watch finds out
		}
		if still.Used > 2*still.Limit {
			return false
		}
	}
	return s.ctx.Err() != nil
}

// describeRelieved names what the agent ended.
func describeRelieved(killed []agent.Relieved) string {
	var texts []string
	for _, k := range killed[:min(len(killed), 5)] {
		text := fmt.Sprintf("process %s (%s, pid %d", plain(k.Process), plain(k.Name), k.PID)
		if k.Processes > 1 {
			text += fmt.Sprintf(" and %d more", k.Processes-1)
		}
		texts = append(texts, text+fmt.Sprintf(", %d MB, %d descriptors)", k.Memory>>20, k.Descriptors))
	}
	if more := len(killed) - len(texts); more > 0 {
		texts = append(texts, fmt.Sprintf("and %d more", more))
	}
	return strings.Join(texts, ", ")
}
