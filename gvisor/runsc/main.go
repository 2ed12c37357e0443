// Command runsc is gVisor's runsc with patches (docs/upstream/README.md) and three changes: its sentry keeps to a soft limit of its own
// memory; it tells programs how much memory their sandbox may have; and its sysinfo(2) tells the agent what is used beyond that, and that
// the patches are there. The bundle names both sizes.
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

// showMemory makes programs see the memory that the bundle names as the total, in /proc/meminfo and by sysinfo(2). By itself, runsc tells
// the sentry the memory of the host or of the host's cgroup, which an ordinary user does not have. A sentry that executes itself again gets
// the same value.
func showMemory(args []string) {
	size := named(args, "guest-memory")
	if at := slices.Index(args, "--total-memory"); size != "" && at >= 0 && at+1 < len(args) {
		args[at+1] = size
	}
}

// tellAgent makes sysinfo(2) tell the first process, which enforces the limit, also what is used beyond it: gVisor reports at most the
// limit.
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

// guardMark tells the agent that this sentry has SoulBox's patches, so that CAP_SYS_PTRACE does not reach the agent
// (agent/guest/setup.go). It is in the load averages, which gVisor leaves zero.
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

// named reads a file of the bundle that the arguments name; "" means that there is none, or that the sentry can no longer see it.
func named(args []string, file string) string {
	for _, arg := range args {
		if bundle, ok := strings.CutPrefix(arg, "--bundle="); ok {
			body, _ := os.ReadFile(filepath.Join(bundle, file)) // a missing file means no limit
			return strings.TrimSpace(string(body))
		}
	}
	return ""
}

// limitMemory sets the limit that a file of the bundle names, in bytes. gVisor starts a sentry without this environment variable, but a
// sentry passes it on when it executes itself again, after which it cannot see the bundle.
func limitMemory(args []string) {
	if limit := debug.SetMemoryLimit(-1); limit != math.MaxInt64 { // it has been executed again
		follow(limit)
		return
	}
	if limit := named(args, "sentry-memory"); limit != "" {
		_ = os.Setenv("GOMEMLIMIT", limit)
	}
}

// follow sets the limit again after each garbage collection. If more is in use than the limit, as while a machine is saved, the sentry
// would otherwise spend its time looking for garbage that does not exist. It also returns the memory beyond the limit to the host, for
// which Go alone takes minutes.
func follow(limit int64) {
	samples := []metrics.Sample{{Name: "/gc/heap/live:bytes"}, {Name: "/memory/classes/total:bytes"},
		{Name: "/memory/classes/heap/released:bytes"}}
	type collected struct{ self *collected } // the pointer keeps it out of memory blocks that it would share with other objects
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

// giveEvery is the shortest time between two returns of memory: each needs a garbage collection.
const giveEvery = 4 * time.Second
