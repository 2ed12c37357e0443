package sandbox

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"soulbox.dev/soulbox/internal/durable"
)

// record is a sandbox as stored in state.json.
type record struct {
	Version  int    `json:"version"`
	ID       string `json:"id"`
	Owner    string `json:"owner,omitempty"`
	Keep     bool   `json:"keep,omitempty"` // it outlives its server, and the next one adopts it
	State    State  `json:"state"`
	Cause    string `json:"cause,omitempty"`
	Template string `json:"template"`
	Image    string `json:"image,omitempty"` // the template's ID
	User     string `json:"user,omitempty"`  // for processes that name none
	Cwd      string `json:"cwd,omitempty"`
	// StartCmd and ReadyCmd are the service of its template. The service is started again if the sandbox begins from files alone.
	StartCmd string            `json:"start_cmd,omitempty"`
	ReadyCmd string            `json:"ready_cmd,omitempty"`
	Parent   string            `json:"parent,omitempty"` // the snapshot or sandbox that it began from
	Origin   string            `json:"origin,omitempty"` // the snapshot that it began from, directly or through forks
	Metadata map[string]string `json:"metadata,omitempty"`
	Limits   Limits            `json:"limits"`
	Created  time.Time         `json:"created"`
	Changed  time.Time         `json:"changed"`          // the last change of state
	Updated  time.Time         `json:"updated,omitzero"` // the last change of anything that its user sets
	Times    Times             `json:"times"`
	Network  Network           `json:"network,omitzero"`
	clock
	Ports   []Port  `json:"ports,omitempty"`
	Ingress Ingress `json:"ingress,omitzero"`
	// Traffic and Access are secrets: for its ports, and for clients that act inside it.
	Traffic string `json:"traffic_token,omitempty"`
	Access  string `json:"access_token,omitempty"`
	// Pause is how it is paused, or how a failed one was saved; otherwise nil.
	Pause *pause `json:"pause,omitempty"`
	// Saves counts its checkpoints and copies.
	Saves int `json:"saves,omitempty"`
	// Copy is what was saved last: all there is of the sandbox while it is on disk, and what it is resumed from after it failed.
	Copy    *savedCopy `json:"copy,omitempty"`
	Protect Protect    `json:"protect,omitzero"`
	// Notice is what its user must know about how it was resumed, until it is paused again.
	Notice string `json:"notice,omitempty"`
	Totals Totals `json:"totals"`
	Seen   seen   `json:"seen"`
}

// pause says how a sandbox is paused.
type pause struct {
	Disk       bool `json:"disk,omitempty"`       // nothing of it runs; its checkpoint is all there is
	FilesOnly  bool `json:"files_only,omitempty"` // its checkpoint has no memory
	AutoResume bool `json:"auto_resume,omitempty"`
	// Silent means that its agent was silent: a resume tries its memory once more, and then boots its files.
	Silent bool `json:"wedged,omitempty"`
	// Waking means that memory is promised to it again.
	Waking bool      `json:"waking,omitempty"`
	Since  time.Time `json:"since"`
}

// basis is the name by which Templates finds the root file system.
func (r record) basis() string { return cmp.Or(r.Image, r.Template) }

// onDisk reports whether what was saved is all there is of the sandbox, so that a resume starts from it.
func (r record) onDisk() bool {
	return (r.State == Paused || r.State == Failed) && r.Pause != nil && r.Pause.Disk
}

// ended reports whether nothing but its tombstone is left, or will be left shortly.
func (r record) ended() bool { return r.State.Ended() && !r.onDisk() }

const recordVersion = 2

// store is the state directory that all servers of this machine share: sandboxes/ has the living sandboxes, ended/ what is kept of the
// others.
type store struct {
	durable.Disk
	dir       string // sandboxes
	ended     string
	snapshots string
	untidy    *atomic.Bool // something of a snapshot could not be removed
}

func newStore(root string) store {
	return store{dir: filepath.Join(root, "sandboxes"), ended: filepath.Join(root, "ended"), snapshots: filepath.Join(root, "snapshots"),
		untidy: new(atomic.Bool)}
}

// path returns the directory of a sandbox.
func (s store) path(id string) string { return filepath.Join(s.dir, id) }

// tomb returns the directory of what is kept of an ended sandbox.
func (s store) tomb(id string) string { return filepath.Join(s.ended, id) }

