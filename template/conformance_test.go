package template

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
	"golang.org/x/tools/txtar"

	"soulbox.dev/soulbox/internal/erofs"
	"soulbox.dev/soulbox/internal/sandboxtest"
)

// oracle is buildah, from Debian, with a store of its own.
type oracle struct {
	*testing.T
	root string
}

func (o oracle) run(args ...string) string {
	o.Helper()
	out, err := exec.Command("buildah", append([]string{"--root", o.root + "/root", "--runroot", o.root + "/run", "--storage-driver", "vfs"}, args...)...).CombinedOutput()
	if err != nil {
		o.Fatalf("buildah %s: %v\n%s", args[0], err, out)
	}
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	return lines[len(lines)-1]
}

// TestConformance: what a Dockerfile makes is what buildah makes of it, file by file.
func TestConformance(t *testing.T) {
	w := newWorkshop(t)
	o := oracle{t, t.TempDir()}
	if os.Geteuid() == 0 {
		if _, err := exec.LookPath("buildah"); err != nil {
			if os.Getenv("SOULBOX_TEST_ALL") != "" {
				t.Fatal(err)
			}
			t.Skip("buildah is not there to compare with")
		}
		o.prepare(w)
	} else if os.Getenv(oracleVar) == "" {
		t.Skip("what buildah makes is not known: it needs root, and then this runs again")
	}
	cases := unpackCases(t, filepath.Join("testdata", "conformance.txtar"))
	if len(cases) < 40 {
		t.Errorf("%d cases", len(cases))
	}
	for _, name := range slices.Sorted(maps.Keys(cases)) {
		t.Run(name, func(t *testing.T) { compare(t, w, oracle{t, o.root}, name, cases[name]) })
	}
}

// oracleVar names the directory in which root's run of the tests leaves what buildah has made, for that of the ordinary user.
const oracleVar = sandboxtest.OracleVar

// prepare gives buildah the template mini.
func (o oracle) prepare(w *workshop) {
	t := o.T
	mini := filepath.Join(t.TempDir(), "mini")
	if err := os.Mkdir(mini, 0o755); err != nil {
		t.Fatal(err)
	}
	m, err := w.store.Get("", "mini")
	if err != nil {
		t.Fatal(err)
	}
	r, err := w.store.open(m.Layers[0])
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	writeFile(t, filepath.Join(mini, "mini.tar"), r)
	writeFile(t, filepath.Join(mini, "Dockerfile"), strings.NewReader("FROM scratch\nADD mini.tar /\nENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n"))
	o.run("bud", "-t", "mini", mini)
}

// made is what buildah makes of a case, or has made.
func (o oracle) made(name, dir string) (files map[string]string) {
	kept := filepath.Join(os.Getenv(oracleVar), name+".json")
	if os.Geteuid() != 0 {
		if err := readJSON(kept, &files); err != nil {
			o.Fatal(err)
		}
		return files
	}
	o.run("bud", "--isolation", "chroot", "--pull-never", "--format", "oci", "-t", name, dir)
	container := o.run("from", "--pull-never", name)
	files = describeDir(o.T, o.run("mount", container))
	o.run("rm", container)
	o.run("rmi", name)
	body, err := json.Marshal(files)
	if err == nil && os.Getenv(oracleVar) != "" {
		err = os.WriteFile(kept, body, 0o644)
	}
	if err != nil {
		o.Fatal(err)
	}
	return files
}

