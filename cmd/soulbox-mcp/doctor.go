package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/gvisor"
	"soulbox.dev/soulbox/sandbox"
)

// check is one thing that a machine needs.
type check struct {
	name string
	fix  string // what to do when it fails
	do   func(context.Context, config) (found string, err error)
}

var checks = []check{
	{"kernel", "SoulBox needs Linux 5.13 or newer on x86-64 or arm64.", checkKernel},
	{"user namespaces", "Allow them: 'sudo sysctl -w user.max_user_namespaces=15000', on Debian also " +
		"'kernel.unprivileged_userns_clone=1', on Ubuntu 24.04 or newer " +
		"'kernel.apparmor_restrict_unprivileged_userns=0'. In a container, start it with '--security-opt seccomp=unconfined " +
		"--security-opt apparmor=unconfined'.", checkNamespaces},
	{"runsc", "Run 'make build', which puts it beside soulbox-mcp, or name it by --runsc or SOULBOX_RUNSC.", checkRunsc},
	{"agent", "Run 'make build', which puts it beside soulbox-mcp, or name it by --agent or SOULBOX_AGENT.", checkAgent},
	{"state directory", "Name a directory by --state-dir that you can write to; as root, one that every user can walk to.", checkStateDir},
	{"disk", "Free some disk space: a sandbox may write 10 GB by default (--disk-mb).", checkDisk},
	{"templates", "Delete some: 'soulbox-mcp template list' shows them; or allow more by --template-budget-mb.", checkTemplates},
	{"memory", "Sandboxes get 1 GB by default; give them less by --memory-mb.", checkMemory},
	{"descriptors", "Raise the limit of file descriptors: 'ulimit -n', LimitNOFILE= of systemd, or nofile in /etc/security/limits.conf.",
		checkDescriptors},
	{"hard limits", "", checkHardLimits},
	{"sandbox", "The lines above may say why. If they are all ok, run it again with --log-level debug and report what it says.",
		checkSandbox},
}

// runDoctor runs all checks, and says what is wrong and how to fix it.
func runDoctor(ctx context.Context, args []string, getenv func(string) string, stdout, stderr io.Writer) error {
	c, err := parseConfig("doctor", args, getenv, stderr)
	if err != nil {
		return err
	}
	failed := 0
	for _, ch := range checks {
		found, err := ch.do(ctx, c)
		if err == nil {
			fmt.Fprintf(stdout, "ok    %-16s %s\n", ch.name, found)
			continue
		}
		failed++
		fmt.Fprintf(stdout, "FAIL  %-16s %v\n      %-16s %s\n", ch.name, err, "", ch.fix)
	}
	if failed > 0 {
		return fmt.Errorf("%d of %d checks failed", failed, len(checks))
	}
	_, err = fmt.Fprintln(stdout, "This machine can run sandboxes.")
	return err
}

func checkKernel(context.Context, config) (string, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "", err
	}
	release := unix.ByteSliceToString(u.Release[:])
	var major, minor int
	if _, err := fmt.Sscanf(release, "%d.%d", &major, &minor); err != nil {
		return "", fmt.Errorf("kernel %s: its version cannot be read", release)
	}
	if major < 5 || major == 5 && minor < 13 {
		return "", fmt.Errorf("kernel %s is too old", release)
	}
	if runtime.GOARCH != "amd64" && runtime.GOARCH != "arm64" {
		return "", fmt.Errorf("%s is not supported", runtime.GOARCH)
	}
	return release + " " + runtime.GOARCH, nil
}

func checkNamespaces(ctx context.Context, _ config) (string, error) {
	cmd := exec.CommandContext(ctx, "/bin/true")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS | syscall.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}},
	}
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("a process in new namespaces cannot be started: %w", err)
	}
	return "can be made", nil
}

func checkRunsc(ctx context.Context, c config) (string, error) {
	if c.runsc == "" {
		return "", errors.New("not found beside this program nor in PATH")
	}
	version, err := (&gvisor.Runtime{Runsc: c.runsc}).Version(ctx)
	return strings.TrimSpace(c.runsc + " " + version), err
}

