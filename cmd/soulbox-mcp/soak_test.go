package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"soulbox.dev/soulbox/internal/sandboxtest"
)

const (
	soakVar     = "SOULBOX_SOAK" // how long, such as 30m; default 20s
	soakClients = 8
	soakOwn     = 3 // sandboxes of one client at most
)

// soak is a server that is killed now and then, and what its clients know.
type soak struct {
	t     *testing.T
	flags []string

	mu    sync.RWMutex // held by who kills the server
	w     *web
	kills int
	done  sync.Map // counts of operations, by name
}

// box is a sandbox as its client knows it: a file in it counts.
type box struct {
	id     string
	n      int
	maybe  int // counts that may or may not have been done
	paused bool
}

// errKilled is of a call whose server was killed, or not there yet.
var errKilled = errors.New("the server was killed")

func (s *soak) server() (*web, int) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.w, s.kills
}

// call makes a call. Its server may be killed under it: then whether it was done is unknown.
func (s *soak) call(tool string, args map[string]any) (sandboxtest.Answer, error) {
	w, kills := s.server()
	c := &sandboxtest.MCP{URL: w.url, Modern: true}
	ctx, cancel := context.WithTimeout(s.t.Context(), 2*time.Minute)
	defer cancel()
	a, err := c.Call(ctx, tool, args)
	if _, now := s.server(); err != nil && (now != kills || ctx.Err() == nil) {
		return a, fmt.Errorf("%w: %w", errKilled, err)
	}
	if err != nil {
		return a, err
	}
	count, _ := s.done.LoadOrStore(tool, new(atomic.Int64))
	count.(*atomic.Int64).Add(1)
	if a.Error != nil || strings.Contains(string(a.Result), `"isError":true`) {
		return a, errors.New(a.Text())
	}
	return a, nil
}

// onBox is call for a sandbox, which after a restart is there when the server has adopted it.
func (s *soak) onBox(b *box, tool string, args map[string]any) (a sandboxtest.Answer, err error) {
	all := map[string]any{"sandbox_id": b.id}
	for k, v := range args {
		all[k] = v
	}
	for end := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		a, err = s.call(tool, all)
		if err == nil || !strings.Contains(err.Error(), "No such sandbox") && !strings.Contains(err.Error(), "shutting down") || time.Now().After(end) {
			return a, err
		}
	}
}

// exec counts in the sandbox, and looks whether everything that was counted before is there.
func (s *soak) exec(b *box) error {
	a, err := s.onBox(b, "exec", map[string]any{"command": "n=$(($(cat n 2>/dev/null || echo 0) + 1)); echo $n > n.new && mv n.new n; echo $n", "isolated": true})
	if errors.Is(err, errKilled) {
		b.maybe++
		return err
	}
	if err != nil {
		return err
	}
	got, err := strconv.Atoi(strings.TrimSpace(a.Field("output")))
	if err != nil || got <= b.n || got > b.n+1+b.maybe {
		return fmt.Errorf("sandbox %s counts %q, was %d, and perhaps %d more", b.id, a.Field("output"), b.n, b.maybe)
	}
	b.n, b.maybe = got, 0
	return nil
}

// create makes a sandbox, from a snapshot of another if there is one.
func (s *soak) create(from *box) (*box, error) {
	args, b := map[string]any{"memory_mb": 128, "pids": 64, "timeout_ms": 24 * 3600_000}, &box{}
	if from == nil {
		a, err := s.call("sandbox_create", args)
		b.id = a.Field("sandbox_id")
		return b, err
	}
	name := "s" + strconv.FormatUint(rand.Uint64(), 36)
	if _, err := s.onBox(from, "sandbox_snapshot", map[string]any{"name": name}); err != nil {
		return nil, err
	}
	b.n, b.maybe = from.n, from.maybe
	a, err := s.call("sandbox_create", map[string]any{"template": name})
	b.id = a.Field("sandbox_id")
	if _, derr := s.call("template_delete", map[string]any{"name": name}); derr != nil {
		err = errors.Join(err, derr)
	}
	if b.id == "" {
		return nil, err
	}
	return b, err
}

func (s *soak) fork(b *box) ([]*box, error) {
	a, err := s.onBox(b, "sandbox_fork", map[string]any{"count": 2})
	var r struct {
		StructuredContent struct {
			IDs []string `json:"sandbox_ids"`
		}
	}
	if err != nil || json.Unmarshal(a.Result, &r) != nil {
		return nil, err
	}
	var copies []*box
	for _, id := range r.StructuredContent.IDs {
		copies = append(copies, &box{id: id, n: b.n, maybe: b.maybe})
	}
	return copies, nil
}

// client does something at random until ctx ends, and returns the sandboxes that it knows to live.
func (s *soak) client(ctx context.Context) (own []*box) {
	fail := func(what string, b *box, err error) {
		switch {
		case err == nil || errors.Is(err, errKilled):
		case strings.Contains(err.Error(), "No room") || strings.Contains(err.Error(), "of memory needed"):
		default:
			s.t.Errorf("%s %s: %v", what, b.id, err)
		}
	}
	for ctx.Err() == nil {
		if len(own) == 0 {
			b, err := s.create(nil)
			if fail("create", &box{}, err); err == nil {
				own = append(own, b)
			}
			continue
		}
		i := rand.IntN(len(own))
		b := own[i]
		switch n := rand.IntN(20); {
		case n < 10:
			if b.paused {
				_, err := s.onBox(b, "sandbox_resume", nil)
				fail("resume", b, err)
				b.paused = b.paused && err != nil
			}
			if !b.paused {
				fail("exec in", b, s.exec(b))
			}
		case n < 14:
			if !b.paused || rand.IntN(2) == 0 {
				_, err := s.onBox(b, "sandbox_pause", map[string]any{"to_disk": rand.IntN(2) == 0})
				fail("pause", b, err)
				b.paused = true // if it is not, a resume does no harm
			}
		case n < 16 && len(own) < soakOwn:
			more, err := s.create(b)
			if fail("create from", b, err); more != nil && err == nil {
				own = append(own, more)
			}
		case n < 17 && len(own) < soakOwn-1:
			more, err := s.fork(b)
			fail("fork", b, err)
			own = append(own, more...)
		case n < 18:
			_, err := s.onBox(b, "sandbox_kill", map[string]any{"confirm": true})
			if fail("kill", b, err); err == nil {
				own = append(own[:i], own[i+1:]...)
				s.ended(b)
			} else if a, err := s.onBox(b, "sandbox_get", nil); err == nil && strings.Contains(a.Text(), "is killed") {
				own = append(own[:i], own[i+1:]...)
			}
		}
	}
	return own
}

