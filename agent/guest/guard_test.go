package guest

import (
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestStillStopped: a process that was resumed, or has ended, since the guard learned that it was stopped counts as stopped by the guard,
// and is resumed with the others.
func TestStillStopped(t *testing.T) {
	var pids []int
	for range 2 {
		cmd := exec.Command("sleep", "600")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		defer func() {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}()
		pids = append(pids, cmd.Process.Pid)
		if err := unix.Kill(cmd.Process.Pid, unix.SIGSTOP); err != nil {
			t.Fatal(err)
		}
	}
	stays, goesOn := pids[0], pids[1]
	eventually(t, "both are stopped", func() bool { return isStopped(stays) && isStopped(goesOn) })
	known := map[int]bool{stays: true, goesOn: true, 1 << 30: true}
	if err := unix.Kill(goesOn, unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
	eventually(t, "one goes on", func() bool { return !isStopped(goesOn) })
	if still := stillStopped(known); len(still) != 1 || !still[stays] {
		t.Errorf("still stopped: %v, of %v", still, pids)
	}
	many := map[int]bool{}
	for i := range 2 * maxStopped {
		many[1<<30+i] = true
	}
	if still := stillStopped(many); len(still) != 0 {
		t.Error(still)
	}
}

// TestLearnFrozen: what the guard sees while it has stopped the processes does not become knowledge, even if they are resumed before it has
// looked.
func TestLearnFrozen(t *testing.T) {
	s := &Server{procs: map[string]*process{}}
	g := newGuard(s)
	for _, frozen := range []bool{true, false} {
		before := g.known.Load()
		s.mu.Lock() // learn waits for this lock
		g.learn()
		if frozen {
			g.freezes.Add(1)
		}
		s.mu.Unlock()
		eventually(t, "it is over", func() bool { return !g.learning.Load() })
		if learnt := g.known.Load() != before; learnt == frozen {
			t.Errorf("others were stopped meanwhile: %v, learnt: %v", frozen, learnt)
		}
	}
}

// TestSettled: while memory of an ended process is known to be still in use, no other process is killed for it, but not forever.
func TestSettled(t *testing.T) {
	now := time.Now()
	for _, test := range []struct {
		owed  int64
		since time.Duration
		want  bool
	}{{0, 100 * time.Millisecond, false}, {0, time.Second, true}, {800 << 20, time.Second, false}, {800 << 20, 3 * time.Second, true}} {
		g := &guard{owed: test.owed, freed: now.Add(-test.since)}
		if got := g.settled(now); got != test.want {
			t.Errorf("%d bytes owed, %v after the last became free: settled is %v", test.owed, test.since, got)
		}
	}
}
