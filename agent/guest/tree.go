package guest

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"soulbox.dev/soulbox/agent"
)

// Bounds of a watched tree.
const (
	maxTreeEvents = 8192
	maxTreeDirs   = 16 << 10
	maxTreeBytes  = 4 << 20 // of the paths in its events
	maxKnown      = 8 << 20 // bytes of the file names that all trees together remember
	readDirPart   = 500
	maxIgnore     = 32
	pairTime      = 10 * time.Millisecond // between the two halves of a rename
)

// Ops of a TreeEvent.
const (
	opCreate = "create"
	opWrite  = "write"
	opRemove = "remove"
	opRename = "rename" // From is the old path
	opSave   = "save"   // From was renamed to an existing file, as editors save
	opAttrib = "attrib"
	opLost   = "lost" // events are missing here
)

// tree watches a directory and, if recursive, all directories in it, including later ones. It keeps events in a ring, so that they can be
// read again. It is safe for concurrent use.
type tree struct {
	id     string
	root   string // the path in the request
	only   string // the name of the only file that counts, or ""
	ignore []*regexp.Regexp
	deep   bool
	notify *inotify
	known  *atomic.Int64 // size of the names that all trees remember

	// The fields below belong to the goroutine that follows.
	dirs  map[int32]string // watched directories, by watch descriptor
	wds   map[string]int32
	files map[string]bool // known files: to tell save from rename, and new files from those found before
	// missing are directories that were gone when they were looked at. An event will tell what became of them, perhaps much later, because
	// the kernel changes a name before it reports that. If they were renamed, their content is looked at under the new name.
	missing map[string]bool

	mu        sync.Mutex
	ring      []agent.TreeEvent
	bytes     int              // of the paths in ring
	first     int64            // sequence number of ring[0]
	delivered int64            // all events before this number were read
	written   map[string]int64 // number of the last opWrite of each path
	changed   chan struct{}
	gone      bool // the directory does not exist any more
	used      time.Time
}

// openTree begins a watch. Once it returns, no change is missed.
func openTree(id string, r agent.TreeRequest, known *atomic.Int64) (_ *tree, err error) {
	if err := checkPath("watch", r.Path); err != nil {
		return nil, err
	}
	if len(r.Ignore) > maxIgnore {
		return nil, agent.Invalid("watch: %d patterns to ignore, at most %d are possible", len(r.Ignore), maxIgnore)
	}
	t := &tree{id: id, root: path.Clean(r.Path), deep: r.Recursive, known: known, dirs: map[int32]string{}, wds: map[string]int32{},
		files: map[string]bool{}, missing: map[string]bool{},
		written: map[string]int64{}, changed: make(chan struct{}), used: time.Now()}
	for _, glob := range r.Ignore {
		if glob == "" || len(glob) > maxPattern {
			return nil, agent.Invalid("watch: a pattern to ignore has %d bytes, it may have 1 to %d", len(glob), maxPattern)
		}
		re, err := compileGlob(strings.TrimSuffix(glob, "/"))
		if err != nil {
			return nil, err
		}
		t.ignore = append(t.ignore, re)
	}
	info, err := os.Stat(t.root)
	if err != nil {
		return nil, err
	}
	if !info.IsDir() {
		t.root, t.only, t.deep = path.Dir(t.root), path.Base(t.root), false
	}
	if t.notify, err = newInotify(); err != nil {
		return nil, err
	}
	if err := t.enter(t.root, false); err != nil {
		_ = t.notify.file.Close()
		t.forget()
		return nil, &fs.PathError{Op: "watch", Path: r.Path, Err: err}
	}
	go t.follow()
	return t, nil
}

// enter watches a directory, then reads it: in this order nothing is created unseen. With tell, what it finds is reported as created.
func (t *tree) enter(dir string, tell bool) error {
	if len(t.dirs) >= maxTreeDirs {
		t.lost()
		return nil
	}
	wd, err := t.notify.add(dir, dir == t.root)
	if err != nil {
		return err
	}
	if old, known := t.dirs[wd]; known {
		delete(t.wds, old) // it was found under another name
	}
	t.dirs[wd], t.wds[dir] = dir, wd
	f, err := os.Open(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return err // it was removed or renamed after add
	}
	if err != nil {
		t.lost()
		return nil
	}
	defer f.Close()
	delete(t.missing, dir)
	for {
		entries, err := f.ReadDir(readDirPart) // in parts: a directory may be larger than memory
		for _, e := range entries {
			name := path.Join(dir, e.Name())
			if t.ignored(name) {
				continue
			}
			isNew := t.learn(name)
			if tell && isNew {
				t.emit(agent.TreeEvent{Op: opCreate, Path: name, Dir: e.IsDir()})
			}
			if e.IsDir() && t.deep {
				t.descend(name, tell)
			}
		}
		if err == io.EOF || errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			t.lost()
			return nil
		}
	}
}

