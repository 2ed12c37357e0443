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

// Level is what this agent knows. 1: users, environment, links, attributes of written files, listings in parts, output that is held.
// 2: arguments of programs that are no text.
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
	CallWork      = "work"
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

// UnknownCall begins the error of a call that an agent does not know, because its host is newer.
const UnknownCall = "unknown call"

// Hello is the one line each side writes first.
type Hello struct {
	Protocol int    `json:"protocol"`
	Version  string `json:"version"`
	Boot     string `json:"boot,omitempty"`
	// Level counts what agents have learned since the first of this protocol.
	Level int    `json:"level,omitempty"`
	Error string `json:"error,omitempty"`
}

// Header opens every stream.
type Header struct {
	Stream  string `json:"stream"`
	Path    string `json:"path,omitempty"`
	User    string `json:"user,omitempty"`
	Offset  int64  `json:"offset,omitempty"`
	Limit   int64  `json:"limit,omitempty"`
	Mode    string `json:"mode,omitempty"`
	Perm    uint32 `json:"perm,omitempty"`
	Parents bool   `json:"parents,omitempty"`
	Process string `json:"process,omitempty"`
	Follow  bool   `json:"follow,omitempty"`
	// Hold has a process wait rather than lose output that the host was not sent yet.
	Hold    bool   `json:"hold,omitempty"`
	Size    int64  `json:"size,omitempty"`
	EOF     bool   `json:"eof,omitempty"`
	Network string `json:"network,omitempty"`
	Address string `json:"address,omitempty"`
	// Dial names a connection, for noteHangUp.
	Dial string `json:"dial,omitempty"`
	// Attrs are the user.* extended attributes of a file that is written, or with AttrsBelow those whose names begin so; nil keeps those
	// that it has.
	Attrs      map[string]string `json:"attrs,omitzero"`
	AttrsBelow string            `json:"attrs_below,omitempty"`
}

// Answer is the guest's message on a raw stream.
type Answer struct {
	Error   *Error    `json:"error,omitempty"`
	Info    *FileInfo `json:"info,omitempty"`
	Written int64     `json:"written,omitempty"`
}

// Config is what the host tells the agent about its sandbox.
type Config struct {
	// Env is added to the environment of every process, and to what was given before.
	Env map[string]string `json:"env,omitempty"`
	// User and Cwd are those of processes that name none; the defaults are "user", and the home of whoever it is.
	User string `json:"user,omitempty"`
	Cwd  string `json:"cwd,omitempty"`
	// MaxProcesses bounds the tasks of all user processes together; zero means no bound.
	MaxProcesses int64 `json:"max_processes,omitempty"`
	// MaxMemory bounds the memory of all user processes together, in bytes: beyond it the largest one is killed
	// with cause "oom". Zero means no bound.
	MaxMemory int64 `json:"max_memory,omitempty"`
	// MaxCPU is the number of cores that programs are told they may use; the host sees to it. Zero means no bound.
	MaxCPU float64 `json:"max_cpu,omitempty"`
	// OrphanMS is how long the agent lives without any host; zero means for ever.
	OrphanMS int64 `json:"orphan_ms,omitempty"`
}

// StartRequest describes a process to start. Either Command (given to the shell) or Args is set.
type StartRequest struct {
	Command string            `json:"command,omitempty"`
	Args    []string          `json:"args,omitempty"`
	Shown   bool              `json:"shown,omitempty"` // on the pipe: Args are in the notation of names, since they are no text
	Cwd     string            `json:"cwd,omitempty"`   // absolute; default the user's home
	Env     map[string]string `json:"env,omitempty"`   // added to the sandbox' environment
	User    string            `json:"user,omitempty"`  // name, uid or uid:gid; default "user"
	// Stdin is given to the process, then its stdin is closed, unless KeepStdin holds it open for WriteStdin.
	Stdin     []byte `json:"stdin,omitempty"`
	KeepStdin bool   `json:"keep_stdin,omitempty"`
	// Terminal gives the process a terminal of that size as stdin, stdout and stderr; zero sizes are 24 and 80. Its stdin stays open.
	Terminal *Terminal `json:"terminal,omitempty"`
	// Tag is a second name, unique among the running processes.
	Tag string `json:"tag,omitempty"`
	// Shell names a shell that remembers: the command starts in its directory, with its environment, functions and options, and leaves them
	// to the next command as it has changed them. Each user has a shell of that name. Without bash only the request's own counts.
	Shell string `json:"shell,omitempty"`
	// Fork starts the command as the shell would with "&": it gets what the shell has, and changes nothing of it. A command with a terminal
	// always is one.
	Fork bool `json:"fork,omitempty"`
	// TimeoutMS ends the process that long after its start, with cause "timeout"; zero means never.
	TimeoutMS int64 `json:"timeout_ms,omitempty"`
	// Hold keeps all output for the first stream that holds it, for a while.
	Hold bool `json:"hold,omitempty"`
	// WaitMS is how long the call waits for the end.
	WaitMS int64  `json:"wait_ms,omitempty"`
	Window Window `json:"window"`
}

