package template

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

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
		if top := strings.Split(m.Source, "/")[1]; !strings.HasPrefix(top, "usr") && !strings.HasPrefix(top, "bin") && !strings.HasPrefix(top, "sbin") && !strings.HasPrefix(top, "lib") {
			t.Errorf("%s of the host is shown", m.Source)
		}
	}
	for _, want := range []string{"etc/passwd", "etc/ld.so.cache", "home/user/.bashrc", "tmp", "proc", "bin", "etc/mtab"} {
		if _, err := os.Lstat(filepath.Join(host.Root, want)); err != nil {
			t.Error(err)
		}
	}
	// Nothing of the host that not everybody may read, nor anything that names its users, peers or file systems.
	for _, never := range []string{"etc/gshadow", "etc/sudoers", "etc/ssh", "etc/ssl/private", "etc/resolv.conf", "etc/machine-id", "etc/cron.d", "etc/environment", "etc/apt"} {
		if _, err := os.Lstat(filepath.Join(host.Root, never)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is in the template", never)
		}
	}
	passwd, err := os.ReadFile(filepath.Join(host.Root, "etc/passwd"))
	if err != nil || strings.Count(string(passwd), "\n") != 4 {
		t.Errorf("%s %v", passwd, err)
	}
	if info, err := os.Stat(filepath.Join(host.Root, "tmp")); err != nil || info.Mode().Perm() != 0o777 || info.Mode()&fs.ModeSticky == 0 {
		t.Errorf("/tmp is %v %v", info.Mode(), err)
	}
	if _, err := store.Template(t.Context(), "", "other"); !errors.Is(err, sandbox.ErrNoTemplate) {
		t.Error(err)
	}
}

// TestHostIsShared: servers that start together agree on one directory, and leave nothing else.
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

func TestCopyTree(t *testing.T) {
	from, to := t.TempDir(), filepath.Join(t.TempDir(), "to")
	for name, mode := range map[string]fs.FileMode{"public": 0o644, "private": 0o600, "dir/inner": 0o644} {
		path := filepath.Join(from, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(name), mode); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(from, "secret"), 0o750); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/etc/shadow", filepath.Join(from, "link")); err != nil {
		t.Fatal(err)
	}
	if err := copyTree(from, to); err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, name := range []string{"public", "private", "dir/inner", "secret", "link"} {
		if _, err := os.Lstat(filepath.Join(to, name)); err == nil {
			got = append(got, name)
		}
	}
	if strings.Join(got, " ") != "public dir/inner link" { // a link is copied as a link: it leads nowhere in a sandbox
		t.Fatal(got)
	}
}
