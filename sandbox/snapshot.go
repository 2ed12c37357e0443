package sandbox

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"soulbox.dev/soulbox/internal/durable"
)

// MaxFork bounds the copies of one fork.
const MaxFork = 100

// forkAtOnce is how many copies are started at the same time.
const forkAtOnce = 4

// SnapshotOptions say what is saved, and under which name.
type SnapshotOptions struct {
	Name      string
	FilesOnly bool // without memory and processes
	Unnamed   bool // the server chose the name
	Replace   bool // replace a snapshot of that name, which otherwise is ErrSnapshot
}

// Snapshot saves the sandbox under a name; the sandbox continues.
func (s *Sandbox) Snapshot(ctx context.Context, o SnapshotOptions) (_ Snapshot, err error) {
	name := o.Name
	if !snapshotPattern.MatchString(name) {
		return Snapshot{},
			fmt.Errorf("snapshot %q: a name is 1 to 63 lower-case letters, digits or . _ - and begins with a letter or digit; a tag may "+
				"follow a colon: %w", name, ErrInvalid)
	}
	if _, err := s.m.opts.Templates.Template(ctx, s.owner, name); err == nil {
		return Snapshot{}, fmt.Errorf("snapshot %q: it is the name of a template: %w", name, ErrInvalid)
	}
	if list, err := s.m.Snapshots(s.owner); err != nil || len(list) >= asleepFactor*s.m.opts.MaxPerOwner {
		return Snapshot{}, errors.Join(err, fmt.Errorf("snapshot %q: you have %d, the most one may have: %w", name, len(list), ErrTooMany))
	}
	began := time.Now()
	ctx, over, err := s.takeTurn(ctx, "snapshot")
	if err != nil {
		return Snapshot{}, err
	}
	defer func() {
		over()
		s.m.opts.Observe("snapshot", time.Since(began), err)
	}()
	dir := s.m.store.snapshotDir(s.owner, name)
	if isThere(dir) && !o.Replace {
		return Snapshot{}, fmt.Errorf("snapshot %q: %w", name, ErrSnapshot)
	}
	temp, done, err := s.m.store.tempSnapshot()
	if err != nil {
		return Snapshot{}, noDisk(err)
	}
	defer func() { err = errors.Join(err, done()) }()
	r, filesOnly, err := s.save(ctx, filepath.Join(temp, "checkpoint"), o.FilesOnly)
	if err != nil {
		return Snapshot{}, fmt.Errorf("snapshot sandbox %s: %w", s.id, s.whyEnded(noDisk(err)))
	}
	snap := Snapshot{Name: name, Owner: s.owner, Sandbox: s.id, Template: r.Template, Image: r.Image, User: r.User, Cwd: r.Cwd,
		StartCmd: r.StartCmd, ReadyCmd: r.ReadyCmd, Limits: r.Limits, Times: r.Times, Network: r.Network, Ingress: r.Ingress,
		Created: time.Now().UTC(), FilesOnly: filesOnly, Unnamed: o.Unnamed}
	for _, p := range r.Ports {
		snap.Ports = append(snap.Ports, Port{Port: p.Port, Public: p.Public})
	}
	if snap.Size, err = sizeOf(filepath.Join(temp, "checkpoint")); err != nil {
		return Snapshot{}, err
	}
	body, err := json.MarshalIndent(snap, "", "  ")
	if err != nil {
		return Snapshot{}, err
	}
	if err := s.m.store.Replace(filepath.Join(temp, "snapshot.json"), body, 0o600); err != nil {
		return Snapshot{}, noDisk(err)
	}
	if err := s.m.snapshots.place(temp, dir, o.Replace); err != nil {
		return Snapshot{}, fmt.Errorf("snapshot %q: %w", name, err)
	}
	s.log.note(LevelInfo, "saved as snapshot %s", name)
	return snap, nil
}

// save makes a checkpoint of the sandbox in whatever state it is, and leaves it in that state. The caller has the turn. save also reports
// whether the checkpoint has no memory, as is the case if the sandbox was paused to disk without it.
func (s *Sandbox) save(ctx context.Context, to string, filesOnly bool) (record, bool, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, saveTime, errors.New("it was not saved in time"))
	defer cancel()
	s.mu.Lock()
	r, machine := s.rec, s.machine
	s.mu.Unlock()
	if r.onDisk() {
		if filesOnly && !r.Pause.FilesOnly {
			return r, false, fmt.Errorf("it is paused to disk with its memory: resume it first to save its files alone: %w", ErrInvalid)
		}
		return r, r.Pause.FilesOnly, linkAll(s.m.store.kept(r), to)
	}
	if r.State != Running && r.State != Paused {
		return r, false, s.asError("save")
	}
	saved, err := s.reserveToSave(ctx, true)
	if err != nil {
		return r, false, err
	}
	defer saved()
	return r, filesOnly, machine.Checkpoint(ctx, to, CheckpointOptions{Resume: true, FilesOnly: filesOnly})
}