func compare(t *testing.T, w *workshop, o oracle, name, dir string) {
	dockerfile, err := os.ReadFile(filepath.Join(dir, "Dockerfile"))
	if err != nil {
		t.Fatal(err)
	}
	files, err := w.store.ContextDir(context.Background(), dir)
	if err != nil {
		t.Fatal(err)
	}
	defer files.Close()
	var log strings.Builder
	built, err := w.builder.Build(t.Context(), BuildRequest{Name: name, Dockerfile: string(dockerfile), Context: files}, func(l Line) { fmt.Fprintf(&log, "%s: %s\n", l.Step, l.Text) })
	if err != nil {
		t.Fatalf("%v\n%s", err, &log)
	}
	ours, err := openFiles(w.store.file("images", strings.TrimPrefix(built.Image, "sha256:")+".erofs"))
	if err != nil {
		t.Fatal(err)
	}
	defer ours.Close()
	got := map[string]string{}
	describeTree(t, ours, "", ours.root, map[*erofs.Node]string{}, got)
	want := o.made(name, dir)
	for path, is := range want {
		if got[path] != is {
			t.Errorf("%q is %q, of buildah %q", path, got[path], is)
		}
	}
	for path, is := range got {
		if want[path] == "" {
			t.Errorf("%q is %q, of buildah it is not there", path, is)
		}
	}
}

// unpackCases gives the directories of the cases.
func unpackCases(t *testing.T, name string) map[string]string {
	t.Helper()
	archive, err := txtar.ParseFile(name)
	if err != nil {
		t.Fatal(err)
	}
	root, cases := t.TempDir(), map[string]string{}
	for _, f := range archive.Files {
		writeFile(t, filepath.Join(root, f.Name), bytes.NewReader(f.Data))
		first, _, _ := strings.Cut(f.Name, "/")
		cases[first] = filepath.Join(root, first)
	}
	for _, dir := range cases {
		script := filepath.Join(dir, "setup.sh")
		if !exists(script) {
			continue
		}
		cmd := exec.Command("bash", "-e", script)
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", dir, err, out)
		}
		if err := os.Remove(script); err != nil {
			t.Fatal(err)
		}
	}
	return cases
}

func writeFile(t *testing.T, name string, from io.Reader) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(f, from); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

// foreign is what a builder puts there itself, and no file of the image.
func foreign(path string) bool {
	for _, p := range []string{"/proc", "/sys", "/dev", "/etc/hosts", "/etc/resolv.conf", "/etc/hostname", "/run/.containerenv", "/run/secrets", "/.soulbox", "/var/lib/soulbox", "/run/soulbox"} {
		if path == p || strings.HasPrefix(path, p+"/") {
			return true
		}
	}
	return false
}

func describeTree(t *testing.T, f *Files, path string, n *erofs.Node, seen map[*erofs.Node]string, all map[string]string) {
	t.Helper()
	if foreign(path) {
		return
	}
	is := fmt.Sprintf("%o %d:%d", n.Mode, n.UID, n.GID)
	switch n.Type() {
	case unix.S_IFREG:
		sum := sha256.New()
		if _, err := io.Copy(sum, f.image.Content(n.Data)); err != nil {
			t.Fatal(err)
		}
		is += fmt.Sprintf(" %d %x", n.Data.Size, sum.Sum(nil)[:6])
		if first := seen[n]; first != "" {
			is += " = " + first
		} else {
			seen[n] = path
		}
	case unix.S_IFLNK:
		is += " -> " + n.Target
	}
	if path != "" {
		all[path] = is
	}
	for _, base := range n.Names() {
		describeTree(t, f, path+"/"+base, n.Children[base], seen, all)
	}
}

func describeDir(t *testing.T, root string) map[string]string {
	t.Helper()
	all, seen := map[string]string{}, map[uint64]string{}
	err := filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
		path := strings.TrimPrefix(name, root)
		if err != nil || path == "" {
			return err
		}
		if foreign(path) {
			return nil
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		st := info.Sys().(*syscall.Stat_t)
		is := fmt.Sprintf("%o %d:%d", st.Mode, st.Uid, st.Gid)
		switch {
		case info.Mode().IsRegular():
			body, err := os.ReadFile(name)
			if err != nil {
				return err
			}
			sum := sha256.Sum256(body)
			is += fmt.Sprintf(" %d %x", st.Size, sum[:6])
			if first := seen[st.Ino]; first != "" {
				is += " = " + first
			} else {
				seen[st.Ino] = path
			}
		case info.Mode()&fs.ModeSymlink != 0:
			target, err := os.Readlink(name)
			if err != nil {
				return err
			}
			is += " -> " + target
		}
		all[path] = is
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}
