package agent

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"time"
)

// Protocol is the version of the protocol in PROTOCOL.md.
const Protocol = 1

// Level counts what agents of this protocol have learned. 1: users, environment, links, attributes of written files, listings in parts,
// output that is held. 2: program arguments that are not text.
const Level = 2

// Bounds of everything that crosses the pipe (PROTOCOL.md, section 5).
const (
	MaxHello   = 4 << 10
	MaxMessage = 1 << 20
	maxChunk   = 256 << 10
	MaxWindow  = 64 << 10
	MaxEntries = 10_000
	MaxStdin   = 256 << 10
	MaxCommand = 128<<10 - 1 // bytes of a command, an argument or a variable: MAX_ARG_STRLEN of Linux
	MaxInput   = 64 << 10    // bytes of an InputRequest; WriteStdin takes any number
)

// Stream kinds.
const (
	StreamRPC    = "rpc"
	StreamRead   = "read"
	StreamWrite  = "write"
	StreamOutput = "output"
	StreamStdin  = "stdin"
	StreamDial   = "dial"
	StreamWatch  = "watch"

	StreamChanges = "changes"
	StreamUnpack  = "unpack"
	StreamAccept  = "accept"
)

// Kinds of frames on an output stream.
const (
	FrameStdout = 1
	frameStderr = 2
	FrameEnd    = 3
)

// Names of calls.
const (
	CallConfigure = "configure"
	CallStart     = "start"
	CallWait      = "wait"
	CallSignal    = "signal"
	CallResize    = "resize"
	CallKill      = "kill"
	CallList      = "list"
	CallStat      = "stat"
	CallUser      = "user"
	CallEnv       = "env"
	CallDir       = "dir"
	CallMkdir     = "mkdir"
	CallMove      = "move"
	CallRemove    = "remove"
	CallEdit      = "edit"
	CallSearch    = "search"
	CallSetattr   = "setattr"
	CallUsage     = "usage"
	CallBusy      = "work"
	CallShell     = "shell"
	CallTree      = "tree"
	CallInput     = "input"
	CallPing      = "ping"
	CallRestored  = "restored"
	CallSuspend   = "suspend"
	CallMount     = "mount"
	CallRelieve   = "relieve"
	NoteCancel    = "$/cancelRequest"
	NoteHangUp    = "$/hangUp"
)

// UnknownCall begins the error for a call that the agent does not know because its host is newer.
const UnknownCall = "unknown call"

// Hello is the one line that each side writes first.
type Hello struct {
	Protocol int    `json:"protocol"`
	Version  string `json:"version"`
	Boot     string `json:"boot,omitempty"`
	// Level is the level of the guest, see the constant Level; 0 is an agent from before levels.
	Level int    `json:"level,omitempty"`
	Error string `json:"error,omitempty"`
}

// Header opens every stream.
type Header struct {
	Stream  string `json:"stream"`
	Path    string `json:"path,omitempty" is:"name"`
	User    string `json:"user,omitempty"`
	Offset  int64  `json:"offset,omitempty"`
	Limit   int64  `json:"limit,omitempty"`
	Mode    string `json:"mode,omitempty"`
	Perm    uint32 `json:"perm,omitempty"`
	Parents bool   `json:"parents,omitempty"`
	Process string `json:"process,omitempty"`
	Follow  bool   `json:"follow,omitempty"`
	// Hold makes the process wait rather than lose output that was not sent to the host yet.
	Hold    bool   `json:"hold,omitempty"`
	Size    int64  `json:"size,omitempty"`
	EOF     bool   `json:"eof,omitempty"`
	Network string `json:"network,omitempty"`
	Address string `json:"address,omitempty"`
	// Dial names the connection for NoteHangUp.
	Dial string `json:"dial,omitempty"`
	// Attrs are the user.* extended attributes of the written file; nil keeps the existing ones. With AttrsBelow they replace only the
	// attributes whose names begin with it.
	Attrs      map[string]string `json:"attrs,omitzero"`
	AttrsBelow string            `json:"attrs_below,omitempty"`
}

// Answer is the message that the guest sends on a raw stream.
type Answer struct {
	Error   *Error    `json:"error,omitempty"`
	Info    *FileInfo `json:"info,omitempty"`
	Written int64     `json:"written,omitempty"`
}

