package gvisor_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"

	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/gvisor"
	"soulbox.dev/soulbox/internal/sandboxtest"
	"soulbox.dev/soulbox/sandbox"
)

// says checks that a user's command prints what is wanted, and nothing else.
func says(t *testing.T, c *agent.Client, user, command, want string) {
	t.Helper()
	if got := output(sandboxtest.RunAs(t, c, user, command)); got != want {
		t.Errorf("as %q, %s:\ngot  %q\nwant %q", user, command, got, want)
	}
}

// TestStandardStreams opens the streams of a process by their names, as the process's owner. The users alternate, so that pipes made ahead
// belong to another user.
func TestStandardStreams(t *testing.T) {
	_, c := newSandbox(t, sandbox.CreateOptions{})
	for _, user := range []string{"", "root", "", "1234", "daemon", "1234:50", "root"} {
		says(t, c, user, `echo a >/dev/stdout; echo b >>/proc/self/fd/1; echo c | tee /dev/fd/1`, "a\nb\nc\nc\n")
		says(t, c, user, `echo a >/dev/stderr; (echo b >/proc/$$/fd/2)`, "a\nb\n")
		says(t, c, user, `test "$(stat -Lc %u:%g /dev/stdout)" = "$(id -u):$(id -g)" && stat -Lc '%F %a' /dev/stdout`, "fifo 600\n")
		s, err := c.Start(t.Context(), agent.StartRequest{Command: "cat /dev/stdin /proc/self/fd/0", User: user, Stdin: []byte("in\n"),
			WaitMS: 50_000, Window: agent.Window{Head: 100}})
		if err != nil || output(s) != "in\n" {
			t.Errorf("as %q, stdin: got %q, %v", user, output(s), err)
		}
		s, err = c.Start(t.Context(), agent.StartRequest{
			Command: "echo a >/dev/stdout; echo b >/dev/stderr; echo c >/dev/tty", User: user, Terminal: &agent.Terminal{}, WaitMS: 50_000,
			Window: agent.Window{Head: 100}})
		if err != nil || output(s) != "a\r\nb\r\nc\r\n" {
			t.Errorf("as %q, on a terminal: got %q, %v", user, output(s), err)
		}
	}
	// A process that was another user when it began may not open them, as on Linux: su of Docker's root writes to what it has, and cannot
	// open it again.
	says(t, c, "root", `perl -e '$> = 1000; print "open\n" if open F, ">", "/dev/stdout"; print "$!\n"; $| = 1; print "has it\n"'`,
		"Permission denied\nhas it\n")
	says(t, c, "1234:50", `perl -e '$< = $> = 0; print "root\n" if $> == 0; print "no\n"'`, "no\n")
}

// TestLogin checks what a login provides: groups, and a limit of descriptors that programs can loop over.
func TestLogin(t *testing.T) {
	_, c := newSandbox(t, sandbox.CreateOptions{})
	says(t, c, "root", `usermod -aG staff,tty user 2>/dev/null || sed -i 's/^\(staff\|tty\):.*/&user/' /etc/group; `+
		`printf 'more:x:50:user\nbad:x:4294967295:user\nworse:x:x:user\n' >>/etc/group`, "")
	for user, want := range map[string]string{"": "1000 5 50", "root": "0", "1000": "1000 5 50", "user:50": "50", "1234": "1234",
		"1234:0": "0"} {
		says(t, c, user, "id -G; perl -e 'print join(q( ), (split q( ), $))[1..20]) =~ s/ +$//r, qq(\n)'", want+"\n"+want+"\n")
	}
	says(t, c, "", `ulimit -Sn; ulimit -Hn; ulimit -n 100000 && ulimit -Sn`, "4096\n1048576\n100000\n")
	says(t, c, "root", `ulimit -Sn; perl -MPOSIX -e 'POSIX::close($_) for 3..POSIX::sysconf(4)-1; print POSIX::sysconf(4), "\n"'`,
		"4096\n4096\n")
	s, err := c.Start(t.Context(), agent.StartRequest{Command: "ulimit -Sn", Terminal: &agent.Terminal{}, WaitMS: 50_000,
		Window: agent.Window{Head: 100}})
	if err != nil || output(s) != "4096\r\n" {
		t.Errorf("on a terminal: got %q, %v", output(s), err)
	}
}

