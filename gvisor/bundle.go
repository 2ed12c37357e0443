package gvisor

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"soulbox.dev/soulbox/sandbox"
)

// agentDir is where the agent's binary is seen in a sandbox.
const agentDir = "/.soulbox"

// capabilities of init. Its children get the same less CAP_SYS_ADMIN, which the agent drops for them; what they may do is bounded by the
// sentry in any case. CAP_SYS_PTRACE and CAP_MKNOD are left out: nobody may look into the agent.
var capabilities = []string{
	"CAP_AUDIT_WRITE", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_NET_BIND_SERVICE",
	"CAP_NET_RAW", "CAP_SETFCAP", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID", "CAP_SYS_ADMIN", "CAP_SYS_CHROOT",
}

// writeBundle writes config.json for a machine.
func writeBundle(dir string, spec sandbox.Spec, agent string) error {
	// What is memory has a size, or is read-only: gVisor's /dev takes no size.
	mounts := []specs.Mount{
		{Destination: "/proc", Type: "proc", Source: "proc"},
		{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"mode=755", "ro"}},
		{Destination: "/dev/pts", Type: "devpts", Source: "devpts"},
		{Destination: "/dev/shm", Type: "tmpfs", Source: "tmpfs", Options: []string{"mode=1777", fmt.Sprintf("size=%d", spec.Limits.Memory/2)}},
		{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"ro"}},
		{Destination: "/sys/fs/cgroup", Type: "cgroup2", Source: "cgroup2"},
		{Destination: agentDir, Type: "bind", Source: filepath.Dir(agent), Options: []string{"ro", "bind"}},
	}
	for _, m := range spec.Template.Mounts {
		mounts = append(mounts, specs.Mount{Destination: m.Destination, Type: "bind", Source: m.Source, Options: []string{"ro", "rbind", "nosuid", "nodev"}})
	}
	tasks := uint64(spec.Limits.Processes) + 128
	config := specs.Spec{
		Version:  "1.0.2",
		Hostname: spec.ID,
		Root:     &specs.Root{Path: spec.Template.Root},
		Process: &specs.Process{
			Args:         []string{filepath.Join(agentDir, filepath.Base(agent)), "init"},
			Cwd:          "/",
			Env:          []string{"PATH=/usr/bin:/bin"},
			Capabilities: &specs.LinuxCapabilities{Bounding: capabilities, Effective: capabilities, Permitted: capabilities},
			Rlimits: []specs.POSIXRlimit{
				{Type: "RLIMIT_NOFILE", Hard: 1 << 20, Soft: 1 << 20},
				// Behind the guest's cgroup, which root in a user namespace of its own can leave: this one it cannot. It is per user, so
				// the agent's own threads have room in it.
				{Type: "RLIMIT_NPROC", Hard: tasks, Soft: tasks},
			},
		},
		Mounts: mounts,
		Linux: &specs.Linux{
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.PIDNamespace}, {Type: specs.MountNamespace}, {Type: specs.IPCNamespace}, {Type: specs.UTSNamespace},
				{Type: specs.NetworkNamespace}, {Type: specs.CgroupNamespace},
			},
			Resources: &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &spec.Limits.Memory}},
		},
	}
	body, err := json.MarshalIndent(config, "", "  ")
	if err != nil {
		return fmt.Errorf("encode bundle: %w", err)
	}
	return os.WriteFile(filepath.Join(dir, "config.json"), body, 0o600)
}