// Config is what the host tells the agent about its sandbox.
type Config struct {
	// Env is added to the environment of every process, and to the variables that earlier calls have set.
	Env map[string]string `json:"env,omitempty"`
	// User and Cwd are the defaults for processes that name none. If they are empty, the user is "user" and the directory is the user's
	// home.
	User string `json:"user,omitempty"`
	Cwd  string `json:"cwd,omitempty" is:"name"`
	// MaxProcesses bounds the tasks of all user processes together; zero means no bound.
	MaxProcesses int64 `json:"max_processes,omitempty"`
	// MaxMemory bounds the memory of all user processes together, in bytes: above it the largest process is killed with cause "oom". Zero
	// means no bound.
	MaxMemory int64 `json:"max_memory,omitempty"`
	// MaxCPU is the number of cores that programs are told they may use; the host enforces it. Zero means no bound.
	MaxCPU float64 `json:"max_cpu,omitempty"`
	// OrphanMS is how long the agent lives without any host; zero means forever.
	OrphanMS int64 `json:"orphan_ms,omitempty"`
}

// StartRequest describes a process to start. Either Command (given to the shell) or Args is set.
type StartRequest struct {
	Command string            `json:"command,omitempty"`
	Args    []string          `json:"args,omitempty"`
	Shown   bool              `json:"shown,omitempty"`         // on the pipe: Args are in the notation of names, since they are not text
	Cwd     string            `json:"cwd,omitempty" is:"name"` // absolute; default the shell's directory, Config.Cwd or the user's home
	Env     map[string]string `json:"env,omitempty"`           // added to the sandbox's environment
	User    string            `json:"user,omitempty"`          // name, uid or uid:gid; default Config.User
	// Stdin is written to the process; then its stdin is closed, unless KeepStdin keeps it open for WriteStdin.
	Stdin     []byte `json:"stdin,omitempty"`
	KeepStdin bool   `json:"keep_stdin,omitempty"`
	// Terminal gives the process a terminal of that size as stdin, stdout and stderr; zero means 24 rows and 80 columns. Its stdin stays
	// open.
	Terminal *Terminal `json:"terminal,omitempty"`
	// Tag is a second name, unique among the running processes.
	Tag string `json:"tag,omitempty"`
	// Shell names a shell that keeps its state: the command starts in the shell's directory, with its environment, functions and options,
	// and passes its changes to them on to the next command. Each user has a separate shell of that name. Without bash there is no state to
	// keep, and only the request's own directory and environment apply.
	Shell string `json:"shell,omitempty"`
	// Fork starts the command as the shell would with "&": it gets the shell's state but changes none of it. A command with a terminal is
	// always forked.
	Fork bool `json:"fork,omitempty"`
	// TimeoutMS is how long the process may run; then it ends with cause "timeout". Zero means no limit.
	TimeoutMS int64 `json:"timeout_ms,omitempty"`
	// Hold keeps all output until the first output stream with Header.Hold opens, but for 10 s at most.
	Hold bool `json:"hold,omitempty"`
	// WaitMS is how long the call waits for the process to end.
	WaitMS int64  `json:"wait_ms,omitempty"`
	Window Window `json:"window"`
}

// WaitRequest asks for a process, by id or tag, and for a window of its output.
type WaitRequest struct {
	Process string `json:"process"`
	WaitMS  int64  `json:"wait_ms,omitempty"`
	// Beyond, if set, also ends the wait when the process has written more than that many bytes in total.
	Beyond *int64 `json:"beyond,omitempty"`
	Window Window `json:"window"`
}

// Window selects output: up to Head bytes from Offset and, if that is not everything, the last Tail bytes.
type Window struct {
	Offset int64  `json:"offset,omitempty"`
	Head   int    `json:"head,omitempty"`
	Tail   int    `json:"tail,omitempty"`
	Stream string `json:"stream,omitempty"` // "", "stdout" or "stderr"
}

// Output is what a Window selected. Offsets count stdout and stderr together.
type Output struct {
	Head []byte `json:"head,omitempty"`
	Tail []byte `json:"tail,omitempty"`
	// HeadEnd is the offset after Head. Output from there to TailStart is left out: it was not asked for, or is no longer kept.
	HeadEnd   int64 `json:"head_end"`
	TailStart int64 `json:"tail_start"`
	// End is the offset from which to continue.
	End int64 `json:"end"`
	// Dropped counts the bytes of the window that are no longer kept.
	Dropped int64 `json:"dropped,omitempty"`
}

// Snapshot is a process and some of its output at one moment.
type Snapshot struct {
	Process Process `json:"process"`
	Output  Output  `json:"output"`
}

// States of a process.
const (
	StateRunning = "running"
	StateExited  = "exited"
)

// Causes of the end of a process that its exit status alone does not tell.
const (
	CauseOOM     = "oom"     // killed by the memory guard
	CauseTimeout = "timeout" // killed at its timeout
	CauseKilled  = "killed"  // killed by Kill
)

