package gvisor_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/internal/sandboxtest"
	"soulbox.dev/soulbox/sandbox"
)

// TestPatches tests what gvisor/runsc/patches changes, each with what Linux answers. Numbers are of errno(3).
func TestPatches(t *testing.T) {
	_, c := newSandbox(t, sandbox.CreateOptions{})
	for _, p := range []struct{ name, command, want string }{
		{"an argument too long", `perl -e 'exec {"/bin/true"} "true", "x" x 200000; print $!+0'`, "7"}, // E2BIG
		{"arguments too long", `perl -e 'exec {"/bin/true"} "true", ("x" x 1000) x 3000; print $!+0'`, "7"},
		{"an environment too long", `perl -e '$ENV{X} = "x" x 200000; exec {"/bin/true"} "true"; print $!+0'`, "7"},
		{"a name too long", `perl -e 'exec {"/" . "x" x 5000} "true"; print $!+0'`, "36"}, // ENAMETOOLONG, as before

		{"a link is not followed", `mkdir d && ln -s d l && ` + openDir("l", "O_NOFOLLOW"), "20"}, // ENOTDIR
		{"a link is not followed on tmpfs", `mkdir /dev/shm/d && ln -s d /dev/shm/l && ` + openDir("/dev/shm/l", "O_NOFOLLOW"), "20"},
		{"a link of /proc is not followed", openDir("/proc/self", "O_NOFOLLOW"), "20"},
		{"a link is followed without O_NOFOLLOW", openDir("l", "0"), "0"},
		{"a link with a slash is followed", openDir("l/", "O_NOFOLLOW"), "0"},
		{"a link to a link with a slash is followed", `ln -s l m && ` + openDir("m/", "O_NOFOLLOW"), "0"},
		{"a link on the way is followed", `mkdir d/e && ` + openDir("l/e", "O_NOFOLLOW"), "0"},
		{"a directory is opened", openDir("d", "O_NOFOLLOW"), "0"},

		{"an empty datagram", empty("SOCK_DGRAM"), "0 1"},
		{"an empty packet", empty("SOCK_SEQPACKET"), "0 1"},
		{"nothing in a stream", empty("SOCK_STREAM"), "1"},

		{"one device", `mkdir t && echo hi > t/f && ln -s f t/l && mkfifo t/p && stat -c %d t t/f t/l t/p /etc /etc/passwd | sort -u | ` +
			`wc -l`, "1"},
		{"du -x", `du -xb t/f | cut -f 1; head -c 5000 /dev/zero > t/g; test "$(du -xb t | cut -f 1)" -gt 5000 && ` +
			`find . -xdev -name g | wc -l`,
			"3\n1"},
		{"inode numbers",
			`cd /etc && perl -e 'opendir D, "."; $n = 0; /^\.\.?$/ || -d $_ || $n++ for readdir D; print $n > 1'; ls -i /etc/passwd | ` +
				`cut -d " " -f 1 > /tmp/i; stat -c %i /etc/passwd | cmp - /tmp/i && echo same`,
			"1same"},
		{"inode numbers are apart",
			`for i in 1 2 3 4 5 6 7 8 9; do mkdir -p n/d$i; echo > n/f$i; done; find n /etc /usr/bin -xdev -printf "%D %i %n %y\n" | ` +
				`awk '$3 == 1 || $4 == "d"' | sort | uniq -d | wc -l`, "0"},
		{"hard links", `echo > h1; ln h1 h2; stat -c %i h1 h2 | uniq | wc -l; test h1 -ef h2 && echo same`, "1\nsame"},

		{"a device on a read-only mount",
			`for d in null fuse; do test -r /dev/$d && test -w /dev/$d && echo $d; done; test -w /dev; echo $?`,
			"null\nfuse\n1"},
		{"vmstat", `awk '$1 == "nr_free_pages" && $2 > 0 || $1 == "pgpgin" || $1 == "pswpout" {print $1}' /proc/vmstat`,
			"nr_free_pages\npgpgin\npswpout"},
		{"diskstats", `wc -c < /proc/diskstats`, "0"},
		{"limits of inotify", `ls /proc/sys/fs/inotify; test "$(cat /proc/sys/fs/inotify/max_user_watches)" -gt 500000 && echo enough`,
			"max_queued_events\nmax_user_instances\nmax_user_watches\nenough"},
		{"the most that a process had",
			`perl -e '$x = "x" x 50e6; undef $x; open F, "/proc/self/status"; /^VmHWM:\s+(\d+) kB$/ && print $1 > 45000 for <F>'`, "1"},

		{"a file without a name", tmpfile("."), "0"},                          // TestTmpfilePatch has more
		{"a file without a name on a read-only tmpfs", tmpfile("/dev"), "30"}, // EROFS
		{"a file without a name on a read-only mount", tmpfile("/usr"), "30"},
		{"a file without a name in nothing on a read-only mount", tmpfile("/usr/missing"), "2"}, // ENOENT
		{"a file without a name by a read-only mount", tmpfile("/usr/share/../../tmp"), "0"},
		{"a file without a name where one may not write", tmpfile("/etc"), "13"}, // EACCES
	} {
		t.Run(p.name, func(t *testing.T) {
			if got := strings.TrimSpace(output(sandboxtest.Run(t, c, p.command))); got != p.want {
				t.Errorf("%s: got %q, want %q", p.command, got, p.want)
			}
		})
	}
}

