package gvisor_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/gvisor"
	"soulbox.dev/soulbox/internal/sandboxtest"
	"soulbox.dev/soulbox/sandbox"
	"soulbox.dev/soulbox/template"
)

// As root: the suite, isolation and limits, which work in other ways there.
func TestMain(m *testing.M) {
	sandboxtest.Main(m, "TestRuntime", "TestImage", "TestNothingOfTheHost", "TestForkBomb", "TestMemoryBombs", "TestUserNamespace",
		"TestUserTmpfs", "TestDeviceDirectory", "TestAttachAsGuest", "TestHostCgroup",
		"TestInHostCgroup", "TestStrangers", "TestSentryKilled", "TestRelieve", "TestOutOfMemory", "TestPauseInTimeLimit", "TestPlanV.*",
		"TestStandardStreams", "TestLogin", "TestLimitsSeen", "TestStickyDirectories", "TestTrace")
}

func newRuntime(t *testing.T) (*gvisor.Runtime, sandbox.Template) {
	t.Helper()
	host, err := newStore(sandboxtest.Dir(t)).Template(t.Context(), "", "")
	if err != nil {
		t.Fatal(err)
	}
	return &gvisor.Runtime{Runsc: sandboxtest.Program(t, "runsc"), Agent: sandboxtest.AgentPath(t)}, host
}

func newStore(dir string) *template.Store {
	store := &template.Store{Dir: filepath.Join(dir, "templates")}
	if os.Geteuid() == 0 {
		store.UID, store.GID = gvisor.Owner()
	}
	return store
}

func TestRuntime(t *testing.T) {
	runtime, host := newRuntime(t)
	image := sandbox.Template{Name: "image", Image: sandboxtest.Image(t, sandboxtest.Dir(t))}
	inMemory := sandbox.DefaultLimits()
	inMemory.DiskInMemory = true
	t.Run("host", func(t *testing.T) { sandboxtest.Suite(t, runtime, host, sandbox.DefaultLimits()) })
	t.Run("image", func(t *testing.T) { sandboxtest.Suite(t, runtime, image, sandbox.DefaultLimits()) })
	t.Run("image in memory", func(t *testing.T) { sandboxtest.Suite(t, runtime, image, inMemory) })
}

// newSandbox makes a real sandbox under a real Manager.
func newSandbox(t *testing.T, o sandbox.CreateOptions) (*sandbox.Sandbox, *agent.Client) {
	t.Helper()
	return newSandboxIn(t, sandboxtest.Dir(t), o)
}

func newSandboxIn(t *testing.T, dir string, o sandbox.CreateOptions) (*sandbox.Sandbox, *agent.Client) {
	t.Helper()
	return createIn(t, newManager(t, dir, nil), o)
}

