package gvisor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/urpc"

	"soulbox.dev/soulbox/internal/durable"
	"soulbox.dev/soulbox/sandbox"
)

// The files of a checkpoint, in the order in which gVisor expects their descriptors (gVisor, pkg/sentry/state/checkpointfiles). The first
// file shows whether it is a checkpoint with memory or one of files alone.
var (
	wholeFiles = []string{"checkpoint.img", "pages_meta.img", "pages.img"}
	diskFiles  = []string{"fscheckpoint.pb", "multitar.img", "pages_meta.img", "pages.img"}
)

// saveArgs has the fields of gVisor's control.SaveOpts that this package uses.
type saveArgs struct {
	Metadata      map[string]string `json:"metadata"`
	ExcludeZeros  bool              `json:"app_mf_exclude_committed_zero_pages"`
	HavePagesFile bool              `json:"have_pages_file"`
	urpc.FilePayload
	Resume bool
}

// saveDiskArgs has the fields of gVisor's boot.FSSaveArgs that this package uses.
type saveDiskArgs struct {
	urpc.FilePayload
	Paths []struct{} `json:"paths"` // empty: the root
	Exit  bool       `json:"exit_after_saving"`
}

// signalArgs has the fields of gVisor's boot.SignalArgs that this package uses.
type signalArgs struct {
	CID   string
	Signo int32
	PID   int32
}

// savedManifest is machine.json of a checkpoint: what a restore needs to know about the machine that was saved.
type savedManifest struct {
	// Agent is the agent's binary on the host. A restore needs the same file, because parts of the saved memory may be only in that file.
	Agent string `json:"agent"`
}

const savedManifestName = "machine.json"

// Checkpoint implements sandbox.Machine. Unless the machine is to be resumed, it is frozen first, so that nothing happens in it that the
// checkpoint does not have.
func (m *machine) Checkpoint(ctx context.Context, dir string, o sandbox.CheckpointOptions) (err error) {
	if o.FilesOnly && m.noDisk {
		return fmt.Errorf("its files are in its memory: save its memory too: %w", sandbox.ErrInvalid)
	}
	if err := m.checkMemoryToSave(); err != nil {
		return fmt.Errorf("checkpoint: %w", err)
	}
	if err := m.runtime.ask("checkpoint mkdir", func() error { return os.Mkdir(dir, 0o711) }); err != nil {
		return fmt.Errorf("checkpoint: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("checkpoint: %w", err), os.RemoveAll(dir))
		}
	}()
	if !o.Resume && !m.frozen {
		if err := m.Pause(ctx); err != nil {
			return err
		}
		defer func() {
			if err != nil {
				err = errors.Join(err, m.Resume(ctx))
			}
		}()
	}
	body, err := json.Marshal(savedManifest{Agent: m.agent})
	if err != nil {
		return err
	}
	if err := m.runtime.fault("checkpoint write"); err != nil {
		return err
	}
	if err := durable.Create(filepath.Join(dir, savedManifestName), body, 0o600); err != nil {
		return err
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return m.save(ctx, dir, o.FilesOnly)
}

// save makes the sentry write the files of a checkpoint. Once begun, it continues even if its caller gives up, and meanwhile the machine
// can only be destroyed; if the save completes, the checkpoint is kept.
func (m *machine) save(ctx context.Context, dir string, filesOnly bool) (err error) {
	names := wholeFiles
	if filesOnly {
		names = diskFiles
	}
	if err := m.runtime.fault("checkpoint create"); err != nil {
		return err
	}
	files, err := createAll(dir, names)
	defer func() {
		for _, f := range files {
			err = errors.Join(err, f.Close())
		}
	}()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), saveBound)
	defer cancel()
	m.setSaving(true)
	defer func() {
		if serr := m.recordSlack(); serr != nil && err == nil { // it has been saved anyway
			m.runtime.log().Warn("look at a sandbox that was saved", "dir", filepath.Base(m.dir), "error", serr)
		}
		m.setSaving(false)
	}()
	if filesOnly {
		args := &saveDiskArgs{}
		args.Files = files
		err = m.runtime.controlSlow(ctx, runDir(m.dir), callSaveFiles, args, &struct{}{})
	} else {
		args := &saveArgs{Metadata: map[string]string{"compression": "none"}, ExcludeZeros: true, HavePagesFile: true, Resume: true}
		args.Files = files
		err = m.runtime.controlSlow(ctx, runDir(m.dir), callCheckpoint, args, &struct{}{})
	}
	if err != nil {
		return fullDisk(err)
	}
	return m.runtime.syncAndSeal(dir, files)
}

