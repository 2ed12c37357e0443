package gvisor_test

import (
	"testing"
	"time"

	"soulbox.dev/soulbox/internal/sandboxtest"
	"soulbox.dev/soulbox/sandbox"
)

// TestMachineTakesSomething: what a machine itself takes on the host is reported, also where nothing in the sandbox takes much. How long it
// was on a CPU is known to 10 ms, so short commands are run until that is reached.
func TestMachineTakesSomething(t *testing.T) {
	m := newManager(t, sandboxtest.Dir(t), func(o *sandbox.Options) { o.SampleEvery = 100 * time.Millisecond })
	sb, c := createIn(t, m, sandbox.CreateOptions{})
	sandboxtest.Eventually(t, "there are samples", func() bool {
		sandboxtest.Run(t, c, "true")
		samples, err := sb.Samples(time.Now().Add(-time.Hour), time.Time{})
		if err != nil {
			t.Fatal(err)
		}
		cpu := 0.0
		for _, s := range samples {
			if cpu += s.HostCPU; s.HostMemory < 1<<20 || s.HostMemory > 1<<30 {
				t.Fatalf("%+v", s)
			}
		}
		return cpu > 0
	})
}
