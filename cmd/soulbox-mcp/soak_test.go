package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"soulbox.dev/soulbox/internal/sandboxtest"
)

const (
	soakVar      = "SOULBOX_SOAK" // how long, such as 30m; default 10s
	soakClients  = 3              // per owner
	soakOwners   = 3
	soakOwn      = 3           // sandboxes per client at most
	soakPatience = time.Minute // for a sandbox of a killed server to be available again
)

// soak is two servers on one state directory, which are killed now and then, and what their clients know.
type soak struct {
	t       *testing.T
	state   string
	keys    []string // of the owners
	servers [2]*soakServer
	done    sync.Map // counts of what was done, by name
	shot    sync.Map // ids of sandboxes whose sentry was killed
	asked   sync.Map // ids of sandboxes that a client has asked to end
}

// soakServer is one of the servers.
type soakServer struct {
	mu       sync.RWMutex // held while the server is killed
	w        *web
	kills    int
	squeezes atomic.Int64 // odd while it has too few descriptors
	eased    atomic.Int64 // when it last had them again, in ns; it takes the server a moment to see that
}

func (s *soakServer) now() (*web, int) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.w, s.kills
}

// counts is a range of counts.
type counts struct{ low, high int }

// box is a sandbox as its client knows it: one file in it holds a count, another one random bytes.
type box struct {
	owner, server int
	id, sum       string
	may           []counts // the counts that it may have reached
	saved         []counts // the counts that its last saved state may have
	paused        bool
}

func (b *box) allows(n int) bool {
	return slices.ContainsFunc(b.may, func(c counts) bool { return c.low <= n && n <= c.high })
}

// easeTime is how long a server that had too few descriptors may refuse connections once it has them again.
const easeTime = 5 * time.Second

// errKilled is the error of a call whose server was killed, or had too few descriptors to keep the connection: its outcome is unknown.
var errKilled = errors.New("the server was killed")

func (s *soak) count(what string) {
	n, _ := s.done.LoadOrStore(what, new(atomic.Int64))
	n.(*atomic.Int64).Add(1)
}

// call makes a call to one of the servers.
func (s *soak) call(owner, server int, tool string, args map[string]any) (sandboxtest.Answer, error) {
	to := s.servers[server]
	w, kills := to.now()
	squeezes, began := to.squeezes.Load(), time.Now()
	c := &sandboxtest.MCP{URL: w.url, Key: s.keys[owner], Modern: true}
	ctx, cancel := context.WithTimeout(s.t.Context(), 2*time.Minute)
	defer cancel()
	a, err := c.Call(ctx, tool, args)
	if err == nil && a.Status >= http.StatusInternalServerError { // the answer is not the server's own
		err = fmt.Errorf("status %d: %s", a.Status, a.Text())
	}
	if ctx.Err() != nil {
		return a, fmt.Errorf("%s is not answered: %w", tool, err)
	}
	if err != nil {
		if _, now := to.now(); now != kills || squeezes%2 == 1 || to.squeezes.Load() != squeezes ||
			began.Sub(time.Unix(0, to.eased.Load())) < easeTime {
			return a, fmt.Errorf("%w: %w", errKilled, err)
		}
		return a, err
	}
	s.count(tool)
	if a.Error != nil || strings.Contains(string(a.Result), `"isError":true`) {
		return a, errors.New(a.Text())
	}
	return a, nil
}

// elsewhere reports whether an error means that another server may have the sandbox, or will have it.
func elsewhere(err error) bool {
	for _, text := range []string{"No such sandbox", "shutting down", "could not take it over"} {
		if err != nil && strings.Contains(err.Error(), text) {
			return true
		}
	}
	return false
}

// onBox is call for a sandbox that one of the servers has, or is about to adopt.
func (s *soak) onBox(b *box, tool string, args map[string]any) (a sandboxtest.Answer, err error) {
	all := map[string]any{"sandbox_id": b.id}
	for k, v := range args {
		all[k] = v
	}
	for end := time.Now().Add(soakPatience); ; time.Sleep(20 * time.Millisecond) {
		a, err = s.call(b.owner, b.server, tool, all)
		if !elsewhere(err) || time.Now().After(end) {
			return a, err
		}
		b.server = 1 - b.server
	}
}

