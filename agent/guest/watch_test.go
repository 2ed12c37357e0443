package guest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"soulbox.dev/soulbox/agent"
)

// watch begins to watch a path and sends the changes to a channel.
func watch(t *testing.T, c *agent.Client, path string) <-chan agent.WatchBatch {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	started, batches, ended := make(chan struct{}), make(chan agent.WatchBatch, 1000), make(chan error, 1)
	go func() {
		ended <- c.Watch(ctx, path, func() { close(started) }, func(b agent.WatchBatch) error { batches <- b; return nil })
	}()
	t.Cleanup(func() { cancel(); <-ended })
	select {
	case <-started:
	case err := <-ended:
		ended <- err
		t.Fatal(err)
	}
	return batches
}

// await collects events until all wanted ones have come.
func await(t *testing.T, batches <-chan agent.WatchBatch, want ...agent.WatchEvent) {
	t.Helper()
	missing := map[agent.WatchEvent]bool{}
	for _, e := range want {
		missing[e] = true
	}
	eventually(t, fmt.Sprint(want), func() bool {
		select {
		case b := <-batches:
			for _, e := range b.Events {
				delete(missing, e)
			}
		default:
		}
		return len(missing) == 0
	})
}

func TestWatch(t *testing.T) {
	c, dir := pair(t)
	in := func(name string) string { return filepath.Join(dir, name) }
	write := func(name string) {
		t.Helper()
		if err := os.WriteFile(in(name), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("there")
	all, one := watch(t, c, dir), watch(t, c, in("there"))
	write("new")
	await(t, all, agent.WatchEvent{Op: "create", Path: in("new")}, agent.WatchEvent{Op: "write", Path: in("new")})
	if err := os.Rename(in("new"), in("there")); err != nil { // as editors save
		t.Fatal(err)
	}
	await(t, all, agent.WatchEvent{Op: "rename", Path: in("new")}, agent.WatchEvent{Op: "create", Path: in("there")})
	await(t, one, agent.WatchEvent{Op: "create", Path: in("there")})
	write("there")
	await(t, one, agent.WatchEvent{Op: "write", Path: in("there")})
	if err := os.Remove(in("there")); err != nil {
		t.Fatal(err)
	}
	await(t, one, agent.WatchEvent{Op: "remove", Path: in("there")})
	write("there")
	await(t, one, agent.WatchEvent{Op: "create", Path: in("there")})
}

// TestWatchBounds: what cannot be watched is an error, many events are cut and marked as cut, and there are at most 64 watches.
func TestWatchBounds(t *testing.T) {
	c, dir := pair(t)
	for path, want := range map[string]error{filepath.Join(dir, "no"): fs.ErrNotExist, "relative": agent.ErrInvalid, dir +
		"/../x": agent.ErrInvalid} {
		if err := c.Watch(t.Context(), path, func() { t.Error("started") }, nil); !errors.Is(err, want) {
			t.Errorf("%s: %v", path, err)
		}
	}
	batches := watch(t, c, dir)
	run(t, c, agent.StartRequest{Command: fmt.Sprintf("cd %s; for i in $(seq 3000); do : > f$i; done", dir)})
	events, overflow := 0, false
	eventually(t, "all events, or the word that there were more", func() bool {
		select {
		case b := <-batches:
			if len(b.Events) > agent.MaxWatchEvents {
				t.Fatal(len(b.Events))
			}
			events, overflow = events+len(b.Events), overflow || b.Overflow
		default:
		}
		return overflow || events >= 3000
	})
	for range maxWatches - 1 {
		watch(t, c, dir)
	}
	if err := c.Watch(t.Context(), dir, func() {}, nil); !errors.Is(err, agent.ErrWatches) {
		t.Fatal(err)
	}
}

// TestWatchAgain: a directory that is removed and created again is still watched, and so is the target of a symlink.
func TestWatchAgain(t *testing.T) {
	c, dir := pair(t)
	in := func(name string) string { return filepath.Join(dir, name) }
	sh := func(command string) {
		t.Helper()
		run(t, c, agent.StartRequest{Command: "cd " + dir + " && " + command})
	}
	sh("mkdir -p a/d && echo 1 > a/d/f && ln -s a/d/f link")
	tree, file, link := watch(t, c, in("a/d")), watch(t, c, in("a/d/f")), watch(t, c, in("link"))
	something := func(what string, batches <-chan agent.WatchBatch) {
		t.Helper()
		eventually(t, what, func() bool {
			select {
			case <-batches:
				return true
			default:
				return false
			}
		})
		for quiet := false; !quiet; { // related events come within a moment
			select {
			case <-batches:
			case <-time.After(10 * watchBatch):
				quiet = true
			}
		}
	}
	sh("echo 2 >> a/d/f")
	something("a change of the target", link)
	something("a change of the file", file)
	something("a change in the directory", tree)
	sh("rm -r a")
	something("the end of the directory", tree)
	something("the end of the file", file)
	sh("mkdir -p a/d")
	something("the directory again", tree)
	sh("echo 3 > a/d/f")
	something("a change in the new directory", tree)
	something("the file again", file)
	sh("echo 4 >> a/d/f")
	something("a change of the new file", file)
}
