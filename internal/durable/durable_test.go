package durable

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

var errPower = errors.New("no power")

// TestReplaceFails cuts the power at each step: the old or the new content is there, and at most one file that no reader uses.
func TestReplaceFails(t *testing.T) {
	replaceFails(t, Disk.Replace)
	replaceFails(t, Disk.ReplaceVolatile)
}

func replaceFails(t *testing.T, replace func(d Disk, name string, body []byte, perm fs.FileMode) error) {
	t.Helper()
	for cut := range 10 {
		dir := t.TempDir()
		name := filepath.Join(dir, "state")
		if err := (Disk{}).Replace(name, []byte("old"), 0o600); err != nil {
			t.Fatal(err)
		}
		n := 0
		err := replace(Disk{Fault: func(_, _ string, size int) (int, error) {
			if n++; n > cut {
				return size / 2, errPower
			}
			return size, nil
		}}, name, []byte("new!"), 0o640)
		body, rerr := os.ReadFile(name)
		if rerr != nil || string(body) != "old" && string(body) != "new!" || (err == nil) != (string(body) == "new!") {
			t.Errorf("cut %d: %q, %v, %v", cut, body, err, rerr)
		}
		if entries, err := os.ReadDir(dir); err != nil || len(entries) > 2 || cut > 3 && len(entries) != 1 {
			t.Errorf("cut %d: %v, %v", cut, entries, err)
		}
	}
}

// TestReplaceErrors: an error of the host leaves no temporary file.
func TestReplaceErrors(t *testing.T) {
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "taken", "full"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := (Disk{}).Replace(filepath.Join(dir, "taken"), nil, 0o600); err == nil {
		t.Error("a directory was replaced")
	}
	if err := (Disk{}).Make(filepath.Join(dir, "x"), 0o600, func(*os.File) error { return errPower }); !errors.Is(err, errPower) {
		t.Error(err)
	}
	if err := (Disk{}).Replace(filepath.Join(dir, "absent", "x"), nil, 0o600); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
		t.Error(entries, err)
	}
}

// TestAppend: a line that was cut off is ended before the next one.
func TestAppend(t *testing.T) {
	name := filepath.Join(t.TempDir(), "log")
	for _, line := range []string{"one", "two"} {
		if err := (Disk{}).Append(name, []byte(line)); err != nil {
			t.Fatal(err)
		}
	}
	half := Disk{Fault: func(_, _ string, size int) (int, error) { return size / 2, errPower }}
	if err := half.Append(name, []byte("lost")); !errors.Is(err, errPower) {
		t.Error(err)
	}
	half.Fault = func(step, _ string, size int) (int, error) {
		if step == "write" {
			return size / 2, errPower
		}
		return size, nil
	}
	if err := half.Append(name, []byte("half")); !errors.Is(err, errPower) {
		t.Error(err)
	}
	if err := (Disk{}).Append(name, []byte("three")); err != nil {
		t.Fatal(err)
	}
	if body, err := os.ReadFile(name); err != nil || string(body) != "one\ntwo\nha\nthree\n" {
		t.Errorf("%q, %v", body, err)
	}
}

// TestLock: only one caller has the lock at a time, until it closes the file.
func TestLock(t *testing.T) {
	name := filepath.Join(t.TempDir(), "lock")
	first, err := Lock(name, false)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Lock(name, false); !errors.Is(err, unix.EWOULDBLOCK) {
		t.Error(err)
	}
	if err := first.Close(); err != nil {
		t.Error(err)
	}
	second, err := Lock(name, true)
	if err != nil {
		t.Fatal(err)
	}
	if err := second.Close(); err != nil {
		t.Error(err)
	}
}

// TestInstall: of many that install the same directory at once, one makes it; what a dead process or a failure leaves is no installation.
func TestInstall(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "all")
	if err := os.MkdirAll(filepath.Join(dir, unfinished+"dead"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := Install(dir, "thing", func(string) error { return errPower }); !errors.Is(err, errPower) {
		t.Error(err)
	}
	var mu sync.Mutex
	built := 0
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			path, err := Install(dir, "thing", func(temp string) error {
				mu.Lock()
				defer mu.Unlock()
				built++
				return os.WriteFile(filepath.Join(temp, "file"), []byte("x"), 0o644)
			})
			if _, serr := os.Stat(filepath.Join(path, "file")); err != nil || serr != nil {
				t.Error(path, err, serr)
			}
		})
	}
	all.Wait()
	entries, err := os.ReadDir(dir)
	if err != nil || built != 1 {
		t.Error(built, err)
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), unfinished) {
			t.Error("left:", e.Name())
		}
	}
}

// TestExchangeAndRemove: names are swapped, and trees are removed up to a power cut.
func TestExchangeAndRemove(t *testing.T) {
	dir := t.TempDir()
	a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b")
	for name, text := range map[string]string{a: "1", b: "2"} {
		if err := errors.Join((Disk{}).Mkdir(name), Create(filepath.Join(name, "f"), []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	if err := Create(filepath.Join(a, "f"), nil, 0o600); !errors.Is(err, os.ErrExist) {
		t.Error(err)
	}
	if err := (Disk{}).Exchange(a, b); err != nil {
		t.Fatal(err)
	}
	if body, err := os.ReadFile(filepath.Join(a, "f")); err != nil || string(body) != "2" {
		t.Errorf("%q, %v", body, err)
	}
	cut := Disk{Fault: func(step, name string, _ int) (int, error) {
		if name == a {
			return 0, errPower
		}
		return 0, nil
	}}
	if err := cut.RemoveAll(a); !errors.Is(err, errPower) {
		t.Error(err)
	}
	if entries, err := os.ReadDir(a); err != nil || len(entries) != 0 {
		t.Error(entries, err)
	}
	if err := errors.Join((Disk{}).RemoveAll(a), (Disk{}).RemoveAll(a)); err != nil {
		t.Error(err)
	}
}
