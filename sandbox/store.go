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

// record is a sandbox as state.json keeps it.
type record struct {
	Version  int    `json:"version"`
	ID       string `json:"id"`
	Owner    string `json:"owner,omitempty"`
	Keep     bool   `json:"keep,omitempty"` // it outlives its server, and the next one adopts it
	State    State  `json:"state"`
	Cause    string `json:"cause,omitempty"`
	Template string `json:"template"`
	Image    string `json:"image,omitempty"` // the template's ID
	User     string `json:"user,omitempty"`  // of processes that name none
	Cwd      string `json:"cwd,omitempty"`
	// StartCmd and ReadyCmd are of its template's service, which is started again where it begins from files alone.
	StartCmd string            `json:"start_cmd,omitempty"`
	ReadyCmd string            `json:"ready_cmd,omitempty"`
	Parent   string            `json:"parent,omitempty"` // the snapshot or the sandbox that it began from
	Origin   string            `json:"origin,omitempty"` // the snapshot that it, or what it is a copy of, began from
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
	// Traffic and Access are secrets: for its ports, and for what is in it.
	Traffic string `json:"traffic_token,omitempty"`
	Access  string `json:"access_token,omitempty"`
	// Pause is how it is paused, or how a failed one was saved; nil where it is neither.
	Pause *pause `json:"pause,omitempty"`
	// Saves counts its checkpoints and copies.
	Saves int `json:"saves,omitempty"`
	// Copy is the last one that was saved: all there is of it while it is on disk, and what it is resumed from when it has failed.
	Copy    *savedCopy `json:"copy,omitempty"`
	Protect Protect    `json:"protect,omitzero"`
	// Notice is what its user must know of how it was resumed, until it is paused again.
	Notice string `json:"notice,omitempty"`
	Totals Totals `json:"totals"`
	Seen   seen   `json:"seen"`
}

// pause is how a sandbox is paused.
type pause struct {
	Disk       bool `json:"disk,omitempty"`       // nothing of it runs; its checkpoint is all there is
	FilesOnly  bool `json:"files_only,omitempty"` // its checkpoint has no memory
	AutoResume bool `json:"auto_resume,omitempty"`
	// Wedged says that its agent was silent: a resume boots its files anew.
	Wedged bool `json:"wedged,omitempty"`
	// Waking says that memory is promised to it again.
	Waking bool      `json:"waking,omitempty"`
	Since  time.Time `json:"since"`
}

// basis is what Templates knows the root file system by.
func (r record) basis() string { return cmp.Or(r.Image, r.Template) }

// onDisk says whether what was saved is all there is of the sandbox, and it can be resumed.
func (r record) onDisk() bool {
	return (r.State == Paused || r.State == Failed) && r.Pause != nil && r.Pause.Disk
}

// ended says whether only its tombstone is left, or about to be.
func (r record) ended() bool { return r.State.Ended() && !r.onDisk() }

const recordVersion = 2

// store is the directory of all sandboxes of this machine's servers: sandboxes/ has the living, ended/ what is remembered of the others.
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

// path is the directory of a sandbox.
func (s store) path(id string) string { return filepath.Join(s.dir, id) }

// tomb is the directory of what is remembered of a sandbox that has ended.
func (s store) tomb(id string) string { return filepath.Join(s.ended, id) }

// checkpoint is the directory of a sandbox' checkpoint of a number.
func (s store) checkpoint(id string, n int) string {
	return filepath.Join(s.path(id), "checkpoint-"+strconv.Itoa(n))
}

// kept is the directory of what was saved last of a sandbox; "" is nothing.
func (s store) kept(r record) string {
	switch {
	case r.Copy != nil:
		return filepath.Join(s.path(r.ID), filepath.Base(r.Copy.Dir))
	case r.onDisk(): // by a server that knew no copies
		return s.checkpoint(r.ID, r.Saves)
	}
	return ""
}

// unfinishedSave ends the name of a checkpoint that is being made.
const unfinishedSave = ".new"

// finish names a checkpoint that has been made.
func (s store) finish(dir string, filesOnly bool) error {
	if filesOnly {
		if err := s.Replace(filepath.Join(dir+unfinishedSave, filesOnlyMark), nil, 0o600); err != nil {
			return err
		}
	}
	return s.Rename(dir+unfinishedSave, dir)
}

// claim makes the directory of a new sandbox and locks it. The store's own lock is held meanwhile, so that nobody sees the
// directory without its lock.
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

// ids lists the sandboxes that there are, of all servers.
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

// orphan locks a sandbox that no living server owns; nil is one that has an owner, or is being removed. The store's own lock is held
// meanwhile, as by who makes one.
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

// save writes state.json: the old one or the new one is there at any time.
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

// load reads state.json of a living sandbox.
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
	if r.Version == 1 { // the clock had one life time only
		r.Version, r.Times = recordVersion, Times{Life: DefaultLifetime, OnTimeout: ActionKill}
	}
	if r.Version != recordVersion || r.ID != id {
		return r, fmt.Errorf("state of %s: version %d, id %q: %w", id, r.Version, r.ID, ErrInvalid)
	}
	return r, nil
}

// promised sums the memory limits of all sandboxes in the store, other servers' too. One on disk has none.
func (s store) promised() (sum int64, err error) {
	err = s.promisedEach(func(r record) { sum += r.Limits.promised() })
	return sum, err
}

// promisedEach calls each for every sandbox in the store that has memory, or is about to. Of one whose state has no meaning to this server
// nothing is known; where the host does not let it be read, that is an error.
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

// remembered are the files that are kept of a sandbox that has ended.
var remembered = []string{"state.json", logName, logName + olderSuffix, metricsName, metricsName + olderSuffix}

// entomb takes a sandbox that has ended away, but for what is remembered of it, and gives its lock back. The lock file goes last: as long
// as it is there, the rest is owned.
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
	r.Traffic, r.Access = "", "" // secrets are for the living
	if err := s.save(r); err != nil {
		return errors.Join(err, s.RemoveAll(dir)) // on a full disk its end cannot be remembered, but must be had
	}
	if err := s.RemoveAll(s.tomb(r.ID)); err != nil {
		return err
	}
	if err := s.Rename(dir, s.tomb(r.ID)); err != nil {
		return errors.Join(err, s.RemoveAll(dir))
	}
	return s.RemoveAll(filepath.Join(s.tomb(r.ID), "lock"))
}

// discard takes away the directory of a sandbox that never was, and gives its lock back.
func (s store) discard(id string, lock *os.File) error {
	return errors.Join(s.RemoveAll(s.path(id)), lock.Close())
}

// tombs lists what is remembered of sandboxes that have ended.
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

// forget removes what is remembered of sandboxes that ended before a time.
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
			continue // another server removes it, too
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
