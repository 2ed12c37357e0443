package sandbox

// leastKernel is what the kernel of the smallest sandbox may take: about 90,000 files.
const leastKernel = 256 << 20

// Kernel tells how much memory the sandbox's kernel may take for itself, in bytes: KernelMemory, by default five eighths of
// Memory: about 200,000 files at 1 GiB. It is promised like Memory, on top of it.
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