func checkAgent(_ context.Context, c config) (string, error) {
	if c.agent == "" {
		return "", errors.New("not found beside this program")
	}
	info, err := os.Stat(c.agent)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%s (%d KB)", c.agent, info.Size()>>10), nil
}

func checkStateDir(_ context.Context, c config) (string, error) {
	if err := os.MkdirAll(c.stateDir, 0o711); err != nil {
		return "", err
	}
	probe, err := os.CreateTemp(c.stateDir, ".doctor-")
	if err != nil {
		return "", err
	}
	if err := errors.Join(probe.Close(), os.Remove(probe.Name())); err != nil {
		return "", err
	}
	if os.Geteuid() == 0 {
		for dir := c.stateDir; dir != "/"; dir = filepath.Dir(dir) {
			if info, err := os.Stat(dir); err != nil || info.Mode()&0o001 == 0 {
				return "", fmt.Errorf("%s: the sandboxes' unprivileged user cannot walk through %s", c.stateDir, dir)
			}
		}
	}
	return c.stateDir, nil
}

func checkDisk(_ context.Context, c config) (string, error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(c.stateDir, &fs); err != nil {
		return "", err
	}
	free := int64(fs.Bavail) * fs.Bsize
	if free < 1<<30 {
		return "", fmt.Errorf("%d MB are free", free>>20)
	}
	return fmt.Sprintf("%d GB free", free>>30), nil
}

// checkDescriptors checks that a server can have as many sandboxes as it may promise. The Go runtime has raised the soft limit to the hard
// one.
func checkDescriptors(_ context.Context, c config) (string, error) {
	sandboxes, err := c.promised()
	if err != nil {
		return "", err
	}
	return enoughDescriptors(sandboxes)
}

func checkTemplates(_ context.Context, c config) (string, error) {
	store, err := c.newStore()
	if err != nil {
		return "", err
	}
	d, err := store.Disk()
	if err == nil && d.Used >= d.Budget {
		err = errors.New("no room for another: " + describeDisk(d))
	}
	return fmt.Sprintf("%d of %d MB are used", d.Used>>20, d.Budget>>20), err
}

func checkMemory(context.Context, config) (string, error) {
	total, err := machineMemory()
	if err != nil {
		return "", err
	}
	if total < 1<<30 {
		return "", fmt.Errorf("the machine has %d MB", total>>20)
	}
	return fmt.Sprintf("%d GB, of which sandboxes may be promised 80 %%", total>>30), nil
}

// checkHardLimits never fails: sandboxes work either way.
func checkHardLimits(context.Context, config) (string, error) {
	if (&gvisor.Runtime{}).HardLimits() {
		return "memory, CPU and processes by the host's cgroups, above what the sandbox itself enforces", nil
	}
	return "none: the host's cgroups cannot be written; the sandbox itself enforces memory, processes and disk, CPU is bound to cores", nil
}

// checkSandbox runs a command in a real sandbox.
func checkSandbox(ctx context.Context, c config) (_ string, err error) {
	log := slog.New(slog.DiscardHandler)
	if c.logLevel <= slog.LevelDebug {
		log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: c.logLevel}))
	}
	manager, _, err := c.newManager(log, nil)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, manager.Close()) }()
	begin := time.Now()
	sb, err := manager.Create(ctx, sandbox.CreateOptions{})
	if err != nil {
		return "", err
	}
	booted := time.Since(begin)
	client, err := sb.Agent(ctx, "run a command in")
	if err != nil {
		return "", err
	}
	begin = time.Now()
	snap, err := client.Start(ctx, agent.StartRequest{Args: []string{"uname", "-r"}, WaitMS: 10_000, Window: agent.Window{Head: 100}})
	if err != nil {
		return "", err
	}
	if snap.Process.State != agent.StateExited || snap.Process.ExitCode != 0 {
		return "", fmt.Errorf("uname ended with %d: %q", snap.Process.ExitCode, snap.Output.Head)
	}
	return fmt.Sprintf("started in %d ms; its kernel is %s; a command takes %d ms", booted.Milliseconds(),
		strings.TrimSpace(string(snap.Output.Head)), time.Since(begin).Milliseconds()), nil
}
