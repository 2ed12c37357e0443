package agent

const (
	MaxWatchEvents = 256 // in one message; Overflow tells of further ones
)

// WatchEvent is a change of a file. Op is create, write, remove, rename (away) or attrib.
type WatchEvent struct {
	Op   string `json:"op"`
	Path string `json:"path"`
}

// WatchBatch holds the changes within a short time. Overflow means that there were more.
type WatchBatch struct {
	Events   []WatchEvent `json:"events,omitempty"`
	Overflow bool         `json:"overflow,omitempty"`
}
