package sandbox

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"

	"soulbox.dev/soulbox/access"
	"soulbox.dev/soulbox/internal/durable"
)

// spareDisk is what a checkpoint must leave free on the file system of the state directory, in bytes.
const spareDisk = 512 << 20

// capacity decides whether there is memory, tasks and disk for a sandbox. It is safe for concurrent use.
type capacity struct {
	m      *Manager
	mu     sync.Mutex   // held while memory is promised, so that two creations do not take the same memory
	saving atomic.Int64 // bytes of the checkpoints being made
}

// promises are what an owner's sandboxes that are not on disk may take from the machine.
type promises struct{ memory, tasks int64 }

// tasksOf returns how many host tasks a sandbox may have: about two for each task in the guest, plus those of its kernel.
func tasksOf(l Limits) int64 { return 2*l.Processes + kernelTasks }

const kernelTasks = 64

// largestShare is the part of the memory budget that one owner may be promised, in percent: the rest is for others. The user of this
// machine may have all of it.
const largestShare = 80

// checkShare returns an error unless the owner's share has room for one more sandbox with these limits, and the server has room for its
// tasks. c.mu is held.
func (c *capacity) checkShare(owner string, l Limits) error {
	mine, all, err := c.promisedTo(owner)
	if err != nil {
		return err
	}
	if share := max(c.m.opts.MemoryBudget*largestShare/100, c.m.opts.Defaults.Memory); owner != "" && mine.memory+l.promised() > share {
		return fmt.Errorf("%d MB of memory needed, %d MB of your share of %d MB are free; pause to disk or kill one of yours: %w",
			l.promised()>>20, max(0, share-mine.memory)>>20, share>>20, ErrNoRoom)
	}
	need := tasksOf(l)
	if need > c.m.opts.MaxTasks {
		return fmt.Errorf("processes: %d are more than this machine has for one sandbox, %d; ask for fewer: %w", l.Processes,
			(c.m.opts.MaxTasks-kernelTasks)/2, ErrInvalid)
	}
	bound, ok := c.m.opts.Accounts.Bound(access.Tasks)
	if !ok {
		return nil
	}
	full := &access.FullError{Owner: owner, Resource: access.Tasks, Used: mine.tasks, Share: bound.Share}
	if full.All = mine.tasks+need <= bound.Share; full.All && all.tasks+need <= bound.Total {
		return nil
	}
	return fmt.Errorf("%d tasks needed for %d processes: %w: %w", need, l.Processes, full, ErrNoRoom)
}

// promisedTo sums what is promised to an owner's sandboxes, and to all, including those of other servers. A sandbox on disk has nothing.
func (c *capacity) promisedTo(owner string) (mine, all promises, err error) {
	err = c.m.store.promisedEach(func(r record) {
		all.memory += r.Limits.promised()
		all.tasks += tasksOf(r.Limits)
		if r.Owner == owner {
			mine.memory += r.Limits.promised()
			mine.tasks += tasksOf(r.Limits)
		}
	})
	return mine, all, err
}

// checkMemory returns an error unless there is memory for an owner's sandbox, on the server and in the owner's share. c.mu is held.
func (c *capacity) checkMemory(owner string, l Limits) error {
	if err := c.checkShare(owner, l); err != nil {
		return err
	}
	need := l.promised()
	promised, err := c.m.store.promised()
	if err != nil {
		return err
	}
	free := c.m.opts.MemoryBudget - promised
	if need <= free {
		return nil
	}
	if need > c.m.opts.MemoryBudget {
		return fmt.Errorf("%d MB of memory needed, with what its kernel takes, and all sandboxes together may have %d MB: %w",
			need>>20, c.m.opts.MemoryBudget>>20, ErrTooMuch)
	}
	text := fmt.Sprintf("%d MB of memory needed, with what its kernel takes, %d MB free", need>>20, max(free, 0)>>20)
	if mine := c.largest(owner); len(mine) > 0 {
		text += "; pause to disk or kill one of " + strings.Join(mine, ", ")
	}
	return fmt.Errorf("%s: %w", text, ErrNoRoom)
}