// WaitRequest asks for a process by id or tag and a window of its output.
type WaitRequest struct {
	Process string `json:"process"`
	WaitMS  int64  `json:"wait_ms,omitempty"`
	// Beyond, if set, ends the wait also when the process has written more than so many bytes in all.
	Beyond *int64 `json:"beyond,omitempty"`
	Window Window `json:"window"`
}

// Window selects output: up to Head bytes from Offset on and, where that is not all, the last Tail bytes.
type Window struct {
	Offset int64  `json:"offset,omitempty"`
	Head   int    `json:"head,omitempty"`
	Tail   int    `json:"tail,omitempty"`
	Stream string `json:"stream,omitempty"` // "", "stdout" or "stderr"
}

// Output is what a Window found. Offsets count stdout and stderr together.
type Output struct {
	Head []byte `json:"head,omitempty"`
	Tail []byte `json:"tail,omitempty"`
	// HeadEnd is the offset behind Head; what lies from there to TailStart is kept but was not asked for.
	HeadEnd   int64 `json:"head_end"`
	TailStart int64 `json:"tail_start"`
	// End is the offset to go on from.
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

// Causes of a process' end that its exit status alone does not tell.
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
	Cwd     string    `json:"cwd"`
	User    string    `json:"user"`
	PID     int       `json:"pid"`
	Started time.Time `json:"started"`
	Ended   time.Time `json:"ended,omitzero"`
	// ExitCode is the exit status, or 128+signal as shells have it; meaningful when exited.
	ExitCode int    `json:"exit_code"`
	Signal   string `json:"signal,omitempty" max:"128"`
	Cause    string `json:"cause,omitempty" max:"128"`
	// Children counts what the process started and left behind; they go on when it has ended.
	Children int `json:"children,omitempty"`
	// LimitHit says that a fork was refused because there were too many processes.
	LimitHit bool `json:"limit_hit,omitempty"`
	// CPUMS is the CPU time used in milliseconds, Memory the bytes used now, or at most once it has ended.
	CPUMS     int64 `json:"cpu_ms"`
	Memory    int64 `json:"memory"`
	Output    int64 `json:"output"`            // bytes written so far
	Dropped   int64 `json:"dropped,omitempty"` // of these, bytes no longer kept
	StdinOpen bool  `json:"stdin_open,omitempty"`
	// Terminal is the size of its terminal, if it has one.
	Terminal *Terminal `json:"terminal,omitempty"`
	// ShellCwd is where its shell is now, if that has moved.
	ShellCwd string `json:"shell_cwd,omitempty"`
	// GoneCwd is where its shell was, if that directory is gone; it was started in one above.
	GoneCwd string `json:"gone_cwd,omitempty"`
	// Forgotten says that what it has changed of its shell could not be remembered.
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

// ResizeRequest changes the size of a process' terminal.
type ResizeRequest struct {
	Process  string   `json:"process"`
	Terminal Terminal `json:"terminal"`
}

// UsageRequest asks for the consumption and, if Since is set, for the events after that number.
type UsageRequest struct {
	Since *int64 `json:"since,omitempty"`
}

// Usage is the consumption of all user processes of the sandbox.
type Usage struct {
	Memory    int64 `json:"memory"`     // bytes
	CPUMS     int64 `json:"cpu_ms"`     // milliseconds since boot
	Processes int64 `json:"processes"`  // tasks now
	DiskUsed  int64 `json:"disk_used"`  // bytes of the root file system
	DiskTotal int64 `json:"disk_total"` // bytes
	OOMKills  int64 `json:"oom_kills"`  // since boot
	// AgentMemory is the agent's own resident memory in bytes.
	AgentMemory int64 `json:"agent_memory"`
	// Events are those that were asked for, the oldest first; the agent keeps the latest ones only.
	Events []Event `json:"events,omitempty" max:"512"`
}

// Types of files.
const (
	TypeFile    = "file"
	TypeDir     = "dir"
	TypeSymlink = "symlink"
	TypeOther   = "other"
)

// FileInfo describes a file. It is the target's for Stat, the link's own in a directory listing, and where links were asked for.
type FileInfo struct {
	Path   string            `json:"path"`
	Type   string            `json:"type"`
	Size   int64             `json:"size"`
	Mode   string            `json:"mode"` // permissions, octal
	Owner  string            `json:"owner"`
	Group  string            `json:"group"`
	MTime  time.Time         `json:"mtime"`
	Target string            `json:"target,omitempty"` // of a symlink
	Attrs  map[string]string `json:"attrs,omitempty"`  // user.* extended attributes, without the prefix
	Link   *Link             `json:"link,omitempty"`   // where links were asked for
}

// Link is what a file is apart from where it leads to, as far as FileInfo does not tell.
type Link struct {
	Permissions string `json:"permissions"` // as fs.FileMode shows them
	// Target is the path that a symlink leads to in the end, and Type and Mode are of what is there; "" is nothing.
	Target string `json:"target,omitempty"`
	Type   string `json:"type,omitempty"`
	Mode   string `json:"mode,omitempty"`
	// Real is the path without symlinks, of a file that was asked for by itself.
	Real string `json:"real,omitempty"`
}

// UserRequest names a user: by name, uid or uid:gid; "" is the sandbox' own.
type UserRequest struct {
	User string `json:"user,omitempty"`
}

// User is a user of the sandbox.
type User struct {
	Name string `json:"name"`
	UID  uint32 `json:"uid"`
	GID  uint32 `json:"gid"`
	Home string `json:"home"`
	Cwd  string `json:"cwd"` // where his processes start that name no directory
}

// DirRequest lists a directory down to Depth levels (at least 1), at most Limit entries, those behind the path After if it is set. With
// Links each entry has what Link tells, and its attributes.
type DirRequest struct {
	Path  string `json:"path"`
	Depth int    `json:"depth,omitempty"`
	Limit int    `json:"limit,omitempty"`
	After string `json:"after,omitempty"`
	Links bool   `json:"links,omitempty"`
}

// DirResult is a listing in tree order. More says that entries were left out.
type DirResult struct {
	Entries []FileInfo `json:"entries"`
	More    bool       `json:"more,omitempty"`
}

// PathRequest names one file; User owns what is created; Recursive extends Remove to whole trees; Links has a file described that is a
// link, not what it leads to.
type PathRequest struct {
	Path      string            `json:"path"`
	User      string            `json:"user,omitempty"`
	Recursive bool              `json:"recursive,omitempty"`
	Perm      uint32            `json:"perm,omitempty"`
	Attrs     map[string]string `json:"attrs,omitempty"`
	Links     bool              `json:"links,omitempty"`
}

// MoveRequest renames From to To, across file systems if need be.
type MoveRequest struct {
	From string `json:"from"`
	To   string `json:"to"`
	User string `json:"user,omitempty"` // whom directories are given that are made for it
}

// EditRequest replaces Old, which must occur exactly once unless All, or inserts New behind line InsertLine.
type EditRequest struct {
	Path       string `json:"path"`
	Old        string `json:"old,omitempty"`
	New        string `json:"new"`
	All        bool   `json:"all,omitempty"`
	InsertLine *int   `json:"insert_line,omitempty"` // 0 is before the first line
}

// EditResult tells what an edit did; Line is the first line that changed, and Snippet the lines around it.
type EditResult struct {
	Info     FileInfo `json:"info"`
	Replaced int      `json:"replaced"`
	Line     int      `json:"line"`
	Snippet  string   `json:"snippet"`
	CRLF     bool     `json:"crlf,omitempty"` // ends of lines were matched or written as the file has them
}

// SearchRequest finds files under Path by Glob (** spans directories) and, with Pattern (RE2), lines in them.
type SearchRequest struct {
	Path    string `json:"path"`
	Pattern string `json:"pattern,omitempty"`
	Glob    string `json:"glob,omitempty"`
	Limit   int    `json:"limit,omitempty"`
}

// SearchResult holds the matches in path order. More says that the limit or the time ended the search.
type SearchResult struct {
	Matches []Match `json:"matches"`
	Files   int     `json:"files"` // files looked at
	More    bool    `json:"more,omitempty"`
}

// Match is a file, or with Line > 0 a line in it.
type Match struct {
	Path string `json:"path"`
	Line int    `json:"line,omitempty"`
	Text string `json:"text,omitempty"`
}

// WriteMessage writes v as a length and JSON.
func WriteMessage(w io.Writer, v any) error {
	body, err := json.Marshal(v)
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

// ReadMessage reads what writeMessage wrote.
func ReadMessage(r io.Reader, v any) error {
	body, err := readBlock(r, MaxMessage)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(body, v); err != nil {
		return fmt.Errorf("decode message: %w", err)
	}
	return nil
}

// readBlock reads a length of at most limit and that many bytes.
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

// cutOff makes the end of a stream in the middle of something an error of its own.
func cutOff(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}
