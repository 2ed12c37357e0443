package guest

import (
	"path"
	"slices"
	"strings"
	"sync"
)

// turns has what changes a name done one after the other: an edit is of the text that it has read, and what is to be new finds no other. It
// is of our own calls alone; a program of the guest is seen by what it has changed (editOnce). Its zero value is ready for use, and safe
// for concurrent use.
type turns struct {
	mu    sync.Mutex
	names map[string]*turn
}

// turn is that of one name.
type turn struct {
	mu   sync.Mutex
	want int // callers that have it or wait for it; guarded by turns.mu
}

// take waits for the turn of some names, each as placeOf gives it.
func (t *turns) take(names ...string) (done func()) {
	slices.Sort(names) // two that want the same ones do not wait for each other
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

// placeOf is the one name of what has several by links of its directory. What cannot be told fails where the name is used.
func placeOf(name string) string {
	name = path.Clean(name)
	dir, err := resolve(path.Dir(name))
	if err != nil {
		return name
	}
	return strings.TrimSuffix(dir, "/") + "/" + path.Base(name)
}

// fileOf is placeOf the file that a name leads to by links of its own, too.
func fileOf(name string) string {
	if real, err := resolve(name); err == nil {
		return real
	}
	return placeOf(name)
}
