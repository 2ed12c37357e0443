package template

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"soulbox.dev/soulbox/internal/sandboxtest"
	"soulbox.dev/soulbox/sandbox"
)

// again returns a command that runs the test once more in another process, which finds said in the environment variable againVar.
func again(t *testing.T, said string) *exec.Cmd {
	cmd := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", "-test.count=1")
	cmd.Env = append(os.Environ(), againVar+"="+said)
	return cmd
}

const againVar = "SOULBOX_TEST_AGAIN"

// half returns the files that are being made or that jobs need.
func half(t *testing.T, s *Store) []string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(s.Dir, "*", ".*"))
	if err != nil {
		t.Fatal(err)
	}
	return names
}

// TestKilledMaker: what a killed server was making is removed at the next collection; what a living one makes stays.
func TestKilledMaker(t *testing.T) {
	if dir := os.Getenv(againVar); dir != "" {
		makeForEver(t, &Store{Dir: dir})
	}
	s := &Store{Dir: t.TempDir(), InUse: func() (map[string]bool, error) { return nil, nil }}
	server := again(t, s.Dir)
	out, err := server.StdoutPipe()
	_, ierr := server.StdinPipe()
	if err := errors.Join(err, ierr); err != nil {
		t.Fatal(err)
	}
	server.Stderr = os.Stderr
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	said := make([]byte, 5)
	_, err = io.ReadFull(out, said)
	before := half(t, s)
	layers := func() []string { names, _ := filepath.Glob(s.file("layers", "[^.]*")); return names }
	cerr := s.Collect()
	during, kept := half(t, s), layers()
	if err := errors.Join(err, cerr, server.Process.Kill()); err != nil || string(said) != "ready" {
		t.Fatal(err, string(said))
	}
	_ = server.Wait() // it was killed
	if len(before) != 5 || len(during) != len(before) || len(kept) != 1 {
		t.Errorf("while it lives: %v, then %v, with %v", before, during, kept)
	}
	if err := s.Collect(); err != nil {
		t.Fatal(err)
	}
	if left := append(half(t, s), layers()...); len(left) > 0 {
		t.Errorf("left by the dead: %v", left)
	}
}

// makeForEver leaves half a context, a whole one, half a layer, a lock, and a job that needs a layer.
func makeForEver(t *testing.T, s *Store) {
	whole, err := s.ContextFiles(t.Context(), "", map[string]string{"a": "a"})
	if err != nil {
		t.Fatal(err)
	}
	j := s.begin("")
	if _, err := j.newLayer(t.Context(), strings.NewReader(pack(t, file("a", "a"))), 1<<20, ""); err != nil {
		t.Fatal(err)
	}
	unlock, err := s.lock(t.Context(), "steps", "key")
	if err != nil {
		t.Fatal(err)
	}
	for _, make := range []func(io.Reader) error{
		func(r io.Reader) error { _, err := s.ReadContext(context.Background(), "", r); return err },
		func(r io.Reader) error {
			_, err := s.begin("").newLayer(context.Background(), r, 1<<20, "")
			return err
		},
	} {
		from, to := io.Pipe()
		go func() { t.Error(make(from)) }()
		if _, err := io.WriteString(to, pack(t, file("b", "b"))[:512]); err != nil {
			t.Fatal(err)
		}
	}
	sandboxtest.Eventually(t, "all is begun", func() bool { return len(half(t, s)) == 5 })
	fmt.Print("ready")
	_, err = io.Copy(io.Discard, os.Stdin) // until it is killed
	runtime.KeepAlive([]any{whole, unlock, j})
	t.Fatal(err)
}

// TestBuildBudget: successive builds leave only the last one's image. What is deleted is removed at once. What only makes builds faster is
// removed when the budget is used up; what is needed never is.
func TestBuildBudget(t *testing.T) {
	w := newWorkshop(t)
	used := func() int64 {
		t.Helper()
		d, err := w.store.Disk()
		if err != nil {
			t.Fatal(err)
		}
		return d.Used
	}
	empty := used()
	w.build("one", "FROM mini\nRUN echo 0 > /r\n", nil)
	one := used()
	for i := 1; i < 3; i++ {
		w.build("one", fmt.Sprintf("FROM mini\nRUN echo %d > /r\n", i), nil)
	}
	if now := used(); now > one+1<<20 {
		t.Errorf("%d MB after one build, %d MB after three of the same name", one>>20, now>>20)
	}
	if err := w.store.Delete("", "one"); err != nil {
		t.Fatal(err)
	}
	if now := used(); now > empty+1<<20 {
		t.Errorf("%d MB before a build, %d MB after its template was deleted", empty>>20, now>>20)
	}
	w.store.Budget = used() + 8<<20
	random := func() string { // gzip cannot make it smaller
		b := make([]byte, 5<<20)
		_, _ = rand.NewChaCha8([32]byte{byte(len(half(t, w.store)))}).Read(b)
		return string(b)
	}
	for i := range 3 { // each leaves a layer of 5 MB that a step remembers
		j := w.store.begin("")
		l, err := j.newLayer(t.Context(), strings.NewReader(pack(t, file(fmt.Sprint("f", i), random()))), 1<<30, "")
		if err == nil {
			err = w.store.remember(fmt.Sprint("key", i), step{Layer: &l})
		}
		if j.end(); err != nil {
			t.Fatal(i, err)
		}
	}
	if d, err := w.store.Disk(); err != nil || d.Used > d.Budget+6<<20 {
		t.Errorf("%+v, %v", d, err)
	}
	_, _, err := w.try(t.Context(), BuildRequest{Name: "two", Dockerfile: "FROM mini\nRUN echo two > /r\n"}, nil)
	if !errors.Is(err, sandbox.ErrNoDisk) || !strings.Contains(err.Error(), "no room: ") ||
		!strings.Contains(err.Error(), "MB of all templates; delete some") {
		t.Error(err)
	}
	if got := w.in("mini", "root", "echo well"); got != "well\n" {
		t.Error(got)
	}
	w.store.Budget = 0
	w.build("two", "FROM mini\nRUN echo two > /r\n", nil)
	if left := half(t, w.store); len(left) != 0 {
		t.Errorf("half made: %v", left)
	}
}