// largest names an owner's sandboxes that have memory, the longest unchanged first.
func (c *capacity) largest(owner string) []string {
	list := c.m.List(Filter{Owner: owner})
	list = slices.DeleteFunc(list, func(i Info) bool { return i.OnDisk || i.State == Creating })
	slices.SortFunc(list, func(a, b Info) int { return a.Changed.Compare(b.Changed) })
	var names []string
	for _, i := range list[:min(3, len(list))] {
		names = append(names, fmt.Sprintf("%s (%d MB)", i.ID, i.Limits.Memory>>20))
	}
	return names
}

// promise promises memory to a sandbox on disk before it is booted with limits l.
func (c *capacity) promise(s *Sandbox, l Limits) error {
	done, err := c.lock()
	if err != nil {
		return err
	}
	defer done()
	if s.current().Pause.Waking { // an earlier, failed resume could not take the promise back
		return nil
	}
	if err := c.checkCount(s.owner); err != nil {
		return err
	}
	if err := c.checkMemory(s.owner, l); err != nil {
		return err
	}
	return setWaking(s, true)
}

// lock keeps two promises, including those of other servers, from taking the same memory.
func (c *capacity) lock() (done func(), err error) {
	c.mu.Lock()
	lock, err := durable.Lock(filepath.Join(c.m.store.dir, ".room"), true)
	if err != nil {
		c.mu.Unlock()
		return nil, err
	}
	return func() {
		_ = lock.Close() // it was only locked
		c.mu.Unlock()
	}, nil
}

// checkCount returns an error if an owner may not have one more sandbox that is not on disk.
func (c *capacity) checkCount(owner string) error {
	alive := 0
	for _, s := range c.m.sandboxes.all() {
		if r := s.current(); r.Owner == owner && !r.ended() && (!r.onDisk() || r.Pause.Waking) {
			alive++
		}
	}
	if alive >= c.m.opts.MaxPerOwner {
		return fmt.Errorf("you have %d, the most one may have; kill one, or raise --max-sandboxes: %w", alive, ErrTooMany)
	}
	return nil
}

// asleepFactor is how many sandboxes, including those on disk, an owner may have for each that may be alive; the same holds for snapshots.
const asleepFactor = 10

// takeBack undoes promise.
func (c *capacity) takeBack(s *Sandbox) error {
	done, err := c.lock()
	if err != nil {
		return err
	}
	defer done()
	return setWaking(s, false)
}