// Process is a running or ended process.
type Process struct {
	ID      string    `json:"id" max:"128"`
	Tag     string    `json:"tag,omitempty" max:"128"`
	State   string    `json:"state" max:"128"`
	Command string    `json:"command,omitempty" max:"16384"`
	Args    []string  `json:"args,omitempty"`
	Cwd     string    `json:"cwd" is:"name"`
	User    string    `json:"user"`
	PID     int       `json:"pid"`
	Started time.Time `json:"started"`
	Ended   time.Time `json:"ended,omitzero"`
	// ExitCode is the exit status, or 128+signal as in shells; it has a meaning only after the process has exited.
	ExitCode int    `json:"exit_code"`
	Signal   string `json:"signal,omitempty" max:"128"`
	Cause    string `json:"cause,omitempty" max:"128"`
	// Children counts the processes that it started and that still run after its end.
	Children int `json:"children,omitempty"`
	// LimitHit reports whether a fork was refused because there were too many processes.
	LimitHit bool `json:"limit_hit,omitempty"`
	// CPUMS is the CPU time used, in milliseconds. Memory is the bytes in use now or, after the end, the peak.
	CPUMS     int64 `json:"cpu_ms"`
	Memory    int64 `json:"memory"`
	Output    int64 `json:"output"`            // bytes written so far
	Dropped   int64 `json:"dropped,omitempty"` // of these, bytes no longer kept
	StdinOpen bool  `json:"stdin_open,omitempty"`
	// Terminal is the size of its terminal, if it has one.
	Terminal *Terminal `json:"terminal,omitempty"`
	// ShellCwd is the directory where its shell is now, if the command has changed it.
	ShellCwd string `json:"shell_cwd,omitempty" is:"name"`
	// GoneCwd is the directory where its shell was, if that is gone or closed to the user; the process was started in a directory above it.
	GoneCwd string `json:"gone_cwd,omitempty" is:"name"`
	// Forgotten reports whether its changes to the shell could not be remembered.
	Forgotten bool `json:"forgotten,omitempty"`
}

// ListRequest selects processes; zero values select all.
type ListRequest struct {
	Tag   string `json:"tag,omitempty"`
	State string `json:"state,omitempty"`
}

// SignalRequest names a process by id or tag and a signal by name ("SIGTERM", "term") or number.
type SignalRequest struct {
	Process string `json:"process"`
	Signal  string `json:"signal"`
}

// ResizeRequest changes the size of a process's terminal.
type ResizeRequest struct {
	Process  string   `json:"process"`
	Terminal Terminal `json:"terminal"`
}

// UsageRequest asks for the resource usage and, if Since is set, for the events after that number.
type UsageRequest struct {
	Since *int64 `json:"since,omitempty"`
}

// Usage is the resource usage of all user processes of the sandbox.
type Usage struct {
	Memory    int64 `json:"memory"`     // bytes
	CPUMS     int64 `json:"cpu_ms"`     // milliseconds since boot
	Processes int64 `json:"processes"`  // tasks now
	DiskUsed  int64 `json:"disk_used"`  // bytes of the root file system
	DiskTotal int64 `json:"disk_total"` // bytes
	OOMKills  int64 `json:"oom_kills"`  // since boot
	// AgentMemory is the agent's own resident memory in bytes.
	AgentMemory int64 `json:"agent_memory"`
	// Events are the requested events, oldest first; the agent keeps only the latest MaxEvents.
	Events []Event `json:"events,omitempty" max:"512"`
}

// Types of files.
const (
	TypeFile    = "file"
	TypeDir     = "dir"
	TypeSymlink = "symlink"
	TypeOther   = "other"
)

// FileInfo describes a file. For a symlink, Stat describes its target; directory listings, and requests for links, describe the link
// itself.
type FileInfo struct {
	Path   string            `json:"path" is:"name"`
	Type   string            `json:"type"`
	Size   int64             `json:"size"`
	Mode   string            `json:"mode"` // permissions, octal
	Owner  string            `json:"owner"`
	Group  string            `json:"group"`
	MTime  time.Time         `json:"mtime"`
	Target string            `json:"target,omitempty" is:"name"` // of a symlink
	Attrs  map[string]string `json:"attrs,omitempty"`            // user.* extended attributes, without the prefix
	Link   *Link             `json:"link,omitempty"`             // if links were asked for
}

// Link is what FileInfo does not tell about a file itself, and about where a symlink leads.
type Link struct {
	Permissions string `json:"permissions"` // in the format of fs.FileMode
	// Target is the path to which a symlink finally leads, Type and Mode describe the file there. "" means that there is no file.
	Target string `json:"target,omitempty" is:"name"`
	Type   string `json:"type,omitempty"`
	Mode   string `json:"mode,omitempty"`
	// Real is the path without symlinks; a directory listing does not set it.
	Real string `json:"real,omitempty" is:"name"`
}

// UserRequest names a user: by name, uid or uid:gid; "" is the sandbox's default user.
type UserRequest struct {
	User string `json:"user,omitempty"`
}

