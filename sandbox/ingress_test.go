package sandbox_test

import (
	"errors"
	"io"
	"net"
	"path/filepath"
	"testing"
	"time"

	"soulbox.dev/soulbox/internal/sandboxtest"
	"soulbox.dev/soulbox/sandbox"
)

// TestOpenPorts: open ports are reachable without being exposed, for those to whom they are open, in forks and after a restart too, and no
// longer than the sandbox lives.
func TestOpenPorts(t *testing.T) {
	fake, dir := &sandboxtest.Fake{}, t.TempDir()
	m := newManager(t, dir, fake, keep)
	inside, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer inside.Close()
	go func() {
		for {
			c, err := inside.Accept()
			if err != nil {
				return
			}
			go func() { _, _ = io.Copy(c, c) }()
		}
	}()
	port := inside.Addr().(*net.TCPAddr).Port
	closed := create(t, m, sandbox.CreateOptions{})
	if _, ok := closed.Reachable(port); ok {
		t.Error("ports are open by themselves")
	}
	if _, err := closed.Dial(t.Context(), port); !errors.Is(err, sandbox.ErrNotExposed) {
		t.Error(err)
	}
	sb := create(t, m, sandbox.CreateOptions{Ingress: sandbox.Ingress{Open: sandbox.OpenPublic, Host: "h:${PORT}", TLS: []int{443}}})
	shared := create(t, m, sandbox.CreateOptions{Ingress: sandbox.Ingress{Open: sandbox.OpenToken}})
	if public, ok := sb.Reachable(port); !ok || !public {
		t.Error("it is not open")
	}
	if public, ok := shared.Reachable(port); !ok || public {
		t.Error("it is open to everybody")
	}
	if sb.AccessToken() == "" || sb.AccessToken() == sb.TrafficToken() || sb.AccessToken() == shared.AccessToken() {
		t.Error("secrets are the same")
	}
	copies, failed, err := sb.Fork(t.Context(), 1, nil)
	if err != nil || len(failed) > 0 {
		t.Fatal(err, failed)
	}
	if in := copies[0].Info().Ingress; in.Open != sandbox.OpenPublic || in.Host != "h:${PORT}" || len(in.TLS) != 1 ||
		copies[0].AccessToken() == sb.AccessToken() {
		t.Errorf("%+v", in)
	}
	token := sb.AccessToken()
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	m = newManager(t, dir, fake, keep)
	m.AwaitSettled(t.Context())
	if sb, err = m.Get("", sb.ID()); err != nil || sb.AccessToken() != token {
		t.Fatal(err)
	}
	conn, err := sb.Dial(t.Context(), port)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(conn, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := sb.Bind(t.Context())
	defer cancel()
	if err := sb.Kill(sandbox.CauseKilled); err != nil {
		t.Fatal(err)
	}
	<-ctx.Done()
	if _, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("the connection ends with %v", err)
	}
	if !sb.Gone() {
		t.Error("it is not gone")
	}
	for _, bad := range []sandbox.Ingress{{Open: "all"}, {Host: "a b"}, {TLS: []int{0}}} {
		if _, err := m.Create(t.Context(), sandbox.CreateOptions{Ingress: bad}); !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("%+v: %v", bad, err)
		}
	}
}

// TestSetNetwork: what can be reached may change while a sandbox lives; whether it has a network may not.
func TestSetNetwork(t *testing.T) {
	fake, dir := &sandboxtest.Fake{}, t.TempDir()
	m := newManager(t, dir, fake, keep)
	sb := create(t, m, sandbox.CreateOptions{Network: sandbox.Network{Mode: sandbox.NetworkFull}})
	want := sandbox.Network{Mode: sandbox.NetworkAllowlist, Allow: []string{"Example.com"}}
	if err := sb.SetNetwork(want); err != nil {
		t.Fatal(err)
	}
	if n := sb.Info().Network; n.Mode != want.Mode || len(n.Allow) != 1 || n.Allow[0] != "example.com" {
		t.Errorf("%+v", n)
	}
	for _, bad := range []sandbox.Network{{}, {Mode: sandbox.NetworkNone}, {Mode: "all"},
		{Mode: sandbox.NetworkFull, Deny: []string{"x"}}} {
		if err := sb.SetNetwork(bad); !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("%+v: %v", bad, err)
		}
	}
	if err := create(t, m, sandbox.CreateOptions{}).SetNetwork(want); !errors.Is(err, sandbox.ErrInvalid) {
		t.Error(err)
	}
	if err := sb.Pause(t.Context(), sandbox.PauseOptions{ToDisk: true}); err != nil {
		t.Fatal(err)
	}
	if err := sb.SetNetwork(sandbox.Network{Mode: sandbox.NetworkFull}); err != nil || sb.Info().Network.Mode != sandbox.NetworkFull {
		t.Error(err)
	}
	if err := sb.Kill(sandbox.CauseKilled); err != nil {
		t.Fatal(err)
	}
	if err := sb.SetNetwork(want); !errors.Is(err, sandbox.ErrState) {
		t.Error(err)
	}
}

// TestSnapshotReplaced: a snapshot replaces another one at once, and nothing is left of the old one.
func TestSnapshotReplaced(t *testing.T) {
	fake, dir := &sandboxtest.Fake{}, t.TempDir()
	m := newManager(t, dir, fake, nil)
	first, second := create(t, m, sandbox.CreateOptions{}), create(t, m, sandbox.CreateOptions{})
	for _, sb := range []*sandbox.Sandbox{first, second, second} {
		if _, err := sb.Snapshot(t.Context(), sandbox.SnapshotOptions{Name: "s", Replace: true}); err != nil {
			t.Fatal(err)
		}
		list, err := m.Snapshots("")
		if err != nil || len(list) != 1 || list[0].Sandbox != sb.ID() {
			t.Fatal(list, err)
		}
	}
	left, err := filepath.Glob(filepath.Join(dir, "snapshots", "*"))
	if err != nil || len(left) != 1 {
		t.Error(left, err)
	}
	if again := create(t, m, sandbox.CreateOptions{Template: "s"}); again.Info().Parent != "s" {
		t.Error("it cannot be begun from")
	}
}

// TestAtLeast: AtLeast makes a life longer and never shorter.
func TestAtLeast(t *testing.T) {
	m := newManager(t, t.TempDir(), &sandboxtest.Fake{}, nil)
	sb := create(t, m, sandbox.CreateOptions{Times: sandbox.Times{Life: time.Hour}})
	before := sb.Info().ExpiresAt
	less, more := time.Minute, 2*time.Hour
	if i, err := sb.Update(t.Context(), sandbox.Update{AtLeast: &less}); err != nil || !i.ExpiresAt.Equal(before) {
		t.Error(i.ExpiresAt, err)
	}
	if i, err := sb.Update(t.Context(), sandbox.Update{AtLeast: &more}); err != nil || i.ExpiresAt.Sub(before) < 50*time.Minute ||
		i.Times.Life != time.Hour {
		t.Error(i.ExpiresAt, err)
	}
	if err := sb.Pause(t.Context(), sandbox.PauseOptions{}); err != nil {
		t.Fatal(err)
	}
	if i, err := sb.Update(t.Context(), sandbox.Update{AtLeast: &more}); err != nil || i.Left < time.Hour {
		t.Error(i.Left, err)
	}
}
