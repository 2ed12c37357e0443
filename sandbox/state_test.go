package sandbox

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"soulbox.dev/soulbox/internal/durable"
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
				want = to == Running || to == Paused || to == Killed || to == Failed // from memory to disk
			case Failed:
				want = to == Running || to == Killed // from what was saved
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

// TestCutAtEveryByte: wherever a write is cut off, in whichever of its steps, a later read finds the old or the new content.
func TestCutAtEveryByte(t *testing.T) {
	old := record{Version: recordVersion, ID: "sbx", State: Running, Metadata: map[string]string{"a": "old"}}
	fresh := old
	fresh.State, fresh.Cause, fresh.Metadata = Killed, "a cause that is long enough to need some room", map[string]string{"a": "new"}
	for name, change := range map[string]func(s store) error{
		"save": func(s store) error { return s.save(fresh) },
		"entomb": func(s store) error {
			lock, err := durable.Lock(filepath.Join(s.path("sbx"), "lock"), false)
			if err != nil {
				return err
			}
			return s.entomb(fresh, lock)
		},
		"log": func(s store) error {
			return new(journal).append(s.Disk, s.path("sbx"), LogEntry{Message: "new", Level: LevelInfo})
		},
	} {
		cuts := 0
		for done := false; !done; cuts++ {
			s := newTestStore(t)
			for _, err := range []error{os.Mkdir(s.path("sbx"), 0o700), s.save(old),
				new(journal).append(s.Disk, s.path("sbx"), LogEntry{Message: "old", Level: LevelInfo})} {
				if err != nil {
					t.Fatal(err)
				}
			}
			left := cuts
			broken := s
			broken.Fault = func(_, _ string, size int) (int, error) {
				if left < 0 {
					return 0, errCut
				}
				if left < max(1, size) {
					part := left
					left = -1
					return min(part, size), errCut
				}
				left -= max(1, size)
				return size, nil
			}
			err := change(broken)
			done = err == nil
			checkCut(t, fmt.Sprintf("%s cut at %d: %v", name, cuts, err), s, old, fresh, done)
		}
		if cuts < 50 {
			t.Errorf("%s was cut %d times only", name, cuts)
		}
	}
}

var errCut = errors.New("cut off")

func checkCut(t *testing.T, name string, s store, old, fresh record, done bool) {
	t.Helper()
	got, err := s.load("sbx")
	dir := s.path("sbx")
	if errors.Is(err, os.ErrNotExist) {
		dir = s.tomb("sbx")
		got, err = loadFrom(dir, "sbx")
	}
	if err != nil || got.Metadata["a"] != old.Metadata["a"] && got.Metadata["a"] != fresh.Metadata["a"] {
		t.Fatalf("%s: %+v, %v", name, got, err)
	}
	var messages []string
	for _, more := range []bool{false, true} {
		if more { // the log continues after a line that was cut off
			if err := new(journal).append(s.Disk, dir, LogEntry{Message: "later", Level: LevelInfo}); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
		}
		messages = nil
		err = eachLine(filepath.Join(dir, logName), func(line []byte) error {
			var e LogEntry
			if json.Unmarshal(line, &e) == nil {
				messages = append(messages, fmt.Sprint(e.Seq, e.Message))
			}
			return nil
		})
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	}
	if n := len(messages); n < 2 || messages[0] != "1old" || messages[n-1] != fmt.Sprintf("%dlater", n) {
		t.Fatalf("%s: %q", name, messages)
	}
	// The next server takes what is left.
	found, err := s.orphan("sbx")
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	if found != nil {
		if err := s.entomb(got, found); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	}
	if _, err := loadFrom(s.tomb("sbx"), "sbx"); done && found == nil && err != nil {
		t.Fatalf("%s: %v", name, err)
	}
}

func TestLocks(t *testing.T) {
	s := newTestStore(t)
	lock, err := s.claim("sbx")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.claim("sbx"); !errors.Is(err, os.ErrExist) {
		t.Fatal(err)
	}
	if found, err := s.orphan("sbx"); err != nil || found != nil {
		t.Fatal("an owned sandbox is an orphan", err)
	}
	if err := os.WriteFile(filepath.Join(s.path("sbx"), "more"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := lock.Close(); err != nil {
		t.Fatal(err)
	}
	found, err := s.orphan("sbx")
	if err != nil || found == nil {
		t.Fatal(found, err)
	}
	if err := s.discard("sbx", found); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(s.path("sbx")); !errors.Is(err, os.ErrNotExist) {
		t.Fatal("it is left")
	}
}

func newTestStore(t *testing.T) store {
	t.Helper()
	s := newStore(t.TempDir())
	for _, dir := range []string{s.dir, s.ended, s.snapshots} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	return s
}
