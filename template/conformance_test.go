package template

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"hash"
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

// recordName holds what buildah makes of each case: the differences from the template mini, which consists of this machine's programs. They
// are recorded because buildah needs root and minutes. UPDATE_GOLDEN=1 ('make golden') records them anew, as root and with Debian's
// buildah.
const recordName = "testdata/buildah.json"

// record is what buildah makes of one case.
type record struct {
	Case  string            `json:"case"`  // its hash: a case that has changed must be recorded anew
	Files map[string]string `json:"files"` // by path; "" means removed
}

// TestConformance: a build makes the same files as buildah makes of the same Dockerfile.
func TestConformance(t *testing.T) {
	update := os.Getenv("UPDATE_GOLDEN") != ""
	if !update {
		sandboxtest.AsUserAlone(t)
	}
	w := newWorkshop(t)
	mini, err := w.store.Get("", "mini")
	if err != nil {
		t.Fatal(err)
	}
	base := w.describe(mini.Image)
	cases, hashes := unpackCases(t, filepath.Join("testdata", "conformance.txtar"))
	if len(cases) < 40 {
		t.Errorf("%d cases", len(cases))
	}
	records := map[string]record{}
	if update {
		o := oracle{t, t.TempDir()}
		o.prepare(w)
		for name, dir := range cases {
			records[name] = record{hashes[name], differences(base, o.made(name, dir))}
		}
		body, err := json.MarshalIndent(records, "", " ")
		if err == nil {
			err = os.WriteFile(recordName, append(body, '\n'), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	} else if err := readJSON(recordName, &records); err != nil {
		t.Fatal(err)
	}
	for name := range records {
		if cases[name] == "" {
			t.Errorf("%s is recorded, but is no case: record anew, by 'make golden' as root", name)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(cases)) {
		t.Run(name, func(t *testing.T) {
			if records[name].Case != hashes[name] {
				t.Fatal("the case is not as buildah had it: record anew, by 'make golden' as root")
			}
			compare(t, w, name, cases[name], base, records[name].Files)
		})
	}
}

// differences returns the files that a tree adds to, or removes from, the base. A tree without any file of the base did not begin from it.
func differences(base, files map[string]string) map[string]string {
	all, begun := map[string]string{}, false
	for path, is := range base {
		begun = begun || strings.HasPrefix(is, "100") && files[path] == is
	}
	if !begun {
		return files
	}
	for path, is := range files {
		if base[path] != is {
			all[path] = is
		}
	}
	for path := range base {
		if files[path] == "" {
			all[path] = ""
		}
	}
	return all
}

// oracle is buildah, from Debian, with its own store.
type oracle struct {
	*testing.T
	root string
}

func (o oracle) run(args ...string) string {
	o.Helper()
	out, err := exec.Command("buildah", append([]string{"--root", o.root + "/root", "--runroot", o.root + "/run", "--storage-driver",
		"vfs"}, args...)...).CombinedOutput()
	if err != nil {
		o.Fatalf("buildah %s: %v\n%s", args[0], err, out)
	}
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	return lines[len(lines)-1]
}

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
	r, err := w.store.open(w.Context(), payer{}, m.Layers[0])
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	writeFile(t, filepath.Join(mini, "mini.tar"), r)
	writeFile(t, filepath.Join(mini, "Dockerfile"),
		strings.NewReader("FROM scratch\nADD mini.tar /\nENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n"))
	o.run("bud", "-t", "mini", mini)
}

// made returns what buildah makes of a case.
func (o oracle) made(name, dir string) (files map[string]string) {
	o.run("bud", "--isolation", "chroot", "--pull-never", "--format", "oci", "-t", name, dir)
	container := o.run("from", "--pull-never", name)
	files = describeDir(o.T, o.run("mount", container))
	o.run("rm", container)
	o.run("rmi", name)
	return files
}

// describe returns the files of an image.
func (w *workshop) describe(image string) map[string]string {
	w.Helper()
	files, err := openFiles(w.store.file("images", strings.TrimPrefix(image, "sha256:")+".erofs"))
	if err != nil {
		w.Fatal(err)
	}
	defer files.Close()
	all := map[string]string{}
	describeTree(w.T, files, "", files.root, map[*erofs.Node]string{}, all)
	return all
}

func compare(t *testing.T, w *workshop, name, dir string, base, want map[string]string) {
	dockerfile, err := os.ReadFile(filepath.Join(dir, "Dockerfile"))
	if err != nil {
		t.Fatal(err)
	}
	files, err := w.store.ContextDir(context.Background(), "", dir)
	if err != nil {
		t.Fatal(err)
	}
	defer files.Close()
	var log strings.Builder
	built, err := w.builder.Build(t.Context(), BuildRequest{Name: name, Dockerfile: string(dockerfile), Context: files},
		func(l Line) { fmt.Fprintf(&log, "%s: %s\n", l.Step, l.Text) })
	if err != nil {
		t.Fatalf("%v\n%s", err, &log)
	}
	got := differences(base, w.describe(built.Image))
	for path, is := range want {
		if have, ok := got[path]; have != is || !ok {
			t.Errorf("%q is %q, of buildah %q", path, have, is)
		}
	}
	for path, is := range got {
		if _, ok := want[path]; !ok {
			t.Errorf("%q is %q, of buildah as in mini", path, is)
		}
	}
}

// unpackCases returns the directories of the cases, and a hash of each.
func unpackCases(t *testing.T, name string) (cases, hashes map[string]string) {
	t.Helper()
	archive, err := txtar.ParseFile(name)
	if err != nil {
		t.Fatal(err)
	}
	root, sums := t.TempDir(), map[string]hash.Hash{}
	cases, hashes = map[string]string{}, map[string]string{}
	for _, f := range archive.Files {
		writeFile(t, filepath.Join(root, f.Name), bytes.NewReader(f.Data))
		first, _, _ := strings.Cut(f.Name, "/")
		if cases[first] = filepath.Join(root, first); sums[first] == nil {
			sums[first] = sha256.New()
		}
		fmt.Fprintf(sums[first], "%s %d %s", f.Name, len(f.Data), f.Data)
	}
	for name, sum := range sums {
		hashes[name] = fmt.Sprintf("%x", sum.Sum(nil)[:8])
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
	return cases, hashes
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

// foreign reports whether a path belongs to the builder, not to the image.
func foreign(path string) bool {
	for _, p := range []string{"/proc", "/sys", "/dev", "/etc/hosts", "/etc/resolv.conf", "/etc/hostname", "/run/.containerenv",
		"/run/secrets", "/.soulbox", "/var/lib/soulbox", "/run/soulbox"} {
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
