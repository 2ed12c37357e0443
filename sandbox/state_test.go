package sandbox

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
)

func TestMoves(t *testing.T) {
	for _, from := range States() {
		for _, to := range States() {
			want := false
			switch from {
			case Creating:
				want = to == Running || to == Killed || to == Failed
			case Running:
				want = to == Paused || to == Killed || to == Failed
			case Paused:
				want = to == Running || to == Killed || to == Failed
			}
			if from.mayBecome(to) != want {
				t.Errorf("%s to %s: %v", from, to, !want)
			}
		}
		if from.Ended() != (from == Killed || from == Failed) {
			t.Errorf("%s ended: %v", from, from.Ended())
		}
	}
}

func TestIDs(t *testing.T) {
	seen := map[string]bool{}
	for range 1000 {
		id := newID()
		if !ValidID(id) || seen[id] || len(id) != 22 {
			t.Fatal(id)
		}
		seen[id] = true
	}
	for _, id := range []string{"", "A", "a/b", "..", "a.b", "a b", "ä", "a\x00"} {
		if ValidID(id) {
			t.Errorf("%q is taken for an id", id)
		}
	}
}

// TestSaveIsWhole cuts a write short: the old state stays, and nothing else is left.
func TestSaveIsWhole(t *testing.T) {
	const helper = "SOULBOX_TEST_HELPER"
	if os.Getenv(helper) == "" {
		// In a process of its own: the limit on file sizes is for the whole process, and go test writes files too.
		cmd := exec.Command(os.Args[0], "-test.run=^TestSaveIsWhole$")
		cmd.Env = append(os.Environ(), helper+"=1")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return
	}
	s := store{t.TempDir()}
	if err := os.Mkdir(s.path("sbx"), 0o700); err != nil {
		t.Fatal(err)
	}
	old := record{Version: recordVersion, ID: "sbx", State: Running}
	if err := s.save(old); err != nil {
		t.Fatal(err)
	}
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_FSIZE, &limit); err != nil {
		t.Fatal(err)
	}
	for cut := range uint64(200) {
		if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &syscall.Rlimit{Cur: cut, Max: limit.Max}); err != nil {
			t.Fatal(err)
		}
		err := s.save(record{Version: recordVersion, ID: "sbx", State: Killed, Cause: "a cause that is long enough to need some room in the file"})
		if rerr := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &limit); rerr != nil {
			t.Fatal(rerr)
		}
		if err == nil {
			t.Fatalf("a write cut at %d did not fail", cut)
		}
		if got, err := s.load("sbx"); err != nil || got.State != Running {
			t.Fatalf("cut at %d: %+v %v", cut, got, err)
		}
	}
	if entries, err := os.ReadDir(s.path("sbx")); err != nil || len(entries) != 1 {
		t.Fatal(entries, err)
	}
}

func TestLocks(t *testing.T) {
	s := store{t.TempDir()}
	lock, err := s.claim("sbx")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.claim("sbx"); !errors.Is(err, os.ErrExist) {
		t.Fatal(err)
	}
	if found, err := s.orphans(); err != nil || len(found) != 0 {
		t.Fatal("an owned sandbox is an orphan", err)
	}
	if err := os.WriteFile(filepath.Join(s.path("sbx"), "more"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := lock.Close(); err != nil {
		t.Fatal(err)
	}
	found, err := s.orphans()
	if err != nil || found["sbx"] == nil {
		t.Fatal(found, err)
	}
	if err := s.remove("sbx", found["sbx"]); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(s.path("sbx")); !errors.Is(err, os.ErrNotExist) {
		t.Fatal("it is left")
	}
}
