package rawsys

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// spawnOutput runs a program with Spawn, and returns its output and status.
func spawnOutput(t *testing.T, attr Attr, args ...string) (string, syscall.WaitStatus) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	attr.Stdio = [3]int{int(null.Fd()), int(w.Fd()), int(w.Fd())}
	c, err := Spawn(args[0], args, attr)
	_ = w.Close()
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	for buf := make([]byte, 4096); ; {
		n, err := r.Read(buf)
		b.Write(buf[:n])
		if err != nil {
			break
		}
	}
	var status syscall.WaitStatus
	if err := waitFor(c.PID, &status); err != nil {
		t.Fatal(err)
	}
	return b.String(), status
}

// TestSpawn checks a process that Spawn has started: it has what it was given, and nothing of ours.
func TestSpawn(t *testing.T) {
	dir := t.TempDir()
	leak, err := os.Create(dir + "/leak")
	if err != nil {
		t.Fatal(err)
	}
	defer leak.Close()
	if inherited, err := unix.Dup(int(leak.Fd())); err != nil { // by a fork that only executes
		t.Fatal(err)
	} else {
		defer unix.Close(inherited)
	}
	ignored := "" // by the process that started the test; Spawn keeps that, as every fork does
	own, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(own)) {
		if strings.HasPrefix(line, "SigIgn:") {
			ignored = line
		}
	}
	out, status := spawnOutput(t, Attr{Dir: dir, Env: []string{"A=1", "B=two words"}}, "/bin/sh", "-c",
		`pwd; echo "$A,$B,$PATH" | cut -d, -f1,2; ls -l /proc/self/fd | grep -c leak; `+
			`sed -nE '/^Sig(Blk|Ign|Cgt)/p' /proc/self/status; test $(ps -o sid= -p $$ 2>/dev/null || echo $$) = $$ && echo leader; exit 7`)
	if want := fmt.Sprintf("%s\n1,two words\n0\nSigBlk:\t%016x\n%sSigCgt:\t%016x\nleader\n", dir, 0, ignored, 0); out != want ||
		status.ExitStatus() != 7 {
		t.Errorf("got status %#x and %q, want 7 and %q", status, out, want)
	}
}

// TestSpawnFails makes every step before the program fail: the error is that step's, and no process is left.
func TestSpawnFails(t *testing.T) {
	dir := t.TempDir()
	script := dir + "/script"
	if err := os.WriteFile(script, []byte("no program"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		program string
		attr    Attr
		want    syscall.Errno
	}{
		"no such program":   {dir + "/none", Attr{}, syscall.ENOENT},
		"no program":        {script, Attr{}, syscall.ENOEXEC},
		"a directory":       {dir, Attr{}, syscall.EACCES},
		"no such directory": {"/bin/true", Attr{Dir: dir + "/none"}, syscall.ENOENT},
		"a file as one":     {"/bin/true", Attr{Dir: script}, syscall.ENOTDIR},
		"no descriptor":     {"/bin/true", Attr{Stdio: [3]int{0, 1, 1 << 20}}, syscall.EBADF},
		"no terminal":       {"/bin/true", Attr{TTY: true}, syscall.ENOTTY},
		"no cgroup":         {"/bin/true", Attr{Group: 1 << 20}, syscall.EBADF},
		"a NUL":             {"/bin/true\x00", Attr{}, syscall.EINVAL},
	} {
		if test.attr.Stdio == [3]int{} {
			null, err := os.Open(os.DevNull)
			if err != nil {
				t.Fatal(err)
			}
			defer null.Close()
			test.attr.Stdio = [3]int{int(null.Fd()), 1, 2}
		}
		test.attr.Pidfd = true
		if c, err := Spawn(test.program, []string{"x"}, test.attr); !errors.Is(err, test.want) || c.PID != 0 || c.Pidfd != -1 {
			t.Errorf("%s: got %v, %v", name, c, err)
		}
	}
	if _, err := syscall.Wait4(-1, nil, unix.WNOHANG, nil); !errors.Is(err, syscall.ECHILD) {
		t.Errorf("a process is left: %v", err)
	}
}

// TestSpawnAtOnce starts processes from many threads while signals arrive and the garbage collector moves stacks.
func TestSpawnAtOnce(t *testing.T) {
	stop := make(chan struct{})
	var noise, all sync.WaitGroup
	noise.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				runtime.GC()
				_ = syscall.Kill(os.Getpid(), syscall.SIGURG) // as the scheduler does
			}
		}
	})
	for range 8 {
		all.Go(func() {
			for range 50 {
				c, err := Spawn("/bin/true", []string{"/bin/true"}, Attr{Stdio: [3]int{0, 1, 2}})
				if err != nil {
					t.Error(err)
					return
				}
				var status syscall.WaitStatus
				if err := waitFor(c.PID, &status); err != nil || status != 0 {
					t.Errorf("status %#x, %v", status, err)
				}
			}
		})
	}
	all.Wait()
	close(stop)
	noise.Wait()
}
