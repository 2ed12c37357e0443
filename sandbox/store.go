package sandbox

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// record is a sandbox as state.json keeps it.
type record struct {
	Version   int               `json:"version"`
	ID        string            `json:"id"`
	Owner     string            `json:"owner,omitempty"`
	Keep      bool              `json:"keep,omitempty"` // it outlives its server, and the next one adopts it
	State     State             `json:"state"`
	Cause     string            `json:"cause,omitempty"`
	Template  string            `json:"template"`
	Metadata  map[string]string `json:"metadata,omitempty"`
	Limits    Limits            `json:"limits"`
	Created   time.Time         `json:"created"`
	Changed   time.Time         `json:"changed"` // the last change of state
	Ready     time.Time         `json:"ready,omitzero"`
	ExpiresAt time.Time         `json:"expires_at,omitzero"`
	MaxLife   time.Duration     `json:"max_lifetime,omitempty"`
	Ports     []Port            `json:"ports,omitempty"`
	Traffic   string            `json:"traffic_token,omitempty"`
}

const recordVersion = 1

// store is the directory of all sandboxes of this machine's servers.
type store struct{ dir string }

// lockFile takes a flock; the file is its proof, closing it gives the lock back. wait == false gives ErrWouldBlock when another has it.
func lockFile(name string, wait bool) (*os.File, error) {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	how := syscall.LOCK_EX
	if !wait {
		how |= syscall.LOCK_NB
	}
	for {
		err = syscall.Flock(int(f.Fd()), how)
		if err != syscall.EINTR {
			break
		}
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", name, err), f.Close())
	}
	return f, nil
}

// path is the directory of a sandbox.
func (s store) path(id string) string { return filepath.Join(s.dir, id) }

// claim makes the directory of a new sandbox and locks it. The store's own lock is held meanwhile, so that nobody sees the
// directory without its lock.
func (s store) claim(id string) (lock *os.File, err error) {
	all, err := lockFile(filepath.Join(s.dir, ".lock"), true)
	if err != nil {
		return nil, err
	}
	defer all.Close()
	if err := os.Mkdir(s.path(id), 0o711); err != nil {
		return nil, err
	}
	lock, err = lockFile(filepath.Join(s.path(id), "lock"), false)
	if err != nil {
		err = errors.Join(err, os.RemoveAll(s.path(id)))
	}
	return lock, err
}

// orphans locks every sandbox that no living server owns.
func (s store) orphans() (map[string]*os.File, error) {
	all, err := lockFile(filepath.Join(s.dir, ".lock"), true)
	if err != nil {
		return nil, err
	}
	defer all.Close()
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, err
	}
	found := map[string]*os.File{}
	for _, e := range entries {
		if !e.IsDir() || !ValidID(e.Name()) {
			continue
		}
		lock, err := lockFile(filepath.Join(s.path(e.Name()), "lock"), false)
		if errors.Is(err, syscall.EWOULDBLOCK) || errors.Is(err, fs.ErrNotExist) {
			continue // owned, or being removed by its owner
		}
		if err != nil {
			return found, err
		}
		found[e.Name()] = lock
	}
	return found, nil
}

// save writes state.json: the old one or the new one is there at any time.
func (s store) save(r record) error {
	body, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return fmt.Errorf("save state of %s: %w", r.ID, err)
	}
	if err := writeFile(filepath.Join(s.path(r.ID), "state.json"), body); err != nil {
		return fmt.Errorf("save state of %s: %w", r.ID, err)
	}
	return nil
}

// writeFile replaces a file by temp, fsync and rename.
func writeFile(name string, body []byte) (err error) {
	f, err := os.CreateTemp(filepath.Dir(name), "."+filepath.Base(name)+"-")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(f.Name())
		}
	}()
	if _, err := f.Write(body); err != nil {
		return errors.Join(err, f.Close())
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), name)
}

// load reads state.json of a sandbox.
func (s store) load(id string) (record, error) {
	var r record
	body, err := os.ReadFile(filepath.Join(s.path(id), "state.json"))
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal(body, &r); err != nil {
		return r, fmt.Errorf("state of %s: %w", id, err)
	}
	if r.Version != recordVersion || r.ID != id {
		return r, fmt.Errorf("state of %s: version %d, id %q: %w", id, r.Version, r.ID, ErrInvalid)
	}
	return r, nil
}

// promised sums the memory limits of all sandboxes in the store, other servers' too.
func (s store) promised() (int64, error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return 0, err
	}
	var sum int64
	for _, e := range entries {
		if !e.IsDir() || !ValidID(e.Name()) {
			continue
		}
		if r, err := s.load(e.Name()); err == nil && !r.State.Ended() {
			sum += r.Limits.Memory
		}
	}
	return sum, nil
}

// remove takes a sandbox' directory away and gives its lock back. The lock file goes last: as long as it is there, the rest is owned.
func (s store) remove(id string, lock *os.File) error {
	dir := s.path(id)
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return errors.Join(err, lock.Close())
	}
	for _, e := range entries {
		if e.Name() != "lock" {
			err = errors.Join(err, os.RemoveAll(filepath.Join(dir, e.Name())))
		}
	}
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		err = os.RemoveAll(dir)
	}
	return errors.Join(err, lock.Close())
}

// memoryTotal reads the machine's memory in bytes from /proc/meminfo.
func memoryTotal() (int64, error) {
	body, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(body)) {
		var kb int64
		if n, _ := fmt.Sscanf(line, "MemTotal: %d kB", &kb); n == 1 {
			return kb << 10, nil
		}
	}
	return 0, errors.New("no MemTotal in /proc/meminfo")
}
