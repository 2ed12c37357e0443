package sandbox

// leastKernel is what the kernel of the smallest sandbox may take: about 90,000 files.
const leastKernel = 256 << 20

// Kernel tells how much memory the sandbox's kernel may take for itself, in bytes: KernelMemory, by default five eighths of
// Memory: about 200,000 files at 1 GiB.
func (l Limits) Kernel() int64 {
	if l.KernelMemory > 0 {
		return l.KernelMemory
	}
	return max(leastKernel, l.Memory/8*5)
}

// fits says whether what was saved with these limits goes on with others: the kernel's own memory may be another.
func (l Limits) fits(other Limits) bool {
	l.KernelMemory, other.KernelMemory = 0, 0
	return l == other
}

// promisedPart is the part of the kernel's default that is promised: few sandboxes have so many files and connections that they need it
// all.
const promisedPart = 4

// promised is the memory of the host that a sandbox with these limits is promised, in bytes: of its kernel's what is asked for, else a part
// of the default.
func (l Limits) promised() int64 {
	if l.KernelMemory > 0 {
		return l.Memory + l.KernelMemory
	}
	return l.Memory + l.Kernel()/promisedPart
}

// grown are the limits with more memory. What is saved with its memory keeps its limit: the rest is its kernel's.
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
