package guest

import (
	"os"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
)

// TestTreeMissing makes the kernel report a rename long after the name has changed, with other events between: the content of the directory
// is reported all the same.
func TestTreeMissing(t *testing.T) {
	root := t.TempDir()
	notify, err := newInotify()
	if err != nil {
		t.Fatal(err)
	}
	defer notify.file.Close()
	tr := &dirWatch{
		eventRing: newEventRing(), path: root, root: root, deep: true, notify: notify, known: &atomic.Int64{}, all: &atomic.Int64{},
		dirs: map[int32]string{}, wds: map[string]int32{}, files: map[string]bool{}, missing: map[string]bool{},
	}
	if err := tr.watchDir(root, false); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(root+"/new/x/y", 0o755); err != nil { // it was made as "old", and renamed
		t.Fatal(err)
	}
	wd := tr.wds[root]
	event := func(mask uint32, name string) rawEvent { return rawEvent{wd: wd, mask: mask, cookie: 1, name: name} }
	tr.take(event(unix.IN_CREATE|unix.IN_ISDIR, "old"))
	for range 3 {
		tr.take(event(unix.IN_MODIFY, "other"))
		tr.wake()
	}
	tr.renamed(event(unix.IN_MOVED_FROM|unix.IN_ISDIR, "old"), event(unix.IN_MOVED_TO|unix.IN_ISDIR, "new"))
	told := rebuilt{}
	for _, e := range tr.kept {
		told.apply(e)
	}
	for _, want := range []string{"/new", "/new/x", "/new/x/y"} {
		if !told[root+want] {
			t.Errorf("%s was not told: %+v", want, tr.kept)
		}
	}
	if told[root+"/old"] || len(tr.missing) > 0 {
		t.Errorf("%v, missing %v", told, tr.missing)
	}
}
