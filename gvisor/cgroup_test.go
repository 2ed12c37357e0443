package gvisor

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"soulbox.dev/soulbox/sandbox"
)

// TestPlanV2 goes up from the server's own cgroup, which has processes, to one that can have children with controllers. The tree is made of
// plain files, because a delegated subtree is not available in every test.
func TestPlanV2(t *testing.T) {
	root := t.TempDir()
	if err := os.WriteFile(filepath.Join(root, "cgroup.controllers"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if g := planCgroup(root, "soulbox-x"); g != nil {
		t.Fatalf("a cgroup without subtree_control was chosen: %v", g)
	}
	if err := os.WriteFile(filepath.Join(root, "cgroup.subtree_control"), []byte("cpu memory pids\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	g := planCgroup(root, "soulbox-x")
	if g == nil || len(g.Dirs) != 1 || g.Dirs[""] != filepath.Join(root, "soulbox-x") {
		t.Fatalf("%+v", g)
	}
	if err := g.create(sandbox.DefaultLimits()); err != nil {
		t.Fatal(err)
	}
	for file, want := range map[string]string{"cpu.max": "200000 100000", "memory.max": "5368709120", "pids.max": "9216"} {
		if got, err := os.ReadFile(filepath.Join(g.Dirs[""], file)); err != nil || string(got) != want {
			t.Errorf("%s: %q %v", file, got, err)
		}
	}
}

// TestHostCgroup: if the server may, it puts a machine into a cgroup of the host with its limits, and nothing of the cgroup is left at the
// end.
func TestHostCgroup(t *testing.T) {
	g := planCgroup("/sys/fs/cgroup", "soulbox-test")
	if g == nil {
		if os.Geteuid() == 0 {
			t.Log("this machine lets not even root make cgroups")
		}
		return // there is no cgroup to test; every other test shows that machines work without one
	}
	if err := g.create(sandbox.Limits{CPU: 1.5, Memory: 100 << 20, Disk: 1, Processes: 10}); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := g.remove(); err != nil {
			t.Error(err)
		}
	}()
	var all strings.Builder
	for _, dir := range g.Dirs {
		for _, file := range []string{"cpu.max", "cpu.cfs_quota_us", "memory.max", "memory.limit_in_bytes", "pids.max"} {
			if body, err := os.ReadFile(filepath.Join(dir, file)); err == nil {
				all.Write(body)
			}
		}
	}
	for _, want := range []string{"150000", "2304770048", "1184"} {
		if !strings.Contains(all.String(), want) {
			t.Errorf("%s is not in %q", want, all.String())
		}
	}
}