// checkpoint returns the directory of a sandbox's n-th checkpoint.
func (s store) checkpoint(id string, n int) string {
	return filepath.Join(s.path(id), "checkpoint-"+strconv.Itoa(n))
}

// kept returns the directory of what was saved last of a sandbox; "" if nothing was.
func (s store) kept(r record) string {
	switch {
	case r.Copy != nil:
		return filepath.Join(s.path(r.ID), filepath.Base(r.Copy.Dir))
	case r.onDisk(): // saved by a server that did not know copies
		return s.checkpoint(r.ID, r.Saves)
	}
	return ""
}

// unfinishedSave ends the name of a checkpoint that is being made.
const unfinishedSave = ".new"

// finish gives a completed checkpoint its name.
func (s store) finish(dir string, filesOnly bool) error {
	if filesOnly {
		if err := s.Replace(filepath.Join(dir+unfinishedSave, filesOnlyMark), nil, 0o600); err != nil {
			return err
		}
	}
	return s.Rename(dir+unfinishedSave, dir)
}

// claim makes the directory of a new sandbox and locks it. The store's own lock is held meanwhile, so that no server sees the directory
// without its lock.
func (s store) claim(id string) (lock *os.File, err error) {
	all, err := durable.Lock(filepath.Join(s.dir, ".lock"), true)
	if err != nil {
		return nil, err
	}
	defer all.Close()
	if err := s.Mkdir(s.path(id)); err != nil {
		return nil, err
	}
	lock, err = durable.Lock(filepath.Join(s.path(id), "lock"), false)
	if err != nil {
		err = errors.Join(err, os.RemoveAll(s.path(id)))
	}
	return lock, err
}

// ids lists the sandboxes of all servers.
func (s store) ids() ([]string, error) {
	if _, err := s.Step("list", s.dir, 0); err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(s.dir)
	var ids []string
	for _, e := range entries {
		if e.IsDir() && ValidID(e.Name()) {
			ids = append(ids, e.Name())
		}
	}
	return ids, err
}

// orphan locks a sandbox that no living server owns; the lock is nil if a server owns it or it is being removed. The store's own lock is
// held meanwhile, as in claim.
func (s store) orphan(id string) (*os.File, error) {
	if _, err := s.Step("lock", s.path(id), 0); err != nil {
		return nil, err
	}
	all, err := durable.Lock(filepath.Join(s.dir, ".lock"), true)
	if err != nil {
		return nil, err
	}
	defer all.Close()
	if !isThere(s.path(id)) {
		return nil, nil
	}
	lock, err := durable.Lock(filepath.Join(s.path(id), "lock"), false)
	if errors.Is(err, syscall.EWOULDBLOCK) || errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return lock, err
}

// save writes state.json: at any time there is either the old or the new one.
func (s store) save(r record) error {
	body, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return fmt.Errorf("save state of %s: %w", r.ID, err)
	}
	if err := s.Replace(filepath.Join(s.path(r.ID), "state.json"), body, 0o600); err != nil {
		return fmt.Errorf("save state of %s: %w", r.ID, err)
	}
	return nil
}

// load reads the state.json of a living sandbox.
func (s store) load(id string) (record, error) {
	if _, err := s.Step("read", filepath.Join(s.path(id), "state.json"), 0); err != nil {
		return record{}, err
	}
	return loadFrom(s.path(id), id)
}

func loadFrom(dir, id string) (record, error) {
	var r record
	body, err := os.ReadFile(filepath.Join(dir, "state.json"))
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal(body, &r); err != nil {
		return r, fmt.Errorf("state of %s: %w", id, err)
	}
	if r.Version == 1 { // version 1 had only one life time
		r.Version, r.Times = recordVersion, Times{Life: DefaultLifetime, OnTimeout: ActionKill}
	}
	if r.Version != recordVersion || r.ID != id {
		return r, fmt.Errorf("state of %s: version %d, id %q: %w", id, r.Version, r.ID, ErrInvalid)
	}
	return r, nil
}

// promised sums the memory promised to all sandboxes in the store, including those of other servers. A sandbox on disk has none.
func (s store) promised() (sum int64, err error) {
	err = s.promisedEach(func(r record) { sum += r.Limits.promised() })
	return sum, err
}

// promisedEach calls each for every sandbox in the store that has memory or is about to get it. It skips a sandbox whose state this server
// cannot interpret; if the host does not let it read a state, that is an error.
func (s store) promisedEach(each func(record)) error {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !e.IsDir() || !ValidID(e.Name()) {
			continue
		}
		r, err := s.load(e.Name())
		if isOfHost(err) {
			return err
		}
		if err == nil && !r.ended() && (!r.onDisk() || r.Pause.Waking) {
			each(r)
		}
	}
	return nil
}

