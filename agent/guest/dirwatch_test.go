package guest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"soulbox.dev/soulbox/agent"
)

// rebuilt is a tree as the events describe it.
type rebuilt map[string]bool

func (t rebuilt) apply(e agent.TreeEvent) {
	below := func(p, dir string) bool { return p == dir || strings.HasPrefix(p, dir+"/") }
	switch e.Op {
	case opCreate, opWrite:
		t[e.Path] = true
	case opRemove:
		for p := range t {
			if below(p, e.Path) {
				delete(t, p)
			}
		}
	case opRename, opSave:
		moved := []string{e.Path}
		for p := range t {
			if e.From != "" && below(p, e.From) {
				delete(t, p)
				moved = append(moved, path.Join(e.Path, strings.TrimPrefix(p, e.From)))
			}
		}
		for _, p := range moved {
			t[p] = true
		}
	}
}

// same compares the tree with the actual files.
func (t rebuilt) same(root string) string {
	var diff []string
	there := map[string]bool{}
	_ = filepath.WalkDir(root, func(p string, _ fs.DirEntry, err error) error {
		if p != root {
			if there[p] = true; !t[p] {
				diff = append(diff, "not told: "+p)
			}
		}
		return err
	})
	for p := range t {
		if !there[p] {
			diff = append(diff, "not there: "+p)
		}
	}
	slices.Sort(diff)
	return strings.Join(diff[:min(len(diff), 20)], "\n")
}

// treeReader reads all current events of a watch.
type treeReader struct {
	t    *testing.T
	c    *agent.Client
	id   string
	next int64
	seen []agent.TreeEvent
	lost bool
}

