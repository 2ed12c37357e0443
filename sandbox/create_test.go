package sandbox_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"soulbox.dev/soulbox/internal/sandboxtest"
	"soulbox.dev/soulbox/sandbox"
)

// TestCreateFails: whichever step of a creation fails, the error is its, and nothing stays behind: no machine, no directory, no lock, no
// promise of memory. What can be undone is undone, also if something else cannot.
func TestCreateFails(t *testing.T) {
	broken, stuck := errors.New("broken"), errors.New("stuck")
	var m *sandbox.Manager
	on := func(step, end string, err error) func(string, string) error {
		return func(s, name string) error {
			if s == step && strings.HasSuffix(filepath.Base(name), end) {
				return err
			}
			return nil
		}
	}
	for what, test := range map[string]struct {
		fault func(step, name string) error // of the disk
		boot  error
		want  error
		tomb  bool // it was seen, so it is remembered
		stays bool
	}{
		"claim":                  {fault: on("mkdir", "", broken), want: broken},
		"the file of its record": {fault: on("create", "state.json", broken), want: broken},
		"its record":             {fault: on("rename", "state.json", broken), want: broken},
		"entering, when the server ends": {fault: func(step, name string) error {
			if step == "rename" && filepath.Base(name) == "state.json" {
				m.CloseRegistry()
			}
			return nil
		}, want: sandbox.ErrClosed},
		"boot": {boot: broken, want: broken, tomb: true},
		"its record, and nothing can be removed": {fault: func(step, name string) error {
			if step == "rename" {
				return broken
			}
			return on("remove", "", stuck)(step, name)
		}, want: broken, stays: true},
	} {
		t.Run(what, func(t *testing.T) {
			fake, armed := &sandboxtest.Fake{FailBoot: test.boot}, atomic.Bool{}
			m = newManager(t, t.TempDir(), fake, func(o *sandbox.Options) {
				o.SetFault(func(step, name string, size int) (int, error) {
					if armed.Load() && test.fault != nil {
						if err := test.fault(step, name); err != nil {
							return 0, err
						}
					}
					return size, nil
				})
			})
			<-m.Settled()
			before, err := m.FreeMemory()
			if err != nil {
				t.Fatal(err)
			}
			armed.Store(true)
			sb, err := m.Create(t.Context(), sandbox.CreateOptions{Owner: "ann"})
			armed.Store(false)
			if sb != nil || !errors.Is(err, test.want) || errors.Is(err, stuck) != test.stays {
				t.Errorf("%v, %v", sb, err)
			}
			if n := fake.Running(); n != 0 {
				t.Errorf("%d machines stay", n)
			}
			left, err := filepath.Glob(filepath.Join(m.Dir(), "sandboxes", "[^.]*"))
			if err != nil || (len(left) > 0) != test.stays {
				t.Errorf("left: %v, %v", left, err)
			}
			if held := locked(t, filepath.Join(m.Dir(), "sandboxes")); len(held) > 0 {
				t.Errorf("these locks are held: %v", held)
			}
			if after, err := m.FreeMemory(); err != nil || !test.stays && after != before {
				t.Errorf("room for %d bytes, before it was %d, %v", after, before, err)
			}
			tombs, err := os.ReadDir(filepath.Join(m.Dir(), "ended"))
			if err != nil || (len(tombs) == 1) != test.tomb {
				t.Errorf("%d tombstones, %v", len(tombs), err)
			}
			if all := m.List(sandbox.Filter{Owner: "ann", State: sandbox.Creating}); len(all) > 0 {
				t.Errorf("still in the making: %+v", all)
			}
		})
	}
}

// locked lists the lock files of sandboxes in a directory that this process has open.
func locked(t *testing.T, dir string) (names []string) {
	t.Helper()
	all, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range all {
		name, err := os.Readlink(filepath.Join("/proc/self/fd", fd.Name()))
		if err == nil && strings.HasPrefix(name, dir+"/") && strings.Contains(name, "/lock") { // the one of ReadDir is closed by now
			names = append(names, name)
		}
	}
	return names
}

// TestCores: what is granted is the sandbox's limit. A server with fewer cores leaves it to what begins from a memory, which it must match.
func TestCores(t *testing.T) {
	dir, fake := t.TempDir(), &sandboxtest.Fake{}
	cores := func(n int) func(*sandbox.Options) { return func(o *sandbox.Options) { o.Cores, o.Keep = n, true } }
	is := func(what string, sb *sandbox.Sandbox, want float64) {
		t.Helper()
		if got := sb.Info().Limits.CPU; got != want {
			t.Errorf("%s has %g cores, want %g", what, got, want)
		}
	}
	asking := func(cpu float64, from string) sandbox.CreateOptions {
		return sandbox.CreateOptions{Template: from, Limits: sandbox.Limits{CPU: cpu}}
	}
	m := newManager(t, dir, fake, cores(8))
	sb := create(t, m, asking(64, ""))
	is("a sandbox", sb, 8)
	for _, o := range []sandbox.SnapshotOptions{{Name: "whole"}, {Name: "files", FilesOnly: true}} {
		if _, err := sb.Snapshot(t.Context(), o); err != nil {
			t.Fatal(err)
		}
	}
	is("one that asks again", create(t, m, asking(64, "whole")), 8)
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	m = newManager(t, dir, fake, cores(4))
	<-m.Settled()
	again, err := m.Get("", sb.ID())
	if err != nil {
		t.Fatal(err)
	}
	is("an adopted sandbox", again, 8)
	copies, failed, err := again.Fork(t.Context(), 1, nil)
	if err != nil || len(failed) > 0 {
		t.Fatal(failed, err)
	}
	is("its copy", copies[0], 8)
	is("one from its memory", create(t, m, asking(0, "whole")), 8)
	is("one from its files", create(t, m, asking(0, "files")), 4)
	for _, other := range []float64{4, 64} {
		if _, err := m.Create(t.Context(), asking(other, "whole")); !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("%g cores for a memory that has 8: %v", other, err)
		}
	}
}
