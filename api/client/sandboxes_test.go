package client_test

import (
	"errors"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"soulbox.dev/soulbox/api/client"
)

func ptr[T any](v T) *T { return &v }

// TestServer: what a server says of itself to others, and to its own user.
func TestServer(t *testing.T) {
	got, err := newSite(t).as("ann").Server(t.Context())
	if want := (client.Server{Version: "v1", API: client.API, Oldest: client.Oldest, Kind: "http"}); err != nil || got != want {
		t.Errorf("%+v, %v", got, err)
	}
	got, err = newSite(t, local).as("").Server(t.Context())
	if err != nil || got.PID != 7 || got.State != "/secret" {
		t.Errorf("%+v, %v", got, err)
	}
	if who, err := newSite(t).as("ann").Caller(t.Context()); err != nil || who != "ann" {
		t.Errorf("%q, %v", who, err)
	}
}

// TestSandboxLife makes a sandbox, changes, pauses, resumes and kills it, and finds it as it is at each step.
func TestSandboxLife(t *testing.T) {
	s := newSite(t)
	c, ctx := s.as("ann"), t.Context()
	box, err := c.Create(ctx, client.NewSandbox{Template: "host", Metadata: map[string]string{"a b": "1&2=ä", "x": "y"}, TimeoutS: 600,
		OnTimeout: "kill", CPU: 1, MemoryMB: 256, DiskMB: 100, Processes: 99, Protect: &client.Protect{EveryS: 3600}})
	if err != nil {
		t.Fatal(err)
	}
	if box.State != "running" || box.MemoryMB != 256 || box.DiskMB != 100 || box.CPU != 1 || box.Processes != 99 ||
		box.OnTimeout != "kill" ||
		box.Metadata["a b"] != "1&2=ä" || box.Protect == nil || box.Protect.EveryS != 3600 || box.Network.Mode != "none" ||
		time.Until(box.ExpiresAt) > 600*time.Second || time.Until(box.ExpiresAt) < 500*time.Second {
		t.Errorf("%+v", box)
	}
	other := s.create(c)
	s.create(s.as("bob"))
	list := func(l client.List) (ids []string) {
		t.Helper()
		all, err := c.Sandboxes(ctx, l)
		if err != nil {
			t.Fatal(err)
		}
		for _, b := range all {
			ids = append(ids, b.ID)
		}
		return ids
	}
	if got := list(client.List{}); !slices.Equal(got, []string{other.ID, box.ID}) {
		t.Errorf("%q", got)
	}
	if got := list(client.List{Metadata: map[string]string{"a b": "1&2=ä", "x": "y"}}); !slices.Equal(got, []string{box.ID}) {
		t.Errorf("%q", got)
	}
	if _, err := c.Sandboxes(ctx, client.List{States: []string{"asleep"}}); err == nil ||
		!strings.Contains(err.Error(), `there is no state "asleep"`) {
		t.Error(err)
	}
	box, err = c.Update(ctx, box.ID, client.Update{TimeoutS: ptr(int64(1000)), Metadata: map[string]*string{"x": nil, "z": ptr("1")}})
	if err != nil || time.Until(box.ExpiresAt) < 900*time.Second || box.Metadata["z"] != "1" || len(box.Metadata) != 2 {
		t.Errorf("%+v, %v", box, err)
	}
	if box, err = c.Pause(ctx, box.ID, client.Pause{InMemory: true}); err != nil || box.State != "paused" || box.OnDisk || box.LeftS < 900 {
		t.Errorf("%+v, %v", box, err)
	}
	if err := c.Resume(ctx, box.ID, 2000*time.Second); err != nil {
		t.Error(err)
	}
	if box, err = c.Sandbox(ctx, box.ID); err != nil || box.State != "running" || time.Until(box.ExpiresAt) < 1900*time.Second {
		t.Errorf("%+v, %v", box, err)
	}
	if box, err = c.Pause(ctx, box.ID, client.Pause{}); err != nil || !box.OnDisk || box.RemoveAt.IsZero() {
		t.Errorf("%+v, %v", box, err)
	}
	if got := list(client.List{States: []string{"paused", "failed"}}); !slices.Equal(got, []string{box.ID}) {
		t.Errorf("%q", got)
	}
	if box, err = c.ResumeAs(ctx, box.ID, client.Resume{}); err != nil || box.State != "running" {
		t.Errorf("%+v, %v", box, err)
	}
	if _, err := c.ResumeAs(ctx, box.ID, client.Resume{MemoryMB: 1}); err == nil || client.IsNotFound(err) || client.Unreachable(err) {
		t.Error(err)
	}
	if err := c.Kill(ctx, box.ID); err != nil {
		t.Error(err)
	}
	if box, err = c.Sandbox(ctx, box.ID); err != nil || box.State != "killed" || box.Cause == "" {
		t.Errorf("%+v, %v", box, err)
	}
	if err := c.Kill(ctx, box.ID); !client.IsNotFound(err) {
		t.Error(err)
	}
	if _, err := c.Create(ctx, client.NewSandbox{Template: "no-such"}); err == nil || !strings.Contains(err.Error(), "no-such") {
		t.Error(err)
	}
}

