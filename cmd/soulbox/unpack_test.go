package main

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestUnpackHostile: nothing that a sandbox sends is written outside of what was asked for.
func TestUnpackHostile(t *testing.T) {
	file := func(name string) *tar.Header {
		return &tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o4755, Size: 1}
	}
	link := func(kind byte, name, to string) *tar.Header {
		return &tar.Header{Name: name, Typeflag: kind, Linkname: to, Mode: 0o777}
	}
	for name, headers := range map[string][]*tar.Header{
		"up":                       {file("dir/../../evil")},
		"absolute":                 {file("/evil")},
		"beside":                   {file("evil")},
		"through a link":           {link(tar.TypeSymlink, "dir/l", ".."), file("dir/l/evil")},
		"through an absolute link": {link(tar.TypeSymlink, "dir/l", "/tmp"), file("dir/l/evil")},
		"a hard link out":          {link(tar.TypeLink, "dir/l", "../evil")},
		"made of nothing": {{Name: "dir/s", Typeflag: tar.TypeReg, Mode: 0o644, Size: 1,
			PAXRecords: map[string]string{"SOULBOX.x": "1"}}, file("../evil")},
		"the base a link": {link(tar.TypeSymlink, "dir", ".."), file("dir/evil")},
	} {
		t.Run(name, func(t *testing.T) {
			var text bytes.Buffer
			w := tar.NewWriter(&text)
			for _, h := range headers {
				if err := w.WriteHeader(h); err != nil {
					t.Fatal(err)
				}
				if h.Size > 0 {
					_, _ = w.Write([]byte("x"))
				}
			}
			if err := w.Close(); err != nil {
				t.Fatal(err)
			}
			root := t.TempDir()
			if err := os.Mkdir(filepath.Join(root, "in"), 0o755); err != nil {
				t.Fatal(err)
			}
			if headers[0].Name != "dir" { // as honest tars begin
				var whole bytes.Buffer
				first := tar.NewWriter(&whole)
				if err := errors.Join(first.WriteHeader(&tar.Header{Name: "dir/", Typeflag: tar.TypeDir, Mode: 0o755}),
					first.Flush()); err != nil {
					t.Fatal(err)
				}
				text = *bytes.NewBuffer(append(whole.Bytes(), text.Bytes()...))
			}
			err := unpack(t.Context(), bytes.NewReader(text.Bytes()), "dir", place{dir: filepath.Join(root, "in"), name: "target"}, &text)
			if err == nil {
				t.Error("it is taken")
			}
			for _, place := range []string{root, filepath.Join(root, "in"), "/tmp", "/"} {
				if _, err := os.Lstat(filepath.Join(place, "evil")); err == nil {
					t.Errorf("evil is in %s", place)
				}
			}
			if err := unpack(t.Context(), bytes.NewReader(text.Bytes()), "asked", place{dir: root, name: "asked"}, io.Discard); err == nil {
				t.Error("it is taken for another file")
			}
		})
	}
}

