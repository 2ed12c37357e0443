package sandbox

import (
	"context"
	"errors"
	"path/filepath"
	"strconv"
	"sync"
	"time"
)

// savedCopy describes what was saved of a sandbox.
type savedCopy struct {
	Dir       string    `json:"dir"` // in the sandbox's directory
	At        time.Time `json:"at"`
	FilesOnly bool      `json:"files_only,omitempty"`
	Size      int64     `json:"size,omitempty"` // bytes on disk
}

// copyName begins the names of copies of sandboxes that continue; copies of paused sandboxes are named checkpoint-N.
const copyName = "copy-"

// copies makes the copies that a sandbox is resumed from if it fails. It is safe for concurrent use; its lock is taken after the sandbox's.
type copies struct {
	s     *Sandbox
	again chan struct{} // tells link.protect to look again

	mu        sync.Mutex
	unchanged time.Time
}

// current returns until when the sandbox had not changed since its copy.
func (c *copies) current() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.unchanged
}

func (c *copies) setUnchanged(until time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.unchanged = until
}

// make saves the sandbox as it is in place of its last copy; the sandbox continues. The caller has the turn.
func (c *copies) make(ctx context.Context, filesOnly bool) error {
	s := c.s
	number := s.current().Saves + 1
	name := copyName + strconv.Itoa(number)
	dir := filepath.Join(s.m.store.path(s.id), name)
	at := time.Now()
	err := errors.Join(s.m.store.RemoveAll(dir+unfinishedSave), s.m.store.RemoveAll(dir))
	if err == nil {
		_, filesOnly, err = s.save(ctx, dir+unfinishedSave, filesOnly)
	}
	if err == nil {
		err = s.m.store.finish(dir, filesOnly)
	}
	if err != nil {
		return errors.Join(noDisk(err), s.m.store.RemoveAll(dir+unfinishedSave))
	}
	size, err := sizeOf(dir)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.rec.State != Running && s.rec.State != Paused || s.rec.onDisk() {
		return s.wrong("protect") // whoever ended it removes the copy
	}
	old := s.m.store.kept(s.rec)
	r := s.rec
	r.Saves, r.Copy = number, &savedCopy{Dir: name, At: at, FilesOnly: filesOnly, Size: size}
	if err := s.commit(r); err != nil {
		return errors.Join(err, s.m.store.RemoveAll(dir))
	}
	c.setUnchanged(at)
	s.log.announce()
	if old != "" {
		return s.m.store.RemoveAll(old)
	}
	return nil
}

// copied returns when the last copy was made; zero means never.
func (r record) copied() time.Time {
	if r.Copy == nil {
		return time.Time{}
	}
	return r.Copy.At
}

// afterFailure is how a sandbox that fails is kept: its last copy can be resumed; nil means that there is none.
func (r record) afterFailure(now time.Time) *pause {
	if r.Copy == nil {
		return nil
	}
	return &pause{Disk: true, FilesOnly: r.Copy.FilesOnly, Since: now}
}

// drop removes the last copy of a running sandbox, from its record first, and returns how many bytes that frees.
func (c *copies) drop() (int64, error) {
	s := c.s
	s.mu.Lock()
	r := s.rec
	if r.Copy == nil || r.State != Running || s.changing != nil {
		s.mu.Unlock()
		return 0, nil
	}
	dir, size := s.m.store.kept(r), r.Copy.Size
	r.Copy = nil
	err := s.commit(r)
	s.mu.Unlock()
	if err != nil {
		return 0, err
	}
	return size, s.m.store.RemoveAll(dir)
}
