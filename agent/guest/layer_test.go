package guest

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"soulbox.dev/soulbox/agent"
)

// layerOf reads a layer to its end.
func layerOf(t *testing.T, c *agent.Client, root string) (names []string, body []byte) {
	t.Helper()
	r, err := c.ChangesOf(t.Context(), root, "")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if body, err = io.ReadAll(r); err != nil {
		t.Fatal(err)
	}
	for from := tar.NewReader(bytes.NewReader(body)); ; {
		h, err := from.Next()
		if err == io.EOF {
			return names, body
		}
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, h.Name)
	}
}

// apply applies a layer as a reader of layers does.
func apply(t *testing.T, c *agent.Client, root string, body []byte) {
	t.Helper()
	var rest bytes.Buffer
	out := tar.NewWriter(&rest)
	for from := tar.NewReader(bytes.NewReader(body)); ; {
		h, err := from.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if gone, _, ok := agent.IsWhiteout(h.Name); ok {
			if err := os.RemoveAll(filepath.Join(root, gone)); err != nil {
				t.Fatal(err)
			}
			continue
		}
		if info, err := os.Lstat(filepath.Join(root, h.Name)); err == nil && info.IsDir() != (h.Typeflag == tar.TypeDir) {
			if err := os.RemoveAll(filepath.Join(root, h.Name)); err != nil {
				t.Fatal(err)
			}
		}
		if err := out.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(out, from); err != nil {
			t.Fatal(err)
		}
	}
	if err := out.Close(); err != nil {
		t.Fatal(err)
	}
	if err := c.Unpack(t.Context(), root, &rest); err != nil {
		t.Fatal(err)
	}
}

// listing describes every file below a directory, as far as a layer does.
func listing(t *testing.T, root string) string {
	t.Helper()
	out, err := exec.Command("bash", "-c",
		`cd "$1" && find . -mindepth 1 ! -type s \( -type d -printf '%P d %m %U %G\n' -o -type f -printf '%P f %m %U %G %T@ %s %n\n' -o -printf '%P %y %m %U %G %T@ %l\n' \) |
		sed -E 's,([0-9])[.][0-9]+( |$),\1 ,' | sort; find . -type f -exec md5sum {} + | sort -k2`, "-", root).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return string(out)
}

// TestChanges: layers on top of each other recreate the same files, whatever was changed.
func TestChanges(t *testing.T) {
	c, dir := pair(t)
	root, copied := dir+"/root", dir+"/copied"
	run(t, c, agent.StartRequest{Command: "mkdir -p " + root + "; cd " + root +
		`; mkdir -p a/b/c d/e many; echo 1 > a/one; echo 2 > a/b/two; ln a/one a/same; ln -s one a/link; echo x > d/e/x; echo y > d/y;
		for i in $(seq 2000); do echo $i > many/$i; done; echo keep > keep; touch -d '2001-02-03 04:05:06' keep; cp -a ` + root + " " +
		copied})
	if _, err := c.ChangesOf(t.Context(), root, ""); !errors.Is(err, agent.ErrInvalid) {
		t.Fatal("without a mark:", err)
	}
	r, err := c.ChangesOf(t.Context(), root, agent.ModeMark)
	if err != nil {
		t.Fatal(err)
	}
	if n, err := io.Copy(io.Discard, r); err != nil || n != 0 {
		t.Fatal(n, err)
	}
	if names, _ := layerOf(t, c, root); len(names) != 0 {
		t.Fatal("nothing was changed, but", names)
	}
	for _, step := range []struct{ script, want, wantNot string }{
		{"echo more >> a/b/two; chmod 700 a/b/c", "a/b/two", "a/one"},
		{"rm -r d/e; rm many/1*; touch many/new", "d/.wh.e", "d/y"},
		{"rm -r a/b; echo file > a/b; rm a/link; mkdir a/link; echo in > a/link/in", "a/b", "keep"},
		{"mv many moved; mkdir many; echo 7 > many/7", "moved/7", "keep"},
		{"ln keep kept; mkfifo pipe; ln -sf /nowhere/.. far; rm a/same", "kept", "d/y"},
		{"touch -d '1999-01-01' keep; sed -i s/y/z/ d/y; truncate -s 1M sparse; printf '\\nodd name' > $'new\\nline'", "sparse", "moved/7"},
		{"mkdir -p .wh; echo q > 'ünï cödé'; rm -rf moved; mkdir -m 1777 sticky; (umask 0; echo w > world)", ".wh.moved", "many"},
		{"rm -rf * .wh", ".wh.a", "x"},
	} {
		run(t, c, agent.StartRequest{Command: "cd " + root + " && " + step.script})
		names, body := layerOf(t, c, root)
		if all := "\n" + strings.Join(names, "\n") + "\n"; !strings.Contains(all, "\n"+step.want+"\n") ||
			strings.Contains(all, "\n"+step.wantNot+"\n") {
			t.Errorf("%s: %d entries: %.300s", step.script, len(names), all)
		}
		apply(t, c, copied, body)
		if got, want := listing(t, copied), listing(t, root); got != want {
			t.Fatalf("%s:\n%.2000s\nwant\n%.2000s", step.script, got, want)
		}
	}
}

// TestUnpack: names stay below the directory, and what cannot be unpacked is an error.
func TestUnpack(t *testing.T) {
	c, dir := pair(t)
	pack := func(headers ...tar.Header) io.Reader {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for _, h := range headers {
			h.Uid, h.Gid, h.Mode = os.Getuid(), os.Getgid(), 0o644
			if err := w.WriteHeader(&h); err != nil {
				t.Fatal(err)
			}
			_, _ = w.Write(make([]byte, h.Size))
		}
		_ = w.Close()
		return &b
	}
	to := dir + "/to"
	err := c.Unpack(t.Context(), to, pack(tar.Header{Name: "../../up", Typeflag: tar.TypeReg, Size: 5},
		tar.Header{Name: "/abs", Typeflag: tar.TypeReg}, tar.Header{Name: "hard", Typeflag: tar.TypeLink, Linkname: "../../abs"}))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"up", "abs", "hard"} {
		if _, err := os.Lstat(filepath.Join(to, name)); err != nil {
			t.Error(err)
		}
	}
	if err := c.Unpack(t.Context(), to, pack(tar.Header{Name: "x", Typeflag: 'V'})); !errors.Is(err, agent.ErrInvalid) {
		t.Error(err)
	}
	if err := c.Unpack(t.Context(), to, strings.NewReader(strings.Repeat("no tar ", 1000))); err == nil {
		t.Error("no error")
	}
	if err := c.Unpack(t.Context(), to, io.MultiReader(pack(tar.Header{Name: "y", Typeflag: tar.TypeReg}), &failing{})); err == nil ||
		!strings.Contains(err.Error(), "source failed") {
		t.Error(err)
	}
}

type failing struct{}

func (*failing) Read([]byte) (int, error) { return 0, errors.New("source failed") }
