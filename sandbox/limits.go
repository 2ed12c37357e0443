package sandbox

import "cmp"

// Limits bound a sandbox. Zero values mean the defaults of DefaultLimits.
type Limits struct {
	CPU    float64 `json:"cpu"`    // cores
	Memory int64   `json:"memory"` // bytes
	Disk   int64   `json:"disk"`   // bytes that may be written
	// DiskInMemory keeps written files in memory, up to half of Memory. A sandbox that boots from an image is then one process on the host
	// and takes less memory while it is idle; with other templates DiskInMemory changes nothing.
	DiskInMemory bool  `json:"disk_in_memory,omitempty"`
	Processes    int64 `json:"processes"` // tasks
	// KernelMemory bounds, in bytes, what the sandbox's kernel uses itself: for files, connections and other objects that no other limit
	// counts. 0 means the default for Memory (see Kernel). It is not part of the saved sandbox: a sandbox can be resumed with more than it
	// was paused with.
	KernelMemory int64 `json:"kernel_memory,omitempty"`
}

// DefaultLimits are the limits of a sandbox that asks for none.
func DefaultLimits() Limits {
	return Limits{CPU: 2, Memory: 1 << 30, Disk: 10 << 30, Processes: 512}
}

// leastKernel is what the kernel of the smallest sandbox may use: enough for about 90,000 files.
const leastKernel = 256 << 20

// Kernel returns how much memory the sandbox's kernel may use itself, in bytes: KernelMemory, or by default five eighths of Memory, which
// at 1 GiB is enough for about 200,000 files.
func (l Limits) Kernel() int64 {
	if l.KernelMemory > 0 {
		return l.KernelMemory
	}
	return max(leastKernel, l.Memory/8*5)
}

// fits reports whether a sandbox that was saved with these limits can be resumed with others: only KernelMemory may differ.
func (l Limits) fits(other Limits) bool {
	l.KernelMemory, other.KernelMemory = 0, 0
	return l == other
}

// promisedPart is the divisor of the kernel's default that gives the memory promised for it: few sandboxes have so many files and
// connections that they need all of the default.
const promisedPart = 4

// promised is the host memory that a sandbox with these limits is promised, in bytes: Memory, and for its kernel all of KernelMemory if
// that was asked for, else a part of the default.
func (l Limits) promised() int64 {
	if l.KernelMemory > 0 {
		return l.Memory + l.KernelMemory
	}
	return l.Memory + l.Kernel()/promisedPart
}

// grown returns the limits with more memory. If the sandbox was saved with its memory (whole), Memory stays and the kernel gets the rest.
func (l Limits) grown(memory int64, whole bool) Limits {
	switch {
	case memory == 0:
	case whole:
		l.KernelMemory = l.Kernel() + memory - l.Memory
	default:
		l.Memory = memory
	}
	return l
}

// or fills in what is not set.
func (l Limits) or(d Limits) Limits {
	return Limits{CPU: cmp.Or(l.CPU, d.CPU), Memory: cmp.Or(l.Memory, d.Memory), Disk: cmp.Or(l.Disk, d.Disk),
		Processes: cmp.Or(l.Processes, d.Processes), DiskInMemory: l.DiskInMemory || d.DiskInMemory,
		KernelMemory: cmp.Or(l.KernelMemory, d.KernelMemory)}
}
