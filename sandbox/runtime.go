package sandbox

import (
	"context"
	"io"
)

// Runtime acts on sandboxes: it boots and destroys the machines they run on. Implementations are safe for concurrent use.
type Runtime interface {
	// Boot makes a machine in spec.Dir, which exists and has no machine, and starts its init. When Boot fails, it leaves nothing running.
	Boot(ctx context.Context, spec Spec) (Machine, error)
	// Attach reconnects to a machine that another server booted in dir. A frozen machine is thawed first, even if its server did not record
	// that it froze it. If nothing of a machine runs in dir, the error is ErrNoMachine.
	Attach(ctx context.Context, dir string) (Machine, error)
	// Reap ends whatever still runs of a machine in dir, in whatever state its server left it, and removes what Boot made there. It does
	// not remove dir. If nothing is left, it does nothing.
	Reap(ctx context.Context, dir string) error
}

// Machine is a running sandbox as the Runtime sees it.
type Machine interface {
	// Pipe is the connection to the agent; it belongs to the caller.
	Pipe() io.ReadWriteCloser
	// Pause freezes all processes in memory, including the agent. Calls of Pause, Resume and Checkpoint must not overlap; Destroy may be
	// called during any of them.
	Pause(ctx context.Context) error
	// Resume thaws the machine after Pause.
	Resume(ctx context.Context) error
	// Checkpoint saves the machine in dir, which it creates; Boot can begin from it. When it fails, dir does not exist, and the machine is
	// as before if it still responds. Unless o.Resume is set, the machine is frozen afterwards, for Resume or Destroy. Only ctx bounds
	// the time that Checkpoint takes.
	Checkpoint(ctx context.Context, dir string, o CheckpointOptions) error
	// Usage returns what the machine takes from the host.
	Usage(ctx context.Context) (Usage, error)
	// IO returns what the machine has read from and written to the host's disk, and its CPU time. It is cheap.
	IO() (IO, error)
	// Check reports problems that the agent may not notice; FindingOf classifies the error. It is an OverError if the machine is stopped or
	// takes more of the host than it may, and ErrNoMachine if its processes do not exist. Any other error means that the host could not be
	// asked. Check is cheap and is called about twice a second.
	Check() error
	// Destroy ends the machine in any state; afterwards nothing of it runs. It may be called twice.
	Destroy(ctx context.Context) error
}

// CorePinner is implemented by a Machine that can pin itself to one core. Work that lasts a few milliseconds finishes sooner on one core
// and takes half the CPU time: the machine's threads hand over to each other all the time, and waking a thread on another, sleeping core
// takes longer than most of what that thread does.
type CorePinner interface {
	// Pin pins the machine to one core, or releases it to all. Calls must not overlap. An error is harmless.
	Pin(one bool) error
}

// Rescuer is implemented by a Runtime that can get the files out of a checkpoint whose memory cannot be used, because the agent in it is
// silent or the memory is damaged.
type Rescuer interface {
	// Rescue saves only the files of the checkpoint spec.From, in the directory to, which it creates; Boot can begin from it. Rescue uses a
	// machine in spec.Dir, which exists and has none, and leaves nothing of that machine. Damage in the checkpoint does not stop it as long
	// as the files can be read.
	Rescue(ctx context.Context, spec Spec, to string) error
}

// Continuer is implemented by a Runtime that can continue a machine whose processes were stopped from outside.
type Continuer interface {
	// Continue continues the stopped processes of the machine in dir.
	Continue(dir string) error
}

// CheckpointOptions say what is saved.
type CheckpointOptions struct {
	Resume    bool // resume the machine afterwards, if it was not frozen before
	FilesOnly bool // save the files without memory and processes
}

// Usage is what a machine takes from the host.
type Usage struct {
	Memory int64 // bytes in memory; shared pages count in part
	Disk   int64 // bytes of the files that the guest wrote
}

// IO is what a machine did on the host since it was started: bytes read from and written to disk, and CPU time in ms.
type IO struct{ Read, Written, CPUMS int64 }

// Spec describes a machine.
type Spec struct {
	ID       string
	Dir      string // the sandbox's own directory
	Template Template
	Limits   Limits
	// From is the directory of a checkpoint to begin from; "" boots from scratch. If the checkpoint has memory, use agent.Rejoin instead of
	// agent.NewClient. A checkpoint can be used any number of times and is only read; it must stay until Boot returns.
	From string
}

// Templates finds root file systems.
type Templates interface {
	// Template returns a template that the owner can see, by name; "" is the default. An ID returns the template with that content, whoever
	// owns it. If there is none, the error is ErrNoTemplate.
	Template(ctx context.Context, owner, name string) (Template, error)
}

// Template is a root file system with defaults and a name.
type Template struct {
	Name string
	// ID identifies the content: a name may get another ID, but an ID never gets other content. If it is "", the template has only a name.
	ID string
	// The read-only base of the root is an image, or a host directory with others mounted in it.
	Image   string // path of an EROFS image
	Root    string
	Mounts  []Mount
	Env     map[string]string // for every process
	User    string            // for processes that name none; default "user"
	Cwd     string            // for those processes; default the user's home
	Limits  Limits            // for sandboxes that ask for none; zero values mean the Manager's
	Protect Protect           // for sandboxes that ask for none; default the Manager's
	// Start starts the service that runs in every sandbox of the template; nil means none.
	Start *StartCommand
}

// Mount shows a host directory, read-only, in the sandbox.
type Mount struct {
	Source      string
	Destination string
}