// descend enters a directory of the tree, if it still exists.
func (t *tree) descend(name string, tell bool) {
	err := t.enter(name, tell)
	switch {
	case (errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR)) && len(t.missing) < maxTreeDirs:
		t.missing[name] = true
	case err != nil:
		t.lost() // for example no more watches: changes there are not seen
	}
}

// ignored reports whether changes of a path are not reported: its name, or its path below the root, matches a pattern.
func (t *tree) ignored(name string) bool {
	below := strings.TrimPrefix(name, strings.TrimSuffix(t.root, "/")+"/")
	if t.only != "" && below != t.only || strings.HasPrefix(path.Base(name), tempPrefix) {
		return true
	}
	for _, re := range t.ignore {
		if re.MatchString(below) || re.MatchString(path.Base(name)) {
			return true
		}
	}
	return false
}

// learn records that a path exists, and reports whether that is new.
func (t *tree) learn(name string) (isNew bool) {
	if t.files[name] {
		return false
	}
	if size := int64(len(name)) + nameCost; t.known.Load()+size < maxKnown {
		t.files[name] = true
		t.known.Add(size)
	}
	return true
}

// nameCost is the memory that a name takes besides its bytes.
const nameCost = 48

// unlearn records that a path does not exist any more.
func (t *tree) unlearn(name string) {
	if t.files[name] {
		delete(t.files, name)
		t.known.Add(-int64(len(name)) - nameCost)
	}
}

func (t *tree) forget() {
	for name := range t.files {
		t.known.Add(-int64(len(name)) - nameCost)
	}
	t.files = nil
}

// follow handles events until the watch is closed.
func (t *tree) follow() {
	defer t.forget()
	var from *rawEvent // the first half of a rename
	for {
		if from != nil {
			_ = t.notify.file.SetReadDeadline(time.Now().Add(pairTime))
		}
		events, err := t.notify.read()
		if from != nil {
			_ = t.notify.file.SetReadDeadline(time.Time{})
			if errors.Is(err, os.ErrDeadlineExceeded) {
				t.movedAway(*from)
				t.tell()
				from = nil
				continue
			}
		}
		if err != nil {
			return // the watch is closed
		}
		for _, e := range events {
			if from != nil && !(e.has(unix.IN_MOVED_TO) && e.cookie == from.cookie) {
				t.movedAway(*from)
				from = nil
			}
			switch {
			case e.has(unix.IN_MOVED_FROM):
				half := e
				from = &half
			case from != nil:
				t.renamed(*from, e)
				from = nil
			default:
				t.take(e)
			}
		}
		t.tell()
	}
}

// take handles one event that is not a rename within the tree.
func (t *tree) take(e rawEvent) {
	if e.has(unix.IN_Q_OVERFLOW) {
		t.again()
		return
	}
	dir, ok := t.dirs[e.wd]
	if !ok {
		return // its directory is not watched any more
	}
	isDir := e.has(unix.IN_ISDIR)
	name := path.Join(dir, e.name)
	switch {
	case e.has(unix.IN_IGNORED):
		delete(t.dirs, e.wd)
		if t.wds[dir] == e.wd {
			delete(t.wds, dir)
		}
		if dir == t.root {
			t.end()
		}
	case e.has(unix.IN_MOVE_SELF) && dir == t.root:
		t.end()
	case e.name == "" || t.ignored(name): // of the directory itself: the event of its parent counts
	case e.has(unix.IN_CREATE | unix.IN_MOVED_TO):
		t.arrived(e, name, false)
	case e.has(unix.IN_DELETE):
		t.unlearn(name)
		t.found(name)
		t.emit(agent.TreeEvent{Op: opRemove, Path: name, Dir: isDir})
	case e.has(unix.IN_MODIFY):
		t.emit(agent.TreeEvent{Op: opWrite, Path: name})
	case e.has(unix.IN_ATTRIB):
		t.emit(agent.TreeEvent{Op: opAttrib, Path: name, Dir: isDir})
	}
}

// arrived handles a new name; whole means a file that a call of the host has written.
func (t *tree) arrived(e rawEvent, name string, whole bool) {
	isDir := e.has(unix.IN_ISDIR)
	whole = whole && !isDir
	if t.learn(name) {
		t.emit(agent.TreeEvent{Op: opCreate, Path: name, Dir: isDir, Whole: whole})
	} else if e.has(unix.IN_MOVED_TO) {
		t.emit(agent.TreeEvent{Op: opSave, Path: name, Whole: whole})
	}
	if !isDir || !t.deep {
		return
	}
	if _, watched := t.wds[name]; !watched || e.has(unix.IN_MOVED_TO) {
		t.descend(name, true)
	}
}

