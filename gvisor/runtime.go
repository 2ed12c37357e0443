package gvisor

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"soulbox.dev/soulbox/sandbox"
)

// Runtime runs machines with runsc. The zero values of its fields but Runsc and Agent are the documented defaults. It is safe for
// concurrent use.
type Runtime struct {
	Runsc string       // path of the binary; required
	Agent string       // path of soulbox-agent in a directory that holds nothing else; required
	Log   *slog.Logger // what sandboxes write to the stderr of their init, at level debug; default discards
	// Cgroups is where the host's cgroups are mounted; default /sys/fs/cgroup. Where the server may write there they are the hard limit.
	Cgroups string
}

var _ sandbox.Runtime = (*Runtime)(nil)

// manifest is machine.json.
type manifest struct {
	Agent  string      `json:"agent"`            // path of the agent in the sandbox
	Host   string      `json:"host_agent"`       // and on the host
	Cgroup *hostCgroup `json:"cgroup,omitempty"` // on the host, if there is one
	Memory int64       `json:"memory"`           // machine.memory
	NoDisk bool        `json:"no_disk,omitempty"`
	Cores  []int       `json:"cores,omitempty"`
}

func (mf manifest) write(dir string) error {
	body, err := json.Marshal(mf)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "machine.json"), body, 0o600)
}

func readManifest(dir string) (manifest, error) {
	var mf manifest
	body, err := os.ReadFile(filepath.Join(dir, "machine.json"))
	if err != nil {
		return mf, err
	}
	return mf, json.Unmarshal(body, &mf)
}

// Version tells runsc's version, and thereby that it starts.
func (r *Runtime) Version(ctx context.Context) (string, error) { return version(ctx, r.Runsc) }

// HardLimits says whether machines get cgroups of the host.
func (r *Runtime) HardLimits() bool {
	return planCgroup(cmp.Or(r.Cgroups, cgroupRoot), "soulbox-") != nil
}

func (r *Runtime) log() *slog.Logger {
	if r.Log == nil {
		return slog.New(slog.DiscardHandler)
	}
	return r.Log
}

// machine implements sandbox.Machine.
type machine struct {
	runtime *Runtime
	dir     string
	pipe    pipe
	stderr  sync.WaitGroup
	fromErr *os.File
	agent   string // on the host
	frozen  bool
	pids    []int // of its processes on the host
	memory  int64 // bytes that its memory may have on the host; 0 is no bound
	noDisk  bool  // what it writes is in its memory
	cores   []int // that it may use; the first is where it is while it does little
}

// kernelMemory bounds what the sentry takes for itself, in bytes. An idle one takes a tenth of that; each file or other object of
// the guest's takes some, which no limit inside the guest counts.
const kernelMemory = 512 << 20

func runDir(dir string) string { return filepath.Join(dir, "run") }

// Boot implements sandbox.Runtime.
func (r *Runtime) Boot(ctx context.Context, spec sandbox.Spec) (_ sandbox.Machine, err error) {
	if err := r.check(); err != nil {
		return nil, err
	}
	m := &machine{runtime: r, dir: spec.Dir, memory: guestMemory(spec.Limits), noDisk: inMemory(spec)}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("boot: %w", err), r.undo(spec.Dir))
		}
	}()
	if err := makeDirs(spec.Dir); err != nil {
		return nil, err
	}
	bundle := filepath.Join(spec.Dir, "bundle")
	begin, err := r.beginFrom(bundle, spec.From)
	if err != nil {
		return nil, err
	}
	m.agent = begin.agent
	if err := writeBundle(bundle, spec, begin.agent); err != nil {
		return nil, err
	}
	var bound []int
	if m.cores, bound, err = pickCores(spec.Limits.CPU); err != nil {
		return nil, err
	}
	// The manifest names the cgroup before it is made: whoever reaps knows of it.
	mf := manifest{Cores: m.cores, Memory: m.memory, NoDisk: m.noDisk, Host: begin.agent, Agent: filepath.Join(agentDir, filepath.Base(begin.agent)), Cgroup: planCgroup(cmp.Or(r.Cgroups, cgroupRoot), "soulbox-"+spec.ID)}
	if err := mf.write(spec.Dir); err != nil {
		return nil, err
	}
	if err := giveAway(spec.Dir); err != nil {
		return nil, err
	}
	streams, err := newStdio()
	if err != nil {
		return nil, err
	}
	errOutput := m.follow(streams.fromErr)
	call := runsc{path: r.Runsc, root: runDir(spec.Dir), disk: filepath.Join(spec.Dir, "disk"), size: spec.Limits.Disk}
	if m.noDisk {
		call.disk = ""
	}
	err = onCores(bound, func() error {
		return call.start(ctx, begin.args, streams.in, streams.out, streams.err, errOutput)
	})
	streams.handOver()
	m.pipe = pipe{File: streams.fromOut, toIn: streams.toIn}
	if err == nil {
		m.pids, err = processesOf(spec.Dir)
	}
	if err == nil && mf.Cgroup != nil {
		if cerr := errors.Join(mf.Cgroup.create(spec.Limits), mf.Cgroup.enter(m.pids)); cerr != nil {
			r.log().Warn("a sandbox has no cgroup on the host; its other limits hold", "sandbox", spec.ID, "error", cerr)
		}
	}
	if err == nil && begin.wake {
		err = wake(ctx, spec.Dir)
	}
	if err != nil {
		_ = m.pipe.Close()
		return nil, err
	}
	return m, nil
}

