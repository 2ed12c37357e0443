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
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"soulbox.dev/soulbox/internal/durable"
	"soulbox.dev/soulbox/sandbox"
)

// Runtime runs machines with runsc. Runsc and Agent are required; the zero values of the other fields are the documented defaults. It is
// safe for concurrent use.
type Runtime struct {
	Runsc string       // path of the binary; required
	Agent string       // path of soulbox-agent in a directory that holds nothing else; required
	Log   *slog.Logger // gets what init writes to stderr, at level debug; the default discards it
	// Cgroups is where the host's cgroups are mounted; default /sys/fs/cgroup. If the server may write there, they are the hard limit.
	Cgroups string

	// Fault is asked before each request to the host, which what names; its error is then the result of that request, as that of
	// durable.Disk's Fault is. Only tests set it.
	Fault func(what string) error
}

var (
	_ sandbox.Runtime = (*Runtime)(nil)
	_ sandbox.Rescuer = (*Runtime)(nil)
)

// manifest is machine.json.
type manifest struct {
	Agent  string      `json:"agent"`            // path of the agent in the sandbox
	Host   string      `json:"host_agent"`       // and on the host
	Cgroup *hostCgroup `json:"cgroup,omitempty"` // on the host; nil if there is none
	Memory int64       `json:"memory"`           // machine.memory
	Kernel int64       `json:"kernel,omitempty"` // kernelMeter.bound; 0 if an older version wrote it
	NoDisk bool        `json:"no_disk,omitempty"`
	Cores  []int       `json:"cores,omitempty"`
}

const manifestName = "machine.json"

// writeManifest writes machine.json without fsync: after a power cut there is no process, without which Attach does not read the file, and
// no cgroup, for which Reap reads it.
func (r *Runtime) writeManifest(dir string, mf manifest) error {
	body, err := json.Marshal(mf)
	if err != nil {
		return err
	}
	return r.ask("write manifest", func() error { return durable.Disk{}.ReplaceVolatile(filepath.Join(dir, manifestName), body, 0o600) })
}

// readManifest reads machine.json. If it does not exist or is not complete, the error is errNoManifest: its machine has no cgroup, not yet
// or not any more.
func (r *Runtime) readManifest(dir string) (manifest, error) {
	var mf manifest
	body, err := r.readFile("read manifest", filepath.Join(dir, manifestName))
	if errors.Is(err, fs.ErrNotExist) {
		return mf, fmt.Errorf("%w: %w", errNoManifest, err)
	}
	if err != nil {
		return mf, err
	}
	if err := json.Unmarshal(body, &mf); err != nil {
		return mf, fmt.Errorf("%w: %w", errNoManifest, err)
	}
	return mf, nil
}

var errNoManifest = errors.New("machine.json is missing or incomplete")

// Version returns runsc's version, which also shows that runsc starts.
func (r *Runtime) Version(ctx context.Context) (string, error) { return version(ctx, r.Runsc) }

// HardLimits reports whether machines get cgroups of the host.
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
	unsure  bool  // frozen is not known and must be looked up
	memory  int64 // bytes that the guest's memory may take on the host; 0 means no bound
	noDisk  bool  // what it writes is in its memory
	cores   []int // cores that it may use; it is on the first while it does little

	processes []process // the machine's processes on the host

	ctx    context.Context // of its background work
	cancel context.CancelFunc
	work   sync.WaitGroup

	mu          sync.Mutex
	kernel      kernelMeter
	memoryNames []string // names in /proc of the guest's memory in the sentry, by which Check measures it
}

// oldKernel is what the kernel of a machine of an older version may use itself, in bytes.
const oldKernel = 512 << 20

func runDir(dir string) string { return filepath.Join(dir, "run") }

func bundleDir(dir string) string { return filepath.Join(dir, "bundle") }

// bootTries is how often Boot starts a machine whose runsc fails without a reason that lies in the machine: the host may be at fault.
const bootTries = 2