// saved returns how many bytes all checkpoints and snapshots take on disk.
func (s store) saved() (int64, error) {
	var sum int64
	seen := map[uint64]bool{} // a snapshot of a paused sandbox shares its files
	for _, pattern := range []string{filepath.Join(s.dir, "*", "checkpoint-*", "*"), filepath.Join(s.dir, "*", copyName+"*", "*"),
		filepath.Join(s.snapshots, "*", "checkpoint", "*")} {
		names, err := filepath.Glob(pattern)
		if err != nil {
			return 0, err
		}
		for _, name := range names {
			info, err := os.Lstat(name)
			if errors.Is(err, fs.ErrNotExist) {
				continue // removed meanwhile
			}
			if err != nil {
				return 0, err
			}
			if st, ok := info.Sys().(*syscall.Stat_t); ok && !seen[st.Ino] {
				seen[st.Ino] = true
				sum += sizeOnDisk(info)
			}
		}
	}
	return sum, nil
}

// remembered are the files that are kept of an ended sandbox.
var remembered = []string{"state.json", logName, logName + olderSuffix, metricsName, metricsName + olderSuffix}

// eachLine reads the lines of a file of JSON lines of a sandbox, wherever it is by now, after those of the older file.
func (s store) eachLine(id, name string, each func([]byte) error) error {
	dir := s.path(id)
	if !isThere(filepath.Join(dir, "state.json")) {
		dir = s.tomb(id)
	}
	for _, name := range []string{name + olderSuffix, name} {
		if err := eachLine(filepath.Join(dir, name), each); err != nil {
			return err
		}
	}
	return nil
}

// entomb removes an ended sandbox except for the remembered files, and releases its lock. The lock file goes last, because the rest is
// owned as long as it exists.
func (s store) entomb(r record, lock *os.File) (err error) {
	defer func() { err = errors.Join(err, lock.Close()) }()
	dir := s.path(r.ID)
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	keep := map[string]bool{"lock": true}
	for _, name := range remembered {
		keep[name] = true
	}
	for _, e := range entries {
		if !keep[e.Name()] {
			err = errors.Join(err, s.RemoveAll(filepath.Join(dir, e.Name())))
		}
	}
	if err != nil {
		return err
	}
	r.Traffic, r.Access = "", "" // an ended sandbox needs no secrets
	if err := s.save(r); err != nil {
		return errors.Join(err, s.RemoveAll(dir)) // a full disk may prevent the tombstone, but not the end
	}
	if err := s.RemoveAll(s.tomb(r.ID)); err != nil {
		return err
	}
	if err := s.Rename(dir, s.tomb(r.ID)); err != nil {
		return errors.Join(err, s.RemoveAll(dir))
	}
	return s.RemoveAll(filepath.Join(s.tomb(r.ID), "lock"))
}

// discard removes the directory of a sandbox that was never entered, and releases its lock.
func (s store) discard(id string, lock *os.File) error {
	return errors.Join(s.RemoveAll(s.path(id)), lock.Close())
}

// tombs lists what is kept of ended sandboxes.
func (s store) tombs() ([]record, error) {
	entries, err := os.ReadDir(s.ended)
	if err != nil {
		return nil, err
	}
	var all []record
	for _, e := range entries {
		if !e.IsDir() || !ValidID(e.Name()) {
			continue
		}
		if r, err := loadFrom(s.tomb(e.Name()), e.Name()); err == nil && r.State.Ended() {
			all = append(all, r)
		}
	}
	return all, nil
}

// forget removes what is kept of sandboxes that ended before a time.
func (s store) forget(before time.Time) error {
	entries, err := os.ReadDir(s.ended)
	if err != nil {
		return err
	}
	var errs error
	for _, e := range entries {
		if !e.IsDir() || !ValidID(e.Name()) {
			continue
		}
		info, err := e.Info()
		if err != nil {
			continue // another server removes it too
		}
		if r, err := loadFrom(s.tomb(e.Name()), e.Name()); err == nil && r.Changed.Before(before) || err != nil &&
			info.ModTime().Before(before) {
			errs = errors.Join(errs, s.RemoveAll(s.tomb(e.Name())))
		}
	}
	return errs
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