// User is a user of the sandbox.
type User struct {
	Name string `json:"name"`
	UID  uint32 `json:"uid"`
	GID  uint32 `json:"gid"`
	Home string `json:"home" is:"name"`
	Cwd  string `json:"cwd" is:"name"` // where the user's processes start if they name no directory
}

// DirRequest lists a directory down to Depth levels (at least 1). It returns at most Limit entries, only those after the path After if that
// is set. With Links each entry also has its Link and its attributes.
type DirRequest struct {
	Path  string `json:"path" is:"name"`
	Depth int    `json:"depth,omitempty"`
	Limit int    `json:"limit,omitempty"`
	After string `json:"after,omitempty" is:"name"`
	Links bool   `json:"links,omitempty"`
}

// DirResult is a listing in tree order. More reports whether entries were left out.
type DirResult struct {
	Entries []FileInfo `json:"entries"`
	More    bool       `json:"more,omitempty"`
}

// PathRequest names one file. User owns what is created. Recursive makes Remove remove whole trees. Links describes a symlink itself
// instead of its target.
type PathRequest struct {
	Path      string            `json:"path" is:"name"`
	User      string            `json:"user,omitempty"`
	Recursive bool              `json:"recursive,omitempty"`
	Perm      uint32            `json:"perm,omitempty"`
	Attrs     map[string]string `json:"attrs,omitempty"`
	Links     bool              `json:"links,omitempty"`
}

// MoveRequest renames From to To, across file systems if necessary.
type MoveRequest struct {
	From string `json:"from" is:"name"`
	To   string `json:"to" is:"name"`
	User string `json:"user,omitempty"` // owner of the directories that are created for To
}

// EditRequest replaces Old, which must occur exactly once unless All is set, or inserts New after line InsertLine.
type EditRequest struct {
	Path       string `json:"path" is:"name"`
	Old        string `json:"old,omitempty"`
	New        string `json:"new"`
	All        bool   `json:"all,omitempty"`
	InsertLine *int   `json:"insert_line,omitempty"` // 0 is before the first line
}

// EditResult is the outcome of an edit. Line is the first changed line, Snippet the lines around it.
type EditResult struct {
	Info     FileInfo `json:"info"`
	Replaced int      `json:"replaced"`
	Line     int      `json:"line"`
	Snippet  string   `json:"snippet"`
	CRLF     bool     `json:"crlf,omitempty"` // the file's CRLF line ends were matched or written
}

// SearchRequest finds files under Path by Glob (** spans directories) and, with Pattern (RE2), lines in them.
type SearchRequest struct {
	Path    string `json:"path" is:"name"`
	Pattern string `json:"pattern,omitempty"`
	Glob    string `json:"glob,omitempty"`
	Limit   int    `json:"limit,omitempty"`
}

// SearchResult holds the matches in path order. More reports whether the limit or the time ended the search early.
type SearchResult struct {
	Matches []Match `json:"matches"`
	Files   int     `json:"files"` // files searched
	More    bool    `json:"more,omitempty"`
}

// Match is a file or, if Line > 0, a line in it.
type Match struct {
	Path string `json:"path" is:"name"`
	Line int    `json:"line,omitempty"`
	Text string `json:"text,omitempty"`
}

// WriteMessage writes v as a length followed by JSON.
func WriteMessage(w io.Writer, v any) error {
	body, err := json.Marshal(ForWire(v))
	if err != nil {
		return fmt.Errorf("encode message: %w", err)
	}
	if len(body) > MaxMessage {
		return fmt.Errorf("encode message: %d bytes are more than %d: %w", len(body), MaxMessage, ErrTooLarge)
	}
	buf := make([]byte, 4, 4+len(body))
	binary.BigEndian.PutUint32(buf, uint32(len(body)))
	_, err = w.Write(append(buf, body...))
	return err
}

// ReadMessage reads what WriteMessage wrote.
func ReadMessage(r io.Reader, v any) error {
	body, err := readBlock(r, MaxMessage)
	if err != nil {
		return err
	}
	if err := Unmarshal(body, v); err != nil {
		return fmt.Errorf("decode message: %w", err)
	}
	return nil
}

// readBlock reads a length of at most limit, then that many bytes.
func readBlock(r io.Reader, limit uint32) ([]byte, error) {
	var size [4]byte
	if _, err := io.ReadFull(r, size[:]); err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(size[:])
	if n > limit {
		return nil, fmt.Errorf("block of %d bytes, allowed are %d: %w", n, limit, ErrTooLarge)
	}
	body := make([]byte, n)
	if _, err := io.ReadFull(r, body); err != nil {
		return nil, cutOff(err)
	}
	return body, nil
}

// cutOff turns an end of file in the middle of something into an error.
func cutOff(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}
