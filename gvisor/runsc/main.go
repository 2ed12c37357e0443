// Command runsc is gVisor's, and has a sentry keep to a soft limit of its own memory, which its bundle names.
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

	"gvisor.dev/gvisor/runsc/cli/maincli"
	"gvisor.dev/gvisor/runsc/version"
)

var _ = version.Version() // the linker sets it

func main() {
	if boot := slices.Index(os.Args, "boot"); boot >= 0 {
		limitMemory(os.Args[boot:])
	}
	maincli.Main()
}

// limitMemory sets the limit that a file of the bundle names, in bytes. gVisor gives a sentry no environment of ours, but a sentry gives it to the
// program that it executes once more when it sees the bundle no longer.
func limitMemory(args []string) {
	if limit := debug.SetMemoryLimit(-1); limit != math.MaxInt64 { // it has been executed once more
		follow(limit)
		return
	}
	for _, arg := range args {
		if bundle, ok := strings.CutPrefix(arg, "--bundle="); ok {
			if body, err := os.ReadFile(filepath.Join(bundle, "sentry-memory")); err == nil { // else it has no limit
				_ = os.Setenv("GOMEMLIMIT", strings.TrimSpace(string(body)))
			}
		}
	}
}

// follow sets the limit anew after each collection of garbage: where more is in use than the limit, as while a machine is saved, the sentry would do
// little else but look for garbage that is not there. What it holds beyond the limit it gives back, which Go by itself takes minutes for.
func follow(limit int64) {
	samples := []metrics.Sample{{Name: "/gc/heap/live:bytes"}, {Name: "/memory/classes/total:bytes"}, {Name: "/memory/classes/heap/released:bytes"}}
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
