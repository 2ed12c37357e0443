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

	"golang.org/x/sys/unix"
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
		changed(t, what, "true", sh, batches)
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

// TestWatchFollows: a watch of a stream goes where its path leads now: through chains of links, also of directories, when one of them leads
// elsewhere, when a directory on the way is replaced, and when a file becomes a link.
func TestWatchFollows(t *testing.T) {
	c, dir := pair(t)
	in := func(name string) string { return filepath.Join(dir, name) }
	sh := func(command string) {
		t.Helper()
		if s := run(t, c, agent.StartRequest{Command: "cd " + dir + " && " + command}); s.Process.ExitCode != 0 {
			t.Fatalf("%s: %s", command, s.Output.Head)
		}
	}
	sh("mkdir -p one/d two/d other/e && echo 1 > one/d/f && echo 2 > two/d/f && echo 3 > other/e/g && ln -s one now && " +
		"ln -s now/../now up && ln -s up/d/f file && ln -s up/d tree && ln -s loop loop")
	if err := c.Watch(t.Context(), in("loop"), func() { t.Error("started") }, nil); !errors.Is(err, unix.ELOOP) {
		t.Error(err)
	}
	file, tree := watch(t, c, in("file")), watch(t, c, in("tree"))
	plain := watch(t, c, in("other/e/g"))
	for _, step := range []struct{ what, command string }{
		{"the target", "echo >> one/d/f"},
		{"another target", "ln -sfn two now"},
		{"what is there now", "echo >> two/d/f"},
		{"a file that an editor saved", "echo > two/d/new && mv two/d/new two/d/f"},
		{"that file", "echo >> two/d/f"},
		{"a directory that was replaced", "mv two away && mkdir -p two/d && echo > two/d/f"},
		{"the file in it", "echo >> two/d/f"},
		{"a link that is gone", "rm up"},
		{"a link that is there again", "ln -s one up"},
		{"what it leads to", "echo >> one/d/f"},
	} {
		t.Log(step.what)
		changed(t, step.what, step.command, sh, file, tree)
	}
	select {
	case b := <-plain:
		t.Errorf("told of what does not concern it: %+v", b)
	default:
	}
	changed(t, "a link in place of the file", "ln -sfn "+in("one/d/f")+" other/e/g", sh, plain)
	changed(t, "its target", "echo >> one/d/f", sh, plain)
	sh("echo > one/d/unrelated; touch unrelated")
	select {
	case b := <-plain:
		t.Errorf("told of what does not concern it: %+v", b)
	default:
	}
}

// TestWatchComesBack: however often what is watched is removed and made again, in whatever order, the last change is told.
func TestWatchComesBack(t *testing.T) {
	c, dir := pair(t)
	sh := func(command string) {
		t.Helper()
		run(t, c, agent.StartRequest{Command: "cd " + dir + " && " + command})
	}
	sh("mkdir -p a/b/c && echo > a/b/c/f")
	tree, file := watch(t, c, filepath.Join(dir, "a/b/c")), watch(t, c, filepath.Join(dir, "a/b/c/f"))
	for _, command := range []string{
		"rm -r a && mkdir -p a/b/c && echo > a/b/c/f",
		"for i in $(seq 20); do rm -r a; mkdir -p a/b/c; echo > a/b/c/f; done",
		"mv a/b a/x && mkdir -p a/b/c && echo > a/b/c/f && rm -r a/x",
		"mkdir -p n/b/c && echo > n/b/c/f && mv a old && mv n a && rm -r old",
		"rm a/b/c/f && mkdir a/b/c/f && rmdir a/b/c/f && echo > a/b/c/f",
	} {
		changed(t, command, command, sh, tree, file)
		changed(t, "a write after "+command, "echo >> a/b/c/f", sh, tree, file)
	}
}

// changed runs a command, and waits until all watches have told of a change and are silent.
func changed(t *testing.T, what, command string, sh func(string), all ...<-chan agent.WatchBatch) {
	t.Helper()
	sh(command)
	for i, batches := range all {
		eventually(t, fmt.Sprintf("%s, watch %d", what, i), func() bool { return told(batches) })
	}
	for _, batches := range all {
		for quiet := false; !quiet; { // related events come within a moment
			select {
			case <-batches:
			case <-time.After(10 * watchBatch):
				quiet = true
			}
		}
	}
}

// told reports whether a watch has told something.
func told(batches <-chan agent.WatchBatch) bool {
	select {
	case <-batches:
		return true
	default:
		return false
	}
}
