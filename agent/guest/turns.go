package guest

import (
	"path"
	"slices"
	"strings"
	"sync"
)

// turns makes changes of one name wait for each other: so an edit changes the text that it has read, and a file that must be new replaces
// no other. This covers only the agent's own calls; changes by programs of the guest are detected (editOnce). The zero value is ready for
// use, and safe for concurrent use.
type turns struct {
	mu    sync.Mutex
	names map[string]*turn
}

// turn is the turn of one name.
type turn struct {
	mu   sync.Mutex
	want int // callers that have it or wait for it; guarded by turns.mu
}

// take waits for the turns of some names, each in the form of placeOf.
func (t *turns) take(names ...string) (done func()) {
	slices.Sort(names) // in one order for all, so that two callers cannot wait for each other
	names = slices.Compact(names)
	var taken []*turn
	for _, name := range names {
		t.mu.Lock()
		n := t.names[name]
		if n == nil {
			if t.names == nil {
				t.names = map[string]*turn{}
			}
			n = &turn{}
			t.names[name] = n
		}
		n.want++
		t.mu.Unlock()
		n.mu.Lock()
		taken = append(taken, n)
	}
	return func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		for i, name := range names {
			taken[i].mu.Unlock()
			if taken[i].want--; taken[i].want == 0 {
				delete(t.names, name)
			}
		}
	}
}

// placeOf returns the one name of a path that may have several because of symlinks in its directory. If the directory cannot be resolved,
// the use of the name will fail.
func placeOf(name string) string {
	name = path.Clean(name)
	dir, err := resolve(path.Dir(name))
	if err != nil {
		return name
	}
	return strings.TrimSuffix(dir, "/") + "/" + path.Base(name)
}

// fileOf is placeOf, but also follows the symlinks of the name itself.
func fileOf(name string) string {
	if real, err := resolve(name); err == nil {
		return real
	}
	return placeOf(name)
}
