package gvisor

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"testing"
	"time"

	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/sandbox"
	"soulbox.dev/soulbox/template"
)

func TestSmoke(t *testing.T) {
	dir := t.TempDir()
	os.Chmod(dir, 0o755)
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	abs := func(s string) string { return "/tmp/sbx/" + s }
	rt := &Runtime{Runsc: abs("runsc"), Agent: abs("agent/soulbox-agent"), Log: log}
	m, err := sandbox.NewManager(sandbox.Options{Dir: dir, Runtime: rt, Templates: &template.Store{Dir: dir + "/templates"}, Log: log, Version: "test"})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	start := time.Now()
	sb, err := m.Create(ctx, sandbox.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	fmt.Println("create", time.Since(start))
	c, _ := sb.Agent("x")
	script := os.Getenv("SCRIPT")
	run := func(req agent.StartRequest) {
		req.WaitMS = 30000
		req.Window = agent.Window{Head: 20000, Tail: 2000}
		start := time.Now()
		s, err := c.Start(ctx, req)
		fmt.Printf("%v %+v %v\n%s%s\n", time.Since(start), s.Process, err, s.Output.Head, s.Output.Tail)
	}
	run(agent.StartRequest{Command: script})
	for range 6 {
		run(agent.StartRequest{Command: "/bin/true"})
	}
	for range 3 {
		run(agent.StartRequest{Command: "echo hi; :"})
	}
	run(agent.StartRequest{Command: script, User: "root"})
	u, hu, err := sb.Usage(ctx)
	fmt.Printf("%+v %+v %v\n", u, hu, err)
	start = time.Now()
	fmt.Println(sb.Kill(sandbox.CauseKilled), time.Since(start))
}
