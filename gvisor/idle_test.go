package gvisor_test

import (
	"testing"
	"time"

	"soulbox.dev/soulbox/internal/sandboxtest"
	"soulbox.dev/soulbox/sandbox"
)

// TestIdleTakesSomething: what a machine itself takes on the host is reported, even for a sandbox in which nothing runs.
func TestIdleTakesSomething(t *testing.T) {
	sb, _ := newSandbox(t, sandbox.CreateOptions{})
	sandboxtest.Eventually(t, "there are samples", func() bool {
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
