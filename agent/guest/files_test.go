package guest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/iotest"

	"soulbox.dev/soulbox/agent"
)

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

func put(t testing.TB, c *agent.Client, name, content string, o agent.WriteOptions) agent.FileInfo {
	t.Helper()
	info, err := c.WriteFile(t.Context(), name, strings.NewReader(content), o)
	if err != nil {
		t.Fatal(err)
	}
	return info
}

func get(t testing.TB, c *agent.Client, name string, offset, limit int64) string {
	t.Helper()
	r, _, err := c.ReadFile(t.Context(), name, offset, limit)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	body, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return string(body)
}

func TestWriteAndRead(t *testing.T) {
	c, dir := pair(t)
	name := filepath.Join(dir, "a/b/c.txt")
	if info := put(t, c, name, "hello", agent.WriteOptions{Perm: 0o640}); info.Size != 5 || info.Mode != "0640" ||
		info.Type != agent.TypeFile {
		t.Fatal(info)
	}
	put(t, c, name, " world", agent.WriteOptions{Mode: agent.ModeAppend})
	if got := get(t, c, name, 0, -1); got != "hello world" {
		t.Fatal(got)
	}
	if got := get(t, c, name, 6, 3); got != "wor" {
		t.Fatal(got)
	}
	if info := put(t, c, name, "new", agent.WriteOptions{}); info.Mode != "0640" {
		t.Fatalf("replacing changed the mode: %v", info)
	}
	if _, err := c.WriteFile(t.Context(), name, strings.NewReader("x"), agent.WriteOptions{Mode: agent.ModeCreate}); !errors.Is(err,
		fs.ErrExist) {
		t.Fatal(err)
	}
	if _, err := c.WriteFile(t.Context(), filepath.Join(dir, "no/file"), strings.NewReader("x"),
		agent.WriteOptions{NoDirs: true}); !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	if _, err := c.WriteFile(t.Context(), filepath.Join(name, "under"), strings.NewReader("x"), agent.WriteOptions{}); !errors.Is(err,
		syscall.ENOTDIR) {
		t.Fatal(err)
	}
	large := strings.Repeat("0123456789abcdef", 1<<20)
	if put(t, c, name, large, agent.WriteOptions{}); get(t, c, name, 0, -1) != large {
		t.Fatal("16 MiB came back changed")
	}
}

