package agent

const (
	MaxWatchEvents = 256 // in one message; more are said to be left out
)

// WatchEvent is a change of a file. Op is one of create, write, remove, rename (away) and attrib.
type WatchEvent struct {
	Op   string `json:"op"`
	Path string `json:"path"`
}

// WatchBatch is what has changed in a short time. Overflow says that there was more.
type WatchBatch struct {
	Events   []WatchEvent `json:"events,omitempty"`
	Overflow bool         `json:"overflow,omitempty"`
}