// newer counts in a sandbox; it waits for a command of a killed server that may still count. sumOf makes the random file if it is missing.
const (
	newer = "exec 9>lock; flock 9; n=$(($(cat n 2>/dev/null || echo 0) + 1)); echo $n > n.new && mv n.new n; echo $n; sha256sum < r"
	sumOf = "[ -e r ] || { head -c 200000 /dev/urandom > r.new && mv r.new r; }; sha256sum < r"
)

// run runs a command in a sandbox to its end.
func (s *soak) run(b *box, command string) ([]string, error) {
	a, err := s.onBox(b, "exec", map[string]any{"command": command, "isolated": true, "yield_ms": 50_000})
	if err == nil && a.Field("exit_code") != "0" {
		err = fmt.Errorf("%s: %s", command, a.Text())
	}
	return strings.Fields(a.Field("output")), err
}

// exec counts in the sandbox, and checks that all its files are unchanged.
func (s *soak) exec(b *box) error {
	out, err := s.run(b, newer)
	if err != nil { // it may have counted
		for i := range b.may {
			b.may[i].high++
		}
		return err
	}
	got, err := strconv.Atoi(slices.Concat(out, []string{""})[0])
	if err != nil || !b.allows(got-1) {
		return fmt.Errorf("sandbox %s counts %q, was one of %v", b.id, out, b.may)
	}
	if len(out) < 2 || out[1] != b.sum {
		return fmt.Errorf("the file of sandbox %s has changed: %q, had the sum %s", b.id, out, b.sum)
	}
	b.may = []counts{{got, got}}
	return nil
}

// create makes a sandbox, from a snapshot of another if there is one.
func (s *soak) create(owner, server int, from *box) (*box, error) {
	b := &box{owner: owner, server: server, may: []counts{{}}}
	args := map[string]any{"memory_mb": 128, "pids": 64, "timeout_ms": 24 * 3600_000}
	if from != nil {
		name := "s" + strconv.FormatUint(rand.Uint64(), 36)
		if _, err := s.onBox(from, "sandbox_snapshot", map[string]any{"name": name}); err != nil {
			return nil, err
		}
		defer func() { _, _ = s.call(owner, server, "template_delete", map[string]any{"name": name}) }() // if it fails, clean tries again
		b.may, b.sum = slices.Clone(from.may), from.sum
		args = map[string]any{"template": name}
	}
	a, err := s.call(owner, server, "sandbox_create", args)
	if b.id = a.Field("sandbox_id"); err != nil || b.id == "" {
		return nil, err
	}
	for b.sum == "" {
		out, err := s.run(b, sumOf)
		if err != nil && !errors.Is(err, errKilled) {
			return nil, err
		}
		if len(out) > 0 {
			b.sum = out[0]
		}
	}
	return b, nil
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
		copies = append(copies, &box{owner: b.owner, server: b.server, id: id, sum: b.sum, may: slices.Clone(b.may)})
	}
	return copies, nil
}

func (s *soak) pause(b *box, toDisk bool) error {
	_, err := s.onBox(b, "sandbox_pause", map[string]any{"to_disk": toDisk})
	if toDisk && err == nil {
		b.saved = slices.Clone(b.may)
	} else if toDisk && errors.Is(err, errKilled) { // it may have been saved, or not
		b.saved = append(b.saved, b.may...)
	}
	b.paused = true // if it is not, a resume does no harm
	return err
}

func (s *soak) resume(b *box) error {
	_, err := s.onBox(b, "sandbox_resume", nil)
	b.paused = b.paused && err != nil
	return err
}

// told reports an error of a call, unless it follows from what the test does to the servers.
func (s *soak) told(what string, b *box, err error) {
	switch {
	case err == nil:
	case errors.Is(err, errKilled):
		s.count("not known whether done")
	case strings.Contains(err.Error(), "No room") || strings.Contains(err.Error(), "of memory needed"):
		s.count("no room")
	case strings.Contains(err.Error(), "too many open files"):
		s.count("no descriptors")
	case strings.Contains(err.Error(), "was not ready in time"): // nothing was made, or nothing has changed
		s.count("too slow a machine")
	default:
		s.t.Errorf("%s %s: %v", what, b.id, err)
	}
}

