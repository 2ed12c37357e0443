// Package client is the client of a SoulBox server's HTTP API, for the command line and for Go programs: sandboxes, what runs in them,
// files, ports, templates. It knows nothing of how sandboxes are made. What the server says beside E2B's API (paths below /v1) has its
// types here.
package client

import "time"

// API is the version of what is below /v1 that this client speaks, and that a server built with it does. Oldest is the oldest that it
// understands.
const (
	API    = 1
	Oldest = 1
)

// Headers of requests and answers beside E2B's.
const (
	// APIHeader has the version that the other side speaks.
	APIHeader = "Soulbox-Api"
	// OwnerHeader says on a server's socket as whom its user acts; without it as himself.
	OwnerHeader = "Soulbox-Owner"
	// FromHeader of Process.Connect is the offset in bytes, stdout and stderr together, from which the output is wanted. One that has ended
	// is told, too.
	FromHeader = "Soulbox-From"
	// LingerHeader of Process.Start and Process.Connect has a process that nobody follows any more killed after so many milliseconds. A
	// Connect without it lets the process go on.
	LingerHeader = "Soulbox-Linger-Ms"
	// ProcessHeader is the id of a process, which is never used again, as its number is: Start and Connect tell it, and calls may name it
	// beside the number.
	ProcessHeader = "Soulbox-Process"
	// NamesHeader says that names of files, and arguments of programs, are in the notation of package names on a call, and asks for it in
	// the answer.
	NamesHeader = "Soulbox-Names"
	// ExitHeader of an error of Process.Start is the exit status that a shell would have: 126 or 127.
	ExitHeader = "Soulbox-Exit"
)

// Server is what a server says of itself.
type Server struct {
	Version string `json:"version"`
	API     int    `json:"api"`
	Oldest  int    `json:"oldest"` // the oldest client that it understands
	Kind    string `json:"kind"`   // stdio, http or local
	PID     int    `json:"pid,omitempty"`
	State   string `json:"stateDir,omitempty"` // only on its socket
}

// Sandbox is a sandbox.
type Sandbox struct {
	ID         string            `json:"id"`
	Template   string            `json:"template"`
	State      string            `json:"state"` // creating, running, paused, killed or failed
	Cause      string            `json:"cause,omitempty"`
	Parent     string            `json:"parent,omitempty"`
	Metadata   map[string]string `json:"metadata,omitempty"`
	CPU        float64           `json:"cpu"`
	MemoryMB   int64             `json:"memoryMB"`
	DiskMB     int64             `json:"diskMB"`
	Processes  int64             `json:"processes"`
	Created    time.Time         `json:"created"`
	Changed    time.Time         `json:"changed"`
	ExpiresAt  time.Time         `json:"expiresAt,omitzero"` // while it runs
	LeftS      int64             `json:"leftSeconds,omitempty"`
	RemoveAt   time.Time         `json:"removeAt,omitzero"` // while it is paused on disk
	OnDisk     bool              `json:"onDisk,omitempty"`
	OnTimeout  string            `json:"onTimeout"`
	AutoResume bool              `json:"autoResume"`
	Network    Network           `json:"network"`
	Ports      []Port            `json:"ports,omitempty"`
	Protect    *Protect          `json:"protect,omitempty"`
	// SavedAt is when what it is resumed from was saved if it fails, SavedFilesOnly that that has no memory, Notice what was lost at its
	// last resume.
	SavedAt        time.Time `json:"savedAt,omitzero"`
	SavedFilesOnly bool      `json:"savedFilesOnly,omitempty"`
	Notice         string    `json:"notice,omitempty"`
}

// Protect says how often a sandbox is saved in the background: what it is resumed from if it fails. 0 seconds are off.
type Protect struct {
	EveryS int64 `json:"everySeconds"`
	Memory bool  `json:"memory,omitempty"` // processes too, not files alone
}

// Network is what a sandbox reaches.
type Network struct {
	Mode  string   `json:"mode"` // none, allowlist or full
	Allow []string `json:"allow,omitempty"`
	Deny  []string `json:"deny,omitempty"`
}