func TestCutOffWriteLeavesNothing(t *testing.T) {
	c, dir := pair(t)
	name := filepath.Join(dir, "file")
	put(t, c, name, "old", agent.WriteOptions{})
	why := errors.New("the source broke")
	broken := io.MultiReader(strings.NewReader(strings.Repeat("x", 100_000)), iotest.ErrReader(why))
	if _, err := c.WriteFile(t.Context(), name, broken, agent.WriteOptions{}); !errors.Is(err, why) {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	stuck := io.MultiReader(strings.NewReader(strings.Repeat("x", 100_000)),
		readerFunc(func([]byte) (int, error) { cancel(why); return 0, why }))
	if _, err := c.WriteFile(ctx, name, stuck, agent.WriteOptions{Mode: agent.ModeAppend}); !errors.Is(err, why) {
		t.Fatal(err)
	}
	eventually(t, "only the old file is left", func() bool {
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		return len(entries) == 1 && get(t, c, name, 0, -1) == "old"
	})
}

func TestWriteThroughLink(t *testing.T) {
	c, dir := pair(t)
	target, link := filepath.Join(dir, "target"), filepath.Join(dir, "link")
	put(t, c, target, "old", agent.WriteOptions{})
	if err := os.Symlink("target", link); err != nil {
		t.Fatal(err)
	}
	put(t, c, link, "new", agent.WriteOptions{})
	if got := get(t, c, target, 0, -1); got != "new" {
		t.Fatal(got)
	}
	if info, err := os.Lstat(link); err != nil || info.Mode()&fs.ModeSymlink == 0 {
		t.Fatal("the link was replaced")
	}
}

// TestSpecialFiles: none of them may block the agent (other agents hang forever on a FIFO).
func TestSpecialFiles(t *testing.T) {
	c, dir := pair(t)
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{fifo, "/dev/zero", "/dev/null", "/dev/tty"} {
		if _, _, err := c.ReadFile(t.Context(), name, 0, -1); err == nil {
			t.Errorf("%s was read", name)
		}
		if _, err := c.WriteFile(t.Context(), name, strings.NewReader("x"), agent.WriteOptions{Mode: agent.ModeAppend}); err == nil {
			t.Errorf("%s was written", name)
		}
		if _, err := c.Edit(t.Context(), agent.EditRequest{Path: name, Old: "a", New: "b"}); err == nil {
			t.Errorf("%s was edited", name)
		}
	}
	if _, _, err := c.ReadFile(t.Context(), dir, 0, -1); !errors.Is(err, syscall.EISDIR) {
		t.Error(err)
	}
	if got := get(t, c, "/proc/self/status", 0, 1000); !strings.Contains(got, "Name:") {
		t.Errorf("a file of /proc, whose size is 0: %q", got)
	}
	sparse := filepath.Join(dir, "sparse")
	if err := os.WriteFile(sparse, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(sparse, 1<<40); err != nil {
		t.Fatal(err)
	}
	if got := get(t, c, sparse, 1<<39, 10); got != strings.Repeat("\x00", 10) {
		t.Errorf("%q", got)
	}
	r, _, err := c.ReadFile(t.Context(), sparse, 0, -1) // Close ends the read, however large the file is
	if err != nil {
		t.Fatal(err)
	}
	_ = r.Close()
	if _, err := c.Search(t.Context(), agent.SearchRequest{Path: dir, Pattern: "x", Glob: "fifo"}); err != nil {
		t.Error(err)
	}
	if _, err := c.Edit(t.Context(), agent.EditRequest{Path: sparse, Old: "a", New: "b"}); !errors.Is(err, agent.ErrTooLarge) {
		t.Error(err)
	}
}

func TestPaths(t *testing.T) {
	c, _ := pair(t)
	for name, want := range map[string]error{
		"": agent.ErrInvalid, "relative": agent.ErrInvalid, "./x": agent.ErrInvalid, "/a/../etc/passwd": agent.ErrInvalid,
		"/..": agent.ErrInvalid, "/a\x00b": agent.ErrInvalid,
		"/" + strings.Repeat("x", 5000): syscall.ENAMETOOLONG, "/" + strings.Repeat("x", 300): syscall.ENAMETOOLONG,
		"/no/such": fs.ErrNotExist,
	} {
		_, _, rerr := c.ReadFile(t.Context(), name, 0, 1)
		_, serr := c.Stat(t.Context(), name)
		_, derr := c.Dir(t.Context(), agent.DirRequest{Path: name})
		rmerr := c.Remove(t.Context(), agent.PathRequest{Path: name})
		_, merr := c.Move(t.Context(), agent.MoveRequest{From: name, To: "/tmp/x"})
		for i, err := range []error{rerr, serr, derr, rmerr, merr} {
			if !errors.Is(err, want) {
				t.Errorf("%.20q, operation %d: got %v, want %v", name, i, err, want)
			}
		}
	}
	if err := c.Remove(t.Context(), agent.PathRequest{Path: "/", Recursive: true}); !errors.Is(err, agent.ErrInvalid) {
		t.Fatal(err)
	}
}

func TestDirectories(t *testing.T) {
	c, dir := pair(t)
	for _, name := range []string{"b/2", "b/1/x", "a", "c"} {
		put(t, c, filepath.Join(dir, name), name, agent.WriteOptions{})
	}
	if err := os.Symlink("/etc", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	names := func(r agent.DirResult) string {
		var all []string
		for _, e := range r.Entries {
			all = append(all, strings.TrimPrefix(e.Path, dir+"/"))
		}
		return strings.Join(all, " ")
	}
	for depth, want := range map[int]string{1: "a b c link", 2: "a b b/1 b/2 c link", 9: "a b b/1 b/1/x b/2 c link"} {
		r, err := c.Dir(t.Context(), agent.DirRequest{Path: dir, Depth: depth})
		if err != nil || names(r) != want || r.More {
			t.Errorf("depth %d: %s %v", depth, names(r), err)
		}
	}
	if r, err := c.Dir(t.Context(), agent.DirRequest{Path: dir, Limit: 2}); err != nil || len(r.Entries) != 2 || !r.More {
		t.Error(r, err)
	}
	if _, err := c.Mkdir(t.Context(), agent.PathRequest{Path: filepath.Join(dir, "n/e/w")}); err != nil {
		t.Error(err)
	}
	if _, err := c.Mkdir(t.Context(), agent.PathRequest{Path: filepath.Join(dir, "n/e/w")}); !errors.Is(err, fs.ErrExist) {
		t.Error(err)
	}
	if _, err := c.Move(t.Context(), agent.MoveRequest{From: filepath.Join(dir, "b"), To: filepath.Join(dir, "q/r")}); err != nil {
		t.Error(err)
	}
	if err := c.Remove(t.Context(), agent.PathRequest{Path: filepath.Join(dir, "q")}); !errors.Is(err, syscall.ENOTEMPTY) {
		t.Error(err)
	}
	if err := c.Remove(t.Context(), agent.PathRequest{Path: filepath.Join(dir, "q"), Recursive: true}); err != nil {
		t.Error(err)
	}
}

func TestMoveAcrossFileSystems(t *testing.T) {
	if _, err := os.Stat("/dev/shm"); err != nil {
		t.Fatal(err)
	}
	c, dir := pair(t)
	shm, err := os.MkdirTemp("/dev/shm", "soulbox-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(shm)
	from, to := filepath.Join(dir, "x"), filepath.Join(shm, "-y")
	put(t, c, from, "content", agent.WriteOptions{})
	if _, err := c.Move(t.Context(), agent.MoveRequest{From: from, To: to}); err != nil {
		t.Fatal(err)
	}
	if got := get(t, c, to, 0, -1); got != "content" {
		t.Fatal(got)
	}
}

func TestEdit(t *testing.T) {
	c, dir := pair(t)
	name := filepath.Join(dir, "f")
	line := func(n int) *int { return &n }
	for label, test := range map[string]struct {
		before string
		req    agent.EditRequest
		after  string
		at     int
		want   error
	}{
		"replace":           {"a\nb\nc\n", agent.EditRequest{Old: "b", New: "B"}, "a\nB\nc\n", 2, nil},
		"remove":            {"a\nb\nc\n", agent.EditRequest{Old: "b\n"}, "a\nc\n", 2, nil},
		"all":               {"x x x", agent.EditRequest{Old: "x", New: "yy", All: true}, "yy yy yy", 1, nil},
		"ambiguous":         {"x x", agent.EditRequest{Old: "x", New: "y"}, "x x", 0, agent.ErrAmbiguous},
		"no match":          {"x", agent.EditRequest{Old: "z", New: "y"}, "x", 0, agent.ErrNoMatch},
		"nothing to find":   {"x", agent.EditRequest{New: "y"}, "x", 0, agent.ErrInvalid},
		"insert first":      {"a\n", agent.EditRequest{New: "b", InsertLine: line(0)}, "b\na\n", 1, nil},
		"insert last":       {"a", agent.EditRequest{New: "b\n", InsertLine: line(1)}, "a\nb\n", 2, nil},
		"insert in nothing": {"", agent.EditRequest{New: "b", InsertLine: line(0)}, "b\n", 1, nil},
		"insert beyond":     {"a\n", agent.EditRequest{New: "b", InsertLine: line(2)}, "a\n", 0, agent.ErrInvalid},
		"both":              {"a\n", agent.EditRequest{Old: "a", New: "b", InsertLine: line(0)}, "a\n", 0, agent.ErrInvalid},
		"binary":            {"a\x00b", agent.EditRequest{Old: "a", New: "b"}, "a\x00b", 0, agent.ErrNotText},
		"not UTF-8":         {"a\xff", agent.EditRequest{Old: "a", New: "b"}, "a\xff", 0, agent.ErrNotText},
		"across lines":      {"a\r\nb\r\n", agent.EditRequest{Old: "a\r\nb", New: "c"}, "c\r\n", 1, nil},
		"CRLF":              {"a\r\nb\r\nc\r\n", agent.EditRequest{Old: "a\nb", New: "x\ny\nz"}, "x\r\ny\r\nz\r\nc\r\n", 1, nil},
		"CRLF, one line":    {"a\r\nb\r\n", agent.EditRequest{Old: "b", New: "x\ny"}, "a\r\nx\r\ny\r\n", 2, nil},
		"CRLF, last line":   {"a\r\nb", agent.EditRequest{Old: "b", New: "x\ny"}, "a\r\nx\r\ny", 2, nil},
		"CRLF, an end":      {"a\r\nb\r\n", agent.EditRequest{Old: "a\n", New: ""}, "b\r\n", 1, nil},
		"CRLF, from an end": {"a\r\nb\r\n", agent.EditRequest{Old: "\nb", New: "\nc"}, "a\r\nc\r\n", 1, nil},
		"CRLF for LF":       {"a\nb\n", agent.EditRequest{Old: "a\r\nb", New: "c"}, "c\n", 1, nil},
		"mixed":             {"a\nb\r\nc\nd\n", agent.EditRequest{Old: "a\nb\nc", New: "x\ny"}, "x\ny\nd\n", 1, nil},
		"mixed, all": {"a\r\na\na\r\n", agent.EditRequest{Old: "a\n", New: "b\nc\n", All: true}, "b\r\nc\r\nb\nc\nb\r\nc\r\n", 1,
			nil},
		"CRLF, all": {"a\r\nb\r\na\r\nb\r\n", agent.EditRequest{Old: "a\nb\n", New: "c\n", All: true}, "c\r\nc\r\n", 1, nil},
		"CRLF, ambiguous": {"a\r\nb\r\na\r\nb\r\n", agent.EditRequest{Old: "a\nb\n", New: "c\n"}, "a\r\nb\r\na\r\nb\r\n", 0,
			agent.ErrAmbiguous},
		"CRLF, insert": {"a\r\nb\r\n", agent.EditRequest{New: "x\ny", InsertLine: line(1)}, "a\r\nx\r\ny\r\nb\r\n", 2, nil},
		"BOM":          {"\ufeffa\r\n", agent.EditRequest{New: "x", InsertLine: line(0)}, "\ufeffx\r\na\r\n", 1, nil},
		"BOM alone":    {"\ufeff", agent.EditRequest{New: "x", InsertLine: line(0)}, "\ufeffx\n", 1, nil},
	} {
		put(t, c, name, test.before, agent.WriteOptions{})
		test.req.Path = name
		r, err := c.Edit(t.Context(), test.req)
		if !errors.Is(err, test.want) || r.Line != test.at {
			t.Errorf("%s: line %d, error %v", label, r.Line, err)
		}
		if got := get(t, c, name, 0, -1); got != test.after {
			t.Errorf("%s: got %q, want %q", label, got, test.after)
		}
	}
}

// TestEditsAtOnce: edits of one file wait for each other, whatever name they use, so that the result has all of them.
func TestEditsAtOnce(t *testing.T) {
	c, dir := pair(t)
	name := filepath.Join(dir, "f")
	const n = 40
	var body strings.Builder
	for i := range n {
		fmt.Fprintf(&body, "<%d>\n", i)
	}
	put(t, c, name, body.String(), agent.WriteOptions{})
	if err := errors.Join(os.Symlink("f", filepath.Join(dir, "link")), os.Symlink(".", filepath.Join(dir, "d"))); err != nil {
		t.Fatal(err)
	}
	names := []string{name, filepath.Join(dir, "link"), filepath.Join(dir, "d/f"), filepath.Join(dir, "d/link")}
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() {
			if _, err := c.Edit(t.Context(), agent.EditRequest{Path: names[i%len(names)], Old: fmt.Sprintf("<%d>", i),
				New: "done"}); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if got := get(t, c, name, 0, -1); got != strings.Repeat("done\n", n) {
		t.Errorf("%q", got)
	}
}

// TestWritesAtOnce: of many calls that create a file one succeeds; what calls append to a new file is complete; an aborted call removes
// only its own data.
func TestWritesAtOnce(t *testing.T) {
	c, dir := pair(t)
	const n = 20
	for round := range 5 {
		var created atomic.Int32
		var all sync.WaitGroup
		for i := range n {
			all.Go(func() {
				_, err := c.WriteFile(t.Context(), filepath.Join(dir, fmt.Sprintf("new%d", round)), strings.NewReader("x"),
					agent.WriteOptions{Mode: agent.ModeCreate})
				if err == nil {
					created.Add(1)
				} else if !errors.Is(err, fs.ErrExist) {
					t.Error(err)
				}
			})
			all.Go(func() {
				if _, err := c.WriteFile(t.Context(), filepath.Join(dir, fmt.Sprintf("log%d", round)),
					strings.NewReader(fmt.Sprintf("%d\n", i)), agent.WriteOptions{Mode: agent.ModeAppend}); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
		if created.Load() != 1 {
			t.Errorf("%d have created it", created.Load())
		}
		if got := strings.Count(get(t, c, filepath.Join(dir, fmt.Sprintf("log%d", round)), 0, -1), "\n"); got != n {
			t.Errorf("%d of %d lines are there", got, n)
		}
	}
	name := filepath.Join(dir, "two")
	put(t, c, name, "first\n", agent.WriteOptions{})
	r, w := io.Pipe()
	broken := make(chan error)
	go func() {
		_, err := c.WriteFile(t.Context(), name, r, agent.WriteOptions{Mode: agent.ModeAppend})
		broken <- err
	}()
	if _, err := io.WriteString(w, "taken back\n"); err != nil {
		t.Fatal(err)
	}
	put(t, c, name, "second\n", agent.WriteOptions{Mode: agent.ModeAppend})
	w.CloseWithError(errors.New("gone"))
	if err := <-broken; err == nil {
		t.Error("the first append has not failed")
	}
	if got := get(t, c, name, 0, -1); !strings.Contains(got, "second\n") || !strings.HasPrefix(got, "first\n") {
		t.Errorf("%q", got)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), tempPrefix) {
			t.Errorf("%s is left", e.Name())
		}
	}
}

func TestSearch(t *testing.T) {
	c, dir := pair(t)
	for name, body := range map[string]string{
		"main.go": "package main\nfunc main() {}\n", "sub/a.go": "package sub\n", "sub/deep/b.txt": "package text\n", "bin": "package\x00",
		".git/x.go": "package git\n",
		"long":      strings.Repeat("é", 5000) + "package" + strings.Repeat("x", 5000) + "\n",
	} {
		put(t, c, filepath.Join(dir, name), body, agent.WriteOptions{})
	}
	for label, test := range map[string]struct {
		req  agent.SearchRequest
		want string
	}{
		"lines":          {agent.SearchRequest{Pattern: `^package \w+`}, "main.go:1 sub/a.go:1 sub/deep/b.txt:1"},
		"in some files":  {agent.SearchRequest{Pattern: "package", Glob: "*.go"}, "main.go:1 sub/a.go:1"},
		"names":          {agent.SearchRequest{Glob: "**/*.txt"}, "sub/deep/b.txt:0"},
		"one level":      {agent.SearchRequest{Glob: "sub/*"}, "sub/a.go:0"},
		"alternatives":   {agent.SearchRequest{Glob: "*.{go,txt}"}, "main.go:0 sub/a.go:0 sub/deep/b.txt:0"},
		"a class":        {agent.SearchRequest{Glob: "[!l]*n"}, "bin:0"},
		"a long line":    {agent.SearchRequest{Pattern: "package", Glob: "long"}, "long:1"},
		"case ignored":   {agent.SearchRequest{Pattern: "(?i)FUNC"}, "main.go:2"},
		"nothing at all": {agent.SearchRequest{Pattern: "nowhere"}, ""},
	} {
		test.req.Path = dir
		r, err := c.Search(t.Context(), test.req)
		if err != nil {
			t.Errorf("%s: %v", label, err)
			continue
		}
		var got []string
		for _, m := range r.Matches {
			got = append(got, strings.TrimPrefix(m.Path, dir+"/")+":"+string(rune('0'+m.Line)))
			if len(m.Text) > searchLine+10 {
				t.Errorf("%s: a line of %d bytes", label, len(m.Text))
			}
		}
		if strings.Join(got, " ") != test.want {
			t.Errorf("%s: got %s", label, got)
		}
	}
	for label, req := range map[string]agent.SearchRequest{"nothing": {}, "bad pattern": {Pattern: "("}, "bad glob": {Glob: "a[b"},
		"open brace": {Glob: "{a,b"}} {
		req.Path = dir
		if _, err := c.Search(t.Context(), req); !errors.Is(err, agent.ErrInvalid) {
			t.Errorf("%s: %v", label, err)
		}
	}
	if r, err := c.Search(t.Context(), agent.SearchRequest{Path: dir, Pattern: "package", Limit: 2}); err != nil || len(r.Matches) != 2 ||
		!r.More {
		t.Error(r, err)
	}
}

func TestAttributes(t *testing.T) {
	c, dir := pair(t)
	name := filepath.Join(dir, "f")
	put(t, c, name, "x", agent.WriteOptions{})
	info, err := c.Setattr(t.Context(), agent.PathRequest{Path: name, Attrs: map[string]string{"a": "1", "b": "2"}})
	if errors.Is(err, syscall.EOPNOTSUPP) {
		t.Skip("the host's temporary directory has no user attributes; gvisor's tests have")
	}
	if err != nil || info.Attrs["a"] != "1" || info.Attrs["b"] != "2" {
		t.Fatal(info, err)
	}
	if info, err = c.Setattr(t.Context(), agent.PathRequest{Path: name, Attrs: map[string]string{"a": "", "never": ""}}); err != nil ||
		len(info.Attrs) != 1 {
		t.Fatal(info, err)
	}
}

// TestSpoolDegrades: when a disk fills up, the last output is still kept, and what is kept is exact.
func TestSpoolDegrades(t *testing.T) {
	s := newSpool(t.TempDir())
	defer s.discard()
	s.append(agent.OnStdout, bytes.Repeat([]byte("h"), spoolHead))
	s.append(agent.OnStdout, bytes.Repeat([]byte("a"), 100_000))
	s.mu.Lock()
	full := &failingRing{ring: s.ring}
	s.ring = full
	s.mu.Unlock()
	s.append(agent.OnStderr, bytes.Repeat([]byte("b"), 10_000))
	out, err := s.window(agent.Window{Offset: spoolHead, Head: agent.MaxWindow, Tail: agent.MaxWindow})
	if err != nil {
		t.Fatal(err)
	}
	kept := append(out.Head, out.Tail...)
	want := strings.Repeat("a", spoolFallback-10_000) + strings.Repeat("b", 10_000)
	if string(kept) != want || out.Dropped != 110_000-spoolFallback {
		t.Fatalf("kept %d, dropped %d", len(kept), out.Dropped)
	}
}

type failingRing struct{ ring }

func (f *failingRing) writeAt([]byte, int64) error { return syscall.ENOSPC }

// TestSpoolRagged: a change of stream at every byte neither takes unbounded memory nor mixes up the streams.
func TestSpoolRagged(t *testing.T) {
	s := newSpool(t.TempDir())
	defer s.discard()
	s.append(agent.OnStdout, bytes.Repeat([]byte("h"), spoolHead))
	for i := range 3 * spoolRuns {
		s.append(i%2, []byte{"oe"[i%2]})
	}
	if len(s.runs) > spoolRuns {
		t.Fatalf("%d runs are kept", len(s.runs))
	}
	buf := make([]byte, 100)
	for at := int64(spoolHead); ; {
		n, found, on, _, _, err := s.next(buf, at)
		if err != nil {
			t.Fatal(err)
		}
		if n == 0 {
			break
		}
		if strings.Trim(string(buf[:n]), "oe"[on:on+1]) != "" {
			t.Fatalf("%q on stream %d at %d", buf[:n], on, found)
		}
		at = found + int64(n)
	}
}

func BenchmarkSpool(b *testing.B) {
	s := newSpool(b.TempDir())
	defer s.discard()
	chunk := bytes.Repeat([]byte("x"), 32<<10)
	b.SetBytes(int64(len(chunk)))
	for b.Loop() {
		s.append(agent.OnStdout, chunk)
	}
}

func BenchmarkStart(b *testing.B) {
	c, _ := pair(b)
	for b.Loop() {
		run(b, c, agent.StartRequest{Command: "/bin/true"})
	}
}

func BenchmarkCall(b *testing.B) {
	c, _ := pair(b)
	for b.Loop() {
		if _, err := c.List(b.Context(), agent.ListRequest{}); err != nil {
			b.Fatal(err)
		}
	}
}
