package gvisor_test

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/internal/sandboxtest"
	"soulbox.dev/soulbox/sandbox"
)

// makeFiles makes a number of files in a sandbox, each of which takes about 2.8 KB of its kernel.
const makeFiles = `perl -e 'for (0 .. $ARGV[0] - 1) { $d = int($_ / 100); mkdir "d$d" if $_ %% 100 == 0; open F, ">", "d$d/$_" or die; ` +
	`print F "x" }' %d`

// TestManyFiles: empty files take no disk, but memory of the sentry on the host.
func TestManyFiles(t *testing.T) {
	sb, c := newSandbox(t, sandbox.CreateOptions{Limits: sandbox.Limits{KernelMemory: 64 << 20}})
	_, err := c.Start(t.Context(), agent.StartRequest{Command: fmt.Sprintf(makeFiles, 10_000_000), WaitMS: 1})
	if err != nil {
		t.Fatal(err)
	}
	end := time.Now().Add(4 * time.Minute)
	for sb.Info().State == sandbox.Running && time.Now().Before(end) {
		time.Sleep(100 * time.Millisecond)
	}
	if info := sb.Info(); info.State == sandbox.Running || !strings.Contains(info.Cause, "its kernel took") {
		t.Fatalf("%+v", info)
	}
}

// TestManyFilesSaved: a save takes several times what the sentry had, and leaves as much garbage; so does a restore. The guest is not
// blamed for either, and the memory is given back.
func TestManyFilesSaved(t *testing.T) {
	dir := sandboxtest.Dir(t)
	const bound, files = 64 << 20, 12_000
	sb, c := newSandboxIn(t, dir, sandbox.CreateOptions{Limits: sandbox.Limits{KernelMemory: bound}})
	if s := sandboxtest.Run(t, c, fmt.Sprintf(makeFiles, files)); s.Process.ExitCode != 0 {
		t.Fatal(output(s))
	}
	calm := func(after string) {
		t.Helper()
		sandboxtest.Eventually(t, "the sentry is below its bound after "+after, func() bool {
			if info := sb.Info(); info.State != sandbox.Running {
				t.Fatalf("after %s it is %s: %s", after, info.State, info.Cause)
			}
			return anonymous(t, dir) < bound
		})
		c, err := sb.Agent(t.Context(), "use")
		if err != nil {
			t.Fatal(err)
		}
		if got := output(sandboxtest.Run(t, c, "find d* -type f | wc -l")); got != fmt.Sprintln(files) {
			t.Fatalf("after %s: %q", after, got)
		}
	}
	if _, err := sb.Snapshot(t.Context(), sandbox.SnapshotOptions{Name: "many"}); err != nil {
		t.Fatal(err)
	}
	calm("a snapshot")
	for _, filesOnly := range []bool{false, true} {
		if err := sb.Pause(t.Context(), sandbox.PauseOptions{ToDisk: true, FilesOnly: filesOnly}); err != nil {
			t.Fatal(err)
		}
		if err := sb.Resume(t.Context()); err != nil {
			t.Fatal(err)
		}
		calm("a pause")
	}
}

// anonymous returns the memory without a file of the sentries in a directory, in bytes.
func anonymous(t *testing.T, dir string) (most int64) {
	t.Helper()
	for _, pid := range sandboxtest.Processes(dir) {
		body, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			t.Fatal(err)
		}
		_, rest, _ := strings.Cut(string(body), "RssAnon:")
		kb, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		most = max(most, kb<<10)
	}
	return most
}
