package gvisor

import (
	"context"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/unet"
	"gvisor.dev/gvisor/pkg/urpc"
)

// controlTimeout bounds a call on the control socket: a stopped sentry does not answer.
const controlTimeout = 10 * time.Second

var errNoAnswer = fmt.Errorf("its kernel has not responded in %s: %w", controlTimeout, context.DeadlineExceeded)

// execArgs has the fields of gVisor's control.ExecArgs that this package uses, with the names in its JSON.
type execArgs struct {
	Filename         string   `json:"filename"`
	Argv             []string `json:"argv"`
	Envv             []string `json:"envv"`
	WorkingDirectory string   `json:"wd"`
	ContainerID      string
	GuestFDs         []int // the numbers of Files in the guest
	urpc.FilePayload
}

// control makes one call on the sentry's control socket that should return at once.
func (r *Runtime) control(ctx context.Context, run, method string, args, result any) error {
	ctx, cancel := context.WithTimeoutCause(ctx, controlTimeout, errNoAnswer)
	defer cancel()
	return r.controlSlow(ctx, run, method, args, result)
}

// controlSlow makes one call that may take as long as ctx allows. It uses its own connection, because urpc serves one call at a time.
func (r *Runtime) controlSlow(ctx context.Context, run, method string, args, result any) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("control %s: %w", method, err)
		}
	}()
	var socket *unet.Socket
	err = r.ask("open socket", func() (err error) {
		socket, err = openSocket(run)
		return err
	})
	if err != nil {
		return err
	}
	client := urpc.NewClient(socket)
	defer client.Close()
	stop := context.AfterFunc(ctx, func() { _ = socket.Shutdown() })
	defer stop()
	if err := r.fault("control " + method); err != nil {
		return err
	}
	if err := client.Call(method, args, result); err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return err
	}
	return nil
}

// openSocket connects to the sentry's control socket. The path may be too long for a socket's address, so it is given by a descriptor of
// its directory.
func openSocket(run string) (*unet.Socket, error) {
	dir, err := os.Open(run)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	var socket *unet.Socket
	if err = unix.Connect(fd, &unix.SockaddrUnix{Name: fmt.Sprintf("/proc/self/fd/%d/runsc-%s.sock", dir.Fd(), containerID)}); err == nil {
		socket, err = unet.NewSocket(fd)
	}
	if err != nil {
		_ = unix.Close(fd) // unet.Connect would leak it if there is no descriptor for its event
		return nil, err
	}
	return socket, nil
}

// Methods of the control socket.
const (
	callExecute    = "containerManager.ExecuteAsync"
	callPause      = "containerManager.Pause"
	callResume     = "containerManager.Resume"
	callCheckpoint = "containerManager.Checkpoint"
	callSaveFiles  = "containerManager.FSSave"
	callSignal     = "containerManager.Signal"
	callReduce     = "Usage.Reduce"
	callStacks     = "debug.Stacks"
)

// isFrozen reports whether a machine is frozen. No call returns that, and Resume of a machine that is not frozen would end its sentry. But
// each task of the guest is a goroutine of the sentry, and if all of them are stopped, the machine is frozen, because init never stops
// otherwise. A sentry that is saving, perhaps for a server that is dead, stops them too and resumes them itself, so isFrozen waits for
// that.
func (r *Runtime) isFrozen(ctx context.Context, run string) (bool, error) {
	for {
		var stacks string
		if err := r.control(ctx, run, callStacks, &struct{}{}, &stacks); err != nil {
			return false, err
		}
		if !isSaving(stacks) {
			return allStopped(stacks), nil
		}
		select {
		case <-time.After(savingPoll):
		case <-ctx.Done():
			return false, fmt.Errorf("it is being saved: %w", context.Cause(ctx))
		}
	}
}

const savingPoll = 50 * time.Millisecond

// isSaving looks in stacks for gVisor's functions that save a kernel or its files.
func isSaving(stacks string) bool {
	for _, f := range []string{"state.(*SaveOpts).Save(", "kernel.(*Kernel).SaveTo(", "kernel.(*Kernel).FSSave("} {
		if strings.Contains(stacks, f) {
			return true
		}
	}
	return false
}

// allStopped reports whether no task runs. A task that was just woken, at the end of a save, has the stack of a stopped one until it is its
// turn on a core; only its state tells.
func allStopped(stacks string) bool {
	tasks, stopped := 0, 0
	for goroutine := range strings.SplitSeq(stacks, "\n\n") {
		if strings.Contains(goroutine, "kernel.(*Task).run(") {
			tasks++
			head, _, _ := strings.Cut(goroutine, "\n")
			if strings.Contains(head, "[sync.Cond.Wait") && strings.Contains(goroutine, "kernel.(*Task).doStop(") {
				stopped++
			}
		}
	}
	return tasks > 0 && tasks == stopped
}
