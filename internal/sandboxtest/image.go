package sandboxtest

import (
	"archive/tar"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"soulbox.dev/soulbox/internal/erofs"
)

// programs are the programs of this machine that an Image contains; those that the machine does not have are left out.
const programs = "bash sh ls cat cp mv rm ln mkdir rmdir chmod chown touch stat find sort head tail grep sed tr cut seq sleep wc env id " +
	"true false dd df du date echo " +
	"printf readlink realpath basename dirname tee test tar gzip sha256sum mkfifo mknod ps kill perl xargs uname hostname mktemp timeout " +
	"sync od cmp diff su setfattr getfattr " +
	"truncate expr nproc md5sum install stty tput"

// Image makes a small EROFS image with programs of this machine and the libraries that they need, a user and a home.
func Image(t testing.TB, dir string) string {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(dir, "image.erofs"), os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := imageBuilder{t: t, w: erofs.NewWriter(f), root: imageDir(0o755), dirs: map[string]*erofs.Node{}}
	b.fill()
	if err := b.w.Finish(b.root); err != nil {
		t.Fatal(err)
	}
	return f.Name()
}

type imageBuilder struct {
	t    testing.TB
	w    *erofs.Writer
	root *erofs.Node
	dirs map[string]*erofs.Node
}

func imageDir(mode uint16) *erofs.Node {
	return &erofs.Node{Mode: unix.S_IFDIR | mode, Time: time.Unix(1_600_000_000, 0), Children: map[string]*erofs.Node{}}
}

// dir returns a directory of the image, made if missing.
func (b imageBuilder) dir(name string) *erofs.Node {
	if name == "/" || name == "." {
		return b.root
	}
	parent := b.dir(path.Dir(name))
	if parent.Children[path.Base(name)] == nil {
		parent.Children[path.Base(name)] = imageDir(0o755)
	}
	return parent.Children[path.Base(name)]
}

func (b imageBuilder) fill() {
	needed := map[string]bool{}
	for name := range strings.FieldsSeq(programs) {
		found, err := exec.LookPath(name)
		if err != nil {
			continue
		}
		real, err := filepath.EvalSymlinks(found)
		if err != nil {
			b.t.Fatal(err)
		}
		b.copy(real, "/usr/bin/"+name)
		out, _ := exec.Command("ldd", real).Output() // scripts have none
		for word := range strings.FieldsSeq(string(out)) {
			if strings.HasPrefix(word, "/") {
				needed[word] = true
			}
		}
	}
	for name := range needed {
		real, err := filepath.EvalSymlinks(name)
		if err != nil {
			b.t.Fatal(err)
		}
		b.copy(real, path.Join("/usr", strings.TrimPrefix(name, "/usr")))
	}
	modules, err := filepath.Glob("/usr/lib/*/perl-base")
	if err != nil {
		b.t.Fatal(err)
	}
	for _, dir := range modules {
		err := filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
			if err == nil && d.Type().IsRegular() {
				b.copy(name, name)
			}
			return err
		})
		if err != nil {
			b.t.Fatal(err)
		}
	}
	for link, target := range map[string]string{"bin": "usr/bin", "sbin": "usr/bin", "lib": "usr/lib", "lib64": "usr/lib64"} {
		b.root.Children[link] = &erofs.Node{Mode: unix.S_IFLNK | 0o777, Target: target}
	}
	b.dir("/tmp").Mode = unix.S_IFDIR | 0o1777
	b.dir("/tmp/.X11-unix") // gVisor mounts a tmpfs on an empty /tmp
	for _, name := range []string{"/root", "/proc", "/sys", "/dev", "/var/tmp", "/run"} {
		b.dir(name)
	}
	home := b.dir("/home/user")
	home.UID, home.GID = 1000, 1000
	b.text("/etc/passwd",
		"root:x:0:0:root:/root:/bin/bash\nuser:x:1000:1000:user:/home/user:/bin/bash\n"+
			"nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n")
	b.text("/etc/group", "root:x:0:\nuser:x:1000:\nnogroup:x:65534:\n")
	if _, err := os.Stat("/etc/ld.so.cache"); err == nil { // without it every program searches many places for its libraries
		b.copy("/etc/ld.so.cache", "/etc/ld.so.cache")
	}
	b.text("/etc/hosts", "127.0.0.1\tlocalhost\n")
}

func (b imageBuilder) copy(from, to string) {
	f, err := os.Open(from)
	if err != nil {
		b.t.Fatal(err)
	}
	defer f.Close()
	data, err := b.w.Add(f)
	if err != nil {
		b.t.Fatal(err)
	}
	b.dir(path.Dir(to)).Children[path.Base(to)] = &erofs.Node{Mode: unix.S_IFREG | 0o755, Data: data, Time: time.Unix(1_600_000_000, 0)}
}

func (b imageBuilder) text(name, text string) {
	data, err := b.w.Add(strings.NewReader(text))
	if err != nil {
		b.t.Fatal(err)
	}
	b.dir(path.Dir(name)).Children[path.Base(name)] = &erofs.Node{Mode: unix.S_IFREG | 0o644, Data: data}
}

// ImageTar makes an Image as a tar file, which "soulbox-mcp template import" accepts.
func ImageTar(t testing.TB, dir string) string {
	t.Helper()
	image, err := erofs.Open(Image(t, dir))
	if err != nil {
		t.Fatal(err)
	}
	defer image.Close()
	root, err := image.Tree()
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(filepath.Join(dir, "image.tar"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w := tar.NewWriter(f)
	if err := errors.Join(writeTar(w, image, "", root), w.Close()); err != nil {
		t.Fatal(err)
	}
	return f.Name()
}

func writeTar(w *tar.Writer, image *erofs.Image, name string, n *erofs.Node) error {
	h := &tar.Header{Name: name, Mode: int64(n.Mode & 0o7777), Uid: int(n.UID), Gid: int(n.GID), ModTime: n.Time, Linkname: n.Target,
		Size: n.Data.Size, Typeflag: tar.TypeReg}
	switch n.Type() {
	case unix.S_IFDIR:
		h.Typeflag, h.Name = tar.TypeDir, name+"/"
	case unix.S_IFLNK:
		h.Typeflag = tar.TypeSymlink
	}
	if name != "" {
		if err := w.WriteHeader(h); err != nil {
			return err
		}
	}
	if h.Typeflag == tar.TypeReg {
		if _, err := io.Copy(w, image.Content(n.Data)); err != nil {
			return err
		}
	}
	for _, base := range n.Names() {
		if err := writeTar(w, image, path.Join(name, base), n.Children[base]); err != nil {
			return err
		}
	}
	return nil
}
