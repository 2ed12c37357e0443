package gvisor

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"soulbox.dev/soulbox/sandbox"
)

// hostCgroup is a machine's cgroup on the host: limits that hold whatever happens in the guest. It exists only if the server may make one:
// as root, or in a delegated subtree of version 2.
type hostCgroup struct {
	// Dirs are its directories by controller in version 1; version 2 has one directory for all, with the key "".
	Dirs map[string]string `json:"dirs"`
}

const cgroupRoot = "/sys/fs/cgroup"

// cgroupSetting is a file of a controller and what is written to it.
type cgroupSetting struct{ controller, file, value string }

// settings are a machine's limits. Memory and tasks are well above what the guest may use, because the sentry has its own share and because
// reaching them ends the whole machine: they are the last resort, not the limits that a guest meets.
func (g *hostCgroup) settings(l sandbox.Limits) []cgroupSetting {
	memory := strconv.FormatInt(guestMemory(l)+saveFactor*l.Kernel(), 10)
	tasks := strconv.FormatInt(16*l.Processes+1024, 10)
	quota := strconv.FormatInt(int64(l.CPU*100_000), 10)
	if _, v2 := g.Dirs[""]; v2 {
		return []cgroupSetting{{"", "memory.max", memory}, {"", "cpu.max", quota + " 100000"}, {"", "pids.max", tasks}}
	}
	return []cgroupSetting{
		{"memory", "memory.limit_in_bytes", memory}, {"cpu", "cpu.cfs_period_us", "100000"}, {"cpu", "cpu.cfs_quota_us", quota},
		{"pids", "pids.max", tasks},
	}
}

// planCgroup finds where a cgroup for a machine may be made; nil means nowhere. It makes nothing yet.
func planCgroup(root, name string) *hostCgroup {
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil
	}
	paths := map[string]string{} // controller to the server's own cgroup; "" is version 2
	for line := range strings.Lines(string(own)) {
		if parts := strings.SplitN(strings.TrimSpace(line), ":", 3); len(parts) == 3 {
			for _, controller := range strings.Split(parts[1], ",") {
				paths[controller] = filepath.Clean("/" + parts[2])
			}
		}
	}
	if _, err := os.Stat(filepath.Join(root, "cgroup.controllers")); err == nil {
		// A cgroup that has processes cannot have children with controllers: go up until one can.
		for path := paths[""]; ; path = filepath.Dir(path) {
			if parent := filepath.Join(root, path); enableControllers(parent) {
				return &hostCgroup{Dirs: map[string]string{"": filepath.Join(parent, name)}}
			}
			if path == "/" || path == "" {
				return nil
			}
		}
	}
	g := &hostCgroup{Dirs: map[string]string{}}
	for _, controller := range []string{"memory", "cpu", "pids"} {
		path, ok := paths[controller]
		parent := filepath.Join(root, controller, path)
		if !ok || !writable(parent) {
			return nil
		}
		g.Dirs[controller] = filepath.Join(parent, name)
	}
	return g
}

// writable reports whether a cgroup can be made in dir.
func writable(dir string) bool {
	probe := filepath.Join(dir, "soulbox-probe-"+strconv.Itoa(os.Getpid()))
	if err := os.Mkdir(probe, 0o755); err != nil {
		return false
	}
	return os.Remove(probe) == nil
}

// enableControllers enables the controllers that machines need for the children of a version 2 cgroup.
func enableControllers(dir string) bool {
	enabled, err := os.ReadFile(filepath.Join(dir, "cgroup.subtree_control"))
	if err != nil {
		return false
	}
	have := " " + strings.TrimSpace(string(enabled)) + " "
	var missing []string
	for _, controller := range []string{"memory", "cpu", "pids"} {
		if !strings.Contains(have, " "+controller+" ") {
			missing = append(missing, "+"+controller)
		}
	}
	if len(missing) > 0 && os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte(strings.Join(missing, " ")), 0o644) != nil {
		return false
	}
	return writable(dir)
}

// create makes the cgroup with a machine's limits. On failure it leaves nothing.
func (g *hostCgroup) create(l sandbox.Limits) (err error) {
	defer func() {
		if err != nil {
			err = errors.Join(err, g.remove())
		}
	}()
	for _, dir := range g.Dirs {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
	}
	for _, s := range g.settings(l) {
		if err := os.WriteFile(filepath.Join(g.Dirs[s.controller], s.file), []byte(s.value), 0o644); err != nil {
			return fmt.Errorf("limit %s: %w", s.file, err)
		}
	}
	return nil
}

// enter moves processes into the cgroup; processes that they start from now on are in it too.
func (g *hostCgroup) enter(processes []process) error {
	for _, dir := range g.Dirs {
		for _, p := range processes {
			err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(p.pid)), 0o644)
			if err != nil && !errors.Is(err, syscall.ESRCH) { // it may have ended
				return fmt.Errorf("enter cgroup: %w", err)
			}
		}
	}
	return nil
}

// remove removes the cgroup. Its processes must have ended.
func (g *hostCgroup) remove() error {
	var errs error
	for _, dir := range g.Dirs {
		if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = errors.Join(errs, err)
		}
	}
	return errs
}
