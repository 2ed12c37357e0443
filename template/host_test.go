package template

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"soulbox.dev/soulbox/internal/durable"
	"soulbox.dev/soulbox/sandbox"
)

func TestHost(t *testing.T) {
	store := &Store{Dir: filepath.Join(t.TempDir(), "templates")}
	host, err := store.Template(t.Context(), "", "")
	if err != nil {
		t.Fatal(err)
	}
	if host.Name != HostName {
		t.Fatal(host.Name)
	}
	for _, m := range host.Mounts {
		if top := strings.Split(m.Source, "/")[1]; !strings.HasPrefix(top, "usr") && !strings.HasPrefix(top, "bin") &&
			!strings.HasPrefix(top, "sbin") && !strings.HasPrefix(top, "lib") {
			t.Errorf("%s of the host is shown", m.Source)
		}
	}
	for _, want := range []string{"etc/passwd", "etc/ld.so.cache", "home/user/.bashrc", "tmp", "proc", "bin", "etc/mtab"} {
		if _, err := os.Lstat(filepath.Join(host.Root, want)); err != nil {
			t.Error(err)
		}
	}
	// The root shows no file of the host that is not readable for everybody, and none that names its users, peers or file systems.
	for _, never := range []string{"etc/gshadow", "etc/sudoers", "etc/sudoers.d", "etc/ssh/ssh_host_rsa_key", "etc/ssl/private",
		"etc/resolv.conf", "etc/machine-id", "etc/cron.d", "etc/environment", "etc/apt"} {
		if _, err := os.Lstat(filepath.Join(host.Root, never)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is in the template", never)
		}
	}
	passwd, err := os.ReadFile(filepath.Join(host.Root, "etc/passwd"))
	if err != nil || strings.Count(string(passwd), "\n") != 6 {
		t.Errorf("%s %v", passwd, err)
	}
	if info, err := os.Stat(filepath.Join(host.Root, "tmp")); err != nil || info.Mode().Perm() != 0o777 || info.Mode()&fs.ModeSticky == 0 {
		t.Errorf("/tmp is %v %v", info.Mode(), err)
	}
	if _, err := store.Template(t.Context(), "", "other"); !errors.Is(err, sandbox.ErrNoTemplate) {
		t.Error(err)
	}
}

// TestHostIsShared: servers that start at the same time agree on one directory, and leave nothing else.
func TestHostIsShared(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "templates")
	var mu sync.Mutex
	roots := map[string]bool{}
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			host, err := (&Store{Dir: dir}).Template(t.Context(), "", HostName)
			if err != nil {
				t.Error(err)
			}
			mu.Lock()
			defer mu.Unlock()
			roots[host.Root] = true
		})
	}
	all.Wait()
	entries, err := os.ReadDir(dir)
	if err != nil || len(roots) != 1 || len(entries) != 2 { // and the lock
		t.Fatalf("%v %v %v", roots, entries, err)
	}
}

// TestHostIsFound: another server on the same state finds the root by its content. It writes nothing and waits for no lock.
func TestHostIsFound(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "templates")
	first, err := (&Store{Dir: dir}).Template(t.Context(), "", HostName)
	if err != nil {
		t.Fatal(err)
	}
	// A writer would need the lock and change the directory.
	lock, err := durable.Lock(filepath.Join(dir, ".lock"), false)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	before, err := os.Stat(dir)
	if err != nil {
		t.Fatal(err)
	}
	second, err := (&Store{Dir: dir}).Template(t.Context(), "", HostName)
	if err != nil || second.Root != first.Root {
		t.Fatalf("%s, then %s: %v", first.Root, second.Root, err)
	}
	if after, err := os.Stat(dir); err != nil || !after.ModTime().Equal(before.ModTime()) {
		t.Errorf("written at %v, not only at %v: %v", after.ModTime(), before.ModTime(), err)
	}
}

// TestHostIsWhole: what is written is exactly what was digested.
func TestHostIsWhole(t *testing.T) {
	tree, err := hostTree("/", nil, map[string]string{"bin": "usr/bin"})
	if err != nil {
		t.Fatal(err)
	}
	root := t.TempDir()
	if err := tree.write(root); err != nil {
		t.Fatal(err)
	}
	got := newRootTree()
	err = filepath.WalkDir(root, func(name string, entry fs.DirEntry, err error) error {
		rel, relErr := filepath.Rel(root, name)
		if err = errors.Join(err, relErr); err != nil || rel == "." {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		e := rootEntry{mode: info.Mode() & (fs.ModeDir | fs.ModeSticky | 0o777)}
		switch {
		case info.Mode()&fs.ModeSymlink != 0:
			e.mode = fs.ModeSymlink
			e.link, err = os.Readlink(name)
		case !info.IsDir():
			e.text, err = os.ReadFile(name)
		}
		got.entries[rel] = e
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for name, e := range tree.entries {
		if e.mode.IsRegular() {
			e.mode |= 0o600 // the server's user can always write
			tree.entries[name] = e
		}
	}
	if got.digest() != tree.digest() {
		t.Errorf("%d entries were written of %d", len(got.entries), len(tree.entries))
	}
}