// NewSandbox is a sandbox that is to be made. Zero values are the server's.
type NewSandbox struct {
	Template  string            `json:"template,omitempty"`
	Metadata  map[string]string `json:"metadata,omitempty"`
	Env       map[string]string `json:"env,omitempty"`
	TimeoutS  int64             `json:"timeoutSeconds,omitempty"`
	OnTimeout string            `json:"onTimeout,omitempty"`
	CPU       float64           `json:"cpu,omitempty"`
	MemoryMB  int64             `json:"memoryMB,omitempty"`
	DiskMB    int64             `json:"diskMB,omitempty"`
	Processes int64             `json:"processes,omitempty"`
	Network   Network           `json:"network,omitzero"`
	Protect   *Protect          `json:"protect,omitempty"`
}

// Update changes a sandbox. What is nil stays.
type Update struct {
	ExtendS   *int64             `json:"extendSeconds,omitempty"`
	TimeoutS  *int64             `json:"timeoutSeconds,omitempty"` // from now on
	OnTimeout string             `json:"onTimeout,omitempty"`
	Metadata  map[string]*string `json:"metadata,omitempty"` // null removes a pair
	Protect   *Protect           `json:"protect,omitempty"`
}

// Pause says how a sandbox is paused: to disk, if not otherwise said.
type Pause struct {
	InMemory  bool `json:"inMemory,omitempty"`
	FilesOnly bool `json:"filesOnly,omitempty"`
}

// Resume says how a sandbox is resumed.
type Resume struct {
	FilesOnly bool  `json:"filesOnly,omitempty"` // boot its files anew, without the processes that were saved
	MemoryMB  int64 `json:"memoryMB,omitempty"`  // a larger memory limit; 0 leaves it
}

// Process is a process of a sandbox, which runs or has ended.
type Process struct {
	ID        string    `json:"id"`
	PID       int       `json:"pid"`
	Tag       string    `json:"tag,omitempty"`
	State     string    `json:"state"`
	Command   string    `json:"command"`
	User      string    `json:"user"`
	Cwd       string    `json:"cwd"`
	Started   time.Time `json:"started"`
	Ended     time.Time `json:"ended,omitzero"`
	ExitCode  int       `json:"exitCode"`
	Signal    string    `json:"signal,omitempty"`
	Cause     string    `json:"cause,omitempty"`
	CPUMS     int64     `json:"cpuMs"`
	Memory    int64     `json:"memory"`
	Output    int64     `json:"output"`
	Terminal  bool      `json:"terminal,omitempty"`
	StdinOpen bool      `json:"stdinOpen,omitempty"`
}

// Port is a port of a sandbox that is exposed.
type Port struct {
	Port      int    `json:"port"`
	URL       string `json:"url"`
	Public    bool   `json:"public,omitempty"`
	Listening bool   `json:"listening"`
}

// NewBuild is a build of a Dockerfile, of the files that were sent under a name before.
type NewBuild struct {
	Dockerfile string `json:"dockerfile"`
	Context    string `json:"context,omitempty"` // the hash they were sent by
	// Filtered says that what is to be ignored was not sent; otherwise the server leaves out what Dockerfile.dockerignore or else
	// .dockerignore names.
	Filtered bool              `json:"filtered,omitempty"`
	Args     map[string]string `json:"args,omitempty"`
	Target   string            `json:"target,omitempty"`
	NoCache  bool              `json:"noCache,omitempty"`
	StartCmd string            `json:"startCmd,omitempty"`
	ReadyCmd string            `json:"readyCmd,omitempty"`
	Protect  *Protect          `json:"protect,omitempty"` // of its sandboxes, where they ask for none
}

// Template is a template that a caller sees.
type Template struct {
	// Aliases are other names: of the server's own programs "base", where no base was built.
	Aliases  []string  `json:"aliases,omitempty"`
	Name     string    `json:"name"`
	Build    string    `json:"build,omitempty"`
	SizeMB   int64     `json:"sizeMB"`
	Created  time.Time `json:"created,omitzero"`
	Shared   bool      `json:"shared"` // the operator's, which everybody sees
	CPU      float64   `json:"cpu"`
	MemoryMB int64     `json:"memoryMB"`
	DiskMB   int64     `json:"diskMB"`
	StartCmd string    `json:"startCmd,omitempty"`
	Digest   string    `json:"digest,omitempty"` // of a registry, where it was pushed to
}
