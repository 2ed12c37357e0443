package sandbox

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"soulbox.dev/soulbox/agent"
)

// rescueName begins the names of files that were taken out of a checkpoint with memory.
const rescueName = "files-"

// wedgedTime bounds how long an agent may take that was silent when its sandbox was saved. It is asked once more: the host may have been at
// fault.
const wedgedTime = 15 * time.Second

// wake boots a machine from what was saved. That stays until something else is saved: it is what the sandbox is resumed from if it fails.
func (s *Sandbox) wake(ctx context.Context, o ResumeOptions) error {
	r := s.current()
	filesOnly := r.Pause.FilesOnly
	r.Limits = r.Limits.grown(o.Memory, !filesOnly && !o.FilesOnly)
	if err := s.m.promiseAgain(s, r.Limits); err != nil {
		return err
	}
	template, err := s.m.opts.Templates.Template(ctx, s.owner, r.basis())
	if err == nil {
		err = s.m.opts.Runtime.Reap(ctx, s.m.store.path(s.id)) // what a failed end has left
	}
	from, rescued := s.m.store.kept(r), ""
	if err == nil && !(o.FilesOnly && !filesOnly) {
		err = s.startWith(ctx, template, from, !filesOnly, r.Limits, r.Pause.Wedged)
	}
	if again := !filesOnly && r.Pause.Wedged && errors.Is(err, agent.ErrLost); again || err == nil && o.FilesOnly && !filesOnly {
		if err = s.clear(ctx); err == nil {
			rescued, err = s.rescue(ctx, template, from)
		}
		if filesOnly = true; err == nil {
			err = s.startWith(ctx, template, rescued, false, r.Limits, false)
		}
	}
	if err == nil {
		err = s.awake(r, filesOnly)
	}
	if err != nil {
		err = errors.Join(s.wakeHint(r, err), s.lieDown())
	}
	if rescued != "" {
		if rerr := s.m.store.RemoveAll(rescued); rerr != nil {
			s.m.log.Error("remove the files that a sandbox was booted from", "sandbox", s.id, "error", rerr) // they go with the sandbox
		}
	}
	return err
}

// awake says that the sandbox runs again.
func (s *Sandbox) awake(was record, filesOnly bool) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.isLeft() { // on disk it is safe
		return ErrClosed
	}
	notice := was.missing(filesOnly)
	err := s.become("resume", Running, nil, func(r *record) {
		r.Limits, r.Pause, r.Notice = was.Limits, nil, notice
		if r.Copy == nil { // it was saved by a server that knew no copies
			r.Copy = &savedCopy{Dir: filepath.Base(s.m.store.checkpoint(s.id, r.Saves)), At: was.Changed, FilesOnly: was.Pause.FilesOnly}
		}
	})
	if err != nil {
		return err
	}
	s.contained.reset()
	if notice != "" {
		s.write(LogEntry{Time: s.rec.Changed, Level: LevelWarn, Source: SourceSystem, Message: notice})
	}
	s.begin()
	if service := was.service(); service != nil && filesOnly {
		s.m.work.Go(func() { // it needs the sandbox, whose turn this one has
			if err := s.StartService(s.ctx, *service, nil); err != nil && s.ctx.Err() == nil {
				s.note(LevelError, "the service of its template is not up: %v", err)
			}
		})
	}
	return nil
}

// missing tells what is not there any more of a sandbox that is resumed; "" is nothing, or what its user wanted.
func (r record) missing(filesOnly bool) string {
	text := ""
	if r.State == Failed && r.Copy != nil {
		text = fmt.Sprintf("it had failed (%s) and was resumed from what was saved at %s: what came after that is missing",
			r.Cause, r.Copy.At.UTC().Format(time.RFC3339))
	}
	switch {
	case !filesOnly || r.State == Paused && r.Pause.FilesOnly:
	case text == "":
		text = "it was booted anew with its files: the processes that were paused are missing"
	default:
		text += ", and its processes, as its files alone were saved"
	}
	return text
}

// rescue takes the files out of a checkpoint with memory, and gives the directory that has them.
func (s *Sandbox) rescue(ctx context.Context, template Template, from string) (string, error) {
	rescuer, ok := s.m.opts.Runtime.(Rescuer)
	if !ok {
		return "", fmt.Errorf("its files cannot be taken out of what was saved with its memory: %w", ErrInvalid)
	}
	r := s.current()
	to := filepath.Join(s.m.store.path(s.id), rescueName+"1")
	if err := s.m.store.RemoveAll(to); err != nil {
		return "", err
	}
	saved, err := s.m.roomOnDisk(s.owner, baseSave+s.meter.now().DiskUsed)
	if err != nil {
		return "", err
	}
	defer saved()
	err = rescuer.Rescue(ctx, Spec{ID: s.id, Dir: s.m.store.path(s.id), Template: template, Limits: r.Limits, From: from}, to)
	if err != nil {
		return "", errors.Join(fmt.Errorf("take the files out of what was saved: %w", noDisk(err)), s.m.store.RemoveAll(to))
	}
	return to, nil
}

// wakeHint tells whoever cannot resume a sandbox as it was what may help.
func (s *Sandbox) wakeHint(r record, err error) error {
	_, ok := s.m.opts.Runtime.(Rescuer)
	if errors.Is(err, ErrDamaged) && ok && !r.Pause.FilesOnly {
		return fmt.Errorf("%w; what was saved is kept, and can be resumed with its files alone (files_only)", err)
	}
	return err
}

// lieDown takes back a waking that has failed.
func (s *Sandbox) lieDown() (err error) {
	s.mu.Lock()
	machine, client := s.machine, s.client
	if !s.rec.ended() {
		s.machine, s.client = nil, nil
	}
	s.mu.Unlock()
	if client != nil {
		_ = client.Close()
	}
	if machine != nil {
		err = s.endMachine(machine)
	}
	return errors.Join(err, s.m.unpromise(s))
}
