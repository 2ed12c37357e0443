package gvisor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// hostID is the user that sandboxes run as if the server is root: an ID that owns nothing else. An ordinary user's sandboxes run as that
// user.
const hostID = 65_431

// containerID is the same for all machines, because each has its own --root; so paths of sockets stay short.
const containerID = "sb"

// runsc says how to call runsc: the struct is the configuration, and command is the one place that builds a call.
type runsc struct {
	path string // of the binary
	root string // --root
	disk string // directory of the upper layer; "" keeps it in memory
	size int64  // of the upper layer, in bytes
}

// Owner returns the user that sandboxes run as on the host: the server's own user or, if that is root, an ID that owns nothing else.
func Owner() (uid, gid int) {
	if os.Geteuid() == 0 {
		return hostID, hostID
	}
	return os.Geteuid(), os.Getegid()
}

// command builds a call of runsc in new user, mount and IPC namespaces. Its mounts vanish with the namespaces.
func (r runsc) command(ctx context.Context, args ...string) (*exec.Cmd, *os.File, error) {
	flags := []string{
		"--root=" + r.root, "--ignore-cgroups", "--platform=systrap", "--network=none", "--in-sandbox-cgroup=v2",
		// Agents' commands are short: large pages cost each of them about a tenth of its time.
		"--app-huge-pages=false",
		// For sudo: the sentry bounds what root may do in a sandbox anyway.
		"--allow-suid",
		"--file-access=exclusive", "--file-access-mounts=exclusive",
	}
	if r.disk != "" {
		flags = append(flags, fmt.Sprintf("--overlay2=root:dir=%s,size=%dk", r.disk, r.size>>10))
	}
	// By descriptor: if the server is root, the sandbox's user may have no access to the binary's directory.
	binary, err := os.Open(r.path)
	if err != nil {
		return nil, nil, fmt.Errorf("open runsc: %w", err)
	}
	cmd := exec.CommandContext(ctx, fmt.Sprintf("/proc/self/fd/%d", binary.Fd()), append(flags, args...)...)
	cmd.Args[0] = "runsc"
	// Also as one of the child's files: Go moves descriptors in the child, but never to the number of one of those.
	cmd.ExtraFiles = []*os.File{binary}
	cmd.Env = []string{"PATH=/usr/bin:/bin", "HOME=/"}
	cmd.Dir = "/"
	uid, gid := Owner()
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS | syscall.CLONE_NEWIPC,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: uid, Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: gid, Size: 1}},
		Setsid:      true, // a terminal's Ctrl-C is for the server only
	}
	if os.Geteuid() == 0 {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: 0, Gid: 0}
		cmd.SysProcAttr.GidMappingsEnableSetgroups = true
	}
	cmd.WaitDelay = time.Second
	return cmd, binary, nil
}

// forkNeeds is how many descriptors Go needs to fork into a user namespace: two pipes, a pidfd, and the map of IDs. If the fork itself
// fails, as for lack of the pidfd, Go leaks the second pipe (syscall.forkAndExecInChild).
const forkNeeds = 6

// checkDescriptors returns an error if there are too few descriptors for a fork.
func checkDescriptors(f *os.File) error {
	for range forkNeeds {
		fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("start runsc: %w", err)
		}
		defer unix.Close(fd)
	}
	return nil
}

// start starts the container detached, with the given call and stdio, and returns when it runs.
func (r runsc) start(ctx context.Context, args []string, stdin, stdout, stderr *os.File, errOutput *headBuffer) error {
	cmd, binary, err := r.command(ctx, append(args, containerID)...)
	if err != nil {
		return err
	}
	defer binary.Close()
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, stdout, stderr
	if err := checkDescriptors(binary); err != nil {
		return err
	}
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return fmt.Errorf("runsc %s: %w: %s", args[0], err, errOutput.text())
	}
	return nil
}

// version returns runsc's version, which also shows that the binary starts.
func version(ctx context.Context, path string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, path, "--version").Output()
	if err != nil {
		return "", fmt.Errorf("start %s: %w", path, err)
	}
	first, _, _ := bytes.Cut(out, []byte("\n"))
	return strings.TrimSpace(string(first)), nil
}

// stdio holds both ends of a machine's standard streams.
type stdio struct {
	in, out, err           *os.File // the machine's
	toIn, fromOut, fromErr *os.File // the server's
}

// pipeSize is how much a pipe holds, in bytes: four times the default makes large transfers half as fast again. All pipes of a user
// together may hold 64 MiB before the kernel makes smaller ones (pipe(7), pipe-user-pages-soft).
const pipeSize = 256 << 10

func (r *Runtime) newStdio() (*stdio, error) {
	s := &stdio{}
	err := r.fault("open pipes")
	pipe := func(r, w **os.File) {
		if err == nil {
			*r, *w, err = os.Pipe()
		}
		if err == nil {
			if raw, rerr := (*w).SyscallConn(); rerr == nil { // a smaller pipe works too
				_ = raw.Control(func(fd uintptr) { _, _ = unix.FcntlInt(fd, unix.F_SETPIPE_SZ, pipeSize) })
			}
		}
	}
	pipe(&s.in, &s.toIn)
	pipe(&s.fromOut, &s.out)
	pipe(&s.fromErr, &s.err)
	if err != nil {
		s.closeAll()
		return nil, fmt.Errorf("open pipes: %w", err)
	}
	return s, nil
}

// handOver closes the machine's ends once the machine has them.
func (s *stdio) handOver() {
	for _, f := range []*os.File{s.in, s.out, s.err} {
		_ = f.Close()
	}
}

func (s *stdio) closeAll() {
	for _, f := range []*os.File{s.in, s.out, s.err, s.toIn, s.fromOut, s.fromErr} {
		if f != nil {
			_ = f.Close()
		}
	}
}

// pipe is the server's end of stdin and stdout as one.
type pipe struct {
	*os.File // stdout of the machine
	toIn     *os.File
}

// Write implements io.Writer.
func (p pipe) Write(b []byte) (int, error) { return p.toIn.Write(b) }

// Close implements io.Closer.
func (p pipe) Close() error { return errors.Join(p.toIn.Close(), p.File.Close()) }