// copied returns a tar of files of one byte, with these names; a name that ends in / is a directory, one with -> a link.
func copied(t *testing.T, mode int64, names ...string) io.Reader {
	t.Helper()
	var text bytes.Buffer
	w := tar.NewWriter(&text)
	for _, name := range names {
		h := &tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: mode, Size: 1}
		if from, to, ok := strings.Cut(name, "->"); ok {
			h = &tar.Header{Name: from, Typeflag: tar.TypeSymlink, Linkname: to}
		} else if strings.HasSuffix(name, "/") {
			h = &tar.Header{Name: name, Typeflag: tar.TypeDir, Mode: mode | 0o111}
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if h.Size > 0 {
			_, _ = w.Write([]byte("x"))
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return &text
}

// TestUnpackPlanted: what an earlier copy has brought cannot lead a later copy out of the destination.
func TestUnpackPlanted(t *testing.T) {
	home, here := t.TempDir(), t.TempDir()
	for name, copies := range map[string][][]string{
		"a file by a link":         {{"a->" + home + "/new"}, {"a"}},
		"a file over another":      {{"b->" + home + "/old"}, {"b"}},
		"a directory by a link":    {{"c->" + home}, {"c/", "c/old"}},
		"a link below":             {{"d/", "d/l->" + home + "/old"}, {"d/", "d/l"}},
		"a linked directory below": {{"e/", "e/l->" + home}, {"e/", "e/l/", "e/l/old"}},
		"a link that changes":      {{"f->" + home}, {"f->" + home + "/old"}, {"f"}},
	} {
		if err := os.WriteFile(filepath.Join(home, "old"), []byte("mine"), 0o600); err != nil {
			t.Fatal(err)
		}
		for _, names := range copies {
			base, _, _ := strings.Cut(strings.TrimSuffix(names[0], "/"), "->")
			_ = unpack(t.Context(), copied(t, 0o644, names...), base, place{dir: here, name: base}, io.Discard) // refused or not
		}
		if text, err := os.ReadFile(filepath.Join(home, "old")); err != nil || string(text) != "mine" {
			t.Errorf("%s: it was written to: %q %v", name, text, err)
		}
		if list, err := os.ReadDir(home); err != nil || len(list) != 1 {
			t.Errorf("%s: %v %v", name, list, err)
		}
	}
	if info, err := os.Lstat(filepath.Join(here, "d", "l")); err != nil || !info.Mode().IsRegular() {
		t.Error("a link below the destination is replaced by the file that it has become", err)
	}
}

// TestUnpackAgain: the same copy works twice, even of read-only files; existing directories keep their mode, and new entries obey the
// umask.
func TestUnpackAgain(t *testing.T) {
	here := t.TempDir()
	if err := os.Chmod(here, 0o750); err != nil {
		t.Fatal(err)
	}
	mode := func(name string) fs.FileMode {
		t.Helper()
		info, err := os.Lstat(filepath.Join(here, name))
		if err != nil {
			t.Fatal(err)
		}
		return info.Mode().Perm()
	}
	for range 2 {
		for _, to := range []place{{dir: here, name: "."}, {dir: here, name: "new"}, {dir: here, name: "deep", slash: true}} {
			if err := unpack(t.Context(), copied(t, 0o446, "dir/", "dir/sub/", "dir/sub/f", "dir/l->f"), "dir", to,
				io.Discard); err != nil {
				t.Fatal(err)
			}
		}
		if err := unpack(t.Context(), copied(t, 0o446, "f"), "f", place{dir: here, name: "single"}, io.Discard); err != nil {
			t.Fatal(err)
		}
		mask := umask()
		got := fmt.Sprint(mode("."), mode("new"), mode("sub"), mode("sub/f"), mode("single"))
		if want := fmt.Sprint(fs.FileMode(0o750), 0o557&^mask, 0o557&^mask, 0o446&^mask, 0o446&^mask); got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
	for _, test := range []struct {
		names []string
		to    place
	}{
		{[]string{"f"}, place{dir: here, name: "new"}},
		{[]string{"dir/"}, place{dir: here, name: "single"}},
		{[]string{"f"}, place{dir: here, name: "none", slash: true}},
		{[]string{"f"}, place{dir: filepath.Join(here, "none"), name: "f"}},
	} {
		base := strings.TrimSuffix(test.names[0], "/")
		if err := unpack(t.Context(), copied(t, 0o644, test.names...), base, test.to, io.Discard); err == nil {
			t.Errorf("%v at %v is taken", test.names, test.to)
		}
	}
	if err := filepath.WalkDir(here, func(name string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			err = os.Chmod(name, 0o700) // so that it can be removed
		}
		return err
	}); err != nil {
		t.Error(err)
	}
}

// TestPlaceOf: a destination is the path that the user named, or in it.
func TestPlaceOf(t *testing.T) {
	t.Chdir(t.TempDir())
	if err := errors.Join(os.Mkdir("d", 0o755), os.WriteFile("f", nil, 0o644)); err != nil {
		t.Fatal(err)
	}
	for to, want := range map[string][2]string{ // for a thing called base, and for its content
		"d": {"d base", "d ."}, "d/": {"d/ base", "d/ ."}, ".": {". base", ". ."}, "f": {". f", ""}, "new": {". new", ". new"},
		"new/":  {". new/", ". new/"},
		"new/.": {". new/", ". new/"}, "d/new/.": {"d new/", "d new/"}, "": {"", ""}, "new/..": {"", ""}, "d/..": {"d/.. base", "d/.. ."},
		"a/b": {"a b", "a b"},
	} {
		for i, whole := range []bool{false, true} {
			got := ""
			if p, err := placeOf(to, "base", whole); err == nil {
				got = p.dir + " " + p.name
				if p.slash {
					got += "/"
				}
			}
			if got != want[i] {
				t.Errorf("%q, contents %v: %q, want %q", to, whole, got, want[i])
			}
		}
	}
}

// TestUnpackBroken: a copy that is cut off leaves no directory of the user's with another mode.
func TestUnpackBroken(t *testing.T) {
	here := t.TempDir()
	if err := errors.Join(os.Mkdir(filepath.Join(here, "dir"), 0o700), os.Chmod(filepath.Join(here, "dir"), 0o500)); err != nil {
		t.Fatal(err)
	}
	if err := unpack(t.Context(), copied(t, 0o644, "dir/", "dir/f", "evil"), "dir", place{dir: here, name: "dir", within: true},
		io.Discard); err == nil {
		t.Error("it is taken")
	}
	info, err := os.Stat(filepath.Join(here, "dir"))
	if err != nil || info.Mode().Perm() != 0o500 {
		t.Errorf("%v %v", info.Mode(), err)
	}
	if err := os.Chmod(filepath.Join(here, "dir"), 0o700); err != nil { // so that it can be removed
		t.Fatal(err)
	}
}