// Boot implements sandbox.Runtime.
func (r *Runtime) Boot(ctx context.Context, spec sandbox.Spec) (sandbox.Machine, error) {
	if err := r.check(); err != nil {
		return nil, err
	}
	for try := 1; ; try++ {
		m, err := r.bootOnce(ctx, spec)
		if err == nil {
			return m, nil
		}
		undone := r.undo(spec.Dir)
		var exit *exec.ExitError
		if undone != nil || try == bootTries || !errors.As(err, &exit) || ctx.Err() != nil || errors.Is(err, sandbox.ErrDamaged) {
			return nil, errors.Join(fmt.Errorf("boot: %w", err), undone)
		}
		r.log().Warn("a machine could not be started; trying again", "sandbox", spec.ID, "error", err)
	}
}

// bootOnce is one attempt of Boot. The caller undoes what it has begun.
func (r *Runtime) bootOnce(ctx context.Context, spec sandbox.Spec) (*machine, error) {
	begin, err := r.beginFrom(spec.Dir, spec.From)
	if err != nil {
		return nil, err
	}
	m, err := r.beginVerified(ctx, spec, begin)
	if err == nil && begin.wake {
		if err = r.wake(ctx, spec.Dir); err != nil {
			_ = m.pipe.Close()
			m.cancel()
		}
	}
	return m, err
}

// beginVerified starts a machine while it verifies the checkpoint that the machine begins from: both only read it, and the machine's pipe
// is not used before the checkpoint is known to be sound. Damage is reported at once, whatever the restore makes of it.
func (r *Runtime) beginVerified(ctx context.Context, spec sandbox.Spec, begin beginning) (*machine, error) {
	if spec.From == "" {
		return r.begin(ctx, spec, begin)
	}
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	verified := make(chan error, 1)
	go func() {
		err := r.verify(ctx, spec.From)
		if err != nil {
			stop(err)
		}
		verified <- err
	}()
	m, err := r.begin(ctx, spec, begin)
	if bad := <-verified; bad != nil {
		if m != nil {
			_ = m.pipe.Close()
			m.cancel()
		}
		return nil, bad
	}
	return m, err
}

// begin starts a machine.
func (r *Runtime) begin(ctx context.Context, spec sandbox.Spec, begin beginning) (*machine, error) {
	m := r.newMachine(spec.Dir, spec.Limits.Kernel())
	m.agent, m.memory, m.noDisk = begin.agent, guestMemory(spec.Limits), inMemory(spec)
	if err := makeDirs(spec.Dir); err != nil {
		return nil, err
	}
	if err := writeBundle(bundleDir(spec.Dir), spec, begin.agent); err != nil {
		return nil, err
	}
	var bound []int
	var err error
	if m.cores, bound, err = pickCores(spec.Limits.CPU); err != nil {
		return nil, err
	}
	// The manifest names the cgroup before the cgroup exists, so that Reap knows of it.
	mf := manifest{Cores: m.cores, Memory: m.memory, Kernel: m.kernel.bound, NoDisk: m.noDisk, Host: begin.agent,
		Agent: filepath.Join(agentDir, filepath.Base(begin.agent)), Cgroup: planCgroup(cmp.Or(r.Cgroups, cgroupRoot), "soulbox-"+spec.ID)}
	if err := r.writeManifest(spec.Dir, mf); err != nil {
		return nil, err
	}
	if err := giveAway(spec.Dir); err != nil {
		return nil, err
	}
	if err := m.start(ctx, spec, begin.args, bound); err != nil {
		m.cancel()
		return nil, err
	}
	if mf.Cgroup != nil {
		if err := errors.Join(mf.Cgroup.create(spec.Limits), mf.Cgroup.enter(m.processes)); err != nil {
			r.log().Warn("a sandbox has no cgroup on the host; its other limits hold", "sandbox", spec.ID, "error", err)
		}
	}
	return m, nil
}

