package sandbox

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"

	"soulbox.dev/soulbox/internal/durable"
)

// spareDisk is what a checkpoint must leave free on the file system of the state directory, in bytes.
const spareDisk = 512 << 20

// admit returns an error unless there is memory for an owner's sandbox, on the server and in the owner's share. m.room is held.
func (m *Manager) admit(owner string, l Limits) error {
	if err := m.admitShare(owner, l); err != nil {
		return err
	}
	need := l.promised()
	promised, err := m.store.promised()
	if err != nil {
		return err
	}
	free := m.opts.MemoryBudget - promised
	if need <= free {
		return nil
	}
	if need > m.opts.MemoryBudget {
		return fmt.Errorf("%d MB of memory needed, with what its kernel takes, and all sandboxes together may have %d MB: %w",
			need>>20, m.opts.MemoryBudget>>20, ErrTooMuch)
	}
	text := fmt.Sprintf("%d MB of memory needed, with what its kernel takes, %d MB free", need>>20, max(free, 0)>>20)
	if mine := m.largest(owner); len(mine) > 0 {
		text += "; pause to disk or kill one of " + strings.Join(mine, ", ")
	}
	return fmt.Errorf("%s: %w", text, ErrNoRoom)
}

// largest names an owner's sandboxes that have memory, the longest unchanged first.
func (m *Manager) largest(owner string) []string {
	list := m.List(Filter{Owner: owner})
	list = slices.DeleteFunc(list, func(i Info) bool { return i.OnDisk || i.State == Creating })
	slices.SortFunc(list, func(a, b Info) int { return a.Changed.Compare(b.Changed) })
	var names []string
	for _, i := range list[:min(3, len(list))] {
		names = append(names, fmt.Sprintf("%s (%d MB)", i.ID, i.Limits.Memory>>20))
	}
	return names
}

// promiseAgain promises memory to a sandbox on disk before it is booted with limits l.
func (m *Manager) promiseAgain(s *Sandbox, l Limits) error {
	done, err := m.lockRoom()
	if err != nil {
		return err
	}
	defer done()
	if s.current().Pause.Waking { // an earlier, failed resume could not take the promise back
		return nil
	}
	if err := m.admitOne(s.owner); err != nil {
		return err
	}
	if err := m.admit(s.owner, l); err != nil {
		return err
	}
	return s.setWaking(true)
}

// lockRoom keeps two promises, including those of other servers, from taking the same memory.
func (m *Manager) lockRoom() (done func(), err error) {
	m.room.Lock()
	lock, err := durable.Lock(filepath.Join(m.store.dir, ".room"), true)
	if err != nil {
		m.room.Unlock()
		return nil, err
	}
	return func() {
		_ = lock.Close() // it was only locked
		m.room.Unlock()
	}, nil
}

// admitOne returns an error if an owner may not have one more sandbox that is not on disk.
func (m *Manager) admitOne(owner string) error {
	alive := 0
	for _, s := range m.all() {
		if r := s.current(); r.Owner == owner && !r.ended() && (!r.onDisk() || r.Pause.Waking) {
			alive++
		}
	}
	if alive >= m.opts.MaxPerOwner {
		return fmt.Errorf("you have %d, the most one may have; kill one, or raise --max-sandboxes: %w", alive, ErrTooMany)
	}
	return nil
}

// asleepFactor is how many sandboxes, including those on disk, an owner may have for each that may be alive; the same holds for snapshots.
const asleepFactor = 10

// unpromise undoes promiseAgain.
func (m *Manager) unpromise(s *Sandbox) error {
	done, err := m.lockRoom()
	if err != nil {
		return err
	}
	defer done()
	return s.setWaking(false)
}

func (s *Sandbox) setWaking(waking bool) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.rec.onDisk() {
		return nil // it has ended, or runs
	}
	r := s.rec
	p := *r.Pause
	p.Waking = waking
	r.Pause = &p
	return s.commit(r)
}

// roomOnDisk returns an error unless need bytes of a checkpoint may be written for an owner, and reserves them until done is called. If
// there is no room and Reclaim is set, it ends those of the owner's sandboxes that have been on disk for the longest time, provided that
// this makes enough room; their tombstones say so.
func (m *Manager) roomOnDisk(owner string, need int64) (done func(), err error) {
	m.saving.Add(need)
	release := sync.OnceFunc(func() { m.saving.Add(-need) })
	defer func() {
		if err != nil {
			release()
		}
	}()
	lack, why, err := m.lackOfDisk(m.saving.Load())
	if err == nil && lack > 0 {
		m.dropCopies(owner, lack)
		lack, why, err = m.lackOfDisk(m.saving.Load())
	}
	if err != nil || lack <= 0 {
		return release, err
	}
	var victims []*Sandbox
	if m.opts.Reclaim {
		for _, i := range m.unowned(owner, nil) {
			m.claimAsleep(i.ID)
		}
		for _, s := range m.asleep(owner) {
			size, err := sizeOf(m.store.kept(s.current()))
			if err != nil || lack <= 0 {
				continue // it is just being resumed
			}
			victims = append(victims, s)
			lack -= size
		}
	}
	if lack > 0 {
		return nil, fmt.Errorf("%s: %w", why, ErrNoDisk)
	}
	for _, s := range victims {
		m.log.Warn("a paused sandbox is ended to make room on disk", "sandbox", s.ID(), "paused_since", s.Info().Changed)
		if err := s.Kill(CauseReclaimed); err != nil && !errors.Is(err, ErrState) {
			return nil, err
		}
	}
	return release, nil
}

// asleep lists an owner's sandboxes on disk that this server has, those that have been there for the longest time first.
func (m *Manager) asleep(owner string) []*Sandbox {
	var list []*Sandbox
	for _, s := range m.all() {
		if r := s.current(); s.owner == owner && r.onDisk() && !r.Pause.Waking {
			list = append(list, s)
		}
	}
	slices.SortFunc(list, func(a, b *Sandbox) int { return a.current().Changed.Compare(b.current().Changed) })
	return list
}

// lackOfDisk returns how many bytes are missing to write need more, and why.
func (m *Manager) lackOfDisk(need int64) (lack int64, why string, err error) {
	var st syscall.Statfs_t
	if err := syscall.Statfs(m.opts.Dir, &st); err != nil {
		return 0, "", fmt.Errorf("look for room on disk: %w", err)
	}
	if free := int64(st.Bavail)*st.Bsize - spareDisk; need > free {
		return need - free, fmt.Sprintf("about %d MB needed, %d MB free in %s", need>>20, max(free, 0)>>20, m.opts.Dir), nil
	}
	if m.opts.DiskBudget <= 0 {
		return 0, "", nil
	}
	used, err := m.store.saved()
	if err != nil {
		return 0, "", err
	}
	if free := m.opts.DiskBudget - used; need > free {
		return need - free, fmt.Sprintf("about %d MB needed, %d MB of %d MB free for paused sandboxes and snapshots", need>>20,
			max(free, 0)>>20, m.opts.DiskBudget>>20), nil
	}
	return 0, "", nil
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
