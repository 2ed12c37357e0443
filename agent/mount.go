package agent

// MountRequest mounts something for a build, or takes it away again.
type MountRequest struct {
	Target string `json:"target"`
	// A file or directory below BuildDir that is seen at Target; "" is an empty directory in memory.
	Source   string `json:"source,omitempty"`
	ReadOnly bool   `json:"read_only,omitempty"`
	Size     int64  `json:"size,omitempty"` // of memory, in bytes
	Unmount  bool   `json:"unmount,omitempty"`
	// Remove, with Unmount, removes Target and as many directories above it as were made for it.
	Remove int `json:"remove,omitempty"`
}

// MountResult tells how many files and directories were made for the target.
type MountResult struct {
	Made int `json:"made"`
}
