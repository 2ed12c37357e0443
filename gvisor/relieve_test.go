package gvisor_test

import (
	"strings"
	"testing"

	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/internal/sandboxtest"
	"soulbox.dev/soulbox/sandbox"
)

// TestRelieve: the agent kills what takes most of the memory or of the kernel, and nothing else.
func TestRelieve(t *testing.T) {
	_, c := newSandbox(t, sandbox.CreateOptions{})
	start := func(tag, command string) {
		t.Helper()
		p, err := c.Start(t.Context(), agent.StartRequest{Command: command, Tag: tag})
		if err != nil {
			t.Fatal(err)
		}
		sandboxtest.Eventually(t, tag+" is ready", func() bool {
			snap, err := c.Wait(t.Context(), agent.WaitRequest{Process: p.Process.ID, Window: agent.Window{Head: 100}})
			return err == nil && output(snap) == "ready\n"
		})
	}
	start("bystander", "echo ready; sleep 600")
	start("memory", `perl -e '$| = 1; $x = q(x) x (100 << 20); print "ready\n"; sleep 600'`)
	start("kernel", `perl -e '$| = 1; for (1 .. 3000) { open(my $f, "<", "/etc/passwd") or die $!; push @x, $f } print "ready\n"; `+
		`sleep 600'; true`)
	for _, kind := range []string{agent.RelieveMemory, agent.RelieveKernel} {
		r, err := c.Relieve(t.Context(), agent.RelieveRequest{Kind: kind})
		if err != nil || len(r.Killed) != 1 || r.Killed[0].Tag != kind || r.Killed[0].Name != "perl" {
			t.Fatalf("%s: %+v, %v", kind, r, err)
		}
		if k := r.Killed[0]; kind == agent.RelieveMemory && k.Memory < 100<<20 || kind == agent.RelieveKernel &&
			(k.Descriptors < 3000 || k.Processes != 2) {
			t.Errorf("%s: %+v", kind, k)
		}
		if kind == agent.RelieveKernel && !strings.Contains(r.Detail, "open files") {
			t.Errorf("there is most of %q", r.Detail)
		}
		sandboxtest.Eventually(t, kind+" has ended", func() bool {
			s, err := c.Wait(t.Context(), agent.WaitRequest{Process: kind})
			return err == nil && s.Process.State == agent.StateExited && s.Process.Cause == agent.CauseOOM && s.Process.Children == 0
		})
	}
	if s, err := c.Wait(t.Context(), agent.WaitRequest{Process: "bystander"}); err != nil || s.Process.State != agent.StateRunning {
		t.Fatalf("the bystander is %s, %v", s.Process.State, err)
	}
	start("sockets", `perl -MSocket -e '$| = 1; for (1 .. 1500) { socketpair(my $a, my $b, AF_UNIX, SOCK_STREAM, 0) or die $!; `+
		`push @x, $a, $b } print "ready\n"; sleep 600'`)
	if r, err := c.Relieve(t.Context(), agent.RelieveRequest{Kind: agent.RelieveKernel}); err != nil || len(r.Killed) != 1 ||
		r.Killed[0].Tag != "sockets" || r.Killed[0].Descriptors < 3000 || !strings.Contains(r.Detail, " sockets") {
		t.Fatalf("sockets: %+v, %v", r, err)
	}
	// What is left needs no relief.
	if r, err := c.Relieve(t.Context(), agent.RelieveRequest{Kind: agent.RelieveKernel}); err != nil || len(r.Killed) != 0 {
		t.Fatalf("%+v, %v", r, err)
	}
	if _, err := c.Relieve(t.Context(), agent.RelieveRequest{Kind: "other"}); err == nil {
		t.Fatal("an unknown kind is no error")
	}
}
