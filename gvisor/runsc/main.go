// Command runsc is gVisor's, with a sentry that keeps to a soft limit of its own memory, and that tells programs how much memory their
// sandbox may have. Its bundle names both.
package main

import (
	"math"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"slices"
	"strings"
	"time"

	abi "gvisor.dev/gvisor/pkg/abi/linux"
	"gvisor.dev/gvisor/pkg/sentry/arch"
	"gvisor.dev/gvisor/pkg/sentry/kernel"
	"gvisor.dev/gvisor/pkg/sentry/syscalls/linux"
	"gvisor.dev/gvisor/pkg/sentry/usage"
	"gvisor.dev/gvisor/runsc/cli/maincli"
	"gvisor.dev/gvisor/runsc/version"
)

var _ = version.Version() // the linker sets it

func main() {
	if boot := slices.Index(os.Args, "boot"); boot >= 0 {
		limitMemory(os.Args[boot:])
		showMemory(os.Args[boot:])
		tellAgent()
	}
	maincli.Main()
}

// showMemory has programs see the memory that the bundle names as all that there is, in /proc/meminfo and by sysinfo(2). runsc itself tells
// the sentry what the host has, or the host's cgroup, of which an ordinary user has none. A sentry that is executed once more is told the
// same.
func showMemory(args []string) {
	size := named(args, "guest-memory")
	if at := slices.Index(args, "--total-memory"); size != "" && at >= 0 && at+1 < len(args) {
		args[at+1] = size
	}
}

// tellAgent has sysinfo(2) tell the first process, which keeps the limit, what is used beyond it, too: gVisor tells at most the limit.
func tellAgent() {
	for _, table := range []*kernel.SyscallTable{linux.AMD64, linux.ARM64} {
		for number, call := range table.Table {
			if call.Name == "sysinfo" {
				call.Fn = sysinfo
				table.Table[number] = call
			}
		}
		table.Init()
	}
}

// guardMark tells the agent that this sentry has our patches: that CAP_SYS_PTRACE does not reach it (agent/guest/machine.go). gVisor has no
// loads.
const guardMark = 0x536f756c426f78

func sysinfo(t *kernel.Task, number uintptr, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	if t.TGIDInRoot() != 1 {
		return linux.Sysinfo(t, number, args)
	}
	file, err := t.Kernel().MemoryFile().TotalUsage()
	if err != nil {
		return 0, nil, err
	}
	counted, _ := usage.MemoryAccounting.Copy()
	used := file + counted.Mapped
	total := max(usage.MaximumTotalMemoryBytes, used)
	info := abi.Sysinfo{
		Loads: [3]uint64{guardMark}, Procs: uint16(t.Kernel().TaskSet().Root.NumTasks()),
		Uptime: t.Kernel().MonotonicClock().Now().Seconds(), TotalRAM: total, FreeRAM: total - used, Unit: 1,
	}
	_, err = info.CopyOut(t, args[0].Pointer())
	return 0, nil, err
}

// named reads a file of the bundle that the arguments name; "" is none, or that the sentry sees it no longer.
func named(args []string, file string) string {
	for _, arg := range args {
		if bundle, ok := strings.CutPrefix(arg, "--bundle="); ok {
			body, _ := os.ReadFile(filepath.Join(bundle, file)) // a missing file is no limit
			return strings.TrimSpace(string(body))
		}
	}
	return ""
}

// limitMemory sets the limit that a file of the bundle names, in bytes. gVisor gives a sentry no environment of ours, but a sentry gives it
// to the program that it executes once more when it sees the bundle no longer.
func limitMemory(args []string) {
	if limit := debug.SetMemoryLimit(-1); limit != math.MaxInt64 { // it has been executed once more
		follow(limit)
		return
	}
	if limit := named(args, "sentry-memory"); limit != "" {
		_ = os.Setenv("GOMEMLIMIT", limit)
	}
}

// follow sets the limit anew after each collection of garbage: where more is in use than the limit, as while a machine is saved, the sentry
// would do little else but look for garbage that is not there. What it holds beyond the limit it gives back, which Go by itself takes
// minutes for.
func follow(limit int64) {
	samples := []metrics.Sample{{Name: "/gc/heap/live:bytes"}, {Name: "/memory/classes/total:bytes"},
		{Name: "/memory/classes/heap/released:bytes"}}
	type collected struct{ self *collected } // it has a pointer, so it is no part of a block of others
	var gave time.Time
	var after func(*collected)
	after = func(*collected) {
		metrics.Read(samples)
		live, held := int64(samples[0].Value.Uint64()), int64(samples[1].Value.Uint64()-samples[2].Value.Uint64())
		bound := max(limit, live*3/2)
		debug.SetMemoryLimit(bound)
		if held > bound && time.Since(gave) > giveEvery {
			gave = time.Now()
			go debug.FreeOSMemory()
		}
		runtime.SetFinalizer(&collected{}, after)
	}
	runtime.SetFinalizer(&collected{}, after)
}

// giveEvery is how often memory is given back at most: it takes a collection of its own.
const giveEvery = 4 * time.Second
