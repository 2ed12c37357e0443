package sandbox

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"soulbox.dev/soulbox/agent"
)

// rescueName begins the names of directories with files taken out of a checkpoint with memory.
const rescueName = "files-"

// secondChance is how long an agent may take to respond if it was silent when its sandbox was saved: the host may have been at fault.
const secondChance = 15 * time.Second

// waking is one resume of a sandbox from what was saved. The copy stays until another is saved, because the sandbox is resumed from it if
// it fails.
type waking struct {
	s    *Sandbox
	o    ResumeOptions
	was  record   // before, with the limits that it gets
	plan bootPlan // from what was saved last
}

// run boots a machine from what was saved.
func (w *waking) run(ctx context.Context) error {
	s := w.s
	w.was = s.current()
	filesOnly := w.was.Pause.FilesOnly
	w.was.Limits = w.was.Limits.grown(w.o.Memory, !filesOnly && !w.o.FilesOnly)
	if err := s.m.capacity.promise(s, w.was.Limits); err != nil {
		return err
	}
	template, err := s.m.opts.Templates.Template(ctx, s.owner, w.was.basis())
	if err == nil {
		err = s.m.opts.Runtime.Reap(ctx, s.m.store.path(s.id)) // left by an end that failed
	}
	silent, rescued := w.was.Pause.Silent, ""
	w.plan = bootPlan{template: template, limits: w.was.Limits, from: s.m.store.kept(w.was), whole: !filesOnly, hurry: silent}
	if err == nil && !(w.o.FilesOnly && !filesOnly) {
		err = s.start(ctx, w.plan)
	}
	if again := !filesOnly && silent && errors.Is(err, agent.ErrLost); again || err == nil && w.o.FilesOnly && !filesOnly {
		if err = s.clear(ctx); err == nil {
			rescued, err = w.rescue(ctx)
		}
		if filesOnly = true; err == nil {
			err = s.start(ctx, bootPlan{template: template, limits: w.was.Limits, from: rescued})
		}
	}
	if err == nil {
		err = w.done(filesOnly)
	}
	if err != nil {
		err = errors.Join(w.hint(err), w.undo())
	}
	if rescued != "" {
		if rerr := s.m.store.RemoveAll(rescued); rerr != nil {
			s.m.log.Error("remove the files that a sandbox was booted from", "sandbox", s.id, "error", rerr) // removed with the sandbox
		}
	}
	return err
}

// done records that the sandbox runs again.
func (w *waking) done(filesOnly bool) error {
	s, was := w.s, w.was
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.isLeft() { // on disk it is safe
		return ErrClosed
	}
	notice := was.missing(filesOnly)
	err := s.become("resume", Running, nil, func(r *record) {
		r.Limits, r.Pause, r.Notice = was.Limits, nil, notice
		if r.Copy == nil { // saved by a server that did not know copies
			r.Copy = &savedCopy{Dir: filepath.Base(s.m.store.checkpoint(s.id, r.Saves)), At: was.Changed, FilesOnly: was.Pause.FilesOnly}
		}
	})
	if err != nil {
		return err
	}
	s.contained.reset()
	if notice != "" {
		s.log.add(LogEntry{Time: s.rec.Changed, Level: LevelWarn, Source: SourceSystem, Message: notice})
	}
	s.begin()
	if start := was.startCommand(); start != nil && filesOnly {
		s.m.work.Go(func() { // it waits until this turn ends
			if err := s.RunStartCommand(s.ctx, *start, nil); err != nil && s.ctx.Err() == nil {
				s.log.note(LevelError, "the service of its template is not up: %v", err)
			}
		})
	}
	return nil
}

// missing says what a resumed sandbox has lost; "" if it lost nothing, or only what its user gave up.
func (r record) missing(filesOnly bool) string {
	text := ""
	if r.State == Failed && r.Copy != nil {
		text = fmt.Sprintf("it had failed (%s) and was resumed from what was saved at %s: what came after that is missing",
			r.Cause, r.Copy.At.UTC().Format(time.RFC3339))
	}
	switch {
	case !filesOnly || r.State == Paused && r.Pause.FilesOnly:
	case text == "":
		text = "it was booted with its files: the processes that were paused are missing"
	default:
		text += ", and its processes, as its files alone were saved"
	}
	return text
}

// rescue takes the files out of a checkpoint with memory, and returns their directory.
func (w *waking) rescue(ctx context.Context) (string, error) {
	s := w.s
	rescuer, ok := s.m.opts.Runtime.(Rescuer)
	if !ok {
		return "", fmt.Errorf("its files cannot be taken out of what was saved with its memory: %w", ErrInvalid)
	}
	limits := s.current().Limits // those that it was saved with
	to := filepath.Join(s.m.store.path(s.id), rescueName+"1")
	if err := s.m.store.RemoveAll(to); err != nil {
		return "", err
	}
	saved, err := s.m.capacity.reserveDisk(s.owner, baseSave+s.meter.now().DiskUsed)
	if err != nil {
		return "", err
	}
	defer saved()
	err = rescuer.Rescue(ctx, Spec{ID: s.id, Dir: s.m.store.path(s.id), Template: w.plan.template, Limits: limits, From: w.plan.from}, to)
	if err != nil {
		return "", errors.Join(fmt.Errorf("take the files out of what was saved: %w", noDisk(err)), s.m.store.RemoveAll(to))
	}
	return to, nil
}

// hint adds to the error of a failed resume what may help.
func (w *waking) hint(err error) error {
	_, ok := w.s.m.opts.Runtime.(Rescuer)
	if errors.Is(err, ErrDamaged) && ok && !w.was.Pause.FilesOnly {
		return fmt.Errorf("%w; what was saved is kept, and can be resumed with its files alone (files_only)", err)
	}
	return err
}

// undo undoes a failed resume.
func (w *waking) undo() (err error) {
	s := w.s
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
		err = endMachine(machine)
	}
	return errors.Join(err, s.m.capacity.takeBack(s))
}
