package sandbox

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"soulbox.dev/soulbox/internal/durable"
)

// Snapshot is a sandbox's memory and files, saved under a name that its owner chose. Any number of sandboxes can begin from it.
type Snapshot struct {
	Name     string    `json:"name"`
	Owner    string    `json:"owner,omitempty"`
	Sandbox  string    `json:"sandbox"` // the sandbox that it was made from
	Template string    `json:"template"`
	Image    string    `json:"image,omitempty"` // the template's ID
	User     string    `json:"user,omitempty"`  // the sandbox's
	Cwd      string    `json:"cwd,omitempty"`
	StartCmd string    `json:"start_cmd,omitempty"` // the sandbox's
	ReadyCmd string    `json:"ready_cmd,omitempty"`
	Limits   Limits    `json:"limits"`
	Times    Times     `json:"times"`
	Network  Network   `json:"network,omitzero"`
	Ingress  Ingress   `json:"ingress,omitzero"`
	Ports    []Port    `json:"ports,omitempty"`
	Created  time.Time `json:"created"`
	Size     int64     `json:"size"` // bytes on disk
	// FilesOnly means that it has no memory: a sandbox that begins from it boots.
	FilesOnly bool `json:"files_only,omitempty"`
	// Unnamed means that its owner gave it no name: the server chose one.
	Unnamed bool `json:"unnamed,omitempty"`
}