// TestBuildOnFullDisk: on a full disk a build fails with an error that says so, wherever it writes. Nothing half made is left, and the
// build works once there is room.
func TestBuildOnFullDisk(t *testing.T) {
	sandboxtest.OnSmallDisk(t, 400<<20, func(dir string) { fullDiskTest(t, dir) })
}

func fullDiskTest(t *testing.T, dir string) {
	t.Setenv("TMPDIR", dir)
	w := newWorkshop(t)
	ballast := filepath.Join(dir, "ballast")
	leave := func(left int64) {
		t.Helper()
		_ = os.Remove(ballast)
		free, _, err := w.store.free()
		if err == nil {
			err = os.WriteFile(ballast, make([]byte, max(0, free-left)), 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	noise := make([]byte, 60<<20)
	_, _ = rand.NewChaCha8([32]byte{}).Read(noise)
	// a little more than the store leaves to others: the store checks only now and then, so the disk itself fills up
	tight := int64(22 << 20)
	for name, c := range map[string]func() error{
		"a context": func() error {
			leave(tight)
			f, err := w.store.ReadContext(t.Context(), "", strings.NewReader(pack(t, file("noise", string(noise)))))
			if err == nil {
				err = errors.Join(errors.New("it fits"), f.Close())
			}
			return err
		},
		"a layer": func() error {
			leave(tight)
			_, err := w.store.Import(t.Context(), Manifest{Name: "layer"}, strings.NewReader(pack(t, file("noise", string(noise)))))
			return err
		},
		"an image": func() error { // a copy of another
			leave(tight)
			_, _, err := w.try(t.Context(), BuildRequest{Name: "full", Dockerfile: "FROM mini\nRUN echo r > /r\n"}, nil)
			return err
		},
		"a step": func() error {
			leave(tight)
			dockerfile := "FROM mini\nRUN head -c 200000000 /dev/urandom > /big; exit 3\n"
			_, _, err := w.try(t.Context(), BuildRequest{Name: "full", Dockerfile: dockerfile}, nil)
			return err
		},
	} {
		err := c()
		if !errors.Is(err, sandbox.ErrNoDisk) || !strings.Contains(err.Error(), "no room: ") || errors.Is(err, ErrLayer) {
			t.Errorf("%s: %v", name, err)
		}
		if left := half(t, w.store); len(left) > 0 {
			t.Errorf("%s: half made: %v", name, left)
		}
		if _, err := w.store.Get("", "full"); !errors.Is(err, sandbox.ErrNoTemplate) {
			t.Errorf("%s: %v", name, err)
		}
		w.none()
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	w.build("full", "FROM mini\nRUN echo r > /r\n", nil)
	if got := w.in("full", "root", "cat /r"); got != "r\n" {
		t.Error(got)
	}
}

// TestBuildModes: only the server's user can read the store, and for files that sandboxes boot from also their group, even if an older
// version left the files open.
func TestBuildModes(t *testing.T) {
	w := newWorkshop(t)
	dockerfile := "FROM mini\nRUN --mount=type=cache,target=/c echo 1 > /c/x; echo 1 > /r\n"
	_, _, err := w.try(t.Context(), BuildRequest{Name: "one", Dockerfile: dockerfile, StartCmd: "sleep 1000"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	open := func() (all []string) {
		for _, kind := range kinds {
			err := filepath.WalkDir(w.store.file(kind, ""), func(name string, d fs.DirEntry, err error) error {
				if errors.Is(err, fs.ErrNotExist) {
					return nil
				}
				info, ierr := d.Info()
				if err := errors.Join(err, ierr); err != nil {
					return err
				}
				if mode := info.Mode().Perm(); !d.IsDir() && mode&0o007 != 0 || d.IsDir() && mode&0o066 != 0 {
					all = append(all, fmt.Sprintf("%s %o", name, mode))
				}
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
		}
		return all
	}
	if all := open(); len(all) > 0 {
		t.Errorf("open: %v", all)
	}
	images, err := filepath.Glob(w.store.file("images", "*.erofs"))
	if err != nil || len(images) != 2 {
		t.Fatal(images, err)
	}
	for _, name := range append(images, w.store.file("layers", "")) {
		if err := os.Chmod(name, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.store.Collect(); err != nil {
		t.Fatal(err)
	}
	if all := open(); len(all) > 0 {
		t.Errorf("still open: %v", all)
	}
	if got := w.in("one", "root", "cat /r"); got != "1\n" {
		t.Error(got)
	}
}
