package main

import (
	"strings"
	"testing"
)

// TestProgramsAfterRestore: a program that draws random numbers ahead, as Python's random does, learns from a hook that it is now a copy,
// and one that watches the generation sees it change.
func TestProgramsAfterRestore(t *testing.T) {
	p := launch(t, "", "--on-exit=kill")
	p.call("exec", map[string]any{"user": "root", "command": `mkdir -p /etc/soulbox/after-restore.d
printf '#!/bin/sh\npkill -HUP -f service.py\n' >/etc/soulbox/after-restore.d/service && chmod +x /etc/soulbox/after-restore.d/service`})
	p.call("exec", map[string]any{"command": `cat >service.py <<'END'
import os, random, signal, time
signal.signal(signal.SIGHUP, lambda *_: random.seed())
generation = lambda: open("/run/soulbox/generation").read().strip()
random.seed(4); begin = generation()
open("up", "w").close()
while generation() == begin or not os.path.exists("go"): time.sleep(0.05)
open("saying", "w").write("%d %s\n" % (random.getrandbits(64), generation()))
os.rename("saying", "said")
time.sleep(1000)
END
python3 service.py >/dev/null 2>&1 & until test -e up; do sleep 0.05; done`})
	forked := p.call("sandbox_fork", map[string]any{"count": 2})
	if text := forked.text(); !strings.Contains(text, "/etc/soulbox/after-restore.d were run") {
		t.Error(text)
	}
	ids := forked.Result.StructuredContent["sandbox_ids"].([]any)
	p.call("sandbox_snapshot", map[string]any{"name": "drawn"})
	ids = append(ids, p.call("sandbox_create", map[string]any{"template": "drawn"}).Result.StructuredContent["sandbox_id"])
	said := map[string]bool{}
	for _, id := range ids {
		got := p.call("exec", map[string]any{"sandbox_id": id, "command": "touch go; until test -e said; do sleep 0.05; done; cat said",
			"yield_ms": 30_000}).Result.StructuredContent["output"].(string)
		if !strings.HasSuffix(got, " 1\n") || said[got] {
			t.Errorf("%q, after %v", got, said)
		}
		said[got] = true
	}
}
