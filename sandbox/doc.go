// Package sandbox is the domain: which sandboxes there are, whose they are, in which state, for how long, and within which limits.
// It does not know how a sandbox is run (Runtime) nor what is in it (package agent acts there), and nothing of MCP, HTTP or flags.
//
// State is files, in the state directory:
//
//	sandboxes/ID/   state.json, log.jsonl, metrics.jsonl, the Runtime's machine, checkpoint-N while it is on disk, and a lock,
//	                whose flock belongs to the server that has the sandbox. Where the lock is free the next server adopts what
//	                runs (adopt.go), ends what was half made, and leaves what is on disk to whoever is asked for it.
//	ended/ID/       what is remembered of a sandbox for a day: state, log and samples
//	snapshots/HASH/ snapshot.json and a checkpoint
//
// Whatever changes between running and paused has the sandbox' turn (pause.go); callers of Agent wait meanwhile. Every write goes through
// disk, so that tests can stop it anywhere (TestPowerFails, TestCutAtEveryByte).
//
// Lock order: Manager.room, Manager.mu, then Sandbox.mu. A turn is taken without any of them.
package sandbox

import (
	"context"
	"io"
	"time"
)

// Runtime acts on sandboxes: it boots and destroys the machines they run on. Implementations are safe for concurrent use.
type Runtime interface {
	// Boot makes a machine in spec.Dir, which exists and has no machine, and starts its init. When it fails nothing is left running.
	Boot(ctx context.Context, spec Spec) (Machine, error)
	// Attach connects anew to a machine that another server has booted in dir; one that is frozen, whether its server wrote that down or
	// not, goes on first. Where nothing of a machine runs that is ErrNoMachine.
	Attach(ctx context.Context, dir string) (Machine, error)
	// Reap ends whatever still runs of a machine in dir, in whatever state its server left it, and removes what Boot made there. It does
	// not remove dir. It does nothing where nothing is left.
	Reap(ctx context.Context, dir string) error
}

// Machine is a running sandbox as the Runtime sees it.
type Machine interface {
	// Pipe is the way to the agent; it belongs to the caller.
	Pipe() io.ReadWriteCloser
	// Pause freezes all processes, the agent too, in memory. Pause, Resume, Checkpoint and Destroy are not called at the same time, but for
	// Destroy.
	Pause(ctx context.Context) error
	// Resume goes on after Pause.
	Resume(ctx context.Context) error
	// Checkpoint saves the machine in dir, which it makes; Boot begins from it. When it fails, dir is not there, and the machine is as
	// before if it still answers. A machine that does not go on is frozen, for Resume or Destroy. ctx alone bounds the time it takes.
	Checkpoint(ctx context.Context, dir string, o CheckpointOptions) error
	// Usage tells what the machine takes from the host.
	Usage(ctx context.Context) (Usage, error)
	// IO tells what the machine has read from the host's disk and written to it. It is cheap.
	IO() (IO, error)
	// Check tells what its agent may not notice, as FindingOf reads it: OverError where the machine is stopped or takes more of the host
	// than it may, ErrNoMachine where its processes do not exist. Any other error says that the host could not be asked. It is cheap and is
	// called about twice a second.
	Check() error
	// Destroy ends the machine whatever its state; afterwards nothing of it runs. It may be called twice.
	Destroy(ctx context.Context) error
}

// Gatherer is the ability of a Machine to keep to one of its cores. What lasts a few milliseconds is done sooner there, with half the work:
// its threads hand over to each other all the time, and to wake one on another core that sleeps takes longer than most of what it does.
type Gatherer interface {
	// Gather binds the machine to one of its cores, or lets it have all of them. It is called by one at a time, and no harm where it fails.
	Gather(one bool) error
}

// Rescuer is the ability of a Runtime to get the files out of a checkpoint whose memory is not to go on: its agent is silent, or it is
// damaged.
type Rescuer interface {
	// Rescue saves the files of the checkpoint spec.From alone, in the directory to, which it makes; Boot begins from that. It does so by a
	// machine in spec.Dir, which exists and has none; nothing of that one is left. Damage in the checkpoint does not stop it as long as
	// files can be read.
	Rescue(ctx context.Context, spec Spec, to string) error
}

// CheckpointOptions say what is saved.
type CheckpointOptions struct {
	GoOn      bool // the machine goes on afterwards, if it was not frozen before
	FilesOnly bool // files are saved, memory and processes are not
}

// Usage is what a machine takes from the host.
type Usage struct {
	Memory int64 // bytes in memory, shared pages counted in part
	Disk   int64 // bytes of the files that the guest has written
}

// IO is what a machine has done on the host since it was started: on its disk, in bytes, and on its CPUs, in ms.
type IO struct{ Read, Written, CPUMS int64 }

// Spec describes a machine.
type Spec struct {
	ID       string
	Dir      string // the sandbox' own directory
	Template Template
	Limits   Limits
	// From is the directory of a checkpoint to begin from; "" boots anew. One with memory needs agent.Rejoin in place of agent.NewClient.
	// It may be used any number of times, and is only read; it must stay until Boot has returned.
	From string
}

// Limits bound a sandbox. Zero values mean the defaults of DefaultLimits.
type Limits struct {
	CPU    float64 `json:"cpu"`    // cores
	Memory int64   `json:"memory"` // bytes
	Disk   int64   `json:"disk"`   // bytes that may be written
	// DiskInMemory has what is written in memory, half of Memory at most. A sandbox of an image then is one process on the host and takes
	// less memory while it is idle; with other templates it changes nothing.
	DiskInMemory bool  `json:"disk_in_memory,omitempty"`
	Processes    int64 `json:"processes"` // tasks
	// KernelMemory bounds, in bytes, what the sandbox's kernel takes for itself: for files, connections and other objects, which no other
	// limit counts. 0 is the default for Memory (Kernel). It is no part of the sandbox that is saved: one may go on with more than it was
	// paused with.
	KernelMemory int64 `json:"kernel_memory,omitempty"`
}

// DefaultLimits are the limits of a sandbox that asks for none.
func DefaultLimits() Limits {
	return Limits{CPU: 2, Memory: 1 << 30, Disk: 10 << 30, Processes: 512}
}

// DefaultLifetime is how long a sandbox lives that asks for no other time, counted from its readiness.
const DefaultLifetime = time.Hour

// Templates finds root file systems.
type Templates interface {
	// Template gives a template that an owner sees, by name; "" is the default. An ID gives what has it, whoever's it is. What is not there
	// is ErrNoTemplate.
	Template(ctx context.Context, owner, name string) (Template, error)
}

// Template is a root file system with defaults and a name.
type Template struct {
	Name string
	// ID stands for the content: a name may get another one, an ID never does. "" is a template that only has its name.
	ID string
	// The read-only base of the root is an image, or a host directory with others in it.
	Image   string // path of an EROFS image
	Root    string
	Mounts  []Mount
	Env     map[string]string // of every process
	User    string            // of processes that name none; default "user"
	Cwd     string            // of those; default the user's home
	Limits  Limits            // of sandboxes that ask for none; zero values are the Manager's
	Protect Protect           // of sandboxes that ask for none; default the Manager's
	// Service runs in every sandbox of it; nil is none.
	Service *Service
}

// Mount shows a host directory, read-only, in the sandbox.
type Mount struct {
	Source      string
	Destination string
}