// createIn makes a sandbox of a Manager, and returns it with its agent.
func createIn(t *testing.T, m *sandbox.Manager, o sandbox.CreateOptions) (*sandbox.Sandbox, *agent.Client) {
	t.Helper()
	sb, err := m.Create(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	client, err := sb.Agent(t.Context(), "test")
	if err != nil {
		t.Fatal(err)
	}
	return sb, client
}

func output(s agent.Snapshot) string { return string(s.Output.Head) + string(s.Output.Tail) }

// TestNothingOfTheHost: a sandbox sees no file, variable, process or secret of the host, and has three descriptors open.
func TestNothingOfTheHost(t *testing.T) {
	secret := filepath.Join(sandboxtest.Dir(t), "secret")
	if err := os.WriteFile(secret, []byte("top secret"), 0o644); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SOULBOX_TEST_SECRET", "top secret")
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	_, port, err := net.SplitHostPort(listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	_, c := newSandbox(t, sandbox.CreateOptions{})
	for name, test := range map[string]struct{ command, want string }{
		"a host file":       {"cat " + secret + " 2>&1", "No such file"},
		"homes":             {"ls /home", "user\n"},
		"root's home":       {"ls -A /root", ""},
		"logs":              {"ls /var/log", ""},
		"processes":         {"ls -d /proc/[0-9]* | wc -l | { read n; test $n -le 5 && echo few; }", "few\n"},
		"interfaces":        {"cat /proc/net/dev | tail -n +3 | cut -d: -f1 | tr -d ' \\n'", "lo"},
		"the host's ports":  {"(exec 3<>/dev/tcp/127.0.0.1/" + port + ") 2>&1", "refused"},
		"the agent's files": {"ls -l /proc/self/fd | tail -n +2 | wc -l", "4\n"}, // 0, 1, 2 and the directory itself
		"init's memory":     {"cat /proc/1/environ; head -c 10 /proc/1/mem; ls /proc/1/fd; true", ""},
		"mounting": {"mount -t tmpfs none /mnt 2>&1; umount /sys 2>&1; unshare -m true 2>&1; mknod /tmp/x b 8 0 2>&1; ls /tmp",
			""},
	} {
		got := output(sandboxtest.RunAs(t, c, "root", test.command))
		if name == "mounting" {
			if strings.Contains(got, "\nx\n") || !strings.Contains(got, "ermi") {
				t.Errorf("%s: got %q", name, got)
			}
			continue
		}
		if name == "init's memory" {
			if strings.Contains(got, "secret") {
				t.Errorf("%s: got %q", name, got)
			}
			continue
		}
		if !strings.Contains(got, test.want) || test.want == "" && got != "" {
			t.Errorf("%s: got %q, want %q", name, got, test.want)
		}
	}
	env := output(sandboxtest.Run(t, c, "env"))
	if strings.Contains(env, "SECRET") || strings.Contains(env, "SOULBOX") {
		t.Errorf("the host's environment is seen: %s", env)
	}
}

func TestRemoveEverything(t *testing.T) {
	before, err := os.Stat("/usr/bin/env")
	if err != nil {
		t.Fatal(err)
	}
	_, c := newSandbox(t, sandbox.CreateOptions{})
	sandboxtest.RunAs(t, c, "root", "rm -rf --no-preserve-root /home /etc /var /tmp /root /opt /bin /lib /lib64 /usr/bin /.soulbox; true")
	if after, err := os.Stat("/usr/bin/env"); err != nil || !after.ModTime().Equal(before.ModTime()) {
		t.Fatalf("the host was touched: %v", err)
	}
	// The agent lives: files and direct commands still work.
	if _, err := c.WriteFile(t.Context(), "/home/user/new", strings.NewReader("x"), agent.WriteOptions{}); err != nil {
		t.Fatal(err)
	}
	// The loader is gone, so a command fails; but its error says so.
	if _, err := c.Start(t.Context(), agent.StartRequest{Args: []string{"/usr/bin/true"}, WaitMS: 10_000}); err != nil &&
		!errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
}

func TestKillEverything(t *testing.T) {
	sb, c := newSandbox(t, sandbox.CreateOptions{})
	sandboxtest.RunAs(t, c, "root", "kill -9 -1; true")
	sandboxtest.RunAs(t, c, "root", "for s in 1 2 3 6 10 13 14 15 16 17 20 21 22 24 25 26 27 28 29 30 35 40 64; do kill -$s 1; done")
	if got := output(sandboxtest.Run(t, c, "echo alive")); got != "alive\n" {
		t.Fatalf("got %q", got)
	}
	// gVisor does not protect init from root's own kill -9 1 (task_signals.go has it as a TODO): that ends the sandbox, with a cause.
	_, _ = c.Start(t.Context(), agent.StartRequest{Command: "kill -9 1", User: "root"})
	sandboxtest.Eventually(t, "the sandbox has failed", func() bool { return sb.Info().State == sandbox.Failed })
	if cause := sb.Info().Cause; cause != "agent lost" {
		t.Fatalf("cause %q", cause)
	}
}

func TestForkBomb(t *testing.T) {
	_, c := newSandbox(t, sandbox.CreateOptions{Limits: sandbox.Limits{Processes: 128}})
	for _, user := range []string{"user", "root"} {
		bomb, err := c.Start(t.Context(), agent.StartRequest{Command: "b() { b | b & }; b; sleep 600", User: user})
		if err != nil {
			t.Fatal(err)
		}
		sandboxtest.Eventually(t, "the limit is hit", func() bool {
			snap, err := c.Wait(t.Context(), agent.WaitRequest{Process: bomb.Process.ID})
			if err != nil {
				t.Fatal(err)
			}
			return snap.Process.LimitHit
		})
		if got := output(sandboxtest.Run(t, c, "echo alive")); got != "alive\n" {
			t.Fatalf("as %s: got %q", user, got)
		}
		// Root cannot raise the limit either.
		lift := sandboxtest.RunAs(t, c, "root", "for f in $(find /sys/fs/cgroup -name pids.max); do echo max > $f; done 2>&1")
		if !strings.Contains(output(lift), "Read-only") {
			t.Fatalf("as %s: lifting the limit: %q", user, output(lift))
		}
		if _, err := c.Kill(t.Context(), bomb.Process.ID); err != nil {
			t.Fatal(err)
		}
		sandboxtest.Eventually(t, "the bomb is gone", func() bool {
			u, err := c.Usage(t.Context(), nil)
			return err == nil && u.Processes == 0
		})
	}
}

func TestMemoryBombs(t *testing.T) {
	sb, c := newSandbox(t, sandbox.CreateOptions{Limits: sandbox.Limits{Memory: 256 << 20}})
	for name, command := range map[string]string{
		"fast":       "perl -e '$x = q(x) x (4 << 30)'",
		"slow":       "perl -e 'push @x, q(x) x (1 << 20) while 1'",
		"many":       "for i in 1 2 3 4 5 6; do perl -e '$x = q(x) x (100 << 20); sleep 600' & done; wait -n; kill $(jobs -p)",
		"by a child": "(perl -e '$x = q(x) x (4 << 30)'); exit 0",
	} {
		snap := sandboxtest.Run(t, c, command)
		if snap.Process.Cause != agent.CauseOOM {
			t.Errorf("%s: cause %q, exit %d, output %q", name, snap.Process.Cause, snap.Process.ExitCode, output(snap))
		}
		if s := sandboxtest.Run(t, c, "echo alive"); output(s) != "alive\n" {
			t.Errorf("%s: afterwards got %+v", name, s.Process)
		}
	}
	// Shared memory is bounded too, because a tmpfs is memory.
	snap := sandboxtest.Run(t, c, "head -c 1G /dev/zero > /dev/shm/x; rm /dev/shm/x")
	if !strings.Contains(output(snap), "No space") && snap.Process.Cause != agent.CauseOOM {
		t.Errorf("a tmpfs: %q, cause %q", output(snap), snap.Process.Cause)
	}
	if sb.Info().State != sandbox.Running {
		t.Fatalf("the sandbox is %s", sb.Info().State)
	}
}

// TestUserNamespace: root in its own user namespace can mount cgroups, but sees only its own, whose limits it cannot change, and it cannot
// start a process in another one. So its processes and its memory are counted, and end as those of others.
func TestUserNamespace(t *testing.T) {
	sb, c := newSandbox(t, sandbox.CreateOptions{Limits: sandbox.Limits{Processes: 64, Memory: 128 << 20}})
	if _, err := c.Start(t.Context(), agent.StartRequest{Command: "sleep 600"}); err != nil { // its cgroup could be entered
		t.Fatal(err)
	}
	said := output(sandboxtest.RunAs(t, c, "root", `unshare -Urm sh -c 'mount -t cgroup2 none /mnt; ls -d /mnt/*/
		for f in /mnt/pids.max /mnt/memory.max /mnt/cgroup.max.depth; do (echo max > $f && echo lifted $f); done
		mkdir /mnt/x && echo made
		mount -o remount,rw,bind /sys/fs/cgroup && echo writable
		mount -t cgroup -o pids none /srv && echo stolen'`))
	if strings.Contains(said, "/\n") || strings.Contains(said, "lifted") || strings.Contains(said, "made") ||
		strings.Contains(said, "writable") || strings.Contains(said, "stolen") {
		t.Errorf("in its namespace root could: %s", said)
	}
	enter := `use Fcntl; opendir(my $d, "/sys/fs/cgroup") or die; my @g = grep /^p[0-9]/, readdir $d; my $in = 0;
		for (@g) { sysopen(my $f, "/sys/fs/cgroup/$_", O_RDONLY | O_DIRECTORY) or next;
			my $pid = syscall(435, pack("Q11", 0x200000000, 0, 0, 0, 17, 0, 0, 0, 0, 0, fileno $f), 88); exit 0 if $pid == 0; $in++ if $pid > 0 } print scalar(@g) > 1, " $in"`
	if got := output(sandboxtest.RunAs(t, c, "root", "perl -e '"+enter+"'")); got != "1 1" { // its own cgroup
		t.Errorf("of the cgroups there could be entered: %q", got)
	}
	leave := "unshare -Urm sh -c 'mount -t cgroup2 none /mnt; %s'"
	got := output(sandboxtest.RunAs(t, c, "root", fmt.Sprintf(leave,
		"perl -e \"for (1 .. 1000) { if (!defined(\\$p = fork)) { print \\$_; last } sleep 600 if !\\$p }\"; kill -9 -1")))
	if n, err := strconv.Atoi(got); err != nil || n > 64 {
		t.Errorf("%q processes could be started", got)
	}
	snap := sandboxtest.RunAs(t, c, "root", fmt.Sprintf(leave, "perl -e \"push @x, q(x) x (1 << 20) while 1\""))
	if snap.Process.Cause != agent.CauseOOM {
		t.Errorf("what took too much memory: cause %q, exit %d", snap.Process.Cause, snap.Process.ExitCode)
	}
	if sb.Info().State != sandbox.Running || output(sandboxtest.Run(t, c, "echo alive")) != "alive\n" {
		t.Fatalf("the sandbox is %s: %s", sb.Info().State, sb.Info().Cause)
	}
}

// TestUserTmpfs: a tmpfs that a user mounts in its own namespace has no size limit but the machine's.
func TestUserTmpfs(t *testing.T) {
	sb, c := newSandbox(t, sandbox.CreateOptions{Limits: sandbox.Limits{Memory: 128 << 20}})
	_, err := c.Start(t.Context(),
		agent.StartRequest{Command: "unshare -Urm sh -c 'mount -t tmpfs none /mnt; head -c 4G /dev/zero > /mnt/x; sleep 600'"})
	if err != nil {
		t.Fatal(err)
	}
	sandboxtest.Eventually(t, "what it wrote is ended", func() bool {
		list, err := c.List(t.Context(), agent.ListRequest{State: agent.StateExited})
		return sb.Info().State == sandbox.Failed || err == nil && len(list) == 1 && list[0].Cause == agent.CauseOOM
	})
}

// TestDeviceDirectory: /dev is memory that no limit counts, so nothing can be put there; its devices still work.
func TestDeviceDirectory(t *testing.T) {
	_, c := newSandbox(t, sandbox.CreateOptions{})
	got := output(sandboxtest.RunAs(t, c, "root",
		"head -c 100M /dev/zero > /dev/fill; echo works > /dev/stdout; echo gone > /dev/null; echo kept > /dev/shm/x; cat /dev/shm/x"))
	if !strings.Contains(got, "Read-only") || !strings.HasSuffix(got, "works\nkept\n") {
		t.Fatalf("%q", got)
	}
}

// TestAttachAsGuest: not even the sandbox's root may speak to the agent as its host does, which would let it raise its own limits.
func TestAttachAsGuest(t *testing.T) {
	_, c := newSandbox(t, sandbox.CreateOptions{})
	for _, user := range []string{"user", "root"} {
		snap := sandboxtest.RunAs(t, c, user,
			`{ echo '{"protocol":1,"version":"x"}'; sleep 1; } | /.soulbox/soulbox-agent attach; echo end`)
		if got := output(snap); strings.Contains(got, "protocol") || !strings.HasSuffix(got, "end\n") {
			t.Errorf("as %s: %q", user, got)
		}
	}
}

func TestFullDisk(t *testing.T) {
	_, c := newSandbox(t, sandbox.CreateOptions{Limits: sandbox.Limits{Disk: 64 << 20}})
	snap := sandboxtest.Run(t, c, "head -c 200M /dev/zero > /home/user/big")
	if !strings.Contains(output(snap), "No space left") {
		t.Fatalf("got %q", output(snap))
	}
	_, err := c.WriteFile(t.Context(), "/home/user/small", strings.NewReader(strings.Repeat("x", 1<<20)), agent.WriteOptions{})
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("write on a full disk: %v", err)
	}
	// No partial state: neither the file nor a temporary one.
	left := output(sandboxtest.Run(t, c, "ls -A /home/user | grep -e small -e soulbox; echo end"))
	if left != "end\n" {
		t.Fatalf("left: %q", left)
	}
	// Output still works, from memory.
	flood := sandboxtest.Run(t, c, "seq 1 200000")
	if !strings.HasSuffix(string(flood.Output.Tail), "\n200000\n") || !strings.HasPrefix(string(flood.Output.Head), "1\n2\n") {
		t.Fatalf("the output of a flood on a full disk: %+v", flood.Process)
	}
	if err := c.Remove(t.Context(), agent.PathRequest{Path: "/home/user/big"}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.WriteFile(t.Context(), "/home/user/small", strings.NewReader("x"), agent.WriteOptions{}); err != nil {
		t.Fatal(err)
	}
}

func TestNoZombies(t *testing.T) {
	_, c := newSandbox(t, sandbox.CreateOptions{})
	sandboxtest.Run(t, c, "for i in $(seq 50); do (setsid sh -c 'sleep 0.01 & exec sleep 0.02' &) ; done; sleep 0.2")
	sandboxtest.Eventually(t, "no zombie is left", func() bool {
		return output(sandboxtest.RunAs(t, c, "root", "cat /proc/[0-9]*/stat | awk '$3 == \"Z\"' | wc -l")) == "0\n"
	})
}

func TestSentryKilled(t *testing.T) {
	dir := sandboxtest.Dir(t)
	sb, c := newSandboxIn(t, dir, sandbox.CreateOptions{})
	snap, err := c.Start(t.Context(), agent.StartRequest{Command: "sleep 600"})
	if err != nil {
		t.Fatal(err)
	}
	waited := make(chan error, 1)
	go func() {
		_, err := c.Wait(context.Background(), agent.WaitRequest{Process: snap.Process.ID, WaitMS: 50_000})
		waited <- err
	}()
	for _, pid := range sandboxtest.Processes(dir) {
		_ = syscall.Kill(pid, syscall.SIGKILL) // it may have ended with another one
	}
	if err := <-waited; !errors.Is(err, agent.ErrLost) {
		t.Fatalf("a wait in flight: %v", err)
	}
	sandboxtest.Eventually(t, "the sandbox has failed", func() bool { return sb.Info().State == sandbox.Failed })
	if _, err := sb.Agent(t.Context(), "use"); !errors.Is(err, sandbox.ErrState) || !strings.Contains(err.Error(), "agent lost") {
		t.Fatal(err)
	}
}

func TestAttributes(t *testing.T) {
	_, c := newSandbox(t, sandbox.CreateOptions{})
	if _, err := c.WriteFile(t.Context(), "/home/user/f", strings.NewReader("x"), agent.WriteOptions{}); err != nil {
		t.Fatal(err)
	}
	info, err := c.Setattr(t.Context(), agent.PathRequest{Path: "/home/user/f", Attrs: map[string]string{"origin": "a test"}})
	if err != nil || info.Attrs["origin"] != "a test" || info.Owner != "user" {
		t.Fatal(info, err)
	}
}

// TestInHostCgroup: if a machine has a cgroup on the host, all its processes are in it, and the cgroup is removed with the machine.
func TestInHostCgroup(t *testing.T) {
	dir := sandboxtest.Dir(t)
	sb, _ := newSandboxIn(t, dir, sandbox.CreateOptions{})
	manifest, err := os.ReadFile(filepath.Join(dir, "sandboxes", sb.ID(), "machine.json"))
	if err != nil {
		t.Fatal(err)
	}
	name := "soulbox-" + sb.ID()
	planned := strings.Contains(string(manifest), name)
	for _, pid := range sandboxtest.Processes(dir) {
		in, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "cgroup"))
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(in), name) != planned {
			t.Errorf("planned is %v, but process %d is in %s", planned, pid, in)
		}
	}
	if err := sb.Kill(sandbox.CauseKilled); err != nil {
		t.Fatal(err)
	}
	for _, depth := range []string{"*", "*/*", "*/*/*", "*/*/*/*"} {
		if left, err := filepath.Glob(filepath.Join("/sys/fs/cgroup", depth, name)); err != nil || len(left) > 0 {
			t.Errorf("left: %v %v", left, err)
		}
	}
}

func TestMissingRunsc(t *testing.T) {
	_, host := newRuntime(t)
	spec := sandbox.Spec{ID: "sbx", Dir: sandboxtest.Dir(t), Template: host, Limits: sandbox.DefaultLimits()}
	_, err := (&gvisor.Runtime{Agent: sandboxtest.AgentPath(t)}).Boot(t.Context(), spec)
	if err == nil || !strings.Contains(err.Error(), "soulbox-mcp doctor") {
		t.Fatal(err)
	}
	broken := filepath.Join(sandboxtest.Dir(t), "runsc")
	if err := os.WriteFile(broken, []byte("#!/bin/sh\necho it is broken >&2; exit 1\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	_, err = (&gvisor.Runtime{Runsc: broken, Agent: sandboxtest.AgentPath(t)}).Boot(t.Context(), spec)
	if err == nil {
		t.Fatal("a broken runsc booted")
	}
}