// syncAndSeal syncs the files of a checkpoint to disk and writes their checksums. Both happen at the same time, because one waits for the
// disk while the other computes.
func (r *Runtime) syncAndSeal(dir string, files []*os.File) error {
	sealed := make(chan error, 1)
	go func() { sealed <- r.seal(context.Background(), dir, files) }()
	err := r.fault("checkpoint sync")
	for _, f := range files {
		err = errors.Join(err, f.Sync())
	}
	return errors.Join(err, <-sealed, durable.Sync(dir))
}

// saveBound bounds how long the sentry may take to save a machine.
const saveBound = 10 * time.Minute

// fullDisk adds ENOSPC to an error of the sentry, which is only text.
func fullDisk(err error) error {
	if strings.Contains(err.Error(), unix.ENOSPC.Error()) {
		return fmt.Errorf("%w (%w)", err, unix.ENOSPC)
	}
	return err
}

// createAll makes new files owned by the user that sandboxes run as, because runsc opens them by name when it restores.
func createAll(dir string, names []string) (files []*os.File, err error) {
	uid, gid := Owner()
	if uid != os.Geteuid() {
		if err := os.Lchown(dir, uid, gid); err != nil {
			return nil, err
		}
	}
	for _, name := range names {
		f, err := os.OpenFile(filepath.Join(dir, name), os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
		if err != nil {
			return files, err
		}
		files = append(files, f)
		if uid != os.Geteuid() {
			if err := f.Chown(uid, gid); err != nil {
				return files, err
			}
		}
	}
	return files, nil
}

// beginning says how a machine is started.
type beginning struct {
	args  []string // on the host
	agent string   // on the host
	wake  bool     // it has the memory of another machine, and must be told about its new pipe
}

// beginFrom returns how to start a machine from a checkpoint; "" means from none.
func (r *Runtime) beginFrom(dir, from string) (beginning, error) {
	bundle := bundleDir(dir)
	b := beginning{agent: r.Agent, args: []string{"run", "--detach", "--bundle=" + bundle}}
	if from == "" {
		return b, nil
	}
	switch there, err := r.isFile(filepath.Join(from, diskFiles[0])); {
	case err != nil:
		return b, fmt.Errorf("look at checkpoint: %w", err)
	case there:
		b.args = append(b.args, "--fs-restore-image-path="+from)
		return b, nil
	}
	body, err := r.readFile("read checkpoint", filepath.Join(from, savedManifestName))
	if errors.Is(err, fs.ErrNotExist) {
		return b, fmt.Errorf("it is not a checkpoint: %w", err)
	}
	var mf savedManifest
	if err == nil {
		err = json.Unmarshal(body, &mf)
	}
	if err != nil {
		return b, fmt.Errorf("read checkpoint: %w", err)
	}
	switch there, err := r.isFile(mf.Agent); {
	case err != nil:
		return b, fmt.Errorf("look at the agent that was saved: %w", err)
	case !there:
		return b, fmt.Errorf("the agent that was saved with its memory is gone: %w",
			&fs.PathError{Op: "stat", Path: mf.Agent, Err: fs.ErrNotExist})
	}
	return beginning{agent: mf.Agent, wake: true, args: []string{"restore", "--detach", "--bundle=" + bundle, "--image-path=" + from}}, nil
}

// wake makes the agent of a restored machine take its new pipe: the descriptors are the same, so it would otherwise continue with the old
// session. A restored machine runs, even if it was frozen when it was saved.
func (r *Runtime) wake(ctx context.Context, dir string) error {
	return r.control(ctx, runDir(dir), callSignal, &signalArgs{CID: containerID, Signo: int32(syscall.SIGUSR2)}, &struct{}{})
}

// isFile reports whether a file exists.
func (r *Runtime) isFile(name string) (bool, error) {
	err := r.ask("stat", func() error {
		_, err := os.Stat(name)
		return err
	})
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}