// check says what is missing before anything is begun.
func (r *Runtime) check() error {
	for what, path := range map[string]string{"runsc": r.Runsc, "soulbox-agent": r.Agent} {
		if path == "" {
			return fmt.Errorf("%s is not found; run 'soulbox-mcp doctor' to see how to mend it", what)
		}
	}
	return nil
}

// undo ends what a failed Boot has begun.
func (r *Runtime) undo(dir string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	return r.Reap(ctx, dir)
}

// parts are what a machine's directory has of ours: the manifest goes last, since it says what else is to be undone.
var parts = []string{"bundle", "run", "disk", "machine.json"}

// makeDirs makes the parts of a machine's directory that are directories.
func makeDirs(dir string) error {
	for _, name := range parts[:3] {
		if err := os.Mkdir(filepath.Join(dir, name), 0o700); err != nil {
			return err
		}
	}
	return nil
}

// giveAway gives a machine's directory to whom the sandbox runs as. As an ordinary user that is the same.
func giveAway(dir string) error {
	uid, gid := Owner()
	if uid == os.Geteuid() {
		return nil
	}
	for _, name := range []string{"bundle", "bundle/config.json", "run", "disk"} {
		if err := os.Lchown(filepath.Join(dir, name), uid, gid); err != nil {
			return err
		}
	}
	return nil
}

// headBuffer keeps the first bytes of a stream, for error messages.
type headBuffer struct {
	mu  sync.Mutex
	buf []byte
}

func (h *headBuffer) add(p []byte) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if room := 2<<10 - len(h.buf); room > 0 {
		h.buf = append(h.buf, p[:min(room, len(p))]...)
	}
}

func (h *headBuffer) text() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return string(bytes.TrimSpace(h.buf))
}

// logBound is how much of a machine's stderr is logged; the rest is read and dropped, since it may be the guest's.
const logBound = 64 << 10

// follow reads a machine's stderr to its end.
func (m *machine) follow(from *os.File) *headBuffer {
	head := &headBuffer{}
	m.fromErr = from
	m.stderr.Go(func() {
		buf := make([]byte, 4<<10)
		logged := 0
		for {
			n, err := from.Read(buf)
			head.add(buf[:n])
			if n > 0 && logged < logBound {
				logged += n
				m.runtime.log().Debug("stderr of init", "dir", filepath.Base(m.dir), "text", string(buf[:n]))
			}
			if err != nil {
				_ = from.Close()
				return
			}
		}
	})
	return head
}

// Attach implements sandbox.Runtime: it starts a bridge in the machine by the control socket.
func (r *Runtime) Attach(ctx context.Context, dir string) (_ sandbox.Machine, err error) {
	pids, err := processesOf(dir)
	if err == nil && len(pids) == 0 {
		err = sandbox.ErrNoMachine
	}
	if err != nil {
		return nil, fmt.Errorf("attach: %w", err)
	}
	mf, err := readManifest(dir)
	if err != nil {
		return nil, fmt.Errorf("attach: read machine.json: %w", err)
	}
	frozen, err := isFrozen(ctx, runDir(dir))
	if err == nil && frozen {
		err = control(ctx, runDir(dir), callResume, &struct{}{}, &struct{}{})
	}
	if err != nil {
		return nil, fmt.Errorf("attach: %w", err)
	}
	streams, err := newStdio()
	if err != nil {
		return nil, fmt.Errorf("attach: %w", err)
	}
	args := &execArgs{Filename: mf.Agent, Argv: []string{mf.Agent, "attach"}, Envv: []string{"PATH=/usr/bin:/bin"}, WorkingDirectory: "/", ContainerID: containerID, GuestFDs: []int{0, 1, 2}}
	args.Files = []*os.File{streams.in, streams.out, streams.err}
	var pid int32
	if err := control(ctx, runDir(dir), callExecute, args, &pid); err != nil {
		streams.closeAll()
		return nil, fmt.Errorf("attach: %w", err)
	}
	streams.handOver()
	m := &machine{runtime: r, dir: dir, cores: mf.Cores, memory: mf.Memory, noDisk: mf.NoDisk, agent: mf.Host, pids: pids, pipe: pipe{File: streams.fromOut, toIn: streams.toIn}}
	m.follow(streams.fromErr)
	return m, nil
}

