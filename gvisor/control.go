package gvisor

import (
	"context"
	"fmt"
	"os"
	"time"

	"gvisor.dev/gvisor/pkg/unet"
	"gvisor.dev/gvisor/pkg/urpc"
)

// controlTimeout bounds a call on the control socket: a stopped sentry answers none.
const controlTimeout = 10 * time.Second

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

// control makes one call on the sentry's control socket: a connection of its own, since urpc serves one call at a time.
func control(ctx context.Context, run, method string, args, result any) error {
	ctx, cancel := context.WithTimeout(ctx, controlTimeout)
	defer cancel()
	// The path may be longer than a socket's may be, so it is named by its directory's descriptor.
	dir, err := os.Open(run)
	if err != nil {
		return fmt.Errorf("control %s: %w", method, err)
	}
	defer dir.Close()
	socket, err := unet.Connect(fmt.Sprintf("/proc/self/fd/%d/runsc-%s.sock", dir.Fd(), containerID), false)
	if err != nil {
		return fmt.Errorf("control %s: %w", method, err)
	}
	client := urpc.NewClient(socket)
	defer client.Close()
	stop := context.AfterFunc(ctx, func() { _ = socket.Shutdown() })
	defer stop()
	if err := client.Call("containerManager."+method, args, result); err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return fmt.Errorf("control %s: %w", method, err)
	}
	return nil
}
