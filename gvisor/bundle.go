package gvisor

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"soulbox.dev/soulbox/internal/durable"
	"soulbox.dev/soulbox/internal/erofs"
	"soulbox.dev/soulbox/sandbox"
)

// agentDir is the directory of the agent's binary in a sandbox.
const agentDir = "/.soulbox"

// capabilities are those of init. Its children get the same without CAP_SYS_ADMIN, which the agent drops for them; the sentry bounds what
// they may do in any case. gvisor/runsc/patches/guarded-init.patch keeps CAP_SYS_PTRACE from reaching the agent and any bridge to it; with
// another runsc, the agent also drops it for its children.
var capabilities = []string{
	"CAP_AUDIT_WRITE", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_NET_BIND_SERVICE",
	"CAP_NET_RAW", "CAP_SETFCAP", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID", "CAP_SYS_ADMIN", "CAP_SYS_CHROOT", "CAP_SYS_PTRACE",
}

// rootAnnotation begins the annotations that tell gVisor to use an image as root (gVisor, runsc/boot/mount_hints.go).
const rootAnnotation = "dev.gvisor.spec.rootfs."

// inMemory reports whether a machine uses no files of the host: its root is an image, and what it writes is in memory. It needs no gofer.
func inMemory(spec sandbox.Spec) bool { return spec.Template.Image != "" && spec.Limits.DiskInMemory }

// agentImage returns an image that holds only the agent, beside the agent's directory. It is made once.
func agentImage(agent string) (string, error) {
	name := filepath.Dir(agent) + ".erofs"
	if _, err := os.Stat(name); !errors.Is(err, fs.ErrNotExist) {
		return name, err
	}
	return name, durable.Disk{}.Make(name, 0o644, func(f *os.File) error { return writeAgentImage(f, agent) })
}

func writeAgentImage(to *os.File, agent string) error {
	from, err := os.Open(agent)
	if err != nil {
		return err
	}
	defer from.Close()
	w := erofs.NewWriter(to)
	data, err := w.Add(from)
	if err != nil {
		return err
	}
	binary := &erofs.Node{Mode: unix.S_IFREG | 0o755, Data: data}
	return w.Finish(&erofs.Node{Mode: unix.S_IFDIR | 0o755, Children: map[string]*erofs.Node{filepath.Base(agent): binary}})
}

// bundleMounts returns a machine's mounts.
func bundleMounts(spec sandbox.Spec, agent string) ([]specs.Mount, error) {
	// Mounts in memory have a size or are read-only: gVisor's /dev accepts no size.
	mounts := []specs.Mount{
		{Destination: "/proc", Type: "proc", Source: "proc"},
		{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"mode=755", "ro"}},
		{Destination: "/dev/pts", Type: "devpts", Source: "devpts"},
		{Destination: "/dev/shm", Type: "tmpfs", Source: "tmpfs",
			Options: []string{"mode=1777", fmt.Sprintf("size=%d", spec.Limits.Memory/2)}},
		{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"ro"}},
		{Destination: "/sys/fs/cgroup", Type: "cgroup2", Source: "cgroup2"},
	}
	if inMemory(spec) {
		image, err := agentImage(agent)
		if err != nil {
			return nil, fmt.Errorf("make image of agent: %w", err)
		}
		mounts = append(mounts, specs.Mount{Destination: agentDir, Type: "erofs", Source: image, Options: []string{"ro"}})
	} else {
		mounts = append(mounts, specs.Mount{Destination: agentDir, Type: "bind", Source: filepath.Dir(agent),
			Options: []string{"ro", "bind"}})
	}
	for _, m := range spec.Template.Mounts {
		mounts = append(mounts, specs.Mount{Destination: m.Destination, Type: "bind", Source: m.Source,
			Options: []string{"ro", "rbind", "nosuid", "nodev"}})
	}
	return mounts, nil
}

// writeBundle writes config.json for a machine, and the files that SoulBox's runsc reads.
func writeBundle(dir string, spec sandbox.Spec, agent string) error {
	mounts, err := bundleMounts(spec, agent)
	if err != nil {
		return err
	}
	config := specs.Spec{Root: &specs.Root{Path: spec.Template.Root}}
	tasks := uint64(spec.Limits.Processes) + 128
	config.Version, config.Hostname, config.Mounts = "1.0.2", spec.ID, mounts
	config.Process = &specs.Process{
		Args:         []string{filepath.Join(agentDir, filepath.Base(agent)), "init"},
		Cwd:          "/",
		Env:          []string{"PATH=/usr/bin:/bin"},
		Capabilities: &specs.LinuxCapabilities{Bounding: capabilities, Effective: capabilities, Permitted: capabilities},
		Rlimits: []specs.POSIXRlimit{
			{Type: "RLIMIT_NOFILE", Hard: 1 << 20, Soft: 1 << 20},
			// This backs up the guest's cgroup, which root in its own user namespace can leave; this limit it cannot. It counts per user,
			// so it leaves room for the agent's own threads.
			{Type: "RLIMIT_NPROC", Hard: tasks, Soft: tasks},
		},
	}
	if spec.Template.Image != "" {
		config.Process.Args = append(config.Process.Args, "image")
		config.Root.Path = "rootfs" // it must be set, but is not used
		// The flag says where it is; the annotation is the same for all, as a restore requires.
		upper, size := "dir=/disk", spec.Limits.Disk
		if inMemory(spec) {
			upper, size = "memory", min(size, spec.Limits.Memory/2)
		}
		config.Annotations = map[string]string{
			rootAnnotation + "source": spec.Template.Image, rootAnnotation + "type": "erofs", rootAnnotation + "overlay": upper,
			rootAnnotation + "options": fmt.Sprintf("size=%d", size),
		}
	}
	config.Linux = &specs.Linux{
		Namespaces: []specs.LinuxNamespace{
			{Type: specs.PIDNamespace}, {Type: specs.MountNamespace}, {Type: specs.IPCNamespace}, {Type: specs.UTSNamespace},
			{Type: specs.NetworkNamespace}, {Type: specs.CgroupNamespace},
		},
		Resources: &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &spec.Limits.Memory}},
	}
	body, err := json.MarshalIndent(config, "", "  ")
	if err != nil {
		return fmt.Errorf("encode bundle: %w", err)
	}
	for name, content := range map[string][]byte{
		"config.json":    body,
		sentryMemoryName: strconv.AppendInt(nil, sentryLimit(spec.Limits.Kernel()), 10),
		guestMemoryName:  strconv.AppendInt(nil, spec.Limits.Memory, 10),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			return err
		}
	}
	return nil
}

// Files in a bundle that SoulBox's runsc reads (gvisor/runsc/main.go).
const (
	// The soft limit of the sentry's own memory in bytes: near it, the sentry collects garbage more often.
	sentryMemoryName = "sentry-memory"
	guestMemoryName  = "guest-memory" // the memory that programs see as their total, in bytes
)