func openDir(name, flag string) string {
	return `perl -MFcntl -e 'print sysopen(F, "` + name + `", O_RDONLY | O_DIRECTORY | ` + flag + `) ? 0 : $!+0'`
}

// empty sends nothing, then one byte, and prints the length of everything that arrives until there is a byte.
func empty(kind string) string {
	return `perl -MSocket -e 'alarm 30; socketpair(A, B, AF_UNIX, ` + kind +
		`, 0) or die $!; defined(send(A, "", 0)) or die $!; send(A, "x", 0);
		do { defined(recv(B, $b, 9, 0)) or die $!; push @n, length $b } until $b; print "@n"'`
}

// terminalCase is what is typed at a terminal once the program says "ready", and what the program says then.
type terminalCase struct {
	name, command string
	typed         []string // an entry that ends in "=" is not typed but waited for
	want          []string
}

const perlSays = `$| = 1; sub say_ { syswrite STDOUT, "@_\n" } `

// TestTerminalPatch: the line discipline of the agent's terminals is as in Linux.
func TestTerminalPatch(t *testing.T) {
	_, c := newSandbox(t, sandbox.CreateOptions{})
	for _, p := range []terminalCase{
		{"ctrl-d while a program polls", `perl -e '` + perlSays +
			`say_ "ready"; vec($r, 0, 1) = 1; select($r, undef, undef, 60) or die "nothing"; say_ "read=", sysread(STDIN, $b, 9)'`,
			[]string{"\x04"}, []string{"read= 0"}},
		{"ctrl-d before a line", `perl -e '` + perlSays + `say_ "ready"; say_ "read=", sysread(STDIN, $b, 9) for 1, 2'`,
			[]string{"\x04abc\n"}, []string{"read= 0", "read= 4"}},
		{"ctrl-d in a line", `perl -e '` + perlSays + `say_ "ready"; say_ "read=", sysread(STDIN, $b, 9) for 1, 2'`,
			[]string{"abc\x04d\n"}, []string{"read= 3", "read= 2"}},
		{"ctrl-u takes back the line", `echo ready; read x; echo "got=<$x>"`, []string{"bad\x15good\n"},
			[]string{"bad\b \b\b \b\b \bgood", "got=<good>"}},
		{"ctrl-u on a terminal that cannot erase", `stty -echok -echoke; echo ready; read x; echo "got=<$x>"`, []string{"bad\x15good\n"},
			[]string{"bad^Ugood", "got=<good>"}},
		{"ctrl-u in raw mode", `stty -icanon; echo ready; head -c 3 | od -c`, []string{"a\x15b"}, []string{"a 025   b"}},
		{"ctrl-c drops what was typed", `trap 'echo INT=' INT; echo ready; while :; do if read x; then echo "got=<$x>"; fi; done`,
			[]string{"rm -rf \x03", "INT=", "ls\n"}, []string{"^C", "got=<ls>"}},
		{"ctrl-c behind a line that nobody reads", `trap 'echo INT=' INT; echo ready; while :; do sleep 60; done`, []string{"line\n\x03"},
			[]string{"INT="}},
		{"ctrl-c with noflsh", `stty noflsh; trap 'echo INT=' INT; echo ready; while :; do if read x; then echo "got=<$x>"; fi; done`,
			[]string{"l\x03", "INT=", "s\n"}, []string{"got=<ls>"}},
		{"a disabled character", `stty intr undef kill undef; echo ready; read x; printf %s "$x" | od -An -c; echo "end="`,
			[]string{"a\x03\x15b\n"}, []string{"a 003 025   b", "end="}},
		{"no minimum, a time", `stty -icanon min 0 time 5; echo ready; dd bs=1 count=1 2>&1`, nil, []string{"0+0 records in"}},
		{"no minimum, no time", `stty -icanon min 0 time 0; echo ready; dd bs=1 count=1 2>&1`, nil, []string{"0+0 records in"}},
		{"no minimum, a time, a byte", `stty -icanon min 0 time 255; echo ready; dd bs=9 count=1 2>&1`, []string{"a"},
			[]string{"0+1 records in"}},
		{"a minimum", `stty -icanon -echo min 3 time 0; perl -e '` + perlSays + `say_ "ready"; say_ "read=", sysread(STDIN, $b, 9), $b'`,
			[]string{"a", "bc"}, []string{"read= 3 abc"}},
		{"a minimum and a time between bytes", `stty -icanon -echo min 9 time 1; echo ready; perl -e '` + perlSays +
			`say_ "read=", sysread(STDIN, $b, 9), $b'`, []string{"a"}, []string{"read= 1 a"}},
		{"control characters are seen", `echo ready; read x; echo "end="`, []string{"a\x1b[Ab\n"}, []string{"a^[[Ab", "end="}},
	} {
		t.Run(p.name, func(t *testing.T) { p.run(t, c) })
	}
}