// movedAway handles the first half of a rename whose second half is not in the tree.
func (t *tree) movedAway(e rawEvent) {
	dir, ok := t.dirs[e.wd]
	if !ok {
		return
	}
	name := path.Join(dir, e.name)
	if t.ignored(name) {
		return
	}
	if e.has(unix.IN_ISDIR) {
		t.leave(name)
	} else {
		t.unlearn(name)
	}
	t.emit(agent.TreeEvent{Op: opRemove, Path: name, Dir: e.has(unix.IN_ISDIR)})
}

// renamed handles both halves of a rename.
func (t *tree) renamed(from, to rawEvent) {
	source, ok1 := t.dirs[from.wd]
	target, ok2 := t.dirs[to.wd]
	if !ok1 || !ok2 { // handle each half by itself
		t.movedAway(from)
		t.take(to)
		return
	}
	old, name, isDir := path.Join(source, from.name), path.Join(target, to.name), to.has(unix.IN_ISDIR)
	switch hidden := t.ignored(old); {
	case t.ignored(name):
		t.movedAway(from)
		return
	case hidden:
		t.arrived(to, name, strings.HasPrefix(from.name, tempPrefix))
		return
	}
	e := agent.TreeEvent{Op: opRename, Path: name, From: old, Dir: isDir}
	if !isDir && t.files[name] {
		e.Op = opSave
	}
	if !isDir {
		t.unlearn(old)
		t.learn(name)
		t.emit(e)
		return
	}
	t.rebase(old, name)
	t.learn(name)
	t.emit(e)
	missing := t.found(old)
	for _, p := range missing {
		t.descend(path.Join(name, strings.TrimPrefix(p, old)), true)
	}
	if len(missing) == 0 && t.deep && t.mistaken(name) {
		t.again()
	}
}

// mistaken reports whether a path is now another directory than the one that is watched under it: the old name may have been another
// directory's when it was looked at.
func (t *tree) mistaken(dir string) bool {
	wd, err := t.notify.add(dir, false)
	return err == nil && t.dirs[wd] != dir
}

// found removes from t.missing the directories at or below a path whose fate is now known, and returns them.
func (t *tree) found(name string) (all []string) {
	for p := range t.missing {
		if p == name || strings.HasPrefix(p, name+"/") {
			delete(t.missing, p)
			all = append(all, p)
		}
	}
	return all
}

// rebase gives everything below a directory its new path.
func (t *tree) rebase(old, name string) {
	moved := func(p string) (string, bool) {
		if p == old {
			return name, true
		}
		rest, ok := strings.CutPrefix(p, old+"/")
		return path.Join(name, rest), ok
	}
	for wd, dir := range t.dirs {
		if next, ok := moved(dir); ok {
			delete(t.wds, dir)
			t.dirs[wd] = next
		}
	}
	for wd, dir := range t.dirs {
		t.wds[dir] = wd
	}
	var files []string
	for p := range t.files {
		if _, ok := moved(p); ok {
			files = append(files, p)
		}
	}
	for _, p := range files {
		t.unlearn(p)
	}
	for _, p := range files {
		next, _ := moved(p)
		t.learn(next)
	}
}

// leave ends the watching of everything at or below a path.
func (t *tree) leave(name string) {
	t.found(name)
	below := func(p string) bool { return p == name || strings.HasPrefix(p, name+"/") }
	for wd, dir := range t.dirs {
		if below(dir) {
			t.notify.remove(wd)
			delete(t.dirs, wd)
			delete(t.wds, dir)
		}
	}
	for p := range t.files {
		if below(p) {
			t.unlearn(p)
		}
	}
}

// again looks at the whole tree again after events were lost.
func (t *tree) again() {
	t.lost()
	t.forget()
	t.files = map[string]bool{}
	for wd, dir := range t.dirs {
		if dir != t.root {
			t.notify.remove(wd)
		}
	}
	clear(t.dirs)
	clear(t.wds)
	clear(t.missing)
	if err := t.enter(t.root, false); err != nil {
		t.end()
	}
}

// lost records that events are missing.
func (t *tree) lost() { t.emit(agent.TreeEvent{Op: opLost, Path: t.root}) }

// end records that there is nothing left to watch.
func (t *tree) end() {
	t.mu.Lock()
	t.gone = true
	t.mu.Unlock()
	t.tell()
}
