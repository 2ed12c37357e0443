package agent

// MountRequest mounts something for a build, or unmounts it.
type MountRequest struct {
	Target string `json:"target" is:"name"`
	// Source is a file or directory below BuildDir to show at Target; "" mounts an empty directory in memory.
	Source   string `json:"source,omitempty" is:"name"`
	ReadOnly bool   `json:"read_only,omitempty"`
	Size     int64  `json:"size,omitempty"` // of the directory in memory, in bytes
	Unmount  bool   `json:"unmount,omitempty"`
	// Remove, with Unmount, is how many files and directories were created for Target: they are removed, from Target upwards.
	Remove int `json:"remove,omitempty"`
}

// MountResult is the number of files and directories that were created for the target.
type MountResult struct {
	Made int `json:"made"`
}
