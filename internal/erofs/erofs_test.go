package erofs

import (
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

var stamp = time.Unix(1_700_000_000, 123_456_789)

func dir(children map[string]*Node) *Node {
	return &Node{Mode: unix.S_IFDIR | 0o755, Time: stamp, Children: children}
}

// write makes an image of the tree that build returns.
func write(t *testing.T, build func(add func(string) Extent) *Node) string {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "image.erofs"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w := NewWriter(f)
	root := build(func(text string) Extent {
		e, err := w.Add(strings.NewReader(text))
		if err != nil {
			t.Fatal(err)
		}
		return e
	})
	if err := w.Finish(root); err != nil {
		t.Fatal(err)
	}
	return f.Name()
}

// sample has every kind of file, and directories with one entry, with many, and with just enough to fill a block.
func sample(add func(string) Extent) *Node {
	file := func(text string) *Node {
		return &Node{Mode: unix.S_IFREG | 0o644, UID: 1000, GID: 70_000, Time: stamp, Data: add(text)}
	}
	shared := file("two names")
	all := map[string]*Node{
		"empty": file(""), "small": file("small"), "block": file(strings.Repeat("x", BlockSize)),
		"more":  file(strings.Repeat("y", BlockSize+1)),
		"zeros": file(strings.Repeat("\x00", 3*BlockSize)), "large": file(strings.Repeat("0123456789abcdef", 100_000)),
		"hard": shared, "!first": file("sorts before ."), "-dash": file("-"), strings.Repeat("n", 255): file("long name"),
		"ünïcödé": file("u"),
		"link":    {Mode: unix.S_IFLNK | 0o777, Time: stamp, Target: "small"},
		"far":     {Mode: unix.S_IFLNK | 0o777, Time: stamp, Target: strings.Repeat("t/", 2000)},
		"null":    {Mode: unix.S_IFCHR | 0o666, Time: stamp, Device: unix.Mkdev(1, 3)},
		"disk":    {Mode: unix.S_IFBLK | 0o600, Time: stamp, Device: unix.Mkdev(259, 0x12345)},
		"fifo":    {Mode: unix.S_IFIFO | 0o600, Time: stamp}, "sock": {Mode: unix.S_IFSOCK | 0o600, Time: stamp},
		"suid": {Mode: unix.S_IFREG | 0o4755, Time: time.Unix(-5, 0), Data: add("#!/bin/sh\n")}, "nothing": dir(nil),
	}
	for _, n := range []int{1, 100, 300, 3000} {
		children := map[string]*Node{"hard": shared}
		for i := range n {
			children[fmt.Sprintf("f%d", i)] = file(fmt.Sprint(i))
		}
		all[fmt.Sprintf("dir%d", n)] = dir(children)
	}
	for size := 230; size <= 236; size++ { // names that end at the end of a block, and close to it
		children := map[string]*Node{}
		for i := range 34 {
			children[fmt.Sprintf("%0*d", size, i)] = file("")
		}
		all[fmt.Sprintf("tight%d", size)] = dir(children)
	}
	all["sticky"] = &Node{Mode: unix.S_IFDIR | 0o1777, Time: stamp}
	return dir(all)
}

// TestReadBack: what is written is read back unchanged.
func TestReadBack(t *testing.T) {
	var want *Node
	name := write(t, func(add func(string) Extent) *Node { want = sample(add); return want })
	image, err := Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer image.Close()
	got, err := image.Tree()
	if err != nil {
		t.Fatal(err)
	}
	same(t, "", got, want)
	if got.Children["hard"] != got.Children["dir1"].Children["hard"] {
		t.Error("hard links are not one file")
	}
}

func same(t *testing.T, name string, a, b *Node) {
	t.Helper()
	wantTime := b.Time
	if wantTime.Before(time.Unix(0, 0)) {
		wantTime = time.Unix(0, 0)
	}
	if a.Mode != b.Mode || a.UID != b.UID || a.GID != b.GID || !a.Time.Equal(wantTime) || a.Target != b.Target || a.Device != b.Device ||
		a.Data != b.Data || len(a.Children) != len(b.Children) {
		t.Errorf("%s: %+v, want %+v", name, a, b)
	}
	for child, n := range b.Children {
		if a.Children[child] == nil {
			t.Errorf("%s/%s is missing", name, child)
			continue
		}
		same(t, name+"/"+child, a.Children[child], n)
	}
}

// TestOracle: erofs-utils find no error in the image, and extract the same files from it.
func TestOracle(t *testing.T) {
	if _, err := exec.LookPath("fsck.erofs"); err != nil {
		if os.Getenv("SOULBOX_TEST_ALL") != "" {
			t.Fatal(err)
		}
		t.Skip("erofs-utils are not installed")
	}
	// Files that only root can make, or that are longer than the oracle accepts, are left out.
	var want *Node
	name := write(t, func(add func(string) Extent) *Node {
		want = sample(add)
		delete(want.Children, "far")
		return want
	})
	if out, err := exec.Command("fsck.erofs", name).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if out, err := exec.Command("dump.erofs", "-s", "-S", name).CombinedOutput(); err != nil ||
		!strings.Contains(string(out), "Filesystem block size") && !strings.Contains(string(out), "blocksize") &&
			!strings.Contains(string(out), "Filesystem blocks") {
		t.Fatalf("%v: %s", err, out)
	}
	if os.Geteuid() != 0 { // only root can make devices with fsck.erofs
		delete(want.Children, "null")
		delete(want.Children, "disk")
		name = write(t, func(add func(string) Extent) *Node {
			n := sample(add)
			for _, no := range []string{"far", "null", "disk"} {
				delete(n.Children, no)
			}
			return n
		})
	}
	to := filepath.Join(t.TempDir(), "out")
	if out, err := exec.Command("fsck.erofs", "--extract="+to, "--no-preserve-owner", "--preserve-perms",
		name).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	image, err := Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer image.Close()
	seen := 0
	err = filepath.WalkDir(to, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == to {
			return err
		}
		seen++
		n := want
		for part := range strings.SplitSeq(strings.TrimPrefix(path, to+"/"), "/") {
			if n = n.Children[part]; n == nil {
				t.Fatalf("%s is not in the tree", path)
			}
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		st := info.Sys().(*syscall.Stat_t)
		if uint16(st.Mode) != n.Mode {
			t.Errorf("%s: mode %o, want %o", path, st.Mode, n.Mode)
		}
		switch n.Type() {
		case unix.S_IFREG:
			got, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			if b, err := io.ReadAll(image.Content(n.Data)); err != nil || !bytes.Equal(got, b) {
				t.Errorf("%s: other content, %v", path, err)
			}
		case unix.S_IFLNK:
			if target, _ := os.Readlink(path); target != n.Target {
				t.Errorf("%s -> %s", path, target)
			}
		case unix.S_IFCHR, unix.S_IFBLK:
			if st.Rdev != n.Device {
				t.Errorf("%s: device %x, want %x", path, st.Rdev, n.Device)
			}
		}
		return nil
	})
	if err != nil || seen < 3500 {
		t.Fatal(seen, err)
	}
}

// TestBase: an image that begins with another's contents has both, and the holes of the first.
func TestBase(t *testing.T) {
	first := write(t, func(add func(string) Extent) *Node {
		return dir(map[string]*Node{"a": {Mode: unix.S_IFREG | 0o644, Data: add("from the first")}})
	})
	base, err := Open(first)
	if err != nil {
		t.Fatal(err)
	}
	defer base.Close()
	root, err := base.Tree()
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(filepath.Join(t.TempDir(), "second.erofs"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w := NewWriter(f)
	if err := w.Base(t.Context(), base); err != nil {
		t.Fatal(err)
	}
	extent, err := w.Add(strings.NewReader("from the second"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Add(strings.NewReader(strings.Repeat("gone", 1<<20))); err != nil {
		t.Fatal(err)
	}
	root.Children["b"] = &Node{Mode: unix.S_IFREG | 0o644, Data: extent}
	if err := w.Finish(root); err != nil {
		t.Fatal(err)
	}
	second, err := Open(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	if root, err = second.Tree(); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"a": "from the first", "b": "from the second"} {
		if got, err := io.ReadAll(second.Content(root.Children[name].Data)); err != nil || string(got) != want {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	if info, err := f.Stat(); err != nil || info.Sys().(*syscall.Stat_t).Blocks > 64 {
		t.Error("the content that was dropped takes room", err)
	}
}

// TestRefused: what the format cannot hold is an error, not an image.
func TestRefused(t *testing.T) {
	loop := dir(map[string]*Node{})
	loop.Children["loop"] = loop
	for name, root := range map[string]*Node{
		"no directory": {Mode: unix.S_IFREG}, "no type": dir(map[string]*Node{"x": {}}), "slash": dir(map[string]*Node{"a/b": dir(nil)}),
		"dot dot":     dir(map[string]*Node{"..": dir(nil)}),
		"long name":   dir(map[string]*Node{strings.Repeat("n", 256): dir(nil)}),
		"no target":   dir(map[string]*Node{"x": {Mode: unix.S_IFLNK}}),
		"long target": dir(map[string]*Node{"x": {Mode: unix.S_IFLNK, Target: strings.Repeat("t", 4096)}}), "in itself": loop,
	} {
		f, err := os.Create(filepath.Join(t.TempDir(), "image"))
		if err != nil {
			t.Fatal(err)
		}
		if err := NewWriter(f).Finish(root); err == nil {
			t.Errorf("%s: no error", name)
		}
		_ = f.Close()
	}
}

// TestBroken: whatever is changed in an image, reading it returns an error or a tree, and never panics.
func TestBroken(t *testing.T) {
	body, err := os.ReadFile(write(t, func(add func(string) Extent) *Node {
		return dir(map[string]*Node{"f": {Mode: unix.S_IFREG, Data: add("text")},
			"d": dir(map[string]*Node{"l": {Mode: unix.S_IFLNK, Target: "t"}})})
	}))
	if err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(t.TempDir(), "broken")
	read := func(b []byte) error {
		if err := os.WriteFile(name, b, 0o600); err != nil {
			t.Fatal(err)
		}
		image, err := Open(name)
		if err != nil {
			return err
		}
		defer image.Close()
		_, err = image.Tree()
		return err
	}
	if err := read(body); err != nil {
		t.Fatal(err)
	}
	for _, size := range []int{0, 1, BlockSize - 1, BlockSize, len(body) - BlockSize, len(body) - 1} {
		if read(body[:size]) == nil {
			t.Errorf("cut at %d: no error", size)
		}
	}
	for i := range 2000 {
		r := rand.New(rand.NewPCG(1, uint64(i)))
		b := bytes.Clone(body)
		for range 1 + r.IntN(3) {
			b[2*BlockSize+r.IntN(len(b)-2*BlockSize)] = byte(r.UintN(256))
		}
		_ = read(b)
	}
}