func watchTree(t *testing.T, c *agent.Client, r agent.TreeRequest) *treeReader {
	t.Helper()
	got, err := c.WatchTree(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	return &treeReader{t: t, c: c, id: got.Watch, next: got.Next}
}

func (r *treeReader) read(waitMS int64) agent.TreeResult {
	r.t.Helper()
	got, err := r.c.WatchTree(r.t.Context(), agent.TreeRequest{Watch: r.id, From: r.next, WaitMS: waitMS})
	if err != nil {
		r.t.Fatal(err)
	}
	r.next, r.seen, r.lost = got.Next, append(r.seen, got.Events...), r.lost || got.Lost
	return got
}

// until reads until an event is found.
func (r *treeReader) until(want agent.TreeEvent) {
	r.t.Helper()
	defer func() {
		if r.t.Failed() {
			r.t.Logf("%v", r.seen)
		}
	}()
	eventually(r.t, fmt.Sprintf("%+v", want), func() bool { r.read(1000); return slices.Contains(r.seen, want) })
}

func TestTree(t *testing.T) {
	c, dir := pair(t)
	in := func(name string) string { return filepath.Join(dir, "w", name) }
	sh := func(command string) {
		t.Helper()
		if s := run(t, c, agent.StartRequest{Command: "cd " + dir + "/w && " + command}); s.Process.ExitCode != 0 {
			t.Fatalf("%s: %s", command, s.Output.Head)
		}
	}
	run(t, c, agent.StartRequest{Command: "mkdir -p " + dir + "/w/old/deep " + dir + "/out && echo 1 > " + dir + "/w/there"})
	r := watchTree(t, c, agent.TreeRequest{Path: dir + "/w", Recursive: true, Ignore: []string{"node_modules", "*.swp", "old/secret/**"}})
	only := watchTree(t, c, agent.TreeRequest{Path: in("there")})
	flat := watchTree(t, c, agent.TreeRequest{Path: dir + "/w"})
	sh("mkdir -p a/b/c && echo x > a/b/c/file")
	r.until(agent.TreeEvent{Op: opCreate, Path: in("a/b/c/file")})
	sh("echo y >> a/b/c/file; echo z >> a/b/c/file")
	r.until(agent.TreeEvent{Op: opWrite, Path: in("a/b/c/file")})
	sh("mv a/b moved && echo w >> moved/c/file")
	r.until(agent.TreeEvent{Op: opRename, Path: in("moved"), From: in("a/b"), Dir: true})
	r.until(agent.TreeEvent{Op: opWrite, Path: in("moved/c/file")})
	sh("echo 2 > tmp && mv tmp there")
	r.until(agent.TreeEvent{Op: opSave, Path: in("there"), From: in("tmp")})
	only.until(agent.TreeEvent{Op: opSave, Path: in("there")})
	sh("mv there ../out/ && mv ../out/there back")
	r.until(agent.TreeEvent{Op: opRemove, Path: in("there")})
	r.until(agent.TreeEvent{Op: opCreate, Path: in("back")})
	sh("mv old ../out/ && echo no > ../out/old/deep/unseen && mv ../out/old new && echo yes > new/deep/seen")
	r.until(agent.TreeEvent{Op: opRemove, Path: in("old"), Dir: true})
	r.until(agent.TreeEvent{Op: opCreate, Path: in("new/deep/unseen")})
	r.until(agent.TreeEvent{Op: opCreate, Path: in("new/deep/seen")})
	sh("mkdir -p node_modules/x sub/node_modules && touch node_modules/x/y sub/node_modules/z f.swp; chmod 600 back; rm -r a; echo end > " +
		"end")
	r.until(agent.TreeEvent{Op: opWrite, Path: in("end")})
	for _, e := range r.seen {
		if strings.Contains(e.Path, "node_modules") || strings.Contains(e.Path, ".swp") || strings.HasPrefix(e.Path, dir+"/out") {
			t.Errorf("told: %+v", e)
		}
	}
	for _, want := range []agent.TreeEvent{{Op: opAttrib, Path: in("back")}, {Op: opRemove, Path: in("a"), Dir: true}} {
		if !slices.Contains(r.seen, want) {
			t.Errorf("not told: %+v", want)
		}
	}
	for _, op := range []string{opCreate, opSave} { // as the file tools write: their temporary file is not reported
		if _, err := c.WriteFile(t.Context(), in("new/tool"), strings.NewReader("x"), agent.WriteOptions{}); err != nil {
			t.Fatal(err)
		}
		r.until(agent.TreeEvent{Op: op, Path: in("new/tool"), Whole: true})
	}
	if slices.ContainsFunc(r.seen, func(e agent.TreeEvent) bool { return strings.Contains(e.Path+e.From, tempPrefix) }) {
		t.Errorf("%+v", r.seen)
	}
	flat.until(agent.TreeEvent{Op: opWrite, Path: in("end")})
	if slices.ContainsFunc(flat.seen, func(e agent.TreeEvent) bool { return path.Dir(e.Path) != dir+"/w" }) {
		t.Errorf("%+v", flat.seen)
	}
	// From the beginning again: the same.
	again := &treeReader{t: t, c: c, id: r.id}
	again.until(agent.TreeEvent{Op: opWrite, Path: in("end")})
	if !slices.Equal(again.seen, r.seen[:len(again.seen)]) {
		t.Errorf("%v\n%v", again.seen, r.seen)
	}
	run(t, c, agent.StartRequest{Command: "rm -r " + dir + "/w"})
	eventually(t, "the end of the tree", func() bool { return r.read(1000).Gone })
}

// TestTreeErrors: what cannot be watched is an error, and there are at most 64 watches.
func TestTreeErrors(t *testing.T) {
	c, dir := pair(t)
	for want, bad := range map[error]agent.TreeRequest{
		fs.ErrNotExist: {Path: dir + "/no"}, agent.ErrInvalid: {Path: "relative"}, agent.ErrNoWatch: {Watch: "w99"},
	} {
		if _, err := c.WatchTree(t.Context(), bad); !errors.Is(err, want) {
			t.Errorf("%+v: %v", bad, err)
		}
	}
	first := watchTree(t, c, agent.TreeRequest{Path: dir})
	if _, err := c.WatchTree(t.Context(), agent.TreeRequest{Watch: first.id, From: 99}); !errors.Is(err, agent.ErrInvalid) {
		t.Error(err)
	}
	if _, err := c.WatchTree(t.Context(), agent.TreeRequest{Path: dir, Ignore: []string{"[", ""}}); !errors.Is(err, agent.ErrInvalid) {
		t.Error(err)
	}
	for range maxWatches - 1 {
		watchTree(t, c, agent.TreeRequest{Path: dir})
	}
	if _, err := c.WatchTree(t.Context(), agent.TreeRequest{Path: dir}); !errors.Is(err, agent.ErrWatches) {
		t.Error(err)
	}
	waiting := make(chan agent.TreeResult, 1)
	go func() {
		r, _ := c.WatchTree(t.Context(), agent.TreeRequest{Watch: first.id, WaitMS: 600_000})
		waiting <- r
	}()
	if _, err := c.WatchTree(t.Context(), agent.TreeRequest{Watch: first.id, Close: true}); err != nil {
		t.Error(err)
	}
	if r := <-waiting; !r.Gone && r.Watch != "" { // it has begun to wait before, or was refused
		t.Errorf("a reader of a watch that was ended got %+v", r)
	}
	watchTree(t, c, agent.TreeRequest{Path: dir})
	if _, err := c.WatchTree(t.Context(), agent.TreeRequest{Watch: first.id}); !errors.Is(err, agent.ErrNoWatch) {
		t.Error(err)
	}
}

// TestTreeUnwanted: a watch that nobody wants any more does not begin, and leaves nothing.
func TestTreeUnwanted(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "below"), 0o755); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	s := newWatches()
	if _, err := s.keep(ctx, agent.TreeRequest{Path: dir, Recursive: true}); err == nil {
		t.Error("it begins")
	}
	if s.open != 0 || s.known.Load() != 0 || s.dirs.Load() != 0 || len(s.byID) != 0 {
		t.Errorf("%d are open, %d bytes and %d directories are known", s.open, s.known.Load(), s.dirs.Load())
	}
}

