package template

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"soulbox.dev/soulbox/internal/erofs"
)

// tarOf returns a tar of texts.
func tarOf(t *testing.T, files map[string]string) string {
	t.Helper()
	var headers []tar.Header
	for _, name := range sortedKeys(files) {
		headers = append(headers, tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Linkname: files[name]})
	}
	return pack(t, headers...)
}

// pack makes a tar; Linkname holds the content of a regular file.
func pack(t *testing.T, headers ...tar.Header) string {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range headers {
		text := ""
		if h.Typeflag == tar.TypeReg {
			text, h.Linkname = h.Linkname, ""
			h.Size = int64(len(text))
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, text); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func file(name, text string) tar.Header {
	return tar.Header{Typeflag: tar.TypeReg, Name: name, Linkname: text, Mode: 0o644}
}
func folder(name string) tar.Header {
	return tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o755}
}
func link(name, to string) tar.Header {
	return tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: to}
}
func hard(name, to string) tar.Header {
	return tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: to}
}

// merged applies layers and lists the result: names, and the texts of files.
func merged(t *testing.T, layers ...string) (string, error) {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "image"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	m := &merger{ctx: t.Context(), root: newRoot(), w: erofs.NewWriter(f)}
	for _, l := range layers {
		if err := m.apply(strings.NewReader(l)); err != nil {
			return "", err
		}
	}
	if err := m.w.Finish(m.root); err != nil {
		return "", err
	}
	files, err := openFiles(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	defer files.Close()
	var list []string
	var walk func(name string, n *erofs.Node)
	walk = func(name string, n *erofs.Node) {
		switch n.Type() {
		case unix.S_IFREG:
			body, err := io.ReadAll(files.image.Content(n.Data))
			if err != nil {
				t.Fatal(err)
			}
			list = append(list, name+"="+string(body))
		case unix.S_IFLNK:
			list = append(list, name+">"+n.Target)
		case unix.S_IFDIR:
			if len(n.Children) == 0 {
				list = append(list, name+"/")
			}
		}
		for _, base := range n.Names() {
			walk(name+"/"+base, n.Children[base])
		}
	}
	walk("", files.root)
	return strings.Join(list, " "), nil
}

// TestLayers applies layers on top of each other, with whiteouts in any order (OCI image specification, layers).
func TestLayers(t *testing.T) {
	base := pack(t, folder("d"), file("d/a", "1"), file("d/b", "2"), file("f", "3"), folder("e"), file("e/x", "4"), link("l", "d"))
	for _, test := range []struct {
		name   string
		layers []string
		want   string
	}{
		{"whiteout", []string{base, pack(t, file("d/.wh.a", ""), file(".wh.f", ""))}, "/d/b=2 /e/x=4 /l>d"},
		{"whiteout of a directory", []string{base, pack(t, file(".wh.d", ""))}, "/e/x=4 /f=3 /l>d"},
		{"opaque first", []string{base, pack(t, file("d/.wh..wh..opq", ""), file("d/c", "5"))}, "/d/c=5 /e/x=4 /f=3 /l>d"},
		{"opaque last", []string{base, pack(t, file("d/c", "5"), file("d/.wh..wh..opq", ""))}, "/d/c=5 /e/x=4 /f=3 /l>d"},
		{"whiteout after what is new", []string{base, pack(t, file("d/a", "new"), file("d/.wh.a", ""))},
			"/d/a=new /d/b=2 /e/x=4 /f=3 /l>d"},
		{"whiteout of a directory that is made again", []string{base, pack(t, folder("d"), file("d/c", "5"), file(".wh.d", ""))},
			"/d/c=5 /e/x=4 /f=3 /l>d"},
		{"directory by file", []string{base, pack(t, file("d", "file"))}, "/d=file /e/x=4 /f=3 /l>d"},
		{"file by directory", []string{base, pack(t, folder("f"), file("f/y", "6"))}, "/d/a=1 /d/b=2 /e/x=4 /f/y=6 /l>d"},
		{"through a link", []string{base, pack(t, file("l/new", "7"))}, "/d/a=1 /d/b=2 /d/new=7 /e/x=4 /f=3 /l>d"},
		{"hard link to the layer below", []string{base, pack(t, hard("g", "f"), file(".wh.f", ""))}, "/d/a=1 /d/b=2 /e/x=4 /g=3 /l>d"},
		{"twice", []string{pack(t, file("x", "1"), file("x", "2"))}, "/x=2"},
		{"no parents", []string{pack(t, file("a/b/c", "1"))}, "/a/b/c=1"},
		{"odd names", []string{pack(t, file("./a", "1"), file("/b", "2"), file("c/../d", "3"), folder("./"))}, "/a=1 /b=2 /d=3"},
	} {
		if got, err := merged(t, test.layers...); err != nil || got != test.want {
			t.Errorf("%s: %q, want %q, %v", test.name, got, test.want, err)
		}
	}
}

// TestHostileLayers: no name leads out of the image, and a layer that is malformed or exceeds a bound gives an error.
func TestHostileLayers(t *testing.T) {
	contained := pack(t, file("../../up", "1"), file("/abs", "2"), link("out", "/../../etc"), file("out/passwd", "3"), link("a", "b"),
		hard("h", "../abs"))
	if got, err := merged(t, contained); err != nil || got != "/a>b /abs=2 /etc/passwd=3 /h=2 /out>/../../etc /up=1" {
		t.Errorf("%q, %v", got, err)
	}
	deep := strings.Repeat("d/", maxDepth+1) + "f"
	for name, layer := range map[string]string{
		"no tar":               strings.Repeat("no tar ", 200),
		"cut short":            pack(t, file("x", strings.Repeat("x", 5000)))[:2000],
		"through a file":       pack(t, file("f", ""), file("f/x", "")),
		"links in a circle":    pack(t, link("a", "b"), link("b", "a"), file("a/x", "")),
		"hard link to nothing": pack(t, hard("h", "nothere")),
		"to a directory":       pack(t, folder("d"), hard("h", "d")),
		"to the root":          pack(t, hard("h", "/")),
		"to itself":            pack(t, hard("h", "h")),
		"long name":            pack(t, file(strings.Repeat("n", 300), "")),
		"long directory":       pack(t, file(strings.Repeat("n", 300)+"/x", "")),
		"deep":                 pack(t, file(deep, "")),
		"long target":          pack(t, link("l", strings.Repeat("t", 5000))),
		"no target":            pack(t, link("l", "")),
		"device":               pack(t, tar.Header{Typeflag: tar.TypeChar, Name: "d", Devmajor: 1 << 13}),
		"kind":                 pack(t, tar.Header{Typeflag: 'Z', Name: "k"}),
		"growing links":        pack(t, link("a", strings.Repeat("b/", 1900)), link("b", strings.Repeat("a/", 1900)), file("a/x", "")),
	} {
		if got, err := merged(t, layer); !errors.Is(err, ErrLayer) {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	many := &merger{ctx: t.Context(), root: newRoot(), entries: maxEntries - 1}
	if err := many.apply(strings.NewReader(pack(t, folder("a"), folder("b")))); !errors.Is(err, ErrLayer) ||
		!strings.Contains(err.Error(), "entries") {
		t.Error(err)
	}
	for name, layer := range map[string]string{"implied directories": pack(t, file(strings.Repeat("d/", 100)+"f", "")),
		"targets": pack(t, link("l", strings.Repeat("t", 3000)))} {
		if err := (&merger{ctx: t.Context(), root: newRoot(), meta: maxMeta - 3000}).apply(strings.NewReader(layer)); !errors.Is(err,
			ErrLayer) || !strings.Contains(err.Error(), "too many files") {
			t.Errorf("%s: %v", name, err)
		}
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if err := (&merger{ctx: ended, root: newRoot()}).apply(strings.NewReader(pack(t, folder("a")))); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	large := &merger{ctx: t.Context(), root: newRoot(), bytes: maxImage}
	if err := large.apply(strings.NewReader(pack(t, file("a", "x")))); !errors.Is(err, ErrLayer) {
		t.Error(err)
	}
}

// FuzzLayer: applying any layer ends without a panic.
func FuzzLayer(f *testing.F) {
	t := &testing.T{}
	f.Add([]byte(pack(t, folder("d"), file("d/a", "1"), link("l", "d"), hard("h", "d/a"), file("d/.wh.a", ""), file("d/.wh..wh..opq", ""))))
	f.Fuzz(func(t *testing.T, body []byte) {
		image, err := os.Create(filepath.Join(t.TempDir(), "image"))
		if err != nil {
			t.Fatal(err)
		}
		defer image.Close()
		m := &merger{ctx: t.Context(), root: newRoot(), w: erofs.NewWriter(image)}
		if m.apply(bytes.NewReader(body)) != nil {
			return
		}
		if err := m.w.Finish(m.root); err != nil {
			t.Fatal(err)
		}
	})
}

// TestChainID checks the chain ID against the specification.
func TestChainID(t *testing.T) {
	one, two := Layer{DiffID: "sha256:" + strings.Repeat("a", 64)}, Layer{DiffID: "sha256:" + strings.Repeat("b", 64)}
	if got := chainID([]Layer{one}); got != one.DiffID {
		t.Error(got)
	}
	if got, want := chainID([]Layer{one, two}), "sha256:"+shaOf(one.DiffID+" "+two.DiffID); got != want {
		t.Error(got, want)
	}
	var all []Layer
	for i := range 300 {
		all = append(all, Layer{DiffID: fmt.Sprint("sha256:", i)})
	}
	if chainID(all) == chainID(all[:299]) {
		t.Error("the last layer does not count")
	}
}

func shaOf(text string) string { sum := sha256.Sum256([]byte(text)); return hex.EncodeToString(sum[:]) }
