package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"regexp"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"soulbox.dev/soulbox/agent"
)

// Bounds of a watch.
const (
	maxWatchDirs = 8 << 10 // of all watches together: gVisor's kernel keeps a descriptor of the host for each
	maxKnown     = 8 << 20 // bytes of the file names that all watches together remember
	readDirPart  = 500
	maxIgnore    = 32
	pairTime     = 10 * time.Millisecond // between the two halves of a rename
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

// dirWatch watches a directory and, if recursive, all directories in it, including later ones; or one file, in its directory, because
// editors replace files. It is the only engine: a watch that outlasts a call and a watch of a stream read its ring. It is safe for
// concurrent use.
type dirWatch struct {
	*eventRing
	id     string // "" if the watch belongs to a stream
	path   string // in the request
	ignore []*regexp.Regexp
	notify *inotify
	known  *atomic.Int64 // size of the names that all watches remember
	all    *atomic.Int64 // directories that all watches have
	onPath *pathWatch    // nil if the watch ends when its directory is gone

	// The fields below belong to the goroutine that handles events.
	root string // the directory
	only string // the name of the only file that counts, or ""
	deep bool
	dirs map[int32]string // watched directories, by watch descriptor
	wds  map[string]int32
	// files are known files: to tell save from rename, and new files from those found before. A stream tells neither: its watch has none.
	files map[string]bool
	// missing are directories that were gone when they were looked at. An event will tell what became of them, perhaps much later, because
	// the kernel changes a name before it reports that. If they were renamed, their content is looked at under the new name.
	missing map[string]bool
	counted int // of dirs, in all
}

// newDirWatch begins a watch. Once it returns, no change is missed. With follow the watch goes where the path leads, as long as the caller
// wants: through symlinks, and back to what was removed and is made again; Recursive and follow exclude each other. A look at a large tree
// takes minutes: it ends with ctx.
func newDirWatch(ctx context.Context, r agent.TreeRequest, follow bool, known, all *atomic.Int64) (_ *dirWatch, err error) {
	w := &dirWatch{eventRing: newEventRing(), path: path.Clean(r.Path), deep: r.Recursive, known: known, all: all, dirs: map[int32]string{},
		wds: map[string]int32{}, files: map[string]bool{}, missing: map[string]bool{}}
	if w.ignore, err = compileIgnore(r.Ignore); err != nil {
		return nil, err
	}
	if w.notify, err = newInotify(); err != nil {
		return nil, err
	}
	if follow {
		w.onPath, w.once = &pathWatch{notify: w.notify}, true
	}
	unwanted := context.AfterFunc(ctx, func() { _ = w.close() }) // then no directory can be added
	err = w.locate()
	if !unwanted() && err == nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		_ = w.notify.file.Close()
		w.forget()
		return nil, &fs.PathError{Op: "watch", Path: r.Path, Err: err}
	}
	go w.run()
	return w, nil
}

func compileIgnore(globs []string) (ignore []*regexp.Regexp, err error) {
	if len(globs) > maxIgnore {
		return nil, agent.Invalid("watch: %d patterns to ignore, at most %d are possible", len(globs), maxIgnore)
	}
	for _, glob := range globs {
		if glob == "" || len(glob) > maxPattern {
			return nil, agent.Invalid("watch: a pattern to ignore has %d bytes, it may have 1 to %d", len(glob), maxPattern)
		}
		re, err := compileGlob(strings.TrimSuffix(glob, "/"))
		if err != nil {
			return nil, err
		}
		ignore = append(ignore, re)
	}
	return ignore, nil
}

// locate watches what is at the path now. With onPath it watches the way there, too: also if it fails.
func (w *dirWatch) locate() (err error) {
	real := w.path
	if w.onPath != nil {
		if real, err = w.onPath.trace(w.path); err != nil {
			return err
		}
	}
	info, err := os.Stat(w.path)
	if err != nil {
		return err
	}
	w.root, w.only = w.path, ""
	if !info.IsDir() {
		w.root, w.only, w.deep = path.Dir(real), path.Base(real), false
	}
	return w.watchDir(w.root, false)
}

// close ends the watch, and reports whether that was the first call.
func (w *dirWatch) close() bool { return w.notify.file.Close() == nil }

// await is read for a caller that waits for an event until ctx ends. Related events arrive within a moment: gather.
func (w *dirWatch) await(ctx context.Context, from int64, limit int, gather time.Duration) (agent.TreeResult, error) {
	for {
		r, changed, err := w.read(from, limit)
		if err != nil {
			return r, fmt.Errorf("watch %s: %w", w.id, err)
		}
		r.Watch = w.id
		if ctx.Err() != nil || len(r.Events) > 0 || r.Lost || r.Gone {
			return r, nil
		}
		select {
		case <-changed:
			select {
			case <-time.After(gather):
			case <-ctx.Done():
			}
		case <-ctx.Done():
		}
	}
}