var snapshotPattern = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,62}(:[a-zA-Z0-9_][a-zA-Z0-9._-]{0,62})?$`)

// Snapshots lists the snapshots of an owner, the newest first.
func (m *Manager) Snapshots(owner string) ([]Snapshot, error) { return m.snapshots.list(owner) }

// FindSnapshot returns an owner's snapshot, or ErrNoSnapshot if there is none of that name.
func (m *Manager) FindSnapshot(owner, name string) (Snapshot, error) {
	return m.snapshots.find(owner, name)
}

// DeleteSnapshot removes an owner's snapshot. Sandboxes that began from it do not need it, but one that is just being made does.
func (m *Manager) DeleteSnapshot(owner, name string) error { return m.snapshots.remove(owner, name) }

// snapshots are the snapshots of all owners. It is safe for concurrent use.
type snapshots struct {
	store store
	log   *slog.Logger

	mu    sync.Mutex
	inUse map[string]int // directories of snapshots that sandboxes are just being made from
}

// place gives a snapshot its name. A snapshot that it replaces is in temp afterwards.
func (x *snapshots) place(temp, dir string, replace bool) error {
	for {
		err := x.store.Rename(temp, dir)
		if err == nil || !errors.Is(err, fs.ErrExist) {
			return err
		}
		if !replace {
			return ErrSnapshot // another caller was faster
		}
		if err = x.exchange(temp, dir); !errors.Is(err, fs.ErrNotExist) { // it was deleted meanwhile
			return err
		}
	}
}

// exchange swaps two snapshots, unless a sandbox is just being made from the named one. It does not ask other servers: there, a sandbox
// that is being made may begin from the new one instead of the old one.
func (x *snapshots) exchange(temp, dir string) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.inUse[dir] > 0 {
		return fmt.Errorf("a sandbox is just being made from the one of that name: %w", ErrBusySnapshot)
	}
	return x.store.Exchange(temp, dir)
}

// list lists the snapshots of an owner, the newest first.
func (x *snapshots) list(owner string) ([]Snapshot, error) {
	entries, err := os.ReadDir(x.store.snapshots)
	if err != nil {
		return nil, err
	}
	list := []Snapshot{}
	for _, e := range entries {
		body, err := os.ReadFile(filepath.Join(x.store.snapshots, e.Name(), "snapshot.json"))
		if err != nil {
			continue // it is being made or removed
		}
		var snap Snapshot
		if err := json.Unmarshal(body, &snap); err != nil {
			x.log.Error("read a snapshot", "directory", e.Name(), "error", err)
			continue
		}
		if snap.Owner == owner && x.store.snapshotDir(owner, snap.Name) == filepath.Join(x.store.snapshots, e.Name()) {
			list = append(list, snap)
		}
	}
	slices.SortFunc(list, func(a, b Snapshot) int { return b.Created.Compare(a.Created) })
	return list, nil
}

// find returns an owner's snapshot, or ErrNoSnapshot if there is none of that name.
func (x *snapshots) find(owner, name string) (Snapshot, error) {
	snap, _, done, err := x.open(owner, name)
	if err == nil {
		done()
	}
	return snap, err
}

// open finds an owner's snapshot, and keeps it from being removed until done is called.
func (x *snapshots) open(owner, name string) (snap Snapshot, dir string, done func(), err error) {
	if !snapshotPattern.MatchString(name) {
		return snap, "", nil, fmt.Errorf("snapshot %q: %w", name, ErrNoSnapshot)
	}
	dir = x.store.snapshotDir(owner, name)
	done = x.acquire(dir) // before it is read: it must not be replaced in between
	body, err := os.ReadFile(filepath.Join(dir, "snapshot.json"))
	if errors.Is(err, fs.ErrNotExist) {
		err = ErrNoSnapshot
	}
	if err == nil {
		err = json.Unmarshal(body, &snap)
	}
	if err != nil {
		done()
		return snap, "", nil, fmt.Errorf("snapshot %q: %w", name, err)
	}
	return snap, filepath.Join(dir, "checkpoint"), done, nil
}

// acquire keeps a directory from being removed until done is called.
func (x *snapshots) acquire(dir string) (done func()) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.inUse[dir]++
	return sync.OnceFunc(func() {
		x.mu.Lock()
		defer x.mu.Unlock()
		if x.inUse[dir]--; x.inUse[dir] == 0 {
			delete(x.inUse, dir)
		}
	})
}

// remove removes an owner's snapshot, unless a sandbox is just being made from it.
func (x *snapshots) remove(owner, name string) error {
	_, _, done, err := x.open(owner, name)
	if err != nil {
		return err
	}
	done()
	dir := x.store.snapshotDir(owner, name)
	x.mu.Lock()
	busy := x.inUse[dir] > 0
	x.mu.Unlock()
	if busy {
		return fmt.Errorf("delete snapshot %q: a sandbox is just being made from it: %w", name, ErrBusySnapshot)
	}
	away := filepath.Join(x.store.snapshots, unfinished+newID())
	if err := x.store.Rename(dir, away); err != nil {
		return fmt.Errorf("delete snapshot %q: %w", name, err)
	}
	if err := x.store.RemoveAll(away); err != nil {
		x.store.untidy.Store(true) // the next look tries again
		x.log.Error("remove a deleted snapshot", "error", err)
	}
	return nil
}

// snapshotDir is the directory of a snapshot: a hash of owner and name, because an owner's name need not be valid in a path.
func (s store) snapshotDir(owner, name string) string {
	sum := sha256.Sum256([]byte(owner + "\x00" + name))
	return filepath.Join(s.snapshots, hex.EncodeToString(sum[:20]))
}

// tempSnapshot makes a directory for a snapshot that is being made; done removes what is left of it. While its maker lives, the maker holds
// its lock.
func (s store) tempSnapshot() (dir string, done func() error, err error) {
	dir = filepath.Join(s.snapshots, unfinished+newID())
	lock, err := durable.Lock(dir+lockSuffix, false)
	if err != nil {
		return "", nil, err
	}
	done = func() error {
		err := errors.Join(s.RemoveAll(dir), s.RemoveAll(dir+lockSuffix), lock.Close())
		if err != nil {
			s.untidy.Store(true) // the next look tries again
		}
		return err
	}
	if err := s.Mkdir(dir); err != nil {
		return "", nil, errors.Join(err, done())
	}
	return dir, done, nil
}

const (
	lockSuffix = ".lock"
	unfinished = ".new-" // begins the names of snapshots that are being made or removed
)

// tidySnapshots removes what dead servers had begun to make or to remove.
func (s store) tidySnapshots() error {
	names, err := filepath.Glob(filepath.Join(s.snapshots, unfinished+"*"))
	for _, name := range names {
		base := strings.TrimSuffix(name, lockSuffix)
		if name != base && isThere(base) {
			continue // it is removed with the directory
		}
		lock, lerr := durable.Lock(base+lockSuffix, false)
		if errors.Is(lerr, syscall.EWOULDBLOCK) {
			continue
		}
		if lerr != nil {
			err = errors.Join(err, lerr)
			continue
		}
		err = errors.Join(err, s.RemoveAll(base), s.RemoveAll(base+lockSuffix), lock.Close())
	}
	return err
}
