package sandbox

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strconv"
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
func (s *Sandbox) contain(machine Machine, over *OverError) {
	if over.Used <= 2*over.Limit && !s.contained.due() { // a machine at more than twice its limit does not wait
		return
	}
	if over.Kind == OverStopped {
		if c, ok := s.m.opts.Runtime.(Continuer); ok {
			if err := c.Continue(s.m.store.path(s.id)); err != nil {
				s.m.log.Warn("continue the processes of a sandbox", "sandbox", s.id, "error", err)
			}
		}
	}
	if s.relieve(machine, over) {
		return
	}
	cause := over.cause()
	s.m.log.Warn("a sandbox is paused, because it must not continue", "sandbox", s.id, "cause", cause)
	o := PauseOptions{ToDisk: true, Cause: cause, forced: true, wedged: over.Kind == OverSilent}
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
		if s.saveFiles(); s.runs() {
			_ = s.end(Failed, cause) // end logs its error
		}
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
		return CauseWedged
	}
	return CauseSilent
}

// saveFiles saves what it can of a sandbox that is about to fail: its files.
func (s *Sandbox) saveFiles() {
	ctx, over, err := s.takeTurn(s.ctx, "save the files of")
	if err != nil {
		return // it has ended
	}
	defer over()
	ctx, cancel := context.WithTimeout(ctx, filesTime)
	defer cancel()
	if err := s.copy(ctx, true); err != nil {
		s.m.log.Error("save the files of a sandbox that has failed", "sandbox", s.id, "error", err)
	}
}

// savedCopy describes what was saved of a sandbox.
type savedCopy struct {
	Dir       string    `json:"dir"` // in the sandbox's directory
	At        time.Time `json:"at"`
	FilesOnly bool      `json:"files_only,omitempty"`
	Size      int64     `json:"size,omitempty"` // bytes on disk
}

// copyName begins the names of copies of sandboxes that continue; copies of paused sandboxes are named checkpoint-N.
const copyName = "copy-"

// copy saves the sandbox as it is in place of its last copy; the sandbox continues. The caller has the turn.
func (s *Sandbox) copy(ctx context.Context, filesOnly bool) error {
	number := s.current().Saves + 1
	name := copyName + strconv.Itoa(number)
	dir := filepath.Join(s.m.store.path(s.id), name)
	at := time.Now()
	err := errors.Join(s.m.store.RemoveAll(dir+unfinishedSave), s.m.store.RemoveAll(dir))
	if err == nil {
		_, filesOnly, err = s.save(ctx, dir+unfinishedSave, filesOnly)
	}
	if err == nil {
		err = s.m.store.finish(dir, filesOnly)
	}
	if err != nil {
		return errors.Join(noDisk(err), s.m.store.RemoveAll(dir+unfinishedSave))
	}
	size, err := sizeOf(dir)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.rec.State != Running && s.rec.State != Paused || s.rec.onDisk() {
		return s.wrong("protect") // whoever ended it removes the copy
	}
	old := s.m.store.kept(s.rec)
	r := s.rec
	r.Saves, r.Copy = number, &savedCopy{Dir: name, At: at, FilesOnly: filesOnly, Size: size}
	if err := s.commit(r); err != nil {
		return errors.Join(err, s.m.store.RemoveAll(dir))
	}
	s.unchanged = at
	s.log.announce()
	if old != "" {
		return s.m.store.RemoveAll(old)
	}
	return nil
}

// afterFailure is how a sandbox that fails is kept: its last copy can be resumed; nil means that there is none.
func (r record) afterFailure(now time.Time) *pause {
	if r.Copy == nil {
		return nil
	}
	return &pause{Disk: true, FilesOnly: r.Copy.FilesOnly, Since: now}
}

// dropCopies removes copies that an owner's sandboxes would need only if they failed, the oldest first, until lack bytes are freed.
// Sandboxes with Protect keep their copies.
func (m *Manager) dropCopies(owner string, lack int64) {
	var old []*Sandbox
	for _, s := range m.all() {
		if r := s.current(); s.owner == owner && r.Copy != nil && !r.onDisk() && !r.Protect.on() {
			old = append(old, s)
		}
	}
	sortBy(old, func(s *Sandbox) time.Time {
		if c := s.current().Copy; c != nil {
			return c.At
		}
		return time.Time{}
	})
	for _, s := range old {
		if lack <= 0 {
			return
		}
		size, err := s.dropCopy()
		if err != nil {
			m.log.Error("remove a copy to make room", "sandbox", s.id, "error", err)
		}
		lack -= size
	}
}

// dropCopy removes the last copy of a running sandbox, and returns how many bytes that frees.
func (s *Sandbox) dropCopy() (int64, error) {
	dir, size, err := s.forgetCopy()
	if err != nil || dir == "" {
		return 0, err
	}
	return size, s.m.store.RemoveAll(dir)
}

// forgetCopy removes the last copy of a running sandbox from its record, and returns the copy's directory and size in bytes.
func (s *Sandbox) forgetCopy() (dir string, size int64, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.rec.Copy == nil || s.rec.State != Running || s.hold != nil {
		return "", 0, nil
	}
	dir, size = s.m.store.kept(s.rec), s.rec.Copy.Size
	r := s.rec
	r.Copy = nil
	if err := s.commit(r); err != nil {
		return "", 0, err
	}
	return dir, size, nil
}

// relieveTime bounds how long the agent may take to end processes, and how long their memory may take to be freed.
const relieveTime = 5 * time.Second

// relieve makes the agent end what takes most of a machine that is over its bounds, and reports whether that was enough.
func (s *Sandbox) relieve(machine Machine, over *OverError) bool {
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
		now := machine.Check()
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