func (r *Runtime) newMachine(dir string, kernel int64) *machine {
	m := &machine{runtime: r, dir: dir, kernel: kernelMeter{bound: kernel}}
	m.ctx, m.cancel = context.WithCancel(context.Background())
	return m
}

// start makes runsc start the machine, and finds the machine's processes.
func (m *machine) start(ctx context.Context, spec sandbox.Spec, args []string, cores []int) error {
	streams, err := m.runtime.newStdio()
	if err != nil {
		return err
	}
	errOutput := m.follow(streams.fromErr)
	call := runsc{path: m.runtime.Runsc, root: runDir(spec.Dir), disk: filepath.Join(spec.Dir, "disk"), size: spec.Limits.Disk}
	if m.noDisk {
		call.disk = ""
	}
	err = onCores(cores, func() error {
		if err := m.runtime.fault("start runsc"); err != nil {
			return err
		}
		return call.start(ctx, args, streams.in, streams.out, streams.err, errOutput)
	})
	streams.handOver()
	m.pipe = pipe{File: streams.fromOut, toIn: streams.toIn}
	if err == nil {
		m.processes, err = m.runtime.processesOf(spec.Dir)
	}
	if err == nil && !hasSentry(m.processes) {
		err = fmt.Errorf("its kernel has ended: %s", errOutput.text())
	}
	if err == nil && spec.From != "" {
		err = m.recordSlack()
	}
	if err != nil {
		_ = m.pipe.Close()
	}
	return err
}

// check returns what is missing before anything is begun.
func (r *Runtime) check() error {
	for what, path := range map[string]string{"runsc": r.Runsc, "soulbox-agent": r.Agent} {
		if path == "" {
			return fmt.Errorf("%s is not found; run 'soulbox-mcp doctor' to see how to fix it", what)
		}
		if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) { // which is no file of a sandbox: it loses its class
			return fmt.Errorf("%s is not found at %s; run 'soulbox-mcp doctor' to see how to fix it", what, path)
		}
	}
	return nil
}

// undoTime bounds how long ending a machine whose start failed may take.
const undoTime = 10 * time.Second

// undo ends what a failed Boot has begun.
func (r *Runtime) undo(dir string) error {
	ctx, cancel := context.WithTimeout(context.Background(), undoTime)
	defer cancel()
	return r.Reap(ctx, dir)
}

// parts are the entries that Boot makes in a machine's directory. The manifest is removed last, because it says what else must be undone.
var parts = []string{"bundle", "run", "disk", "machine.json"}

// makeDirs makes those parts of a machine's directory that are directories.
func makeDirs(dir string) error {
	for _, name := range parts[:3] {
		if err := os.Mkdir(filepath.Join(dir, name), 0o700); err != nil {
			return err
		}
	}
	return nil
}

// giveAway gives a machine's directory to the user that the sandbox runs as, which differs only if the server is root.
func giveAway(dir string) error {
	uid, gid := Owner()
	if uid == os.Geteuid() {
		return nil
	}
	for _, name := range []string{"bundle", "bundle/config.json", "bundle/" + sentryMemoryName, "bundle/" + guestMemoryName, "run",
		"disk"} {
		if err := os.Lchown(filepath.Join(dir, name), uid, gid); err != nil {
			return err
		}
	}
	return nil
}

// headBuffer keeps the first bytes of a stream for error messages.
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

// logBound is how much of a machine's stderr is logged; the rest is read and dropped, because it may come from the guest.
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