// TestTreeRebuilt: whatever happens in a tree, the events describe the final state, or say that some are missing.
func TestTreeRebuilt(t *testing.T) {
	some := "some() { seq $1; }; "
	if testing.Short() {
		some = "some() { seq $(($1 / 3)); }; "
	}
	for name, script := range map[string]string{
		"made and removed": "for i in $(some 60); do mkdir -p n/p$i/lib/deep; for j in 1 2 3 4 5; do echo $j > n/p$i/lib/deep/f$j; done; " +
			"done; rm -rf n/p1* n/p2*; mkdir -p n/p1/x; touch n/p1/x/y",
		"renamed": "mkdir d e; for i in $(some 300); do : > d/f$i; done; for k in 1 2 3; do for i in $(some 300); do mv d/f$i " +
			"e/g$i; mv e/g$i d/f$i; done; done; mv d e/d; mv e/d/f1 f; mkdir d; mv e/d/f2 d/f1; mv -f f d/f1",
		"unpacked": "mkdir -p src/a/b src/c; for i in $(some 200); do echo $i > src/a/b/f$i; echo $i > src/c/g$i; done; tar cf " +
			"all.tar src; rm -r src; tar xf all.tar; mv src again; tar xf all.tar",
		"at the same time": "for k in 1 2 3 4; do (for i in $(some 100); do mkdir -p s$k/$i/x; mv s$k/$i s$k/m$i; rm -r s$k/m$((i - 1)) " +
			"2>/dev/null; : > s$k/m$i/x/f; done) & done; wait",
		"cloned": "git init -q from && cd from && git config user.email a@b && git config user.name n && for i in $(some 500); do mkdir " +
			"-p d$((i % 20)) && echo $i > d$((i % 20))/f$i; done && git add . && git commit -qm all && cd .. && git clone -q from to && " +
			"rm -rf from",
	} {
		t.Run(name, func(t *testing.T) {
			c, dir := pair(t)
			root := dir + "/tree"
			if err := os.Mkdir(root, 0o755); err != nil {
				t.Fatal(err)
			}
			r := watchTree(t, c, agent.TreeRequest{Path: root, Recursive: true})
			var done sync.WaitGroup
			done.Go(func() {
				if s := start(t, c, agent.StartRequest{Command: some + "cd " + root + " && " + script,
					Env: map[string]string{"HOME": dir}}); s.Process.ExitCode != 0 {
					t.Errorf("%s", s.Output.Head)
				}
			})
			tree := rebuilt{}
			take := func() {
				n := len(r.seen)
				r.read(100)
				for _, e := range r.seen[n:] {
					tree.apply(e)
				}
			}
			over := make(chan struct{})
			go func() { done.Wait(); close(over) }()
			for running := true; running; {
				select {
				case <-over:
					running = false
				default:
					take()
				}
			}
			eventually(t, "the tree as it is", func() bool { take(); return r.lost || tree.same(root) == "" })
			if r.lost {
				t.Log("events were lost, and it was said")
			}
			t.Logf("%d events", len(r.seen))
		})
	}
}

// TestTreeLost: a reader that is too late is told, and continues with the events that are kept.
func TestTreeLost(t *testing.T) {
	c, dir := pair(t)
	r := watchTree(t, c, agent.TreeRequest{Path: dir, Recursive: true, Ignore: []string{"spool"}})
	// More events than a watch and the kernel keep, in parts: so the test holds whether the agent keeps up or, on a busy machine, does not.
	const rounds, files = 30, 1000
	for round := range rounds {
		run(t, c, agent.StartRequest{Command: fmt.Sprintf("cd %s; for i in {1..%d}; do echo > f%d.$i; done", dir, files, round)})
	}
	last := agent.TreeEvent{Op: opWrite, Path: dir + "/last"}
	eventually(t, "a write after that", func() bool {
		run(t, c, agent.StartRequest{Command: "echo >> " + last.Path})
		r.read(1000)
		return slices.Contains(r.seen, last)
	})
	if !r.lost || len(r.seen) >= 2*rounds*files {
		t.Fatal(r.lost, len(r.seen))
	}
}

// TestWatchedDirs: all watches together have a bound. Beyond it a watch sees its own directory, and says that it does not see all.
func TestWatchedDirs(t *testing.T) {
	root := t.TempDir()
	if err := os.Mkdir(root+"/sub", 0o755); err != nil {
		t.Fatal(err)
	}
	s := newWatches()
	s.dirs.Store(maxWatchDirs)
	w, err := s.keep(t.Context(), agent.TreeRequest{Path: root, Recursive: true})
	if err != nil {
		t.Fatal(err)
	}
	defer s.endAll()
	if got := s.dirs.Load() - maxWatchDirs; got != 1 {
		t.Errorf("%d directories are watched, want the watch's own", got)
	}
	if r, err := w.await(t.Context(), 0, 10, 0); err != nil || !r.Lost {
		t.Errorf("%+v, %v: want lost", r, err)
	}
}
