package guest

import (
	"maps"
	"os"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// maxLinks is how many symlinks a path may lead through, as in Linux.
const maxLinks = 40

// maxSteps is how many directories a pathWatch watches. On a longer way, which only an attacker makes, later changes are missed.
const maxSteps = 128

// pathWatch watches the way to a watched path: the directories that it leads through, with those behind symlinks. When a name on it
// changes, the path may lead elsewhere. It is nil for a watch that does not follow its path.
type pathWatch struct {
	notify *inotify
	steps  map[int32]map[string]bool // watched directories, and the names in them that lead on
	stale  bool                      // a name on the way has changed since trace
}

// trace watches the way to a path, and returns the path without symlinks. If nothing is there, it watches the way as far as it goes.
func (r *pathWatch) trace(name string) (real string, err error) {
	r.steps, r.stale = map[int32]map[string]bool{}, false
	at, rest := "/", strings.Split(name, "/")
	for links := 0; len(rest) > 0; {
		next := rest[0]
		rest = rest[1:]
		switch next {
		case "", ".":
			continue
		case "..":
			at = path.Dir(at)
			continue
		}
		var wd int32
		watched := len(r.steps) < maxSteps
		if watched { // first, so that no change is missed; where it fails, only changes of this name are
			var err error
			wd, err = r.notify.add(at, false)
			watched = err == nil
		}
		here := path.Join(at, next)
		info, err := os.Lstat(here)
		if err == nil && len(rest) == 0 && !info.IsDir() && info.Mode()&os.ModeSymlink == 0 {
			return here, nil // a file: its own changes are events, and lead nowhere else
		}
		if watched {
			if r.steps[wd] == nil {
				r.steps[wd] = map[string]bool{}
			}
			r.steps[wd][next] = true
		}
		if err != nil {
			return "", err
		}
		if at = here; info.Mode()&os.ModeSymlink == 0 {
			continue
		}
		if links++; links > maxLinks {
			return "", unix.ELOOP
		}
		target, err := os.Readlink(here)
		if err != nil {
			return "", err
		}
		if at = path.Dir(here); path.IsAbs(target) {
			at = "/"
		}
		rest = append(strings.Split(target, "/"), rest...)
	}
	return at, nil
}

// notice finds out whether an event changes the way.
func (r *pathWatch) notice(e rawEvent) {
	switch {
	case r == nil:
	case e.has(unix.IN_IGNORED):
		r.stale = r.stale || r.steps[e.wd] != nil
		delete(r.steps, e.wd)
	case r.steps[e.wd][e.name]:
		r.stale = r.stale || e.has(unix.IN_CREATE|unix.IN_DELETE|unix.IN_MOVED_FROM|unix.IN_MOVED_TO)
	}
}

func (r *pathWatch) isStale() bool { return r != nil && r.stale }

// watches reports whether a watch belongs to the way.
func (r *pathWatch) watches(wd int32) bool { return r != nil && r.steps[wd] != nil }

// wds returns the watches of the way.
func (r *pathWatch) wds() []int32 { return slices.Collect(maps.Keys(r.steps)) }

// isRegular reports whether a path is neither a directory nor a symlink; what does not exist any more counts as such.
func isRegular(name string) bool {
	info, err := os.Lstat(name)
	return err != nil || !info.IsDir() && info.Mode()&os.ModeSymlink == 0
}