// TestCopies forks and snapshots a sandbox; of many snapshots the list has all, over its pages.
func TestCopies(t *testing.T) {
	s := newSite(t)
	c, ctx := s.as("ann"), t.Context()
	box := s.create(c)
	if ids, err := c.Fork(ctx, box.ID, 0, 500*time.Second); err == nil || !strings.Contains(err.Error(), "1 to 100") {
		t.Error(ids, err)
	}
	ids, err := c.Fork(ctx, box.ID, 2, 500*time.Second)
	if err != nil || len(ids) != 2 {
		t.Fatal(ids, err)
	}
	if copied, err := c.Sandbox(ctx, ids[1]); err != nil || copied.Parent != box.ID || time.Until(copied.ExpiresAt) > 500*time.Second {
		t.Errorf("%+v, %v", copied, err)
	}
	if ids, err := c.Fork(ctx, box.ID, 20, 500*time.Second); len(ids) == 20 || err == nil || client.Unreachable(err) {
		t.Errorf("more than an owner may have: %d, %v", len(ids), err)
	}
	if name, err := c.Snapshot(ctx, box.ID, "first"); err != nil || name != "first" {
		t.Fatal(name, err)
	}
	var told *client.Error
	if _, err := c.Snapshot(ctx, box.ID, "first"); !errors.As(err, &told) || told.Status != http.StatusConflict {
		t.Errorf("a name that is taken: %v", err)
	}
	if name, err := c.SnapshotAs(ctx, box.ID, client.NewSnapshot{Name: "first", Replace: true}); err != nil || name != "first" {
		t.Error(name, err)
	}
	made, err := c.Snapshot(ctx, box.ID, "")
	if err != nil || made == "" {
		t.Fatal(made, err)
	}
	if names, err := c.Snapshots(ctx); err != nil || !slices.Equal(names, []string{made, "first"}) {
		t.Errorf("%q, %v", names, err)
	}
	if again, err := c.Create(ctx, client.NewSandbox{Template: "first"}); err == nil && again.Parent != "first" || err != nil &&
		!strings.Contains(err.Error(), "sandboxes") { // the owner may have no more
		t.Errorf("%+v, %v", again, err)
	}
	if err := c.DeleteTemplate(ctx, "first"); err != nil {
		t.Error(err)
	}
	if names, err := c.Snapshots(ctx); err != nil || !slices.Equal(names, []string{made}) {
		t.Errorf("%q, %v", names, err)
	}
	if _, err := c.Snapshot(ctx, box.ID, "Not A Name"); err == nil || client.IsNotFound(err) {
		t.Error(err)
	}
}