// Reap implements sandbox.Runtime.
func (r *Runtime) Reap(ctx context.Context, dir string) error {
	if err := killAll(ctx, dir); err != nil {
		return fmt.Errorf("reap %s: %w", filepath.Base(dir), err)
	}
	// A manifest that is half written is of a machine that has no cgroup yet.
	if mf, err := readManifest(dir); err == nil && mf.Cgroup != nil {
		if err := mf.Cgroup.remove(); err != nil {
			return fmt.Errorf("reap %s: %w", filepath.Base(dir), err)
		}
	}
	// runsc mounts here; the mount goes with its namespace, unless somebody ran it without one.
	err := unix.Unmount(filepath.Join(runDir(dir), "null-netns"), unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	if err != nil && err != unix.EINVAL && err != unix.ENOENT && err != unix.EPERM {
		return fmt.Errorf("reap %s: unmount: %w", filepath.Base(dir), err)
	}
	for _, name := range parts {
		if err := os.RemoveAll(filepath.Join(dir, name)); err != nil {
			return fmt.Errorf("reap %s: %w", filepath.Base(dir), err)
		}
	}
	return nil
}

// Pipe implements sandbox.Machine.
func (m *machine) Pipe() io.ReadWriteCloser { return m.pipe }

// Pause implements sandbox.Machine.
func (m *machine) Pause(ctx context.Context) error { return m.setFrozen(ctx, true) }

// Resume implements sandbox.Machine.
func (m *machine) Resume(ctx context.Context) error { return m.setFrozen(ctx, false) }

// setFrozen freezes or thaws the machine. gVisor counts both, and one more Resume than Pauses ends the sentry: so a call that was made is not
// given up with its caller, and where its outcome is not known it is looked up.
func (m *machine) setFrozen(ctx context.Context, want bool) error {
	if m.frozen == want {
		return nil
	}
	ctx = context.WithoutCancel(ctx)
	method := callResume
	if want {
		method = callPause
	}
	err := control(ctx, runDir(m.dir), method, &struct{}{}, &struct{}{})
	m.frozen = want
	if err != nil {
		frozen, lookErr := isFrozen(ctx, runDir(m.dir))
		if lookErr != nil {
			return errors.Join(err, lookErr)
		}
		if m.frozen = frozen; frozen == want {
			err = nil
		}
	}
	return err
}

// Usage implements sandbox.Machine: the memory of the machine's processes on the host, and that of the guest, whether it is mapped or not.
func (m *machine) Usage(context.Context) (sandbox.Usage, error) {
	var u sandbox.Usage
	pids, err := processesOf(m.dir)
	if err != nil {
		return u, fmt.Errorf("measure: %w", err)
	}
	for _, pid := range pids {
		pss, err := readPSS(pid)
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrPermission) { // another user's is none of it
			return u, fmt.Errorf("measure: %w", err)
		}
		u.Memory += pss + guestMemoryOf(pid)
	}
	files, err := os.ReadDir(filepath.Join(m.dir, "disk")) // the sentry keeps all of them in one
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return u, fmt.Errorf("measure: %w", err)
	}
	for _, f := range files {
		if info, err := f.Info(); err == nil {
			if st, ok := info.Sys().(*syscall.Stat_t); ok {
				u.Disk += st.Blocks * 512
			}
		}
	}
	return u, nil
}

// guestMemory bounds what the sentry holds for the guest: the limit that the agent keeps, half of it for tmpfs, as much for a root in memory, and
// what many processes may take before the agent has killed enough of them, also on a slow machine. It is the last word on whatever escapes the
// guest's cgroups.
func guestMemory(l sandbox.Limits) int64 {
	sum := l.Memory + l.Memory/2 + 1<<30
	if l.DiskInMemory {
		sum += l.Memory / 2
	}
	return sum
}

// IO implements sandbox.Machine: the sum of proc(5), io.
func (m *machine) IO() (sandbox.IO, error) {
	var sum sandbox.IO
	for _, pid := range m.pids {
		body, err := os.ReadFile(fmt.Sprintf("/proc/%d/io", pid))
		if errors.Is(gone(err), fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return sum, fmt.Errorf("measure: %w", err)
		}
		for line := range strings.Lines(string(body)) {
			name, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
			n, _ := strconv.ParseInt(value, 10, 64) // 0 where the kernel says something else
			switch name {
			case "read_bytes":
				sum.Read += n
			case "write_bytes":
				sum.Written += n
			}
		}
	}
	return sum, nil
}

// Check implements sandbox.Machine.
func (m *machine) Check() error {
	for _, pid := range m.pids {
		if used := guestMemoryOf(pid); m.memory > 0 && used > m.memory {
			return fmt.Errorf("it took %d MB of memory, more than %d MB", used>>20, m.memory>>20)
		}
		state, anonymous, err := readStatus(pid)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			continue // the agent's pipe tells it
		case err != nil:
			return fmt.Errorf("check: %w", err)
		case state == 'T' || state == 't':
			return errors.New("a process of its runtime was stopped")
		case anonymous > kernelMemory:
			return fmt.Errorf("its kernel took %d MB, more than %d MB, for files and other objects", anonymous>>20, kernelMemory>>20)
		}
	}
	return nil
}

// Destroy implements sandbox.Machine. SIGKILL is the first word already: it works on a wedged sentry too, and leaves nothing.
func (m *machine) Destroy(ctx context.Context) error {
	err := m.runtime.Reap(ctx, m.dir)
	_ = m.pipe.Close() // again is no harm
	_ = m.fromErr.Close()
	m.stderr.Wait()
	return err
}
