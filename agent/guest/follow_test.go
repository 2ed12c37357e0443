package guest

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"soulbox.dev/soulbox/agent"
)

// TestFollow: a process waits for its follower, however slow that is, and for no other reader; nothing is lost.
func TestFollow(t *testing.T) {
	c, _ := pair(t)
	const size = 40 << 20
	s, err := c.Start(t.Context(), agent.StartRequest{Command: fmt.Sprintf("read x; head -c %d /dev/zero; echo over >&2", size),
		KeepStdin: true})
	if err != nil {
		t.Fatal(err)
	}
	var got atomic.Int64
	go_, held := make(chan struct{}), make(chan struct{})
	followed := make(chan error, 1)
	go func() {
		first := true
		followed <- c.Follow(t.Context(), s.Process.ID, 0, func(f agent.OutputFrame) error {
			if f.Offset != got.Load() {
				return fmt.Errorf("a frame at %d, want %d", f.Offset, got.Load())
			}
			got.Add(int64(len(f.Data)))
			if first {
				first = false
				close(held)
				<-go_
			}
			return nil
		})
	}()
	if _, err := c.WriteStdin(t.Context(), s.Process.ID, []byte("\n"), true); err != nil {
		t.Fatal(err)
	}
	<-held
	written := func() int64 {
		s, err := c.Wait(t.Context(), agent.WaitRequest{Process: s.Process.ID})
		if err != nil {
			t.Fatal(err)
		}
		return s.Process.Output
	}
	last := int64(-1)
	eventually(t, "the process stands still", func() bool {
		now := written()
		still := now == last && now > holdRoom/2
		last = now
		return still
	})
	if last > holdRoom+(4<<20) {
		t.Errorf("it wrote %d bytes that nobody has read", last)
	}
	close(go_)
	if err := <-followed; err != nil {
		t.Fatal(err)
	}
	if got.Load() != size+5 {
		t.Errorf("%d bytes, want %d", got.Load(), size+5)
	}
}

// TestFollowerGone: a process does not wait for a follower that has gone, not even at its end.
func TestFollowerGone(t *testing.T) {
	c, _ := pair(t)
	s, err := c.Start(t.Context(), agent.StartRequest{Command: "head -c 40000000 /dev/zero"})
	if err != nil {
		t.Fatal(err)
	}
	enough := errors.New("enough")
	if err := c.Follow(t.Context(), s.Process.ID, 0, func(agent.OutputFrame) error { return enough }); !errors.Is(err, enough) {
		t.Fatal(err)
	}
	end, err := c.Wait(t.Context(), agent.WaitRequest{Process: s.Process.ID, WaitMS: 60_000})
	if err != nil || end.Process.State != agent.StateExited || end.Process.Output != 40_000_000 {
		t.Fatalf("%+v %v", end.Process, err)
	}
	// A process that is killed while it waits ends, and its follower is told.
	s, err = c.Start(t.Context(), agent.StartRequest{Command: "yes"})
	if err != nil {
		t.Fatal(err)
	}
	killed := make(chan error, 1)
	err = c.Follow(t.Context(), s.Process.ID, 0, func(f agent.OutputFrame) error {
		if f.End == nil && f.Offset == 0 {
			eventually(t, "it stands still", func() bool {
				a, _ := c.Wait(t.Context(), agent.WaitRequest{Process: s.Process.ID})
				return a.Process.Output > holdRoom
			})
			_, err := c.Kill(t.Context(), s.Process.ID)
			killed <- err
		}
		return nil
	})
	if err != nil || <-killed != nil {
		t.Fatal(err)
	}
}

// TestListGoesOn: a listing in parts equals the listing in one part, wherever it is cut.
func TestListGoesOn(t *testing.T) {
	c, dir := pair(t)
	for _, name := range []string{"a/1", "a/2/x", "a-b/3", "a.b", "b/4", "c", "a/2/y/z"} {
		put(t, c, filepath.Join(dir, name), "", agent.WriteOptions{})
	}
	names := func(limit int) (all []string) {
		for after := ""; ; {
			r, err := c.Dir(t.Context(), agent.DirRequest{Path: dir, Depth: 9, Limit: limit, After: after})
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range r.Entries {
				all = append(all, strings.TrimPrefix(e.Path, dir))
			}
			if !r.More {
				return all
			}
			after = r.Entries[len(r.Entries)-1].Path
		}
	}
	whole := strings.Join(names(0), " ")
	for limit := 1; limit < 12; limit++ {
		if parts := strings.Join(names(limit), " "); parts != whole {
			t.Errorf("by %d: %s, want %s", limit, parts, whole)
		}
	}
}