// TestPortsOfSandbox exposes a port on which something listens, and closes it.
func TestPortsOfSandbox(t *testing.T) {
	s := newSite(t)
	c, ctx := s.as("ann"), t.Context()
	box := s.create(c)
	l, err := net.Listen("tcp", "127.0.0.1:0") // the Fake's sandboxes are this machine
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	port := l.Addr().(*net.TCPAddr).Port
	p, err := c.Expose(ctx, box.ID, port, true)
	if err != nil || p.Port != port || !p.Public || !strings.Contains(p.URL, box.ID) {
		t.Errorf("%+v, %v", p, err)
	}
	find := func() (got client.Port) {
		t.Helper()
		all, err := c.Ports(ctx, box.ID)
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range all {
			if p.Port == port {
				got = p
			}
		}
		return got
	}
	if got := find(); got.URL != p.URL || !got.Public || !got.Listening {
		t.Errorf("%+v", got)
	}
	if err := c.ClosePort(ctx, box.ID, port); err != nil {
		t.Error(err)
	}
	if got := find(); got.URL != "" || got.Public || !got.Listening {
		t.Errorf("%+v", got)
	}
	if err := c.ClosePort(ctx, box.ID, port); !client.IsNotFound(err) {
		t.Error(err)
	}
	if _, err := c.Expose(ctx, box.ID, 70_000, false); err == nil || client.IsNotFound(err) {
		t.Error(err)
	}
}

// TestObserved reads logs and metrics, and a signed URL that is used without a key.
func TestObserved(t *testing.T) {
	s := newSite(t)
	c, ctx := s.as("ann"), t.Context()
	box := s.create(c)
	if _, err := c.Pause(ctx, box.ID, client.Pause{InMemory: true}); err != nil {
		t.Fatal(err)
	}
	if err := c.Resume(ctx, box.ID, 0); err != nil {
		t.Fatal(err)
	}
	said := func(l client.LogQuery) (all []string) {
		t.Helper()
		entries, err := c.Logs(ctx, box.ID, l)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if e.Level != "info" || time.Since(e.Time) > time.Minute {
				t.Errorf("%+v", e)
			}
			all = append(all, e.Message)
		}
		return all
	}
	all := said(client.LogQuery{Limit: 100})
	if len(all) < 4 || all[0] != "creating" || !slices.ContainsFunc(all, func(m string) bool { return strings.HasPrefix(m, "paused") }) {
		t.Fatalf("%q", all)
	}
	for name, test := range map[string]struct {
		l    client.LogQuery
		want []string
	}{
		"the last":     {client.LogQuery{Limit: 2}, all[len(all)-2:]},
		"since":        {client.LogQuery{Limit: 100, Since: time.Now().Add(-time.Minute)}, all},
		"a source":     {client.LogQuery{Limit: 100, Source: "build"}, nil},
		"a level":      {client.LogQuery{Limit: 100, Level: "error"}, nil},
		"what it says": {client.LogQuery{Limit: 100, Search: "creating"}, all[:1]},
	} {
		if got := said(test.l); !slices.Equal(got, test.want) {
			t.Errorf("%s: %q, want %q", name, got, test.want)
		}
	}
	if _, err := c.Logs(ctx, box.ID, client.LogQuery{Limit: 100_000}); err == nil || client.IsNotFound(err) {
		t.Error(err)
	}
	if _, err := c.Metrics(ctx, box.ID, time.Now().Add(-time.Hour)); err != nil {
		t.Error(err)
	}
	name := t.TempDir() + "/a b"
	if err := c.Upload(ctx, box.ID, name, strings.NewReader("signed")); err != nil {
		t.Fatal(err)
	}
	signed, err := c.FileURL(ctx, box.ID, name, false, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	_, rest, ok := strings.Cut(signed, "box.test")
	if !ok {
		t.Fatal(signed)
	}
	host := strings.TrimPrefix(signed[:len(signed)-len(rest)], "http://")
	req, err := http.NewRequestWithContext(ctx, "GET", s.web.URL+rest, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Host = host
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if body, err := io.ReadAll(res.Body); err != nil || string(body) != "signed" {
		t.Errorf("%s: %d %q %v", signed, res.StatusCode, body, err)
	}
	if _, err := c.FileURL(ctx, box.ID, "", true, time.Minute); err == nil || client.IsNotFound(err) {
		t.Error(err)
	}
}