// client acts at random until ctx ends, and returns the sandboxes that it knows to be alive.
func (s *soak) client(ctx context.Context, owner int) (own []*box) {
	for ctx.Err() == nil {
		if len(own) == 0 {
			b, err := s.create(owner, rand.IntN(2), nil)
			if s.told("create", &box{}, err); b != nil && err == nil {
				own = append(own, b)
			}
			continue
		}
		i := rand.IntN(len(own))
		b := own[i]
		drop := false
		switch n := rand.IntN(42); {
		case n < 20:
			s.resumeAndExec(b)
		case n < 28:
			if !b.paused || rand.IntN(2) == 0 {
				s.told("pause", b, s.pause(b, rand.IntN(2) == 0))
			}
		case n < 32 && len(own) < soakOwn:
			more, err := s.create(owner, rand.IntN(2), b)
			if s.told("create from", b, err); more != nil && err == nil {
				own = append(own, more)
			}
		case n < 34 && len(own) < soakOwn-1:
			more, err := s.fork(b)
			s.told("fork", b, err)
			own = append(own, more...)
		case n < 36:
			s.kill(b)
			drop = true
		case n < 37:
			drop = !s.shoot(b)
		}
		if drop {
			own = slices.Delete(own, i, i+1)
		}
	}
	return own
}

// resumeAndExec counts in a sandbox, after resuming it if it is paused.
func (s *soak) resumeAndExec(b *box) {
	if b.paused {
		s.told("resume", b, s.resume(b))
	}
	if !b.paused {
		s.told("exec in", b, s.exec(b))
	}
}

// kill kills a sandbox, and checks its tombstone.
func (s *soak) kill(b *box) {
	s.asked.Store(b.id, true)
	_, err := s.onBox(b, "sandbox_kill", map[string]any{"confirm": true})
	for end := time.Now().Add(soakPatience); ; time.Sleep(20 * time.Millisecond) {
		a, gerr := s.onBox(b, "sandbox_get", nil)
		switch text := a.Text(); {
		case gerr == nil && strings.Contains(text, "is killed (killed by request)"):
			return
		case gerr == nil && strings.Contains(text, "is failed") && !strings.Contains(text, resumable):
			s.count("killed with its server, and remembered as failed")
			return
		case time.Now().After(end):
			s.t.Errorf("the tombstone of %s: %v, %v, %s", b.id, err, gerr, text)
			return
		}
		if err != nil { // it may not have been done
			_, err = s.onBox(b, "sandbox_kill", map[string]any{"confirm": true})
		}
	}
}

// resumable is said about a sandbox that has failed and of which something was saved.
const resumable = "can be resumed by sandbox_resume"

// TestSoak: the clients of three owners do everything at random on two servers. Now and then a server is killed or has no descriptors, or a
// machine stands still. Nothing is lost but what was killed, and nothing is left over.
func TestSoak(t *testing.T) {
	length := 10 * time.Second
	if v := os.Getenv(soakVar); v != "" {
		var err error
		if length, err = time.ParseDuration(v); err != nil {
			t.Fatal(err)
		}
	}
	s := &soak{t: t, state: sandboxtest.Dir(t)}
	for i := range soakOwners {
		s.keys = append(s.keys, makeKey(t, s.state, fmt.Sprint("owner", i)))
	}
	for i := range s.servers {
		s.servers[i] = &soakServer{w: serve(t, s.state, soakFlags...)}
	}
	fds := max(s.quiet(0), s.quiet(1))
	before := s.tree()
	ctx, cancel := context.WithTimeout(t.Context(), length)
	defer cancel()
	var all sync.WaitGroup
	var mu sync.Mutex
	var left []*box
	for i := range soakOwners * soakClients {
		all.Go(func() {
			own := s.client(ctx, i%soakOwners)
			mu.Lock()
			defer mu.Unlock()
			left = append(left, own...)
		})
	}
	all.Go(func() { s.faults(ctx) })
	for every := min(time.Minute, length/3); ctx.Err() == nil; {
		select {
		case <-ctx.Done():
		case <-time.After(every):
			s.kill9(rand.IntN(2))
		}
	}
	all.Wait()
	for _, b := range left { // every sandbox that a client knows exists, with all that it counted
		all.Go(func() {
			s.told("resume at the end", b, s.resume(b))
			if err := s.exec(b); err != nil {
				t.Errorf("at the end: %v", err)
			}
		})
	}
	all.Wait()
	s.checkFailed()
	s.clean()
	s.checkFailed()
	s.checkLeft(fds, before)
	var lines []string
	s.done.Range(func(what, n any) bool {
		lines = append(lines, fmt.Sprintf("%-60s %7d", what, n.(*atomic.Int64).Load()))
		return true
	})
	slices.Sort(lines)
	t.Logf("%s, %d sandboxes at the end, %d descriptors of a quiet server\n%s", length, len(left), fds, strings.Join(lines, "\n"))
}

