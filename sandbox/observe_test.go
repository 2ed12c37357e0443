package sandbox_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/internal/sandboxtest"
	"soulbox.dev/soulbox/sandbox"
)

func logs(t *testing.T, sb *sandbox.Sandbox, q sandbox.LogQuery) (messages []string, last int64, more bool) {
	t.Helper()
	page, err := sb.Logs(q)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range page.Entries {
		messages = append(messages, e.Message)
	}
	return messages, page.Last, page.More
}

// TestLogs: what happens to a sandbox and its processes is logged, and can be read by every selection, from any cursor, and after its end
// by the next server.
func TestLogs(t *testing.T) {
	dir := t.TempDir()
	m := newManager(t, dir, &sandboxtest.Fake{}, keep)
	sb := create(t, m, sandbox.CreateOptions{})
	client, err := sb.Agent(t.Context(), "use")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.Start(t.Context(), agent.StartRequest{Command: "exit 3", Tag: "three\x1b[31m", WaitMS: 10_000,
		Env: map[string]string{"SECRET": "hidden"}}); err != nil {
		t.Fatal(err)
	}
	sandboxtest.Eventually(t, "the end of the process is in the log", func() bool {
		sb.Refresh(t.Context())
		got, _, _ := logs(t, sb, sandbox.LogQuery{Source: sandbox.SourceProcess})
		return len(got) == 2 && strings.Contains(got[0], "process p1 (three\\x1b[31m) started as") &&
			strings.Contains(got[1], "exit code 3")
	})
	got, last, more := logs(t, sb, sandbox.LogQuery{Limit: 1})
	if len(got) != 1 || !more || last != 4 {
		t.Fatal(got, last, more)
	}
	if got, last, more = logs(t, sb, sandbox.LogQuery{After: 1, Limit: 2}); len(got) != 2 || got[0] != "running" || !more || last != 3 {
		t.Fatal(got, last, more)
	}
	for name, q := range map[string]sandbox.LogQuery{
		"since": {Since: time.Now().Add(time.Minute)}, "until": {Until: time.Now().Add(-time.Hour)}, "level": {Level: sandbox.LevelWarn},
		"source": {Source: sandbox.SourceBuild},
		"text":   {Text: "no such"}, "after": {After: 99},
	} {
		if got, _, _ := logs(t, sb, q); len(got) != 0 {
			t.Errorf("%s: %v", name, got)
		}
	}
	if err := sb.Kill(sandbox.CauseKilled); err != nil {
		t.Fatal(err)
	}
	next := newManager(t, dir, &sandboxtest.Fake{}, nil)
	tomb, err := next.Get("", sb.ID())
	if err != nil {
		t.Fatal(err)
	}
	if got, _, _ := logs(t, tomb, sandbox.LogQuery{}); len(got) != 5 || got[4] != "killed: killed by request" {
		t.Fatal(got)
	}
	if info := tomb.Info(); info.State != sandbox.Killed || info.Cause != "killed by request" {
		t.Fatalf("%+v", info)
	}
	if err := tomb.Kill(sandbox.CauseKilled); !errors.Is(err, sandbox.ErrState) {
		t.Fatal(err)
	}
	if list := next.List(sandbox.Filter{State: sandbox.Killed}); len(list) != 1 || list[0].ID != sb.ID() {
		t.Fatal(list)
	}
	if _, err := next.Get("bob", sb.ID()); !errors.Is(err, sandbox.ErrNotFound) {
		t.Fatal(err)
	}
	found, err := filepath.Glob(filepath.Join(dir, "ended", sb.ID(), "*"))
	if err != nil || len(found) != 2 {
		t.Fatal(found, err)
	}
	for _, name := range found {
		if body, err := os.ReadFile(name); err != nil || strings.Contains(string(body), "hidden") ||
			strings.Contains(string(body), "traffic") {
			t.Errorf("%s: %s %v", name, body, err)
		}
	}
}