// SaveTo saves the sandbox, including memory and processes, in a directory that it creates; the sandbox continues. A sandbox that begins
// from there needs the same template and the same limits.
func (s *Sandbox) SaveTo(ctx context.Context, dir string) error {
	ctx, over, err := s.takeTurn(ctx, "save")
	if err != nil {
		return err
	}
	defer over()
	if _, _, err := s.save(ctx, dir, false); err != nil {
		return fmt.Errorf("save sandbox %s: %w", s.id, s.whyEnded(noDisk(err)))
	}
	return nil
}

// linkAll makes a directory of links to the files of another directory: checkpoints never change.
func linkAll(from, to string) error {
	entries, err := os.ReadDir(from)
	if err != nil {
		return err
	}
	info, err := os.Stat(from)
	if err != nil {
		return err
	}
	if err := os.Mkdir(to, info.Mode().Perm()); err != nil {
		return err
	}
	if err := sameOwner(info, to); err != nil {
		return err
	}
	for _, e := range entries {
		if err := os.Link(filepath.Join(from, e.Name()), filepath.Join(to, e.Name())); err != nil {
			return err
		}
	}
	return durable.Sync(to)
}

// sizeOf returns the sum of a directory's files, in bytes on disk.
func sizeOf(dir string) (int64, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return 0, err
	}
	var sum int64
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			return 0, err
		}
		sum += sizeOnDisk(info)
	}
	return sum, nil
}

// Fork makes copies of the sandbox, which continues. Each copy has the memory, files and processes of the sandbox, and its own ID, host
// name, ports and life. Fork returns the copies that could be made; failed has the errors of the others, by their number from 1.
func (s *Sandbox) Fork(ctx context.Context, count int, metadata map[string]string) (copies []*Sandbox, failed map[int]error, err error) {
	if count < 1 || count > MaxFork {
		return nil, nil, fmt.Errorf("fork sandbox %s: the number of copies is from 1 to %d: %w", s.id, MaxFork, ErrInvalid)
	}
	if err := checkMetadata(metadata); err != nil {
		return nil, nil, err
	}
	began := time.Now()
	defer func() { s.m.opts.Observe("fork", time.Since(began), err) }()
	from := filepath.Join(s.m.store.path(s.id), "fork-"+strconv.FormatInt(time.Now().UnixNano(), 36)+unfinishedSave)
	turn, over, err := s.takeTurn(ctx, "fork")
	if err != nil {
		return nil, nil, err
	}
	defer func() { err = errors.Join(err, s.m.store.RemoveAll(from)) }() // if it was not moved
	r, filesOnly, err := s.save(turn, from, false)
	if err != nil {
		over()
		return nil, nil, fmt.Errorf("fork sandbox %s: %w", s.id, s.whyEnded(noDisk(err)))
	}
	// The sandbox may end while its copies are made, so what they begin from is moved out of its directory.
	shared, done, err := s.m.store.tempSnapshot()
	if err == nil {
		defer func() { err = errors.Join(err, done()) }()
		err = s.m.store.RenameVolatile(from, filepath.Join(shared, "checkpoint")) // after a power cut there are no copies that need it
	}
	over()
	if err != nil {
		return nil, nil, fmt.Errorf("fork sandbox %s: %w", s.id, noDisk(err))
	}
	template, err := s.m.templateOf(ctx, r)
	if err != nil {
		return nil, nil, fmt.Errorf("fork sandbox %s: %w", s.id, err)
	}
	o := CreateOptions{Owner: s.owner, Base: &template, Limits: r.Limits, Times: r.Times, Network: r.Network, Ingress: r.Ingress,
		Metadata: maps.Clone(r.Metadata), parent: s.id, origin: r.Origin,
		from: filepath.Join(shared, "checkpoint"), whole: !filesOnly, ports: r.Ports}
	if metadata != nil {
		o.Metadata = metadata
	}
	copies, failed = s.m.createSame(ctx, o, count)
	s.log.note(LevelInfo, "%d copies of it were made", len(copies))
	return copies, failed, nil
}

// createSame makes count sandboxes with the same options, a few at a time. failed has the errors of those that could not be made, by their
// number from 1.
func (m *Manager) createSame(ctx context.Context, o CreateOptions, count int) (created []*Sandbox, failed map[int]error) {
	var mu sync.Mutex
	var all sync.WaitGroup
	made, failed := make([]*Sandbox, count), map[int]error{}
	slots := make(chan struct{}, forkAtOnce)
	for i := range count {
		slots <- struct{}{}
		all.Go(func() {
			defer func() { <-slots }()
			sb, err := m.Create(ctx, o)
			mu.Lock()
			defer mu.Unlock()
			if made[i] = sb; err != nil {
				failed[i+1] = err
			}
		})
	}
	all.Wait()
	return slices.DeleteFunc(made, func(sb *Sandbox) bool { return sb == nil }), failed
}

// sizeOnDisk returns how many bytes a file takes on disk.
func sizeOnDisk(info fs.FileInfo) int64 {
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		return st.Blocks * 512
	}
	return info.Size()
}

// sameOwner gives a file to the owner of the file that info describes.
func sameOwner(info fs.FileInfo, name string) error {
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok || int(st.Uid) == os.Geteuid() {
		return nil
	}
	return os.Lchown(name, int(st.Uid), int(st.Gid))
}
