package guest

import (
	"errors"
	"os"
	"path"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"soulbox.dev/soulbox/agent"
)

// run handles events until the watch is closed.
func (w *dirWatch) run() {
	defer w.end() // who waits for an event is told
	defer w.forget()
	var from *rawEvent // the first half of a rename
	for {
		if from != nil {
			_ = w.notify.file.SetReadDeadline(time.Now().Add(pairTime))
		}
		events, err := w.notify.read()
		if from != nil {
			_ = w.notify.file.SetReadDeadline(time.Time{})
			if errors.Is(err, os.ErrDeadlineExceeded) {
				w.movedAway(*from)
				w.wake()
				from = nil
				continue
			}
		}
		if err != nil {
			return // the watch is closed
		}
		for _, e := range events {
			w.onPath.notice(e)
			if from != nil && !(e.has(unix.IN_MOVED_TO) && e.cookie == from.cookie) {
				w.movedAway(*from)
				from = nil
			}
			switch {
			case e.has(unix.IN_MOVED_FROM):
				half := e
				from = &half
			case from != nil:
				w.renamed(*from, e)
				from = nil
			default:
				w.take(e)
			}
		}
		if w.onPath.isStale() {
			w.again()
		}
		w.wake()
	}
}

// take handles one event that is not a rename within the tree.
func (w *dirWatch) take(e rawEvent) {
	if e.has(unix.IN_Q_OVERFLOW) {
		w.again()
		return
	}
	dir, ok := w.dirs[e.wd]
	if !ok {
		return // its directory is not watched any more
	}
	isDir := e.has(unix.IN_ISDIR)
	name := path.Join(dir, e.name)
	switch {
	case e.has(unix.IN_IGNORED):
		delete(w.dirs, e.wd)
		w.count()
		if w.wds[dir] == e.wd {
			delete(w.wds, dir)
		}
		if dir == w.root {
			w.lostRoot()
		}
	case e.has(unix.IN_MOVE_SELF) && dir == w.root:
		w.lostRoot()
	case e.name == "" && dir == w.root && w.only == "" && w.onPath != nil && e.has(unix.IN_ATTRIB):
		w.emit(agent.TreeEvent{Op: opAttrib, Path: w.root, Dir: true})
	case e.name == "" || w.ignored(name): // of the directory itself: the event of its parent counts
	case e.has(unix.IN_CREATE | unix.IN_MOVED_TO):
		w.arrived(e, name, false)
	case e.has(unix.IN_DELETE):
		w.unlearn(name)
		w.settled(name)
		w.emit(agent.TreeEvent{Op: opRemove, Path: name, Dir: isDir})
	case e.has(unix.IN_MODIFY):
		w.emit(agent.TreeEvent{Op: opWrite, Path: name})
	case e.has(unix.IN_ATTRIB):
		w.emit(agent.TreeEvent{Op: opAttrib, Path: name, Dir: isDir})
	}
}

// arrived handles a new name; whole means a file that a call of the host has written.
func (w *dirWatch) arrived(e rawEvent, name string, whole bool) {
	isDir := e.has(unix.IN_ISDIR)
	whole = whole && !isDir
	if w.only != "" && w.onPath != nil && !isRegular(name) { // a symlink or a directory took the file's place
		w.onPath.stale = true
	}
	if w.learn(name) {
		w.emit(agent.TreeEvent{Op: opCreate, Path: name, Dir: isDir, Whole: whole})
	} else if e.has(unix.IN_MOVED_TO) {
		w.emit(agent.TreeEvent{Op: opSave, Path: name, Whole: whole})
	}
	if !isDir || !w.deep {
		return
	}
	if _, watched := w.wds[name]; !watched || e.has(unix.IN_MOVED_TO) {
		w.descend(name, true)
	}
}

// movedAway handles the first half of a rename whose second half is not in the tree.
func (w *dirWatch) movedAway(e rawEvent) {
	dir, ok := w.dirs[e.wd]
	if !ok {
		return
	}
	name := path.Join(dir, e.name)
	if w.ignored(name) {
		return
	}
	if e.has(unix.IN_ISDIR) {
		w.unwatch(name)
	} else {
		w.unlearn(name)
	}
	w.emit(agent.TreeEvent{Op: opRemove, Path: name, Dir: e.has(unix.IN_ISDIR)})
}

// renamed handles both halves of a rename.
func (w *dirWatch) renamed(from, to rawEvent) {
	source, ok1 := w.dirs[from.wd]
	target, ok2 := w.dirs[to.wd]
	if !ok1 || !ok2 { // handle each half by itself
		w.movedAway(from)
		w.take(to)
		return
	}
	old, name, isDir := path.Join(source, from.name), path.Join(target, to.name), to.has(unix.IN_ISDIR)
	switch hidden := w.ignored(old); {
	case w.ignored(name):
		w.movedAway(from)
		return
	case hidden:
		w.arrived(to, name, strings.HasPrefix(from.name, tempPrefix))
		return
	}
	e := agent.TreeEvent{Op: opRename, Path: name, From: old, Dir: isDir}
	if !isDir && w.files[name] {
		e.Op = opSave
	}
	if !isDir {
		w.unlearn(old)
		w.learn(name)
		w.emit(e)
		return
	}
	w.rebase(old, name)
	w.learn(name)
	w.emit(e)
	missing := w.settled(old)
	for _, p := range missing {
		w.descend(path.Join(name, strings.TrimPrefix(p, old)), true)
	}
	if len(missing) == 0 && w.deep && w.mistaken(name) {
		w.again()
	}
}

// mistaken reports whether a path is now another directory than the one that is watched under it: the old name may have been another
// directory's when it was looked at.
func (w *dirWatch) mistaken(dir string) bool {
	wd, err := w.notify.add(dir, false)
	return err == nil && w.dirs[wd] != dir
}

// settled removes from w.missing the directories at or below a path whose fate is now known, and returns them.
func (w *dirWatch) settled(name string) (all []string) {
	for p := range w.missing {
		if p == name || strings.HasPrefix(p, name+"/") {
			delete(w.missing, p)
			all = append(all, p)
		}
	}
	return all
}

// rebase gives everything below a directory its new path.
func (w *dirWatch) rebase(old, name string) {
	moved := func(p string) (string, bool) {
		if p == old {
			return name, true
		}
		rest, ok := strings.CutPrefix(p, old+"/")
		return path.Join(name, rest), ok
	}
	for wd, dir := range w.dirs {
		if next, ok := moved(dir); ok {
			delete(w.wds, dir)
			w.dirs[wd] = next
		}
	}
	for wd, dir := range w.dirs {
		w.wds[dir] = wd
	}
	var files []string
	for p := range w.files {
		if _, ok := moved(p); ok {
			files = append(files, p)
		}
	}
	for _, p := range files {
		w.unlearn(p)
	}
	for _, p := range files {
		next, _ := moved(p)
		w.learn(next)
	}
}

// unwatch ends the watching of everything at or below a path.
func (w *dirWatch) unwatch(name string) {
	w.settled(name)
	below := func(p string) bool { return p == name || strings.HasPrefix(p, name+"/") }
	for wd, dir := range w.dirs {
		if below(dir) {
			w.notify.remove(wd)
			delete(w.dirs, wd)
			delete(w.wds, dir)
		}
	}
	w.count()
	for p := range w.files {
		if below(p) {
			w.unlearn(p)
		}
	}
}
