package template

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"

	"soulbox.dev/soulbox/access"
	"soulbox.dev/soulbox/internal/sandboxtest"
	"soulbox.dev/soulbox/sandbox"
)

// TestBuildsInTurn: of many announced builds some run at once, the others wait for their turn, and all end.
func TestBuildsInTurn(t *testing.T) {
	w := newWorkshop(t)
	w.store.Accounts = access.NewAccounts(map[access.Resource]access.Bound{access.Builds: {Total: 4, Share: 4}})
	builds := NewBuilds(w.builder)
	defer builds.Close()
	var most atomic.Int64
	var all []*Build
	for i := range 20 {
		b, err := builds.Announce(BuildRequest{Owner: "ann", Name: fmt.Sprintf("t%d", i), Dockerfile: "FROM mini\nRUN echo $((1 + 1))\n"})
		if err != nil {
			t.Fatal(err)
		}
		req := b.Request
		req.Open = func(context.Context, *BuildRequest) error { // the build's turn has come
			for _, u := range w.store.Accounts.Uses() {
				if u.Resource == access.Builds {
					most.Store(max(most.Load(), u.Used))
				}
			}
			return nil
		}
		if err := builds.Start(t.Context(), b, req, nil); err != nil {
			t.Fatal(err)
		}
		if err := builds.Start(t.Context(), b, req, nil); !errors.Is(err, ErrStarted) {
			t.Error(err)
		}
		all = append(all, b)
	}
	if !builds.UnderWay() || builds.Find("bob", all[0].ID) != nil || builds.Find("ann", all[0].ID) != all[0] {
		t.Error("none is under way, or it is another's")
	}
	for _, b := range all {
		<-b.done
		if s, err := builds.Standing("ann", b.ID); err != nil || s.Status != BuildReady || len(s.Lines) == 0 {
			t.Errorf("%+v, %v", s, err)
		}
		if _, err := builds.Standing("bob", b.ID); !errors.Is(err, ErrNoBuild) {
			t.Error(err)
		}
	}
	if n := most.Load(); n < 1 || n > 4 || builds.UnderWay() {
		t.Errorf("%d at once, under way %v", n, builds.UnderWay())
	}
	w.none()
}

// TestBuildsSeen: a build of another face, or of another server on the same directory, is visible while it runs and after its server has
// ended.
func TestBuildsSeen(t *testing.T) {
	w := newWorkshop(t)
	builds, other := NewBuilds(w.builder), NewBuilds(w.builder)
	defer other.Close()
	ctx, cancel := context.WithCancelCause(t.Context())
	ids, failed := make(chan string, 100), make(chan error)
	go func() {
		_, err := builds.Run(ctx, BuildRequest{Owner: "ann", Name: "long", Dockerfile: "FROM mini\nRUN sleep 1000\n"}, func(l Line) {
			if id, ok := strings.CutPrefix(l.Text, "build "); ok {
				ids <- strings.Fields(id)[0]
			}
		})
		failed <- err
	}()
	id := <-ids
	for name, of := range map[string]*Builds{"its server": builds, "another": other} {
		if s, err := of.Standing("ann", id); err != nil || s.Status != BuildRunning || len(s.Lines) == 0 {
			t.Errorf("%s: %+v, %v", name, s, err)
		}
		if last, err := of.Last("ann", "long"); err != nil || last != id {
			t.Errorf("%s: the last one is %q, %v", name, last, err)
		}
	}
	cancel(errors.New("enough"))
	if err := <-failed; err == nil {
		t.Error("it was built")
	}
	builds.Close()
	for name, of := range map[string]*Builds{"its server": builds, "another": other} {
		if s, err := of.Standing("ann", id); err != nil || s.Status != BuildFailed || s.Err == nil ||
			!strings.Contains(s.Err.Error(), "enough") {
			t.Errorf("%s: %+v, %v", name, s, err)
		}
	}
	again, err := other.Announce(BuildRequest{Owner: "ann", Name: "more", Dockerfile: "FROM nothere\n"}, "long")
	if err != nil {
		t.Fatal(err)
	}
	if last, err := other.Last("ann", "long"); err != nil || last != id { // one that was announced has not begun
		t.Errorf("the last one is %q, %v", last, err)
	}
	if err := other.Start(t.Context(), again, again.Request, nil); err != nil {
		t.Fatal(err)
	}
	if last, err := other.Last("ann", "long"); err != nil || last != again.ID {
		t.Errorf("the last one is %q, %v", last, err)
	}
	<-again.done
	for _, c := range [][2]string{{"bob", "long"}, {"ann", "lon"}, {"", "long"}} {
		if last, err := other.Last(c[0], c[1]); !errors.Is(err, ErrNoBuild) {
			t.Errorf("%v: %q %v", c, last, err)
		}
	}
	w.none()
}

// TestBuildsBounded: announced builds are counted, and failed ones are not kept for long.
func TestBuildsBounded(t *testing.T) {
	w := newWorkshop(t)
	builds := NewBuilds(w.builder)
	defer builds.Close()
	for range maxFinished + 10 {
		if _, err := builds.Run(t.Context(), BuildRequest{Owner: "ann", Name: "t", Dockerfile: "FROM nothere\n"}, nil); err == nil {
			t.Fatal("it was built")
		}
	}
	builds.mu.Lock()
	kept := len(builds.byID)
	builds.mu.Unlock()
	if kept > maxFinished+1 {
		t.Errorf("%d builds are kept", kept)
	}
	for i := range maxWaiting + 1 {
		_, err := builds.Announce(BuildRequest{Owner: "ann", Name: "t"})
		if (err == nil) != (i < maxWaiting) || err != nil && !errors.Is(err, sandbox.ErrTooMany) {
			t.Fatalf("%d: %v", i, err)
		}
	}
	if _, err := builds.Announce(BuildRequest{Owner: "bob", Name: "t"}); err != nil {
		t.Error("another owner's:", err)
	}
	sandboxtest.Eventually(t, "nothing is under way", func() bool { return !builds.UnderWay() })
}
