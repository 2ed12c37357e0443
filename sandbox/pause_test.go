package sandbox_test

import (
	"bufio"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/internal/sandboxtest"
	"soulbox.dev/soulbox/sandbox"
)

// promised is what a sandbox with the default limits is promised, in bytes.
const promised = (1024 + 160) << 20

func keep(o *sandbox.Options) { o.Keep = true }

// startEcho starts a process that repeats its input.
func startEcho(t *testing.T, sb *sandbox.Sandbox) {
	t.Helper()
	client, err := sb.Agent(t.Context(), "use")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.Start(t.Context(), agent.StartRequest{Command: "cat", Tag: "echo", KeepStdin: true}); err != nil {
		t.Fatal(err)
	}
}

// echo writes a line to the process of startEcho, and returns all that the process has written.
func echo(t *testing.T, sb *sandbox.Sandbox, what string) string {
	t.Helper()
	client, err := sb.Agent(t.Context(), "use")
	if err != nil {
		t.Fatal(err)
	}
	before, err := client.Wait(t.Context(), agent.WaitRequest{Process: "echo"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.WriteStdin(t.Context(), "echo", []byte(what), false); err != nil {
		t.Fatal(err)
	}
	after, err := client.Wait(t.Context(), agent.WaitRequest{Process: "echo", WaitMS: 30_000, Beyond: &before.Process.Output,
		Window: agent.Window{Head: 1000}})
	if err != nil {
		t.Fatal(err)
	}
	return string(after.Output.Head)
}

func TestPauseToDisk(t *testing.T) {
	fake, dir := &sandboxtest.Fake{}, t.TempDir()
	m := newManager(t, dir, fake, keep)
	sb := create(t, m, sandbox.CreateOptions{Env: map[string]string{"A": "1"}})
	startEcho(t, sb)
	echo(t, sb, "one ")
	left := time.Until(sb.Info().ExpiresAt)
	if err := sb.Pause(t.Context(), sandbox.PauseOptions{ToDisk: true}); err != nil {
		t.Fatal(err)
	}
	info := sb.Info()
	if fake.Running() != 0 || info.State != sandbox.Paused || !info.OnDisk || info.Left > left || info.Left < left-time.Minute ||
		!info.ExpiresAt.IsZero() {
		t.Fatalf("%d %+v", fake.Running(), info)
	}
	if free, err := m.FreeMemory(); err != nil || free != 8<<30 {
		t.Fatal("one on disk takes memory", free, err)
	}
	var state *sandbox.StateError
	if _, err := sb.Agent(t.Context(), "use"); !errors.As(err, &state) || state.State != sandbox.Paused || state.Wakes {
		t.Fatal(err)
	}

	// The server is killed: it closes nothing.
	next := newManager(t, dir, fake, nil)
	if _, err := next.Get("", sb.ID()); err == nil {
		t.Fatal("a sandbox has two owners")
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	sb = awaitSandbox(t, next, "", sb.ID())
	if got := sb.Info(); got.State != sandbox.Paused || got.Left != info.Left {
		t.Fatalf("%+v", got)
	}
	if err := sb.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := echo(t, sb, "two"); got != "one two" {
		t.Fatalf("%q", got)
	}
	client, err := sb.Agent(t.Context(), "use")
	if err != nil {
		t.Fatal(err)
	}
	if got := sandboxtest.Run(t, client, "echo $A"); string(got.Output.Head) != "1\n" {
		t.Fatalf("its environment is %q", got.Output.Head)
	}
	if found, err := filepath.Glob(filepath.Join(dir, "sandboxes", sb.ID(), "*-*")); err != nil || len(found) != 1 {
		t.Fatal("its last checkpoint is kept, and nothing else", found, err)
	}
	if info := sb.Info(); time.Until(info.ExpiresAt) > left {
		t.Fatal("the pause has made its life longer")
	}
	if err := sb.Resume(t.Context()); !errors.Is(err, sandbox.ErrState) {
		t.Fatal(err)
	}
}

// TestPauseFromMemory: a frozen sandbox can go to disk, and can be adopted frozen.
func TestPauseFromMemory(t *testing.T) {
	fake, dir := &sandboxtest.Fake{}, t.TempDir()
	m := newManager(t, dir, fake, keep)
	one, two := create(t, m, sandbox.CreateOptions{}), create(t, m, sandbox.CreateOptions{})
	for _, sb := range []*sandbox.Sandbox{one, two} {
		startEcho(t, sb)
		if err := sb.Pause(t.Context(), sandbox.PauseOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	if err := one.Pause(t.Context(), sandbox.PauseOptions{ToDisk: true}); err != nil {
		t.Fatal(err)
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	next := newManager(t, dir, fake, keep)
	for id, disk := range map[string]bool{one.ID(): true, two.ID(): false} {
		sb := awaitSandbox(t, next, "", id)
		if info := sb.Info(); info.State != sandbox.Paused || info.OnDisk != disk {
			t.Fatalf("%+v", info)
		}
		if err := sb.Resume(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := echo(t, sb, "more"); got != "more" {
			t.Fatalf("%q", got)
		}
	}
}

func TestFilesOnly(t *testing.T) {
	m := newManager(t, t.TempDir(), &sandboxtest.Fake{}, nil)
	sb := create(t, m, sandbox.CreateOptions{Env: map[string]string{"A": "1"}})
	if err := sb.Pause(t.Context(), sandbox.PauseOptions{FilesOnly: true}); !errors.Is(err, sandbox.ErrInvalid) {
		t.Fatal(err)
	}
	startEcho(t, sb)
	if err := sb.Pause(t.Context(), sandbox.PauseOptions{ToDisk: true, FilesOnly: true, AutoResume: true}); err != nil {
		t.Fatal(err)
	}
	client, err := sb.Agent(t.Context(), "use") // this wakes it
	if err != nil {
		t.Fatal(err)
	}
	if list, err := client.List(t.Context(), agent.ListRequest{}); err != nil || len(list) != 0 {
		t.Fatal("its processes are there", list, err)
	}
	if got := sandboxtest.Run(t, client, "echo $A"); string(got.Output.Head) != "1\n" {
		t.Fatalf("its environment is %q", got.Output.Head)
	}
}

// TestWaitAtPause: a call that waits returns with what there is, and many calls to a paused sandbox wake it once.
func TestWaitAtPause(t *testing.T) {
	m := newManager(t, t.TempDir(), &sandboxtest.Fake{}, nil)
	sb := create(t, m, sandbox.CreateOptions{})
	startEcho(t, sb)
	client, err := sb.Agent(t.Context(), "use")
	if err != nil {
		t.Fatal(err)
	}
	type result struct {
		snap agent.Snapshot
		err  error
	}
	waited := make(chan result, 1)
	go func() {
		snap, err := client.Wait(t.Context(), agent.WaitRequest{Process: "echo", WaitMS: 600_000})
		waited <- result{snap, err}
	}()
	sandboxtest.Eventually(t, "it waits", func() bool { calls, _ := client.Activity(); return calls == 1 })
	if err := sb.Pause(t.Context(), sandbox.PauseOptions{ToDisk: true, AutoResume: true}); err != nil {
		t.Fatal(err)
	}
	if got := <-waited; got.err != nil || got.snap.Process.State != agent.StateRunning {
		t.Fatal(got)
	}
	var paused *sandbox.StateError
	if _, err := client.List(t.Context(), agent.ListRequest{}); !errors.As(err, &paused) || !paused.Wakes {
		t.Fatal("a client from before the pause gets:", err)
	}
	var all sync.WaitGroup
	for range 20 {
		all.Go(func() {
			client, err := sb.Agent(t.Context(), "use")
			if err == nil {
				err = client.Ping(t.Context())
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	logs, err := sb.Logs(sandbox.LogQuery{Text: "running"})
	if err != nil || len(logs.Entries) != 2 { // at its start, and now
		t.Fatal(logs, err)
	}
}

// TestRaces: whatever calls come together, each gets a result that the table of states allows, and nothing is left.
func TestRaces(t *testing.T) {
	fake, dir := &sandboxtest.Fake{}, t.TempDir()
	m := newManager(t, dir, fake, nil)
	for range 20 {
		sb := create(t, m, sandbox.CreateOptions{})
		var all sync.WaitGroup
		for _, do := range []func() error{
			func() error { return sb.Pause(t.Context(), sandbox.PauseOptions{ToDisk: true, AutoResume: true}) },
			func() error { return sb.Pause(t.Context(), sandbox.PauseOptions{}) },
			func() error { return sb.Resume(t.Context()) },
			func() error { return sb.Pause(t.Context(), sandbox.PauseOptions{ToDisk: true}) },
			func() error { _, err := sb.Agent(t.Context(), "use"); return err },
			func() error { _, err := sb.Snapshot(t.Context(), sandbox.SnapshotOptions{Name: "same"}); return err },
			func() error { return sb.Kill(sandbox.CauseKilled) },
			func() error { return sb.Kill(sandbox.CauseKilled) },
		} {
			all.Go(func() {
				if err := do(); err != nil && !errors.Is(err, sandbox.ErrState) && !errors.Is(err, sandbox.ErrSnapshot) {
					t.Error(err)
				}
			})
		}
		all.Wait()
		if info := sb.Info(); info.State != sandbox.Killed || fake.Running() != 0 {
			t.Fatalf("%+v, %d run", info, fake.Running())
		}
	}
	noDirectories(t, dir)
	left, err := filepath.Glob(filepath.Join(dir, "snapshots", ".new-*"))
	if err != nil || len(left) > 0 {
		t.Fatal(left, err)
	}
}

// TestSaveFails: a sandbox that cannot be saved continues as if it had not been tried.
func TestSaveFails(t *testing.T) {
	fake := &sandboxtest.Fake{FailSave: errors.New("no")}
	dir := t.TempDir()
	m := newManager(t, dir, fake, nil)
	sb := create(t, m, sandbox.CreateOptions{})
	startEcho(t, sb)
	if err := sb.Pause(t.Context(), sandbox.PauseOptions{ToDisk: true}); err == nil || sb.Info().State != sandbox.Running {
		t.Fatal(err)
	}
	if _, err := sb.Snapshot(t.Context(), sandbox.SnapshotOptions{Name: "s"}); err == nil {
		t.Fatal("it was saved")
	}
	if _, _, err := sb.Fork(t.Context(), 2, nil); err == nil {
		t.Fatal("it was copied")
	}
	if got := echo(t, sb, "on"); got != "on" {
		t.Fatal(got)
	}
	for _, pattern := range []string{"sandboxes/*/checkpoint*", "sandboxes/*/fork*", "snapshots/*", "snapshots/.new*"} {
		if left, err := filepath.Glob(filepath.Join(dir, pattern)); err != nil || len(left) > 0 {
			t.Error(left, err)
		}
	}
}

func TestSnapshots(t *testing.T) {
	fake := &sandboxtest.Fake{}
	m := newManager(t, t.TempDir(), fake, nil)
	sb := create(t, m, sandbox.CreateOptions{Owner: "ann", Metadata: map[string]string{"a": "1"}, Env: map[string]string{"A": "1"}})
	for _, name := range []string{"", "A", "../x", "a/b", "host", strings.Repeat("a", 64), "a\x00"} {
		if _, err := sb.Snapshot(t.Context(), sandbox.SnapshotOptions{Name: name}); !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("%q: %v", name, err)
		}
	}
	snap, err := sb.Snapshot(t.Context(), sandbox.SnapshotOptions{Name: "base"})
	if err != nil || snap.Sandbox != sb.ID() || snap.FilesOnly {
		t.Fatal(snap, err)
	}
	if _, err := sb.Snapshot(t.Context(), sandbox.SnapshotOptions{Name: "base"}); !errors.Is(err, sandbox.ErrSnapshot) {
		t.Fatal(err)
	}
	if err := sb.Kill(sandbox.CauseKilled); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Create(t.Context(), sandbox.CreateOptions{Owner: "bob", Template: "base"}); !errors.Is(err, sandbox.ErrNoTemplate) {
		t.Fatal("bob finds ann's snapshot:", err)
	}
	if _, err := m.Create(t.Context(), sandbox.CreateOptions{Owner: "ann", Template: "base",
		Limits: sandbox.Limits{Memory: 64 << 20}}); !errors.Is(err, sandbox.ErrInvalid) {
		t.Fatal(err)
	}
	again := create(t, m, sandbox.CreateOptions{Owner: "ann", Template: "base"})
	if info := again.Info(); info.Template != "host" || info.Parent != "base" || info.Limits != snap.Limits || len(info.Metadata) != 0 {
		t.Fatalf("%+v", info)
	}
	if list, err := m.Snapshots("bob"); err != nil || len(list) != 0 {
		t.Fatal(list, err)
	}
	if list, err := m.Snapshots("ann"); err != nil || len(list) != 1 || list[0].Name != "base" {
		t.Fatal(list, err)
	}
	if err := m.DeleteSnapshot("bob", "base"); !errors.Is(err, sandbox.ErrNoSnapshot) {
		t.Fatal(err)
	}
	if err := m.DeleteSnapshot("ann", "base"); err != nil {
		t.Fatal(err)
	}
	if err := m.DeleteSnapshot("ann", "base"); !errors.Is(err, sandbox.ErrNoSnapshot) {
		t.Fatal(err)
	}
	if list := m.List(sandbox.Filter{Owner: "ann", Template: "base"}); len(list) != 1 {
		t.Fatal(list)
	}
}

// TestFork: a sandbox on disk can be forked too; copies are made as far as there is room.
func TestFork(t *testing.T) {
	fake, dir := &sandboxtest.Fake{}, t.TempDir()
	m := newManager(t, dir, fake, func(o *sandbox.Options) { o.MemoryBudget = 4 * promised })
	sb := create(t, m, sandbox.CreateOptions{Metadata: map[string]string{"a": "1"}})
	if _, err := sb.Expose(8080, false); err != nil {
		t.Fatal(err)
	}
	for _, n := range []int{0, -1, 101} {
		if _, _, err := sb.Fork(t.Context(), n, nil); !errors.Is(err, sandbox.ErrInvalid) {
			t.Error(n, err)
		}
	}
	copies, failed, err := sb.Fork(t.Context(), 5, nil)
	if err != nil || len(copies) != 3 || len(failed) != 2 {
		t.Fatal(len(copies), failed, err)
	}
	for _, err := range failed {
		if !errors.Is(err, sandbox.ErrNoRoom) || !strings.Contains(err.Error(), "pause to disk or kill one of sb") {
			t.Error(err)
		}
	}
	seen := map[string]bool{sb.ID(): true}
	for _, c := range copies {
		info, ports := c.Info(), c.Ports()
		if seen[c.ID()] || info.Parent != sb.ID() || info.Metadata["a"] != "1" || len(ports) != 1 || ports[0].Host == sb.Ports()[0].Host ||
			c.TrafficToken() == sb.TrafficToken() {
			t.Fatalf("%+v %v", info, ports)
		}
		seen[c.ID()] = true
		if err := c.Kill(sandbox.CauseKilled); err != nil {
			t.Fatal(err)
		}
	}
	if err := sb.Pause(t.Context(), sandbox.PauseOptions{ToDisk: true}); err != nil {
		t.Fatal(err)
	}
	copies, failed, err = sb.Fork(t.Context(), 2, map[string]string{"b": "2"})
	if err != nil || len(copies) != 2 || len(failed) != 0 || sb.Info().State != sandbox.Paused || copies[0].Info().Metadata["b"] != "2" {
		t.Fatal(copies, failed, err)
	}
	left, err := os.ReadDir(filepath.Join(dir, "snapshots"))
	if err != nil || len(left) != 0 {
		t.Fatal(left, err)
	}
}

// TestPortsWake: a connection to a port of a paused sandbox wakes it.
func TestPortsWake(t *testing.T) {
	fake, dir := &sandboxtest.Fake{}, t.TempDir()
	m := newManager(t, dir, fake, nil)
	sb := create(t, m, sandbox.CreateOptions{})
	port := inside(t, func(c net.Conn) {
		if _, err := http.ReadRequest(bufio.NewReader(c)); err == nil {
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhello")
		}
	})
	p, err := sb.Expose(port, false)
	if err != nil {
		t.Fatal(err)
	}
	if err := sb.Pause(t.Context(), sandbox.PauseOptions{ToDisk: true}); err != nil {
		t.Fatal(err)
	}
	if body := get(t, p); !strings.Contains(body, "does not run") || sb.Info().State != sandbox.Paused {
		t.Fatal(body)
	}
	yes := true
	if _, err := sb.Update(t.Context(), sandbox.Update{AutoResume: &yes}); err != nil {
		t.Fatal(err)
	}
	if body := get(t, p); body != "hello" || sb.Info().State != sandbox.Running {
		t.Fatal(body)
	}
	if err := sb.Pause(t.Context(), sandbox.PauseOptions{ToDisk: true, AutoResume: true}); err != nil {
		t.Fatal(err)
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	passing := newManager(t, dir, fake, nil) // when it ends, it leaves the sandbox alone
	<-passing.Settled()
	if err := passing.Close(); err != nil {
		t.Fatal(err)
	}
	m = newManager(t, dir, fake, keep) // it has to listen, although it was not asked for the sandbox
	<-m.Settled()
	if body := get(t, p); body != "hello" {
		t.Fatal(body)
	}
	sb = awaitSandbox(t, m, "", sb.ID())
	if totals := sb.Info().Totals; totals.NetIn == 0 || totals.NetOut == 0 {
		t.Fatalf("%+v", totals)
	}
}

// get returns a port's response to a browser.
func get(t *testing.T, p sandbox.Port) string {
	t.Helper()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	res, err := client.Get("http://" + p.Address())
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(body)
}

// TestNoDisk: the budget for what is saved, and which sandboxes end if the operator sets Reclaim.
func TestNoDisk(t *testing.T) {
	small := func(reclaim bool) func(*sandbox.Options) {
		return func(o *sandbox.Options) { o.DiskBudget, o.Reclaim = 1, reclaim }
	}
	m := newManager(t, t.TempDir(), &sandboxtest.Fake{}, small(false))
	sb := create(t, m, sandbox.CreateOptions{})
	if err := sb.Pause(t.Context(), sandbox.PauseOptions{ToDisk: true}); !errors.Is(err, sandbox.ErrNoDisk) ||
		sb.Info().State != sandbox.Running {
		t.Fatal(err)
	}
	if _, err := sb.Snapshot(t.Context(), sandbox.SnapshotOptions{Name: "s"}); !errors.Is(err, sandbox.ErrNoDisk) {
		t.Fatal(err)
	}
	// With Reclaim the oldest end, if that helps; another owner's stays.
	m = newManager(t, t.TempDir(), &sandboxtest.Fake{}, func(o *sandbox.Options) {
		o.DiskBudget, o.Reclaim, o.Defaults.Disk = 120<<20, true,
			16<<20
	})
	var old []*sandbox.Sandbox
	for _, owner := range []string{"bob", "ann"} {
		sb := create(t, m, sandbox.CreateOptions{Owner: owner})
		if err := sb.Pause(t.Context(), sandbox.PauseOptions{ToDisk: true}); err != nil {
			t.Fatal(err)
		}
		dirs, err := filepath.Glob(filepath.Join(m.Dir(), "sandboxes", sb.ID(), "checkpoint-1"))
		if err != nil || len(dirs) != 1 {
			t.Fatal(dirs, err)
		}
		if err := os.WriteFile(filepath.Join(dirs[0], "large"), make([]byte, 50<<20), 0o600); err != nil {
			t.Fatal(err)
		}
		old = append(old, sb)
	}
	large := create(t, m, sandbox.CreateOptions{Owner: "ann", Limits: sandbox.Limits{Disk: 200 << 20}})
	if err := large.Pause(t.Context(), sandbox.PauseOptions{ToDisk: true}); !errors.Is(err, sandbox.ErrNoDisk) ||
		old[1].Info().State != sandbox.Paused {
		t.Fatal("one was ended in vain", err)
	}
	sb = create(t, m, sandbox.CreateOptions{Owner: "ann"})
	if err := sb.Pause(t.Context(), sandbox.PauseOptions{ToDisk: true}); err != nil {
		t.Fatal(err)
	}
	if info := old[1].Info(); info.State != sandbox.Killed || info.Cause != string(sandbox.CauseReclaimed) ||
		old[0].Info().State != sandbox.Paused {
		t.Fatalf("%+v", info)
	}
}

// onRecord is a log that calls a function for every record of one message.
type onRecord struct {
	message string
	do      func()
}

func (l onRecord) Enabled(context.Context, slog.Level) bool { return true }
func (l onRecord) WithAttrs([]slog.Attr) slog.Handler       { return l }
func (l onRecord) WithGroup(string) slog.Handler            { return l }

func (l onRecord) Handle(_ context.Context, r slog.Record) error {
	if r.Message == l.message {
		l.do()
	}
	return nil
}

// TestReclaimOfResumed: a sandbox that its owner resumes at that moment is not ended for disk space, and others are not ended in vain.
func TestReclaimOfResumed(t *testing.T) {
	var old []*sandbox.Sandbox
	resumed := 0
	m := newManager(t, t.TempDir(), &sandboxtest.Fake{}, func(o *sandbox.Options) {
		o.DiskBudget, o.Reclaim, o.Defaults.Disk = 130<<20, true, 80<<20
		o.Log = slog.New(onRecord{"disk space is needed: a paused sandbox is ended, unless it is just being resumed", func() {
			if resumed++; resumed > 1 {
				t.Error("another one is ended")
			} else if err := old[0].Resume(t.Context()); err != nil {
				t.Error(err)
			}
		}})
	})
	for range 2 {
		sb := create(t, m, sandbox.CreateOptions{Owner: "ann", Limits: sandbox.Limits{Disk: 16 << 20}})
		if err := sb.Pause(t.Context(), sandbox.PauseOptions{ToDisk: true}); err != nil {
			t.Fatal(err)
		}
		large := filepath.Join(m.Dir(), "sandboxes", sb.ID(), "checkpoint-1", "large")
		if err := os.WriteFile(large, make([]byte, 50<<20), 0o600); err != nil {
			t.Fatal(err)
		}
		old = append(old, sb)
	}
	other := create(t, m, sandbox.CreateOptions{Owner: "ann"})
	if err := other.Pause(t.Context(), sandbox.PauseOptions{ToDisk: true}); !errors.Is(err, sandbox.ErrNoDisk) {
		t.Fatal(err) // the copy of the one that was resumed stays, so the other one would not make enough room
	}
	for i, want := range []sandbox.State{sandbox.Running, sandbox.Paused} {
		if info := old[i].Info(); resumed != 1 || info.State != want {
			t.Fatalf("resumed %d times, and %d is %s: %s", resumed, i, info.State, info.Cause)
		}
	}
}

// TestEndOfExtended: a sandbox whose time was over when its keeper looked, and that its owner has extended since then, is not ended.
func TestEndOfExtended(t *testing.T) {
	m := newManager(t, t.TempDir(), &sandboxtest.Fake{}, nil)
	sb := create(t, m, sandbox.CreateOptions{Times: sandbox.Times{Life: time.Minute, OnTimeout: sandbox.ActionKill}})
	hour := time.Hour
	if _, err := sb.Update(t.Context(), sandbox.Update{Extend: &hour}); err != nil {
		t.Fatal(err)
	}
	if err := sb.EndIfOver(); err == nil || sb.Info().State != sandbox.Running {
		t.Fatal(err, sb.Info().State)
	}
}

// TestAsleepIsNobodys: a sandbox on disk belongs to the first server that is asked for it; until then all servers list it.
func TestAsleepIsNobodys(t *testing.T) {
	fake, dir := &sandboxtest.Fake{}, t.TempDir()
	first := newManager(t, dir, fake, nil)
	sb := create(t, first, sandbox.CreateOptions{Owner: "ann", Metadata: map[string]string{"a": "1"}})
	if err := sb.Pause(t.Context(), sandbox.PauseOptions{ToDisk: true}); err != nil {
		t.Fatal(err)
	}
	one, two := newManager(t, dir, fake, nil), newManager(t, dir, fake, nil)
	if list := one.List(sandbox.Filter{Owner: "ann"}); len(list) != 0 {
		t.Fatal("another server's is listed", list)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	for _, m := range []*sandbox.Manager{one, two} {
		<-m.Settled()
		if list := m.List(sandbox.Filter{Owner: "ann", State: sandbox.Paused}); len(list) != 1 || list[0].Metadata["a"] != "1" ||
			!list[0].OnDisk {
			t.Fatal(list)
		}
		if list := m.List(sandbox.Filter{Owner: "bob"}); len(list) != 0 {
			t.Fatal(list)
		}
	}
	if _, err := two.Get("bob", sb.ID()); !errors.Is(err, sandbox.ErrNotFound) {
		t.Fatal(err)
	}
	again, err := two.Get("ann", sb.ID())
	if err != nil {
		t.Fatal(err)
	}
	if err := again.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := one.Get("ann", sb.ID()); !errors.Is(err, sandbox.ErrNotFound) {
		t.Fatal("it has two owners", err)
	}
	if list := one.List(sandbox.Filter{Owner: "ann"}); len(list) != 0 {
		t.Fatal(list)
	}
}
