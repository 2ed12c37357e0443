package guest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"
	"soulbox.dev/soulbox/agent"
)

const (
	defaultRows = 24
	defaultCols = 80
)

// openTerminal opens a pseudo-terminal. It returns the process's end, for stdin, stdout and stderr, and our end twice: for writing, and for
// the collector to read.
func (s *Server) openTerminal(size agent.Terminal, user identity) (child *os.File, master *os.File, reader int, err error) {
	ours, theirs, err := pty.Open()
	if err != nil {
		return nil, nil, -1, fmt.Errorf("start: open a terminal: %w", err)
	}
	reader = -1
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("start: open a terminal: %w", err), ours.Close(), theirs.Close())
			if reader >= 0 {
				_ = unix.Close(reader)
			}
		}
	}()
	if err = resizeTerminal(ours, size); err != nil {
		return nil, nil, -1, err
	}
	// os.File has made it non-blocking, and the programs on it would share that.
	if err = control(theirs, func(fd uintptr) error { return unix.SetNonblock(int(fd), false) }); err != nil {
		return nil, nil, -1, err
	}
	if s.opts.Init { // programs such as tmux and sudo open it by its name
		if err = theirs.Chown(int(user.uid), int(user.gid)); err != nil {
			return nil, nil, -1, err
		}
	}
	err = control(ours, func(fd uintptr) (err error) {
		if reader, err = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0); err == nil {
			err = unix.SetNonblock(reader, true)
		}
		return err
	})
	return theirs, ours, reader, err
}

// control uses a file's descriptor without making it blocking.
func control(f *os.File, do func(fd uintptr) error) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	if err := raw.Control(func(fd uintptr) { inner = do(fd) }); err != nil {
		return err
	}
	return inner
}

func resizeTerminal(master *os.File, size agent.Terminal) error {
	return control(master, func(fd uintptr) error {
		return unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: uint16(size.Rows), Col: uint16(size.Cols)})
	})
}

// resize changes the size of a process's terminal; the kernel tells its programs by SIGWINCH.
func (s *Server) resize(req agent.ResizeRequest) (agent.Process, error) {
	p, err := s.processByName(req.Process)
	if err != nil {
		return agent.Process{}, err
	}
	if err := req.Terminal.Check(); err != nil {
		return agent.Process{}, err
	}
	p.mu.Lock()
	master, terminal := p.stdin, p.terminal
	p.mu.Unlock()
	switch {
	case terminal == nil:
		return agent.Process{}, fmt.Errorf("resize process %s: %w", p.id, agent.ErrNoTerminal)
	case master == nil:
		return agent.Process{}, fmt.Errorf("resize process %s: %w", p.id, agent.ErrEnded)
	}
	if err := resizeTerminal(master, req.Terminal); err != nil {
		return agent.Process{}, fmt.Errorf("resize process %s: %w", p.id, err)
	}
	p.mu.Lock()
	p.terminal = &req.Terminal
	p.mu.Unlock()
	return p.describe(), nil
}

// terminalKeys are the signals that a terminal itself sends to its foreground group when these keys are typed.
var terminalKeys = map[syscall.Signal]byte{syscall.SIGINT: 3, syscall.SIGQUIT: 0x1c, syscall.SIGTSTP: 0x1a}

// typeTime is how long typing a key may wait for a terminal that no program reads.
const typeTime = time.Second

// signalTerminal sends a signal as the terminal would, and reports whether it did. gVisor does not tell which group is in the foreground:
// there it types the keys, and other signals go to the leader's group.
func (p *process) signalTerminal(sig syscall.Signal) (done bool, err error) {
	p.mu.Lock()
	master, terminal := p.stdin, p.terminal
	p.mu.Unlock()
	if terminal == nil || master == nil {
		return false, nil
	}
	if sig == syscall.SIGHUP {
		return true, p.hangUp()
	}
	if group := p.foreground(); group != 0 {
		return true, ignoreGone(syscall.Kill(-group, sig))
	}
	if key, ok := terminalKeys[sig]; ok {
		ctx, cancel := context.WithTimeout(context.Background(), typeTime)
		defer cancel()
		_, err := p.writeStdin(ctx, bytes.NewReader([]byte{key}), false)
		return err == nil, nil // if the key cannot be typed, the leader's group gets the signal
	}
	return false, nil
}

// ignoreGone treats a process that is gone as one that got the signal.
func ignoreGone(err error) error {
	if err == syscall.ESRCH {
		return nil
	}
	return err
}

// foreground returns the foreground process group of the terminal; 0 if there is none.
func (p *process) foreground() int {
	p.mu.Lock()
	master, terminal := p.stdin, p.terminal
	p.mu.Unlock()
	if terminal == nil || master == nil {
		return 0
	}
	group := 0
	err := control(master, func(fd uintptr) (err error) {
		group, err = unix.IoctlGetInt(int(fd), unix.TIOCGPGRP)
		return err
	})
	if err != nil || group <= 1 {
		return 0
	}
	return group
}

// hangUp ends the programs on a terminal as closing it would. What still runs after killGrace, because it was about to start something when
// the signal came, is killed: its terminal would be gone.
func (p *process) hangUp() error {
	for _, group := range []int{p.foreground(), p.PID} {
		if group <= 1 {
			continue
		}
		for _, sig := range []syscall.Signal{syscall.SIGHUP, syscall.SIGCONT} {
			if err := ignoreGone(syscall.Kill(-group, sig)); err != nil {
				return fmt.Errorf("hang up process %s: %w", p.id, err)
			}
		}
	}
	after(killGrace, func() {
		if p.running() {
			p.killAll()
		}
	})
	return nil
}