func (p terminalCase) run(t *testing.T, c *agent.Client) {
	started, err := c.Start(t.Context(), agent.StartRequest{Command: p.command, Terminal: &agent.Terminal{Rows: 24, Cols: 200}})
	if err != nil {
		t.Fatal(err)
	}
	id := started.Process.ID
	defer func() {
		if _, err := c.Signal(t.Context(), id, "SIGKILL"); err != nil && !strings.Contains(err.Error(), "ended") {
			t.Error(err)
		}
	}()
	var said string
	says := func(text string) {
		t.Helper()
		sandboxtest.Eventually(t, p.name+": it says "+text, func() bool {
			s, err := c.Wait(t.Context(), agent.WaitRequest{Process: id, WaitMS: 50, Window: agent.Window{Head: 10_000}})
			said = output(s)
			return err == nil && strings.Contains(said, text)
		})
	}
	says("ready")
	for _, text := range p.typed {
		if strings.HasSuffix(text, "=") {
			says(text)
			continue
		}
		if _, err := c.Input(t.Context(), agent.InputRequest{Process: id, Data: []byte(text)}); err != nil {
			t.Fatal(err)
		}
	}
	for _, text := range p.want {
		says(text)
	}
	if t.Failed() {
		t.Logf("it said %q", said)
	}
}

// TestHangUpPatch closes the master of a terminal: a reader at the other end gets an end of file, a writer an error, and the session's
// leader its signal even if another group has the terminal.
func TestHangUpPatch(t *testing.T) {
	_, c := newSandbox(t, sandbox.CreateOptions{})
	script, err := os.Open(filepath.Join("testdata", "hangup.pl"))
	if err != nil {
		t.Fatal(err)
	}
	defer script.Close()
	if _, err := c.WriteFile(t.Context(), "/tmp/hangup.pl", script, agent.WriteOptions{}); err != nil {
		t.Fatal(err)
	}
	got := output(sandboxtest.Run(t, c, "perl /tmp/hangup.pl 2>&1"))
	for _, want := range []string{"leader: SIGHUP", "foreground: read 0", "foreground: write 5", "foreground: poll",
		"foreground: ioctl 5"} {
		if !strings.Contains(got, want+"\n") {
			t.Errorf("%q is missing in %q", want, got)
		}
	}
}
