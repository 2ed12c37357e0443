package gvisor

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"soulbox.dev/soulbox/sandbox"
)

var _ sandbox.Continuer = (*Runtime)(nil)

// Continue implements sandbox.Continuer. It sends SIGCONT by pidfd, so that only a process of the machine gets it.
func (r *Runtime) Continue(dir string) error {
	processes, err := r.processesOf(dir)
	if err != nil {
		return fmt.Errorf("continue: %w", err)
	}
	var errs error
	for _, p := range processes {
		fd, err := unix.PidfdOpen(p.pid, 0)
		if err == nil {
			var there bool
			if there, err = r.isThere(p); there {
				err = unix.PidfdSendSignal(fd, unix.SIGCONT, nil, 0)
			}
			_ = unix.Close(fd) // it was only opened
		}
		if err != nil && !hasEnded(err) {
			errs = errors.Join(errs, fmt.Errorf("continue process %d: %w", p.pid, err))
		}
	}
	return errs
}