// TestLogIsBounded: an older file is kept beside the newer one, and the numbers continue.
func TestLogIsBounded(t *testing.T) {
	dir := t.TempDir()
	m := newManager(t, dir, &sandboxtest.Fake{}, nil)
	sb := create(t, m, sandbox.CreateOptions{})
	name := filepath.Join(dir, "sandboxes", sb.ID(), "log.jsonl")
	var b strings.Builder
	for i := range 12_000 {
		fmt.Fprintf(&b, `{"seq":%d,"time":"2026-01-01T00:00:00Z","level":"info","source":"system","message":"%s"}`+"\n", 100+i,
			strings.Repeat("x", 50))
	}
	if err := os.WriteFile(name, []byte(b.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := sb.Pause(t.Context(), sandbox.PauseOptions{ToDisk: true}); err != nil {
		t.Fatal(err)
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	m = newManager(t, dir, &sandboxtest.Fake{}, nil) // it reads where the file ends
	sb = awaitSandbox(t, m, "", sb.ID())
	got, last, _ := logs(t, sb, sandbox.LogQuery{Limit: 2})
	if last < 12_100 || got[len(got)-1] != "adopted by a new server" {
		t.Fatal(got, last)
	}
	if _, err := os.Stat(name + ".1"); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(name); err != nil || info.Size() > 2<<20 {
		t.Fatal(info, err)
	}
}

// TestMetrics: samples are kept over a restart; totals do not change during a pause.
func TestMetrics(t *testing.T) {
	fake, dir := &sandboxtest.Fake{}, t.TempDir()
	often := func(o *sandbox.Options) { o.Keep, o.SampleEvery = true, time.Millisecond }
	m := newManager(t, dir, fake, often)
	sb := create(t, m, sandbox.CreateOptions{})
	some := func(sb *sandbox.Sandbox, n int) {
		t.Helper()
		sandboxtest.Eventually(t, "samples", func() bool {
			samples, err := sb.Samples(time.Time{}, time.Time{})
			return err == nil && len(samples) >= n
		})
	}
	some(sb, 5)
	if err := sb.Pause(t.Context(), sandbox.PauseOptions{}); err != nil {
		t.Fatal(err)
	}
	before := sb.Info().Totals
	if before.RunMS <= 0 || before.GBSeconds <= 0 {
		t.Fatalf("%+v", before)
	}
	if err := sb.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	kept, err := sb.Samples(time.Time{}, time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	m = newManager(t, dir, fake, often)
	sb = awaitSandbox(t, m, "", sb.ID())
	some(sb, len(kept)+2)
	samples, err := sb.Samples(kept[0].Time, kept[len(kept)-1].Time)
	if err != nil || len(samples) != len(kept)-1 {
		t.Fatal(len(samples), len(kept), err)
	}
	if after := sb.Info().Totals; after.RunMS < before.RunMS {
		t.Fatalf("%+v, was %+v", after, before)
	}
	sandboxtest.Eventually(t, "no more than so many are kept", func() bool {
		old, err := os.Stat(filepath.Join(dir, "sandboxes", sb.ID(), "metrics.jsonl.1"))
		samples, serr := sb.Samples(time.Time{}, time.Time{})
		return err == nil && old.Size() > 0 && serr == nil && len(samples) >= 720 && len(samples) <= 1440
	})
	if used := m.Used(); used.RunMS == 0 {
		t.Fatalf("%+v", used)
	}
}

// TestFrozenCall: a call that is under way when a sandbox is frozen continues after the resume.
func TestFrozenCall(t *testing.T) {
	m := newManager(t, t.TempDir(), &sandboxtest.Fake{}, nil)
	sb := create(t, m, sandbox.CreateOptions{})
	startEcho(t, sb)
	client, err := sb.Agent(t.Context(), "use")
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() {
		snap, err := client.Wait(t.Context(), agent.WaitRequest{Process: "echo", WaitMS: 60_000})
		if err == nil && snap.Process.State != agent.StateExited {
			err = errors.New("it did not wait for the end")
		}
		ended <- err
	}()
	sandboxtest.Eventually(t, "it waits", func() bool { calls, _ := client.Activity(); return calls == 1 })
	if err := sb.Pause(t.Context(), sandbox.PauseOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := sb.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := client.WriteStdin(t.Context(), "echo", nil, true); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
}

// TestGone: a sandbox whose machine is gone when a server returns, as after a restart of the host, has a tombstone that says so.
func TestGone(t *testing.T) {
	fake, dir := &sandboxtest.Fake{}, t.TempDir()
	m := newManager(t, dir, fake, keep)
	sb, asleep := create(t, m, sandbox.CreateOptions{}), create(t, m, sandbox.CreateOptions{})
	if err := asleep.Pause(t.Context(), sandbox.PauseOptions{ToDisk: true}); err != nil {
		t.Fatal(err)
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	if err := fake.Reap(t.Context(), filepath.Join(dir, "sandboxes", sb.ID())); err != nil {
		t.Fatal(err)
	}
	m = newManager(t, dir, fake, keep)
	<-m.Settled()
	tomb, err := m.Get("", sb.ID())
	if err != nil {
		t.Fatal(err)
	}
	if info := tomb.Info(); info.State != sandbox.Failed || info.Cause != string(sandbox.CauseGone) {
		t.Fatalf("%+v", info)
	}
	if asleep, err = m.Get("", asleep.ID()); err != nil {
		t.Fatal(err)
	}
	if err := asleep.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
}
