// Package client is the client of a SoulBox server's HTTP API, for the command line and for Go programs: sandboxes and what runs in them,
// files, ports, templates. It knows nothing of how sandboxes are made. It also defines the types of the paths below /v1, which are
// SoulBox's additions to E2B's API.
package client

import "time"

// API is the version of the paths below /v1 that this client, and a server of the same build, speaks. Oldest is the oldest version of a
// client that such a server understands.
const (
	API    = 1
	Oldest = 1
)

// Headers of requests and answers, in addition to E2B's.
const (
	// APIHeader is the version that the sender speaks.
	APIHeader = "Soulbox-Api"
	// OwnerHeader names, on a server's socket, the owner as whom the user acts; the default is the user's own account.
	OwnerHeader = "Soulbox-Owner"
	// FromHeader of Process.Connect is the offset from which the output is wanted, in bytes, counting stdout and stderr together. With it,
	// Connect also finds processes that have ended.
	FromHeader = "Soulbox-From"
	// LingerHeader of Process.Start and Process.Connect is how many milliseconds a process may run without followers before it is killed. A
	// Connect without it removes the limit.
	LingerHeader = "Soulbox-Linger-Ms"
	// ProcessHeader is the id of a process. Unlike a number, an id is never reused. Start and Connect return it, and calls may send it in
	// addition to the number.
	ProcessHeader = "Soulbox-Process"
	// NamesHeader of a call says that file names and program arguments are in the notation of package names, and asks for the same in the
	// answer.
	NamesHeader = "Soulbox-Names"
	// ExitHeader of an error of Process.Start is the exit status that a shell would have: 126 or 127.
	ExitHeader = "Soulbox-Exit"
)

// Server is what a server says about itself.
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
	// SavedAt is when the copy was saved from which the sandbox is resumed if it fails. SavedFilesOnly says that this copy has no memory.
	// Notice says what was lost at the last resume.
	SavedAt        time.Time `json:"savedAt,omitzero"`
	SavedFilesOnly bool      `json:"savedFilesOnly,omitempty"`
	Notice         string    `json:"notice,omitempty"`
}

// Protect says how often a sandbox is saved in the background, to be resumed from that copy if it fails. 0 seconds mean never.
type Protect struct {
	EveryS int64 `json:"everySeconds"`
	Memory bool  `json:"memory,omitempty"` // save processes too, not only files
}

// Network is what a sandbox may reach.
type Network struct {
	Mode  string   `json:"mode"` // none, allowlist or full
	Allow []string `json:"allow,omitempty"`
	Deny  []string `json:"deny,omitempty"`
}

// NewSandbox describes a sandbox to make. Zero values are the server's defaults.
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

// Update changes a sandbox. Fields that are nil or empty change nothing.
type Update struct {
	ExtendS   *int64             `json:"extendSeconds,omitempty"`
	TimeoutS  *int64             `json:"timeoutSeconds,omitempty"` // from now on
	OnTimeout string             `json:"onTimeout,omitempty"`
	Metadata  map[string]*string `json:"metadata,omitempty"` // null removes a pair
	Protect   *Protect           `json:"protect,omitempty"`
}

// Pause says how a sandbox is paused; the default is to disk.
type Pause struct {
	InMemory  bool `json:"inMemory,omitempty"`
	FilesOnly bool `json:"filesOnly,omitempty"`
}

// Resume says how a sandbox is resumed.
type Resume struct {
	FilesOnly bool  `json:"filesOnly,omitempty"` // boot from the saved files, without the saved processes
	MemoryMB  int64 `json:"memoryMB,omitempty"`  // a larger memory limit; 0 keeps it
}

// NewSnapshot is a snapshot that is to be made.
type NewSnapshot struct {
	Name    string `json:"name,omitempty"`    // "" has the server make one
	Replace bool   `json:"replace,omitempty"` // take the place of the snapshot that has the name, instead of being refused
}

// Process is a process of a sandbox, running or ended.
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

// Port is an exposed port of a sandbox, or one on which something listens.
type Port struct {
	Port      int    `json:"port"`
	URL       string `json:"url"`
	Public    bool   `json:"public,omitempty"`
	Listening bool   `json:"listening"`
}

// NewBuild describes a build of a Dockerfile, with files that were sent before.
type NewBuild struct {
	Dockerfile string `json:"dockerfile"`
	Context    string `json:"context,omitempty"` // the hash under which the files were sent
	// Filtered says that the client has left out the ignored files. Otherwise the server leaves out what Dockerfile.dockerignore names, or
	// .dockerignore if that does not exist.
	Filtered bool              `json:"filtered,omitempty"`
	Args     map[string]string `json:"args,omitempty"`
	Target   string            `json:"target,omitempty"`
	NoCache  bool              `json:"noCache,omitempty"`
	StartCmd string            `json:"startCmd,omitempty"`
	ReadyCmd string            `json:"readyCmd,omitempty"`
	Protect  *Protect          `json:"protect,omitempty"` // of its sandboxes that ask for none
}

// Template is a template that the caller sees.
type Template struct {
	// Aliases are other names: "base" for the server's own programs if no base has been built.
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
	Digest   string    `json:"digest,omitempty"` // in the registry it was pushed to
}
