package gvisor

import (
	"context"
	"errors"
	"fmt"

	"soulbox.dev/soulbox/sandbox"
)

// Rescue implements sandbox.Rescuer. It restores the machine, and freezes it before anything talks to it.
func (r *Runtime) Rescue(ctx context.Context, spec sandbox.Spec, to string) (err error) {
	if err := r.check(); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("rescue files: %w", err)
		}
	}()
	var m *machine
	begin, err := r.beginFrom(spec.Dir, spec.From)
	if err == nil {
		m, err = r.begin(ctx, spec, begin)
	}
	if err != nil {
		return errors.Join(err, r.undo(spec.Dir))
	}
	err = m.Checkpoint(ctx, to, sandbox.CheckpointOptions{FilesOnly: true})
	ending, cancel := context.WithTimeout(context.Background(), undoTime)
	defer cancel()
	return errors.Join(err, m.Destroy(ending))
}