var soakFlags = []string{"--on-exit=keep", "--rate=100000"}

// quiet is how many descriptors a server has after it has done everything once.
func (s *soak) quiet(server int) int {
	b, err := s.create(0, server, nil)
	if err != nil {
		s.t.Fatal(err)
	}
	if err := errors.Join(s.pause(b, true), s.resume(b), s.exec(b)); err != nil {
		s.t.Fatal(err)
	}
	s.kill(b)
	http.DefaultClient.CloseIdleConnections()
	time.Sleep(100 * time.Millisecond) // gives the server a moment to see that
	return len(descriptors(s.servers[server].w))
}

// clean kills all sandboxes, including those that no client knows because the server was killed.
func (s *soak) clean() {
	sandboxes := filepath.Join(s.state, "sandboxes", "sb*")
	for end := time.Now().Add(2 * soakPatience); ; {
		var all sync.WaitGroup
		for _, i := range s.list("") {
			all.Go(func() {
				_, err := s.call(i.owner, i.server, "sandbox_kill", map[string]any{"sandbox_id": i.ID, "confirm": true})
				if err != nil && !strings.Contains(err.Error(), "is killed") && !elsewhere(err) {
					s.t.Error(err)
				}
			})
		}
		all.Wait()
		found, err := filepath.Glob(sandboxes)
		if err != nil || len(found) == 0 {
			break
		}
		if time.Now().After(end) {
			s.t.Error("left:", found)
			break
		}
	}
	for owner := range s.keys {
		a, err := s.call(owner, 0, "template_list", nil)
		if err != nil {
			s.t.Fatal(err)
		}
		for _, line := range strings.Split(a.Text(), "\n") { // a server was killed before it could delete it
			if name, ok := strings.CutPrefix(line, "snapshot "); ok {
				if _, err := s.call(owner, 0, "template_delete", map[string]any{"name": strings.SplitN(name, ":", 2)[0]}); err != nil {
					s.t.Error(err)
				}
			}
		}
	}
}

// listed is a sandbox as a list shows it.
type listed struct {
	owner, server int
	ID            string `json:"sandbox_id"`
	Cause         string `json:"cause"`
}

// list lists the sandboxes of all owners on both servers that are in a state; "" means all that have not ended.
func (s *soak) list(state string) (all []listed) {
	for at := range len(s.keys) * len(s.servers) {
		args := map[string]any{"limit": 200}
		if state != "" {
			args["state"] = state
		}
		for more := true; more; more = args["cursor"] != "" {
			a, err := s.call(at/len(s.servers), at%len(s.servers), "sandbox_list", args)
			if err != nil {
				s.t.Fatal(err)
			}
			var r struct {
				StructuredContent struct {
					Sandboxes []listed `json:"sandboxes"`
					Next      string   `json:"next_cursor"`
				}
			}
			if err := json.Unmarshal(a.Result, &r); err != nil {
				s.t.Fatal(err)
			}
			for _, i := range r.StructuredContent.Sandboxes {
				i.owner, i.server = at/len(s.servers), at%len(s.servers)
				all = append(all, i)
			}
			args["cursor"] = r.StructuredContent.Next
		}
	}
	return all
}

// descriptors are a server's open descriptors, by what they refer to.
func descriptors(w *web) (open []string) {
	dir := fmt.Sprintf("/proc/%d/fd", w.cmd.Process.Pid)
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		name, _ := os.Readlink(filepath.Join(dir, e.Name()))
		open = append(open, name)
	}
	return open
}