// watchDir watches a directory, then reads it: in this order nothing is created unseen. With tell, what it finds is reported as created.
// The watch of a stream needs no names, so it reads nothing.
func (w *dirWatch) watchDir(dir string, tell bool) error {
	if dir != w.root && w.all.Load() >= maxWatchDirs {
		w.lost()
		return nil
	}
	wd, err := w.notify.add(dir, dir == w.root)
	if err != nil {
		return err
	}
	if old, known := w.dirs[wd]; known {
		delete(w.wds, old) // it was found under another name
	}
	w.dirs[wd], w.wds[dir] = dir, wd
	w.count()
	if w.onPath != nil { // it keeps no names
		return nil
	}
	if w.only != "" { // no other name counts
		if _, err := os.Lstat(path.Join(dir, w.only)); err == nil {
			w.learn(path.Join(dir, w.only))
		}
		return nil
	}
	return w.readDir(dir, tell)
}

// readDir learns the names in a directory, and watches those below that are directories.
func (w *dirWatch) readDir(dir string, tell bool) error {
	flags := os.O_RDONLY | unix.O_DIRECTORY | unix.O_NONBLOCK // a FIFO that took its place would hold the watch for ever
	if dir != w.root {
		flags |= unix.O_NOFOLLOW
	}
	f, err := os.OpenFile(dir, flags, 0)
	if isAbsent(err) {
		return err // it was removed, renamed or replaced after its watch began
	}
	if err != nil {
		w.lost()
		return nil
	}
	defer f.Close()
	delete(w.missing, dir)
	for {
		entries, err := f.ReadDir(readDirPart) // in parts: a directory may be larger than memory
		for _, e := range entries {
			name := path.Join(dir, e.Name())
			if w.ignored(name) {
				continue
			}
			isNew := w.learn(name)
			if tell && isNew {
				w.emit(agent.TreeEvent{Op: opCreate, Path: name, Dir: e.IsDir()})
			}
			if e.IsDir() && w.deep {
				w.descend(name, tell)
			}
		}
		if err == io.EOF || errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			w.lost()
			return nil
		}
	}
}

// descend watches a directory of the tree, if it still exists.
func (w *dirWatch) descend(name string, tell bool) {
	err := w.watchDir(name, tell)
	switch {
	case isAbsent(err) && len(w.missing) < maxWatchDirs:
		w.missing[name] = true
	case err != nil:
		w.lost() // for example no more watches: changes there are not seen
	}
}

// isAbsent reports whether an error means that there is no such directory now.
func isAbsent(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP)
}

// ignored reports whether changes of a path are not reported: its name, or its path below the root, matches a pattern.
func (w *dirWatch) ignored(name string) bool {
	below := strings.TrimPrefix(name, strings.TrimSuffix(w.root, "/")+"/")
	if w.only != "" && below != w.only || strings.HasPrefix(path.Base(name), tempPrefix) {
		return true
	}
	for _, re := range w.ignore {
		if re.MatchString(below) || re.MatchString(path.Base(name)) {
			return true
		}
	}
	return false
}

// learn records that a path exists, and reports whether that is new.
func (w *dirWatch) learn(name string) (isNew bool) {
	if w.onPath != nil {
		return true
	}
	if w.files[name] {
		return false
	}
	if size := int64(len(name)) + nameCost; w.known.Load()+size < maxKnown {
		w.files[name] = true
		w.known.Add(size)
	}
	return true
}

// nameCost is the memory that a name takes besides its bytes.
const nameCost = 48

// unlearn records that a path does not exist any more.
func (w *dirWatch) unlearn(name string) {
	if w.files[name] {
		delete(w.files, name)
		w.known.Add(-int64(len(name)) - nameCost)
	}
}

// count counts the directories of this watch among those of all.
func (w *dirWatch) count() {
	w.all.Add(int64(len(w.dirs) - w.counted))
	w.counted = len(w.dirs)
}

// forget gives back what the watch has taken of what all watches share.
func (w *dirWatch) forget() {
	w.forgetNames()
	clear(w.dirs)
	w.count()
}

func (w *dirWatch) forgetNames() {
	for name := range w.files {
		w.known.Add(-int64(len(name)) - nameCost)
	}
	clear(w.files)
}

// again looks at everything again after events were lost, or when the path may lead elsewhere.
func (w *dirWatch) again() {
	w.lost()
	w.forgetNames()
	var before []int32 // what is still watched afterwards keeps its watch
	for wd, dir := range w.dirs {
		if dir == w.root || w.onPath.watches(wd) {
			before = append(before, wd)
		} else {
			w.notify.remove(wd)
		}
	}
	clear(w.dirs)
	w.count()
	clear(w.wds)
	clear(w.missing)
	defer w.lost() // a reader may have been told, and have looked, before all was watched again
	if w.onPath == nil {
		if err := w.watchDir(w.root, false); err != nil {
			w.end()
		}
		return
	}
	before = append(before, w.onPath.wds()...)
	if err := w.locate(); err != nil && !isAbsent(err) { // where nothing is, the way to it is watched
		w.end()
		return
	}
	for _, wd := range before {
		if _, watched := w.dirs[wd]; !watched && !w.onPath.watches(wd) {
			w.notify.remove(wd)
		}
	}
}

// lost records that events are missing.
func (w *dirWatch) lost() { w.emit(agent.TreeEvent{Op: opLost, Path: w.path}) }

// lostRoot handles the end of the watched directory.
func (w *dirWatch) lostRoot() {
	if w.onPath != nil {
		w.onPath.stale = true
		return
	}
	w.end()
}
