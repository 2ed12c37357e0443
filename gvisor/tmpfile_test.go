package gvisor_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/internal/sandboxtest"
	"soulbox.dev/soulbox/sandbox"
)

// TestTmpfilePatch tests files without a name (O_TMPFILE) in an overlay and on tmpfs. On Linux, testdata/tmpfile.py finds no error either,
// on ext4, tmpfs and overlayfs.
func TestTmpfilePatch(t *testing.T) {
	_, c := newSandbox(t, sandbox.CreateOptions{})
	writeTmpfileScript(t, c)
	sandboxtest.RunAs(t, c, "root", "mkdir -m 2755 /srv/group && chgrp daemon /srv/group")
	for _, p := range []struct{ user, dir, other string }{
		{"root", "/mnt", "/dev/shm"}, // only in the image
		{"root", "/tmp/root", "/dev/shm"},
		{"root", "/srv/group", "/dev/shm"},
		{"root", "/dev/shm/root", "/tmp"},
		{"user", "/tmp/user", "/dev/shm"},
		{"user", "/home/user/tmpfiles", "/dev/shm"},
		{"user", "/dev/shm/user", "/tmp"},
	} {
		t.Run(p.user+" in "+p.dir, func(t *testing.T) {
			got := output(sandboxtest.RunAs(t, c, p.user, "mkdir -p "+p.dir+" && python3 /tmp/tmpfile.py "+p.dir+" "+p.other+" 2>&1"))
			if got != "done\n" {
				t.Error(got)
			}
		})
	}
}

// TestTmpfileInImage tests them with an image below, and an upper layer on disk and in memory.
func TestTmpfileInImage(t *testing.T) {
	image := sandboxtest.Image(t, sandboxtest.Dir(t))
	runtime, _ := newRuntime(t)
	open := func(dir string) string {
		return fmt.Sprintf(`sysopen(F, "%s", %d, 0600) or print($!+0, "\n"), exit;`, dir, unix.O_TMPFILE|unix.O_RDWR)
	}
	named := func(dir string) string { // prints the links before, then the links and the size of the named file
		return fmt.Sprintf(`print F "x"; F->flush; $n = (stat F)[3]; $from = "/proc/self/fd/" . fileno F; $to = "%s/named";
			syscall(%d, %d, $from, %d, $to, %d) and print("$!\n"), exit; print "$n ", join(" ", (stat $to)[3, 7]), "\n"; unlink $to`,
			dir, unix.SYS_LINKAT, unix.AT_FDCWD, unix.AT_FDCWD, unix.AT_SYMLINK_FOLLOW)
	}
	for name, inMemory := range map[string]bool{"on disk": false, "in memory": true} {
		t.Run(name, func(t *testing.T) {
			limits := sandbox.DefaultLimits()
			limits.DiskInMemory = inMemory
			spec := sandbox.Spec{ID: "sbtest", Dir: sandboxtest.Dir(t), Template: sandbox.Template{Image: image}, Limits: limits}
			c := sandboxtest.Greet(t, boot(t, runtime, spec))
			for dir, user := range map[string]string{"/": "root", "/usr/bin": "root", "/tmp": "user", "/home/user": "user",
				"/dev/shm": "user"} {
				says(t, c, user, "LC_ALL=C perl -e '"+open(dir)+named(dir)+"'", "0 1 1\n")
			}
			says(t, c, "user", "LC_ALL=C perl -e '"+open("/usr/bin")+"'", "13\n")
			says(t, c, "user", "LC_ALL=C perl -e '"+open("/.soulbox")+"'", "30\n") // the agent's directory; in memory it is an EROFS image
			says(t, c, "user", "LC_ALL=C perl -e '"+open("/.soulbox/missing")+"'", "2\n")
			says(t, c, "user", "LC_ALL=C perl -e '"+open("/.soulbox/../tmp")+"'", "")
		})
	}
}

// TestTmpfileSaved: files without a name that are open when a machine is saved still exist when it is resumed, and so does whether they may
// get a name.
func TestTmpfileSaved(t *testing.T) {
	sb, c := newSandbox(t, sandbox.CreateOptions{Limits: sandbox.Limits{Memory: 128 << 20}})
	writeTmpfileScript(t, c)
	started, err := c.Start(t.Context(), agent.StartRequest{Command: "python3 /tmp/tmpfile.py hold /tmp /dev/shm 2>&1"})
	if err != nil {
		t.Fatal(err)
	}
	said := func(want string) {
		t.Helper()
		sandboxtest.Eventually(t, "it says "+want, func() bool {
			s, err := c.Wait(t.Context(), agent.WaitRequest{Process: started.Process.ID, WaitMS: 50, Window: agent.Window{Head: 10_000}})
			if err == nil && s.Process.State == agent.StateExited && output(s) != want {
				t.Fatal(output(s))
			}
			return err == nil && output(s) == want
		})
	}
	said("ready\n")
	if err := sb.Pause(t.Context(), sandbox.PauseOptions{ToDisk: true}); err != nil {
		t.Fatal(err)
	}
	if err := sb.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	if c, err = sb.Agent(t.Context(), "test"); err != nil {
		t.Fatal(err)
	}
	sandboxtest.Run(t, c, "touch /tmp/go")
	said("ready\ndone\n")
}

func writeTmpfileScript(t *testing.T, c *agent.Client) {
	t.Helper()
	script, err := os.ReadFile(filepath.Join("testdata", "tmpfile.py"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.WriteFile(t.Context(), "/tmp/tmpfile.py", strings.NewReader(string(script)), agent.WriteOptions{}); err != nil {
		t.Fatal(err)
	}
}

// tmpfile opens a file without a name in a directory, and prints the error.
func tmpfile(dir string) string {
	return `python3 -c 'import os
try: os.close(os.open("` + dir + `", os.O_TMPFILE | os.O_RDWR, 0o600)); print(0)
except OSError as e: print(e.errno)'`
}
