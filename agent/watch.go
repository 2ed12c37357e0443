package agent

// MaxWatchEvents bounds the events of one message of a stream.
const MaxWatchEvents = 256

// WatchEvent is a change of a file, as a stream tells it. Op is create, write, remove, rename (away; the create of the new name follows) or
// attrib.
type WatchEvent struct {
	Op   string `json:"op"`
	Path string `json:"path" is:"name"`
}

// WatchBatch holds the changes within a short time. Overflow means that there were more, or that the path leads elsewhere now: the reader
// must look again.
type WatchBatch struct {
	Events   []WatchEvent `json:"events,omitempty"`
	Overflow bool         `json:"overflow,omitempty"`
	// Error is why no more changes follow; older agents end the stream without it.
	Error *Error `json:"error,omitempty"`
}

// TreeRequest begins, reads or ends a watch that outlasts the call.
type TreeRequest struct {
	// Path, Recursive and Ignore begin a watch of a directory or of one file. Ignore holds globs that match names, or paths below Path.
	Path      string   `json:"path,omitempty" is:"name"`
	Recursive bool     `json:"recursive,omitempty"`
	Ignore    []string `json:"ignore,omitempty"`
	// Watch names an existing watch. From is the number of the first event to read; events that are still kept can be read again.
	Watch string `json:"watch,omitempty"`
	From  int64  `json:"from,omitempty"`
	Close bool   `json:"close,omitempty"`
	// Limit bounds the number of events, WaitMS the wait for the first one.
	Limit  int   `json:"limit,omitempty"`
	WaitMS int64 `json:"wait_ms,omitempty"`
}

// TreeEvent is a change in a watched tree. Op is create, write, remove, rename (From is the old path), save (a rename replaced an existing
// file; From is the path of the new file before, if that was in the tree) or attrib.
type TreeEvent struct {
	Op   string `json:"op"`
	Path string `json:"path" is:"name"`
	From string `json:"from,omitempty" is:"name"`
	Dir  bool   `json:"dir,omitempty"`
	// Whole, for create and save, means that a call of the host has written the file, which got its name only when it was complete: no
	// write event follows.
	Whole bool `json:"whole,omitempty"`
}

// TreeResult is the events of a watch that were read.
type TreeResult struct {
	Watch  string      `json:"watch" max:"64"`
	Events []TreeEvent `json:"events" max:"2000"`
	Next   int64       `json:"next"`           // number of the first event after these
	More   bool        `json:"more,omitempty"` // more events can be read at once
	// Lost means that events are missing, because there were too many or the reader was too slow. The reader must look at the tree again.
	Lost bool `json:"lost,omitempty"`
	// Gone means that the watched path does not exist any more.
	Gone bool `json:"gone,omitempty"`
}

// MaxTreeBatch bounds the events of one answer.
const MaxTreeBatch = 2000
