// Package rawsys makes system calls without the Go runtime: the few on the way of a short command, most of whose time they are. In gVisor
// each call costs microseconds, and each thread that wakes costs more than that. Spawn forks and executes with a third of the calls of
// syscall.ForkExec, which needs assembly, because no Go code may run between fork and exec. All other functions make calls that do not
// block, and do not tell the Go scheduler: it would wake its monitor for each call after an idle time, and the monitor then wakes every
// 20 µs for a millisecond. The price: only the monitor takes the processor from a goroutine that keeps it, so code that runs for long must
// make an ordinary call in time. Work for the host begins with one, which reads the request. The package knows nothing about sandboxes.
package rawsys