// TestLinks: a link is described by itself and by its target; the attributes of a file stay when it is replaced, unless others are given.
func TestLinks(t *testing.T) {
	c, dir := pair(t)
	target, link, dead, loop := filepath.Join(dir, "file"), filepath.Join(dir, "link"), filepath.Join(dir, "dead"),
		filepath.Join(dir, "loop")
	put(t, c, target, "x", agent.WriteOptions{Perm: 0o640})
	for name, to := range map[string]string{link: "file", dead: "nowhere", loop: "loop"} {
		if err := os.Symlink(to, name); err != nil {
			t.Fatal(err)
		}
	}
	real, err := filepath.EvalSymlinks(target)
	if err != nil {
		t.Fatal(err)
	}
	if f, err := c.Lstat(t.Context(), link); err != nil || f.Type != agent.TypeSymlink || f.Link == nil || f.Link.Target != real ||
		f.Link.Type != agent.TypeFile || f.Link.Mode != "0640" || f.Link.Permissions[0] != 'L' {
		t.Fatalf("%+v %+v %v", f, f.Link, err)
	}
	for _, name := range []string{dead, loop} {
		if f, err := c.Lstat(t.Context(), name); err != nil || f.Link.Target != "" {
			t.Errorf("%+v %v", f.Link, err)
		}
	}
	if f, err := c.Lstat(t.Context(), target); err != nil || f.Link.Permissions != "-rw-r-----" {
		t.Errorf("%+v %v", f, err)
	}
	if _, err := c.Lstat(t.Context(), filepath.Join(dir, "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	if r, err := c.Dir(t.Context(), agent.DirRequest{Path: dir, Links: true}); err != nil || len(r.Entries) != 4 ||
		r.Entries[1].Link == nil {
		t.Errorf("%+v %v", r, err)
	}
	if f := put(t, c, target, "y", agent.WriteOptions{Attrs: map[string]string{"e2b.a": "1"}}); f.Attrs["e2b.a"] != "1" {
		t.Skip("this file system has no extended attributes")
	}
	if f := put(t, c, target, "z", agent.WriteOptions{}); f.Attrs["e2b.a"] != "1" {
		t.Errorf("they are gone: %v", f.Attrs)
	}
	if f := put(t, c, target, "z", agent.WriteOptions{Attrs: map[string]string{"b": "2"}}); f.Attrs["e2b.a"] != "" || f.Attrs["b"] != "2" {
		t.Errorf("%v", f.Attrs)
	}
	if _, err := c.WriteFile(t.Context(), target, strings.NewReader("w"),
		agent.WriteOptions{Attrs: map[string]string{"b": strings.Repeat("x", 1<<20)}}); err == nil {
		t.Error("an attribute of a megabyte")
	}
	r, _, err := c.ReadFile(t.Context(), target, 0, -1)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if body, _ := io.ReadAll(r); string(body) != "z" {
		t.Errorf("a write that failed has left %q", body)
	}
}

// TestWho: users are found by name, and the environment that was set is returned.
func TestWho(t *testing.T) {
	c, dir := pair(t)
	u, err := c.User(t.Context(), "")
	if err != nil || u.UID != uint32(os.Getuid()) || u.Home == "" || u.Cwd != u.Home {
		t.Errorf("%+v %v in %s", u, err, dir)
	}
	if _, err := c.User(t.Context(), "nobody-such"); !errors.Is(err, agent.ErrNoUser) {
		t.Error(err)
	}
	if err := c.Configure(t.Context(), agent.Config{Env: map[string]string{"A": "1"}}); err != nil {
		t.Fatal(err)
	}
	if env, err := c.Environment(t.Context()); err != nil || env["A"] != "1" {
		t.Error(env, err)
	}
}

// TestFollowBeforeFlood: the leader's output is not dropped for what its child writes after its end, while a follower is behind.
func TestFollowBeforeFlood(t *testing.T) {
	c, _ := pair(t)
	s, err := c.Start(t.Context(), agent.StartRequest{Command: "head -c 8000000 /dev/zero; (yes &)", Hold: true})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = c.Kill(t.Context(), s.Process.ID) }()
	enough := errors.New("enough")
	at := int64(0)
	err = c.Follow(t.Context(), s.Process.ID, 0, func(f agent.OutputFrame) error {
		if f.Offset != at {
			return fmt.Errorf("a gap: %d, want %d", f.Offset, at)
		}
		if at == 0 { // the leader has ended, and the child writes as much as it may
			last := int64(-1)
			eventually(t, "all stands still", func() bool {
				w, _ := c.Wait(t.Context(), agent.WaitRequest{Process: s.Process.ID})
				still := w.Process.State == agent.StateExited && w.Output.End == last
				last = w.Output.End
				return still
			})
		}
		if at += int64(len(f.Data)); at > 8_000_000 {
			return enough
		}
		return nil
	})
	if !errors.Is(err, enough) {
		t.Fatal(err)
	}
}

// TestHoldRaggedOutput: neither alternating streams nor a ring that has become small make a holder lose unread output.
func TestHoldRaggedOutput(t *testing.T) {
	s := newSpool(t.TempDir())
	defer s.discard()
	h := s.hold(0)
	written := int64(0)
	for i := 0; i < 100_000 && !s.stall(nil); i++ {
		s.append(i%2, []byte("12345678"))
		written += 8
	}
	if _, dropped := s.sizes(); dropped > 0 || written == 800_000 {
		t.Errorf("%d of %d bytes are gone", dropped, written)
	}
	s.advance(h, written, false)
	for i := 0; i < 20_000; i++ {
		if s.stall(nil) {
			s.advance(h, s.end, false)
		}
		s.append(i%2, []byte("12345678"))
	}
	if s.lost(h.at, s.end) > 0 {
		t.Error("what is not read is gone")
	}
	s.shrink()
	s.advance(h, s.end, false)
	s.append(0, make([]byte, readPart))
	if !s.stall(nil) || s.lost(h.at, s.end) > 0 {
		t.Error("a small ring is not respected")
	}
	s.stalled = nil
	s.advance(h, s.end, true)
	if s.stall(nil) {
		t.Error("it is held for nobody")
	}
}