// ended looks for the tombstone of a sandbox that was killed.
func (s *soak) ended(b *box) {
	a, err := s.onBox(b, "sandbox_get", nil)
	if err != nil && !errors.Is(err, errKilled) || err == nil && !strings.Contains(a.Text(), "killed by request") {
		s.t.Errorf("the tombstone of %s: %s %v", b.id, a.Text(), err)
	}
}

// TestSoak (issue 5, must show 4): eight clients do everything at random while the server is killed now and then. Nothing is lost, nothing is left.
func TestSoak(t *testing.T) {
	length := 20 * time.Second
	if v := os.Getenv(soakVar); v != "" {
		var err error
		if length, err = time.ParseDuration(v); err != nil {
			t.Fatal(err)
		}
	}
	s := &soak{t: t, flags: []string{"--on-exit=keep", "--rate=100000"}}
	s.w = serve(t, "", s.flags...)
	fds := descriptors(s.w)
	ctx, cancel := context.WithTimeout(t.Context(), length)
	defer cancel()
	var all sync.WaitGroup
	var mu sync.Mutex
	var left []*box
	for range soakClients {
		all.Go(func() {
			own := s.client(ctx)
			mu.Lock()
			defer mu.Unlock()
			left = append(left, own...)
		})
	}
	for every := min(time.Minute, length/3); ctx.Err() == nil; {
		select {
		case <-ctx.Done():
		case <-time.After(every):
			s.mu.Lock()
			s.w = s.w.kill9(s.flags...)
			s.kills++
			s.mu.Unlock()
		}
	}
	all.Wait()
	for _, b := range left { // every one that was told is there, with all that it counted
		if _, err := s.onBox(b, "sandbox_resume", nil); err != nil {
			t.Errorf("resume %s: %v", b.id, err)
			continue
		}
		if err := s.exec(b); err != nil {
			t.Error(err)
		}
	}
	s.clean()
	sandboxtest.Eventually(t, "no process is left", func() bool { return len(sandboxtest.Processes(s.w.state)) == 0 })
	sandboxtest.Eventually(t, "no more descriptors than at the start", func() bool { return descriptors(s.w) <= fds+20 }) // idle connections
	for _, pattern := range []string{"sandboxes/sb*", "snapshots/*"} {
		if found, err := filepath.Glob(filepath.Join(s.w.state, pattern)); err != nil || len(found) > 0 {
			t.Error("left:", found, err)
		}
	}
	if mounts, err := os.ReadFile("/proc/self/mountinfo"); err != nil || strings.Contains(string(mounts), s.w.state) {
		t.Error("a mount is left", err)
	}
	s.done.Range(func(tool, n any) bool { t.Logf("%s: %d", tool, n.(*atomic.Int64).Load()); return true })
	t.Logf("%d times killed, descriptors %d, then %d", s.kills, fds, descriptors(s.w))
}

// clean kills all sandboxes, those too of which no client was told because the server was killed.
func (s *soak) clean() {
	for {
		a, err := s.call("sandbox_list", nil)
		if err != nil {
			s.t.Fatal(err)
		}
		var r struct {
			StructuredContent struct {
				Sandboxes []struct {
					ID string `json:"sandbox_id"`
				} `json:"sandboxes"`
			}
		}
		if err := json.Unmarshal(a.Result, &r); err != nil {
			s.t.Fatal(err)
		}
		if len(r.StructuredContent.Sandboxes) == 0 {
			break
		}
		for _, b := range r.StructuredContent.Sandboxes {
			if _, err := s.call("sandbox_kill", map[string]any{"sandbox_id": b.ID, "confirm": true}); err != nil && !strings.Contains(err.Error(), "is killed") {
				s.t.Fatal(err)
			}
		}
	}
	a, err := s.call("template_list", nil)
	if err != nil {
		s.t.Fatal(err)
	}
	for _, line := range strings.Split(a.Text(), "\n") { // a server was killed before it could delete it
		if name, ok := strings.CutPrefix(line, "snapshot "); ok {
			if _, err := s.call("template_delete", map[string]any{"name": strings.SplitN(name, ":", 2)[0]}); err != nil {
				s.t.Error(err)
			}
		}
	}
	failed, err := s.call("sandbox_list", map[string]any{"state": "failed"})
	if err != nil {
		s.t.Fatal(err)
	}
	for _, line := range strings.Split(failed.Text(), "\n") { // half made ones fail with the server that made them
		if strings.Contains(line, "is failed") && !strings.Contains(line, "while it was made") {
			s.t.Error(line)
		}
	}
}

func descriptors(w *web) int {
	entries, _ := os.ReadDir(fmt.Sprintf("/proc/%d/fd", w.cmd.Process.Pid))
	return len(entries)
}