// setWaking records whether memory is promised to a sandbox on disk.
func setWaking(s *Sandbox, waking bool) error {
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

// reserveDisk returns an error unless need bytes of a checkpoint may be written for an owner, and reserves them until done is called. If
// there is no room and Reclaim is set, it ends those of the owner's sandboxes that have been on disk for the longest time, provided that
// this makes enough room; their tombstones say so.
func (c *capacity) reserveDisk(owner string, need int64) (done func(), err error) {
	all := c.saving.Add(need) // what is reserved later does not count here
	release := sync.OnceFunc(func() { c.saving.Add(-need) })
	defer func() {
		if err != nil {
			release()
		}
	}()
	lack, why, err := c.lackOfDisk(all)
	if err == nil && lack > 0 {
		c.dropCopies(owner, lack)
		lack, why, err = c.lackOfDisk(min(all, c.saving.Load()))
	}
	if err != nil || lack <= 0 {
		return release, err
	}
	for range reclaimTries {
		if lack, err = c.reclaim(owner, lack); err != nil {
			return nil, err
		}
		if lack > 0 {
			return nil, fmt.Errorf("%s: %w", why, ErrNoDisk)
		}
		if lack, why, err = c.lackOfDisk(min(all, c.saving.Load())); err != nil || lack <= 0 {
			return release, err
		}
	}
	return nil, fmt.Errorf("%s: %w", why, ErrNoDisk)
}

// reclaimTries is how often sandboxes are chosen to be ended: an owner may resume one that was chosen.
const reclaimTries = 3

// reclaim ends an owner's sandboxes on disk, those that have been there for the longest time first, until lack bytes are freed, provided
// that this makes enough room. It returns what is missing after that. It stops at one that its owner resumes.
func (c *capacity) reclaim(owner string, lack int64) (missing int64, err error) {
	if !c.m.opts.Reclaim {
		return lack, nil
	}
	for _, i := range c.m.adoption.unowned(owner, nil) {
		c.m.adoption.claimOnDisk(i.ID)
	}
	var victims []*Sandbox
	for _, s := range c.onDisk(owner) {
		size, err := sizeOf(c.m.store.kept(s.current()))
		if err != nil || lack <= 0 {
			continue // it is just being resumed
		}
		victims = append(victims, s)
		lack -= size
	}
	if lack > 0 {
		return lack, nil
	}
	for _, s := range victims {
		c.m.log.Warn("disk space is needed: a paused sandbox is ended, unless it is just being resumed", "sandbox", s.ID(),
			"paused_since", s.Info().Changed)
		if err := s.endIf(Killed, CauseReclaimed, s.isAsleep); errors.Is(err, errMeanwhile) {
			return lack, nil
		} else if err != nil && !errors.Is(err, ErrState) {
			return lack, err
		}
	}
	return lack, nil
}

// isAsleep reports whether a sandbox is on disk and nothing is about to change that. s.mu is held.
func (s *Sandbox) isAsleep() bool {
	return s.changing == nil && s.ending == nil && !s.isLeft() && s.rec.onDisk() && !s.rec.Pause.Waking
}

// onDisk lists an owner's sandboxes on disk that this server has, those that have been there for the longest time first.
func (c *capacity) onDisk(owner string) []*Sandbox {
	var list []*Sandbox
	for _, s := range c.m.sandboxes.all() {
		s.mu.Lock()
		asleep := s.isAsleep()
		s.mu.Unlock()
		if s.owner == owner && asleep {
			list = append(list, s)
		}
	}
	slices.SortFunc(list, func(a, b *Sandbox) int { return a.current().Changed.Compare(b.current().Changed) })
	return list
}

// lackOfDisk returns how many bytes are missing to write need more, and why.
func (c *capacity) lackOfDisk(need int64) (lack int64, why string, err error) {
	var st syscall.Statfs_t
	if err := syscall.Statfs(c.m.opts.Dir, &st); err != nil {
		return 0, "", fmt.Errorf("look for room on disk: %w", err)
	}
	if free := int64(st.Bavail)*st.Bsize - spareDisk; need > free {
		return need - free, fmt.Sprintf("about %d MB needed, %d MB free in %s", need>>20, max(free, 0)>>20, c.m.opts.Dir), nil
	}
	if c.m.opts.DiskBudget <= 0 {
		return 0, "", nil
	}
	used, err := c.m.store.saved()
	if err != nil {
		return 0, "", err
	}
	if free := c.m.opts.DiskBudget - used; need > free {
		return need - free, fmt.Sprintf("about %d MB needed, %d MB of %d MB free for paused sandboxes and snapshots", need>>20,
			max(free, 0)>>20, c.m.opts.DiskBudget>>20), nil
	}
	return 0, "", nil
}

// dropCopies removes copies that an owner's sandboxes would need only if they failed, the oldest first, until lack bytes are freed.
// Sandboxes with Protect keep their copies.
func (c *capacity) dropCopies(owner string, lack int64) {
	var old []*Sandbox
	for _, s := range c.m.sandboxes.all() {
		if r := s.current(); s.owner == owner && r.Copy != nil && !r.onDisk() && !r.Protect.on() {
			old = append(old, s)
		}
	}
	slices.SortFunc(old, func(a, b *Sandbox) int { return a.current().copied().Compare(b.current().copied()) })
	for _, s := range old {
		if lack <= 0 {
			return
		}
		size, err := s.copies.drop()
		if err != nil {
			c.m.log.Error("remove a copy to make room", "sandbox", s.id, "error", err)
		}
		lack -= size
	}
}
