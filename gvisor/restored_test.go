package gvisor_test

import (
	"fmt"
	"strings"
	"testing"

	"soulbox.dev/soulbox/internal/sandboxtest"
	"soulbox.dev/soulbox/sandbox"
)

// TestAfterRestore: whatever continues from what was saved has another boot_id and the next generation, and its hooks have run: copies,
// copies of copies, what begins from a snapshot, and what is resumed from disk. A sandbox paused in memory stays unchanged.
func TestAfterRestore(t *testing.T) {
	sb, client := newSandbox(t, sandbox.CreateOptions{Limits: sandbox.Limits{Memory: 128 << 20}})
	const show = "cat /proc/sys/kernel/random/boot_id /run/soulbox/generation; cat /tmp/hooked 2>/dev/null; true"
	boot := map[string]bool{}
	look := func(sb *sandbox.Sandbox) string {
		t.Helper()
		c, err := sb.Agent(t.Context(), "use")
		if err != nil {
			t.Fatal(err)
		}
		id, rest, _ := strings.Cut(output(sandboxtest.Run(t, c, show)), "\n")
		if len(id) != 36 || boot[id] {
			t.Errorf("boot_id %q is not a new one", id)
		}
		boot[id] = true
		return rest
	}
	if got := look(sb); got != "0\n" {
		t.Fatalf("%q", got)
	}
	sandboxtest.RunAs(t, client, "root", `mkdir -p /etc/soulbox/after-restore.d; cd /etc/soulbox/after-restore.d
printf '#!/bin/sh\necho $SOULBOX_GENERATION $(id -un) >>/tmp/hooked\n' >10-note; printf '#!/bin/sh\necho out of order; exit 3\n' >20-fail
printf '#!/bin/sh\necho never >>/tmp/hooked\n' >30-plain; printf '#!/bin/sh\necho never >>/tmp/hooked\n' >40-users; chmod +x 10-note 20-fail 40-users; chown user 40-users`)
	copies, failed, err := sb.Fork(t.Context(), 2, nil)
	if err != nil || len(failed) > 0 {
		t.Fatal(failed, err)
	}
	for _, c := range copies {
		if got := look(c); got != "1\n1 root\n" {
			t.Errorf("a copy: %q", got)
		}
	}
	again, failed, err := copies[0].Fork(t.Context(), 1, nil)
	if err != nil || len(failed) > 0 {
		t.Fatal(failed, err)
	}
	if got := look(again[0]); got != "2\n1 root\n2 root\n" {
		t.Errorf("a copy of a copy: %q", got)
	}
	if err := copies[1].Pause(t.Context(), sandbox.PauseOptions{ToDisk: true}); err != nil {
		t.Fatal(err)
	}
	if err := copies[1].Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := look(copies[1]); got != "2\n1 root\n2 root\n" {
		t.Errorf("resumed from disk: %q", got)
	}
	page, err := copies[1].Logs(sandbox.LogQuery{})
	said := fmt.Sprint(page.Entries)
	if err != nil || !strings.Contains(said, "out of order") || !strings.Contains(said, "20-fail has ended with exit code 3") {
		t.Error(said, err)
	}
}
