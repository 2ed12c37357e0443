package template

import (
	"errors"
	"os"
	"strings"
	"testing"

	"soulbox.dev/soulbox/internal/durable"
)

// TestPowerFailsInStore cuts the power, or fails a single step, at each step of a change. The next server finds the old or the new
// template whole, and removes what is half made.
func TestPowerFailsInStore(t *testing.T) {
	for name, lasts := range map[string]bool{"power cut": true, "one error": false} {
		t.Run(name, func(t *testing.T) {
			for cut := 0; ; cut++ {
				dir := t.TempDir()
				if err := (&Store{Dir: dir}).Put(Manifest{Name: "x", Build: "old"}); err != nil {
					t.Fatal(err)
				}
				n, reached := 0, false
				failed := (&Store{Dir: dir, Durable: durable.Disk{Fault: func(_, _ string, size int) (int, error) {
					if n++; n-1 == cut || lasts && n > cut {
						reached = true
						return size / 2, errors.New("no power")
					}
					return size, nil
				}}}).Put(Manifest{Name: "x", Build: "new"})
				next := &Store{Dir: dir}
				got, err := next.Get("", "x")
				if err != nil || got.Build != map[bool]string{true: "old", false: "new"}[reached] || (failed != nil) != reached {
					t.Fatalf("step %d: %v, then %q, %v", cut, failed, got.Build, err)
				}
				if !reached {
					if cut < 3 {
						t.Fatalf("there are only %d steps", cut)
					}
					return
				}
				if err := next.Collect(); err != nil {
					t.Fatal(err)
				}
				entries, err := os.ReadDir(next.file("names", ""))
				if err != nil || len(entries) != 1 || strings.HasPrefix(entries[0].Name(), tempPrefix) {
					t.Fatalf("step %d leaves %v, %v", cut, entries, err)
				}
			}
		})
	}
}