// TestLimitsSeen: programs find the sandbox's limits wherever they look: before and after a pause to disk, and with other limits when it
// boots from its files.
func TestLimitsSeen(t *testing.T) {
	limits := sandbox.DefaultLimits()
	limits.Memory, limits.CPU = 512<<20, 1
	sb, c := newSandbox(t, sandbox.CreateOptions{Limits: limits})
	seen := func() {
		t.Helper()
		says(t, c, "", "awk '/^MemTotal/ {print $2}' /proc/meminfo; getconf _PHYS_PAGES; nproc",
			fmt.Sprintf("%d\n%d\n1\n", limits.Memory>>10, limits.Memory>>12))
		says(t, c, "", `awk '/^Mem(Free|Available)/ && $2 > 400000 && $2 < 524288 {print $1}' /proc/meminfo`, "MemFree:\nMemAvailable:\n")
		says(t, c, "", "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max; cat /sys/fs/cgroup/p*/cpu.max | sort -u; cat "+
			"/sys/fs/cgroup/p*/memory.max | sort -u",
			fmt.Sprintf("%d\n100000 100000\n100000 100000\n%d\n", limits.Memory, limits.Memory))
		says(t, c, "", `! type java >/dev/null 2>&1 || java -XX:+PrintFlagsFinal -version 2>&1 | awk '/ MaxHeapSize / && `+
			`($4 < 100e6 || $4 > 270e6)'`, "")
		says(t, c, "", `! type node >/dev/null 2>&1 || node -p '(h => h > 100e6 && `+
			`h < 400e6 ? "" : h)(v8.getHeapStatistics().heap_size_limit)' | grep .`, "")
	}
	seen()
	if err := errors.Join(sb.Pause(t.Context(), sandbox.PauseOptions{ToDisk: true}), sb.Resume(t.Context())); err != nil {
		t.Fatal(err)
	}
	c, err := sb.Agent(t.Context(), "test")
	if err != nil {
		t.Fatal(err)
	}
	seen()
	// The process that enforces the limit sees what is used beyond it.
	s, err := c.Start(t.Context(), agent.StartRequest{Command: "perl -e '$x = q(x) x (600 << 20)'", WaitMS: 60_000})
	if err != nil || s.Process.Cause != agent.CauseOOM {
		t.Errorf("a process of 600 MB of 512: cause %q, exit %d, %v", s.Process.Cause, s.Process.ExitCode, err)
	}
	says(t, c, "", "echo alive", "alive\n")
}

// traces is a program that attaches to a process, detaches, and prints how that went.
const traces = `python3 -c '
import ctypes, os, sys
c, pid = ctypes.CDLL(None, use_errno=True), int(sys.argv[1])
if c.ptrace(16, pid, 0, 0) < 0: sys.exit(print(os.strerror(ctypes.get_errno())))
os.waitpid(pid, 0x40000000)
print("attached"); c.ptrace(17, pid, 0, 0)' `

// TestStickyDirectories renames to names that are free again, in directories where only owners may: the overlay has whiteouts there, which
// belong to root.
func TestStickyDirectories(t *testing.T) {
	image := sandboxtest.Image(t, sandboxtest.Dir(t))
	runtime, host := newRuntime(t)
	inMemory := sandbox.DefaultLimits()
	inMemory.DiskInMemory = true
	for name, spec := range map[string]sandbox.Spec{
		"host":            {Template: host, Limits: sandbox.DefaultLimits()},
		"image":           {Template: sandbox.Template{Image: image}, Limits: sandbox.DefaultLimits()},
		"image in memory": {Template: sandbox.Template{Image: image}, Limits: inMemory},
	} {
		t.Run(name, func(t *testing.T) {
			spec.ID, spec.Dir = "sbtest", sandboxtest.Dir(t)
			c := sandboxtest.Greet(t, boot(t, runtime, spec))
			says(t, c, "root", "mkdir -p /var/tmp /tmp/own; chmod 1777 /tmp /var/tmp /tmp/own", "")
			for _, dir := range []string{"/tmp", "/var/tmp", "/tmp/own"} {
				says(t, c, "user", "cd "+dir+"; echo 1 >a; echo 2 >b; mv a a.bak; mv b a; cat a a.bak; rm a a.bak", "2\n1\n")
				says(t, c, "user", "cd "+dir+
					"; echo 1 >a; mv a b; mv b a; mv a b; ln b a; mv a c; ln -s b a; rm a; mkdir a; rmdir a; mv b a; cat a; rm a c; ls a "+
					"b c 2>/dev/null", "1\n")
				says(t, c, "user", "cd "+dir+"; mkdir d e; mv d f; mv e d; rmdir d f; echo 1 >d; rm d; ls d e f 2>/dev/null", "")
				says(t, c, "root", "echo r >"+dir+"/r; mv "+dir+"/r "+dir+"/root", "")
				says(t, c, "user", "cd "+dir+
					"; echo 1 >a; mv a r; cat r; rm r; echo 2 >a; mv -f a root 2>/dev/null || cat root a; rm a; rm -f root 2>/dev/null "+
					"|| echo root\\'s", "1\nr\n2\nroot's\n")
			}
		})
	}
}

