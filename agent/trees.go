package agent

// TreeRequest begins, reads or ends a watch that outlasts the call.
type TreeRequest struct {
	// Path and what follows begin one: of a directory, or of one file. Ignore are globs of names, or of paths below it.
	Path      string   `json:"path,omitempty"`
	Recursive bool     `json:"recursive,omitempty"`
	Ignore    []string `json:"ignore,omitempty"`
	// Watch names one that was begun, From is the number of the first event to read: those that are kept can be read again.
	Watch string `json:"watch,omitempty"`
	From  int64  `json:"from,omitempty"`
	Close bool   `json:"close,omitempty"`
	// Limit bounds the events, WaitMS the wait for the first one.
	Limit  int   `json:"limit,omitempty"`
	WaitMS int64 `json:"wait_ms,omitempty"`
}

// TreeEvent is a change in a watched tree: create, write, remove, rename (From is where it was), save (a file was replaced by a rename,
// From is what by, if that was in the tree) or attrib.
type TreeEvent struct {
	Op   string `json:"op"`
	Path string `json:"path"`
	From string `json:"from,omitempty"`
	Dir  bool   `json:"dir,omitempty"`
	// Whole says of create and save that a call of the host has written the file, which got its name when it was whole: there is no write
	// to tell of.
	Whole bool `json:"whole,omitempty"`
}

// TreeResult is what a watch has to tell.
type TreeResult struct {
	Watch  string      `json:"watch"`
	Events []TreeEvent `json:"events" max:"2000"`
	Next   int64       `json:"next"`           // the first event that is not in it
	More   bool        `json:"more,omitempty"` // there are some already
	// Lost says that events are missing: because there were too many, or the reader was too slow. What is there must be looked at anew.
	Lost bool `json:"lost,omitempty"`
	// Gone says that what is watched does not exist any more.
	Gone bool `json:"gone,omitempty"`
}

const (
	MaxTreeBatch = 2000
)
