package sandbox_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"soulbox.dev/soulbox/access"
	"soulbox.dev/soulbox/internal/sandboxtest"
	"soulbox.dev/soulbox/sandbox"
)

// TestShares: an owner is promised at most a share of memory and tasks, never what others need; a sandbox on disk has no promise; the user
// of this machine may have all its memory. A request that no machine could meet is refused for good.
func TestShares(t *testing.T) {
	m := newManager(t, t.TempDir(), &sandboxtest.Fake{}, func(o *sandbox.Options) {
		o.MemoryBudget, o.MaxTasks = 12<<30, 2000
		o.Accounts = access.NewAccounts(map[access.Resource]access.Bound{access.Tasks: {Total: 4000, Share: 3000}})
	})
	make := func(owner string, l sandbox.Limits) (*sandbox.Sandbox, error) {
		return m.Create(t.Context(), sandbox.CreateOptions{Owner: owner, Limits: l})
	}
	if _, err := make("ann", sandbox.Limits{Processes: 1_000_000}); !errors.Is(err, sandbox.ErrInvalid) ||
		!strings.Contains(err.Error(), "1000000 are more than this machine has for one sandbox, 968; ask for fewer") {
		t.Error(err)
	}
	big, err := make("ann", sandbox.Limits{Memory: 7 << 30, Processes: 100})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := make("ann", sandbox.Limits{Memory: 2 << 30, Processes: 8}); !errors.Is(err, sandbox.ErrNoRoom) ||
		!strings.Contains(err.Error(), "2368 MB of memory needed, 1542 MB of your share of 9830 MB are free") {
		t.Error(err)
	}
	two, err := make("", sandbox.Limits{Memory: 3 << 30, Processes: 8})
	if err != nil {
		t.Fatal("what is left is for others:", err)
	}
	if err := errors.Join(two.Kill(sandbox.CauseKilled), big.Pause(t.Context(), sandbox.PauseOptions{ToDisk: true})); err != nil {
		t.Fatal(err)
	}
	all, err := make("", sandbox.Limits{Memory: 10 << 30, Processes: 8})
	if err != nil {
		t.Fatal("the user of this machine:", err)
	}
	if err := all.Kill(sandbox.CauseKilled); err != nil {
		t.Fatal(err)
	}
	small := sandbox.Limits{Memory: 64 << 20, Processes: 900} // 1864 tasks
	if _, err := make("ann", small); err != nil {
		t.Fatal(err)
	}
	if _, err := make("ann", small); !errors.Is(err, sandbox.ErrNoRoom) || !errors.Is(err, access.ErrFull) ||
		!strings.Contains(err.Error(), "the account of ann is full: 1864 of 3000 tasks are used") {
		t.Error(err)
	}
	if _, err := make("bob", small); err != nil {
		t.Error("another owner:", err)
	}
	if _, err := make("eve", small); !errors.Is(err, access.ErrFull) || !strings.Contains(err.Error(), "all owners together") {
		t.Error(err)
	}
	uses, err := m.Promised()
	if err != nil || len(uses) != 2 {
		t.Error(uses, err)
	}
}

// TestPortOfAnotherUser: on this machine's loopback, a port that is not public is only for the server's own user.
func TestPortOfAnotherUser(t *testing.T) {
	if os.Geteuid() != 0 {
		return // only root can ask as another user
	}
	m := newManager(t, t.TempDir(), &sandboxtest.Fake{}, nil)
	sb := create(t, m, sandbox.CreateOptions{})
	port := inside(t, func(c net.Conn) { fmt.Fprint(c, "HTTP/1.0 200 OK\r\n\r\nsecret") })
	p := exposePort(t, sb, port)
	ask := func(uid uint32) string {
		t.Helper()
		cmd := exec.Command("bash", "-c", fmt.Sprintf(`exec 3<>/dev/tcp/127.0.0.1/%d; printf 'GET / HTTP/1.0\r\n\r\n' >&3; cat <&3`,
			p.Host))
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatal(err, string(out))
		}
		return string(out)
	}
	if out := ask(12345); !strings.HasPrefix(out, "HTTP/1.1 403 ") ||
		!strings.Contains(out, "another user of this machine made it. Open it as the user") {
		t.Error(out)
	}
	if n := sb.Connections(); n != 0 {
		t.Errorf("refused connections keep %d of the sandbox's places", n)
	}
	if out := ask(0); !strings.HasSuffix(out, "secret") {
		t.Error(out)
	}
	if _, err := sb.Expose(port, true); err != nil {
		t.Fatal(err)
	}
	if out := ask(12345); !strings.HasSuffix(out, "secret") {
		t.Error("a public one:", out)
	}
}

// TestFullAccountAtPort: a connection for which its owner's account has no room gets a sentence that says so; kill and pause work
// meanwhile.
func TestFullAccountAtPort(t *testing.T) {
	accounts := access.NewAccounts(map[access.Resource]access.Bound{access.Connections: {Total: 10, Share: 5}})
	m := newManager(t, t.TempDir(), &sandboxtest.Fake{},
		func(o *sandbox.Options) { o.Accounts, o.ConnWait = accounts, 50*time.Millisecond })
	sb := create(t, m, sandbox.CreateOptions{Owner: "ann"})
	p := exposePort(t, sb, inside(t, func(c net.Conn) { _, _ = io.Copy(c, c) }))
	full, err := accounts.Take("ann", access.Connections, 5)
	if err != nil {
		t.Fatal(err)
	}
	defer full()
	res, err := http.Get("http://" + p.Address())
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(res.Body)
	if err = errors.Join(err, res.Body.Close()); err != nil || res.StatusCode != http.StatusServiceUnavailable ||
		!strings.Contains(string(body), "the account of ann is full: 5 of 5 connections are used; close connections") {
		t.Error(res.StatusCode, string(body), err)
	}
	if _, err := sb.Dial(t.Context(), p.Port); !errors.Is(err, sandbox.ErrBusy) || !errors.Is(err, access.ErrFull) {
		t.Error(err)
	}
	if err := sb.Pause(t.Context(), sandbox.PauseOptions{ToDisk: true}); err != nil {
		t.Error("pause:", err)
	}
	if err := sb.Kill(sandbox.CauseKilled); err != nil {
		t.Error("kill:", err)
	}
}

// TestPortStalls: the connection of a client that does not read what is sent to it ends, and releases what it took.
func TestPortStalls(t *testing.T) {
	accounts := access.NewAccounts(map[access.Resource]access.Bound{access.Buffers: {Total: 1 << 30, Share: 1 << 30}})
	m := newManager(t, t.TempDir(), &sandboxtest.Fake{},
		func(o *sandbox.Options) { o.Accounts, o.StallTime = accounts, 200*time.Millisecond })
	sb := create(t, m, sandbox.CreateOptions{})
	ended := make(chan struct{})
	p := exposePort(t, sb, inside(t, func(c net.Conn) {
		defer close(ended)
		for part := make([]byte, 64<<10); ; {
			if _, err := c.Write(part); err != nil {
				return
			}
		}
	}))
	conn, err := net.Dial("tcp", p.Address())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	<-ended
	sandboxtest.Eventually(t, "its account is empty", func() bool { return len(accounts.Uses()) == 0 })
}