// boot boots a machine without a Manager.
func boot(t *testing.T, runtime *gvisor.Runtime, spec sandbox.Spec) sandbox.Machine {
	t.Helper()
	m, err := runtime.Boot(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Destroy(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return m
}

// vmRead is a program that reads a byte of a process's memory. Any result but a refusal is wrong, even that nothing is at that address.
const vmRead = `python3 -c '
import ctypes, os, sys
c, b = ctypes.CDLL(None, use_errno=True), ctypes.create_string_buffer(8)
v = (ctypes.c_size_t * 2)(ctypes.addressof(b), 1)
n = c.process_vm_readv(int(sys.argv[1]), v, 1, v, 1, 0)
print(os.strerror(ctypes.get_errno()) if n < 0 else "read")' `

// TestTrace: debuggers can attach to processes of their user, and no process can attach to the agent or its bridge.
func TestTrace(t *testing.T) {
	runtime, host := newRuntime(t)
	spec := sandbox.Spec{ID: "sbtest", Dir: sandboxtest.Dir(t), Template: host, Limits: sandbox.DefaultLimits()}
	first := sandboxtest.Greet(t, boot(t, runtime, spec))
	for _, user := range []string{"user", "root", "daemon"} {
		if _, err := first.Start(t.Context(), agent.StartRequest{Command: "exec sleep 600", User: user, Tag: user}); err != nil {
			t.Fatal(err)
		}
	}
	_ = first.Close()
	again, err := runtime.Attach(t.Context(), spec.Dir)
	if err != nil {
		t.Fatal(err)
	}
	c := sandboxtest.Greet(t, again) // by a bridge
	target := func(user string) string { return fmt.Sprintf("$(pgrep -u %s -x sleep)", user) }
	bridge := "$(pgrep -x soulbox-agent | grep -vx 1)"
	// A child whose start hangs still has the agent's memory, and already the ID of its user.
	sandboxtest.RunAs(t, c, "user", "mkfifo -m 755 /tmp/fifo; printf '#!/tmp/fifo\\n' >/tmp/hangs; chmod 755 /tmp/hangs")
	var hung sync.WaitGroup
	defer hung.Wait()
	hung.Go(func() {
		_, _ = c.Start(context.Background(), agent.StartRequest{Args: []string{"/tmp/hangs"}, User: "user"})
	}) // it is killed
	find := "for n in $(seq 100); do p=$(pgrep -u user -x soulbox-agent) && break; sleep 0.05; done; "
	for _, user := range []string{"user", "root"} { // ptrace(2) itself waits for the end of the start
		says(t, c, user, find+"for f in mem environ maps; do head -c 1 /proc/$p/$f 2>&1 | grep -o 'Permission denied'; done",
			"Permission denied\nPermission denied\nPermission denied\n")
		says(t, c, user, find+vmRead+"$p", "Operation not permitted\n")
	}
	for _, test := range []struct{ user, target, want string }{
		{"user", target("user"), "attached\n"}, {"daemon", target("daemon"), "attached\n"}, {"root", target("root"), "attached\n"},
		{"root", target("user"), "attached\n"}, {"root", target("daemon"), "attached\n"},
		{"user", target("root"), "Operation not permitted\n"}, {"user", target("daemon"), "Operation not permitted\n"},
		{"user", "1", "Operation not permitted\n"}, {"root", "1", "Operation not permitted\n"},
		{"user", bridge, "Operation not permitted\n"}, {"root", bridge, "Operation not permitted\n"},
	} {
		says(t, c, test.user, traces+test.target, test.want)
	}
	for _, file := range []string{"/proc/1/mem", "/proc/1/fd/0", "/proc/1/maps", "/proc/1/environ"} {
		if got := output(sandboxtest.RunAs(t, c, "root", "head -c 1 "+file)); !strings.Contains(got, "ermission") &&
			!strings.Contains(got, "denied") && got != "" {
			t.Errorf("root reads %s of the agent: %q", file, got)
		}
	}
}