// Attach implements sandbox.Runtime. It starts a bridge in the machine by a call on the control socket.
func (r *Runtime) Attach(ctx context.Context, dir string) (_ sandbox.Machine, err error) {
	m := r.newMachine(dir, 0)
	defer func() {
		if err != nil {
			m.cancel()
			err = fmt.Errorf("attach: %w", err)
		}
	}()
	processes, err := r.processesOf(dir)
	if err == nil && !hasSentry(processes) {
		err = sandbox.ErrNoMachine
	}
	if err != nil {
		return nil, err
	}
	mf, err := r.readManifest(dir)
	if err != nil {
		return nil, err
	}
	m.cores, m.memory, m.noDisk, m.agent, m.processes = mf.Cores, mf.Memory, mf.NoDisk, mf.Host, processes
	m.kernel.bound = cmp.Or(mf.Kernel, oldKernel)
	if err := m.recordSlack(); err != nil { // it may just have been saved or restored
		return nil, err
	}
	if m.frozen, err = r.isFrozen(ctx, runDir(dir)); err != nil {
		return nil, err
	}
	if m.frozen {
		if err := m.Resume(ctx); err != nil {
			return nil, err
		}
		defer func() {
			if err != nil { // the next attempt finds it as it was
				err = errors.Join(err, m.Pause(ctx))
			}
		}()
	}
	streams, err := r.newStdio()
	if err != nil {
		return nil, err
	}
	args := &execArgs{Filename: mf.Agent, Argv: []string{mf.Agent, "attach"}, Envv: []string{"PATH=/usr/bin:/bin"}, WorkingDirectory: "/",
		ContainerID: containerID, GuestFDs: []int{0, 1, 2}}
	args.Files = []*os.File{streams.in, streams.out, streams.err}
	var pid int32
	if err := r.control(ctx, runDir(dir), callExecute, args, &pid); err != nil {
		streams.closeAll()
		return nil, err
	}
	streams.handOver()
	m.pipe = pipe{File: streams.fromOut, toIn: streams.toIn}
	m.follow(streams.fromErr)
	return m, nil
}

func hasSentry(processes []process) bool {
	return slices.ContainsFunc(processes, func(p process) bool { return p.sentry })
}

// Pipe implements sandbox.Machine.
func (m *machine) Pipe() io.ReadWriteCloser { return m.pipe }

// Pause implements sandbox.Machine.
func (m *machine) Pause(ctx context.Context) error { return m.setFrozen(ctx, true) }

// Resume implements sandbox.Machine.
func (m *machine) Resume(ctx context.Context) error { return m.setFrozen(ctx, false) }

// setFrozen freezes or thaws the machine. gVisor counts both, and one Resume more than Pauses ends the sentry. So a call is completed even
// if its caller gives up, and if its outcome is not known, it is looked up, now or before the next call.
func (m *machine) setFrozen(ctx context.Context, want bool) error {
	ctx = context.WithoutCancel(ctx)
	if m.unsure {
		if err := m.lookFrozen(ctx); err != nil {
			return err
		}
	}
	if m.frozen == want {
		return nil
	}
	method := callResume
	if want {
		method = callPause
	}
	err := m.runtime.control(ctx, runDir(m.dir), method, &struct{}{}, &struct{}{})
	m.frozen = want
	if err != nil {
		m.unsure = true
		if lookErr := m.lookFrozen(ctx); lookErr != nil {
			return errors.Join(err, lookErr)
		}
		if m.frozen == want {
			err = nil
		}
	}
	return err
}

// lookFrozen finds out whether the machine is frozen.
func (m *machine) lookFrozen(ctx context.Context) error {
	frozen, err := m.runtime.isFrozen(ctx, runDir(m.dir))
	if err == nil {
		m.frozen, m.unsure = frozen, false
	}
	return err
}

// Destroy implements sandbox.Machine. It starts with SIGKILL, which works on a sentry that hangs too and leaves nothing.
func (m *machine) Destroy(ctx context.Context) error {
	err := m.runtime.Reap(ctx, m.dir)
	m.mu.Lock()
	m.cancel() // no background work starts after this
	m.mu.Unlock()
	m.work.Wait()
	_ = m.pipe.Close() // closing it again does no harm
	_ = m.fromErr.Close()
	m.stderr.Wait()
	return err
}
