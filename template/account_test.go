package template

import (
	"context"
	"errors"
	"io"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"soulbox.dev/soulbox/access"
	"soulbox.dev/soulbox/internal/sandboxtest"
)

// TestAccountsOfBuilds: an owner whose merges and builds never end does not keep other owners from building. A waiting build leaves the
// queue when it is cancelled; a running one ends.
func TestAccountsOfBuilds(t *testing.T) {
	w := newWorkshop(t)
	w.store.Accounts = access.NewAccounts(map[access.Resource]access.Bound{
		access.Merges: {Total: 3, Share: 2}, access.Builds: {Total: 3, Share: 2}, access.Work: {Total: 3, Share: 2},
	})
	gone := errors.New("the client is gone")
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	var all sync.WaitGroup
	defer all.Wait()
	failed := make(chan error, 8)
	for range 2 {
		from, to := io.Pipe()
		all.Go(func() {
			_, err := w.store.ReadContext(ctx, "ann", from)
			failed <- err
		})
		all.Go(func() { // a file that grows as long as it is read
			h := pack(t, file("big", strings.Repeat("x", 1<<20)))
			for _, err := io.WriteString(to, h[:512+1<<20]); err == nil; _, err = io.WriteString(to, h[:512+1<<20]) {
			}
		})
		defer from.CloseWithError(gone)
	}
	uses := func(r access.Resource, n int64) func() bool {
		return func() bool {
			for _, u := range w.store.Accounts.Uses() {
				if u.Owner == "ann" && u.Resource == r {
					return u.Used == n
				}
			}
			return n == 0
		}
	}
	sandboxtest.Eventually(t, "both merges go on", uses(access.Merges, 2))
	for range 2 {
		all.Go(func() {
			_, err := w.builder.Build(ctx, BuildRequest{Owner: "ann", Name: "endless", Dockerfile: "FROM mini\nRUN sleep 1000\n"}, nil)
			failed <- err
		})
	}
	sandboxtest.Eventually(t, "both builds go on", uses(access.Builds, 2))
	waiting, leave := context.WithCancelCause(t.Context())
	leave(gone)
	if _, err := w.store.ContextFiles(waiting, "ann", map[string]string{"a": "a"}); !errors.Is(err, gone) {
		t.Error("a merge that waits:", err)
	}
	if _, err := w.builder.Build(waiting, BuildRequest{Owner: "ann", Name: "third", Dockerfile: "FROM mini\n"}, nil); !errors.Is(err,
		gone) {
		t.Error("a build that waits:", err)
	}
	files, err := w.store.ContextFiles(t.Context(), "bob", map[string]string{"a": "a"})
	if err != nil {
		t.Fatal(err)
	}
	defer files.Close()
	bobs := BuildRequest{Owner: "bob", Name: "bobs", Dockerfile: "FROM mini\nCOPY a /a\nRUN test -s /a\n", Context: files}
	if _, err := w.builder.Build(t.Context(), bobs, nil); err != nil {
		t.Fatal("another owner's build:", err)
	}
	cancel(gone)
	for range 4 {
		if err := <-failed; !errors.Is(err, gone) {
			t.Error(err)
		}
	}
	sandboxtest.Eventually(t, "nothing is charged any more", func() bool { return len(w.store.Accounts.Uses()) == 0 })
	if left, _ := filepath.Glob(w.store.file("builds", ".*")); len(left) != 1 { // bob's
		t.Errorf("left: %v", left)
	}
	w.none()
}
