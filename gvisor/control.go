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

// controlTimeout bounds a call on the control socket: a stopped sentry answers none.
const controlTimeout = 10 * time.Second

var errNoAnswer = fmt.Errorf("its kernel has not answered in %s: %w", controlTimeout, context.DeadlineExceeded)

// execArgs is gVisor's control.ExecArgs as far as we use it; the field names are its JSON.
type execArgs struct {
	Filename         string   `json:"filename"`
	Argv             []string `json:"argv"`
	Envv             []string `json:"envv"`
	WorkingDirectory string   `json:"wd"`
	ContainerID      string
	GuestFDs         []int // where the guest sees Files
	urpc.FilePayload
}

// control makes one call on the sentry's control socket that takes no time to speak of.
func (r *Runtime) control(ctx context.Context, run, method string, args, result any) error {
	ctx, cancel := context.WithTimeoutCause(ctx, controlTimeout, errNoAnswer)
	defer cancel()
	return r.controlSlow(ctx, run, method, args, result)
}

// controlSlow makes one call that may take as long as ctx allows: on a connection of its own, since urpc serves one call at a time.
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

// openSocket connects to the sentry's control socket. The path may be longer than a socket's may be, so it is named by its directory's
// descriptor.
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
		_ = unix.Close(fd) // unet.Connect forgets it where there is no descriptor for its event
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

// isFrozen says whether a machine is. No call tells, and Resume of one that is not would be the end of its sentry; but each task of the
// guest is a goroutine there, and where all of them have stopped they are frozen: init never stops otherwise. A sentry that is saving,
// perhaps for a server that is dead, stops them as well, and has them go on itself: that is waited for.
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

// isSaving looks for gVisor's functions that save a kernel, or its files.
func isSaving(stacks string) bool {
	for _, f := range []string{"state.(*SaveOpts).Save(", "kernel.(*Kernel).SaveTo(", "kernel.(*Kernel).FSSave("} {
		if strings.Contains(stacks, f) {
			return true
		}
	}
	return false
}

// allStopped says whether no task runs.
func allStopped(stacks string) bool {
	tasks, stopped := 0, 0
	for goroutine := range strings.SplitSeq(stacks, "\n\n") {
		if strings.Contains(goroutine, "kernel.(*Task).run(") {
			tasks++
			if strings.Contains(goroutine, "kernel.(*Task).doStop(") {
				stopped++
			}
		}
	}
	return tasks > 0 && tasks == stopped
}
