package guest

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
)

// TestResolveReplaced: a file whose place another one takes all the time has one name, never "NAME (deleted)", as the kernel calls it then.
func TestResolveReplaced(t *testing.T) {
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	name, odd := filepath.Join(dir, "f"), filepath.Join(dir, "g (deleted)")
	for _, name := range []string{name, odd} {
		if err := os.WriteFile(name, nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	var over atomic.Bool
	replaced := make(chan error)
	go func() {
		for i := 0; !over.Load(); i++ {
			next := fmt.Sprintf("%s.%d", name, i)
			if err := errors.Join(os.WriteFile(next, nil, 0o644), os.Rename(next, name)); err != nil {
				replaced <- err
				return
			}
		}
		replaced <- nil
	}()
	for range 20_000 {
		if real, err := resolve(name); err != nil || real != name {
			t.Errorf("%s: %v", real, err)
			break
		}
	}
	over.Store(true)
	if err := <-replaced; err != nil {
		t.Fatal(err)
	}
	if real, err := resolve(odd); err != nil || real != odd {
		t.Errorf("a file of such a name is %s: %v", real, err)
	}
	f, err := os.Open(odd)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := os.Remove(odd); err != nil {
		t.Fatal(err)
	}
	if real, err := resolve(fmt.Sprintf("/proc/self/fd/%d", f.Fd())); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("one that is no more is %s: %v", real, err)
	}
}
