package client_test

import (
	"context"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"soulbox.dev/soulbox/api"
	"soulbox.dev/soulbox/api/client"
	"soulbox.dev/soulbox/internal/sandboxtest"
	"soulbox.dev/soulbox/sandbox"
	"soulbox.dev/soulbox/template"
)

// site is a server of the HTTP API before the Fake. A key is its owner's name.
type site struct {
	*testing.T
	manager *sandbox.Manager
	store   *template.Store
	builder *template.Builder
	web     *httptest.Server
	handler http.Handler
}

func newSite(t *testing.T, change ...func(*api.Control)) *site {
	t.Helper()
	fake, store := &sandboxtest.Fake{}, &template.Store{Dir: filepath.Join(t.TempDir(), "templates")}
	fake.EndAfter(t)
	m, err := sandbox.NewManager(sandbox.Options{Dir: t.TempDir(), Runtime: fake, Templates: sandboxtest.Templates{}, Version: "test",
		MaxPerOwner: 20, MemoryBudget: 64 << 30})
	if err != nil {
		t.Fatal(err)
	}
	store.InUse = m.Images
	log := slog.New(slog.DiscardHandler)
	s := &site{T: t, manager: m, store: store, builder: &template.Builder{Store: store, Manager: m, Log: log}}
	gateway := api.NewGateway(m, &url.URL{Scheme: "http", Host: "box.test"}, log)
	control := &api.Control{Manager: m, Store: store, Builds: template.NewBuilds(s.builder), Gateway: gateway, Log: log,
		Self: client.Server{Version: "v1", Kind: "http", PID: 7, State: "/secret"},
		Owner: func(r *http.Request) (string, error) {
			if key := r.Header.Get("X-API-Key"); key != "" {
				return key, nil
			}
			return "", errors.New("there is no key")
		}}
	for _, f := range change {
		f(control)
	}
	mux := http.NewServeMux()
	for pattern, h := range control.Routes() {
		mux.Handle(pattern, h)
	}
	s.handler = gateway.Handler(mux)
	s.web = httptest.NewServer(s.handler)
	t.Cleanup(func() {
		gateway.Close()
		s.web.CloseClientConnections()
		s.web.Close()
		control.Close()
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// local makes a server its own user's, who is the operator.
func local(c *api.Control) {
	c.Local, c.Owner = true, func(*http.Request) (string, error) { return "", nil }
}

// as is a client of the server for an owner.
func (s *site) as(owner string) *client.Client {
	s.Helper()
	return newClient(s.T, client.Options{URL: s.web.URL, Key: owner})
}

func newClient(t *testing.T, o client.Options) *client.Client {
	t.Helper()
	c, err := client.New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func (s *site) create(c *client.Client) client.Sandbox {
	s.Helper()
	box, err := c.Create(s.Context(), client.NewSandbox{})
	if err != nil {
		s.Fatal(err)
	}
	return box
}

// call is one method, called with a sandbox, or a template, of a name.
type call func(ctx context.Context, c *client.Client, name string) error

// nothing drops what a method gives.
func nothing[T any](_ T, err error) error { return err }

// ofSandbox are the methods that want a sandbox.
var ofSandbox = map[string]call{
	"Sandbox": func(ctx context.Context, c *client.Client, id string) error { return nothing(c.Sandbox(ctx, id)) },
	"Update": func(ctx context.Context, c *client.Client, id string) error {
		return nothing(c.Update(ctx, id, client.Update{}))
	},
	"Pause": func(ctx context.Context, c *client.Client, id string) error {
		return nothing(c.Pause(ctx, id, client.Pause{}))
	},
	"Resume": func(ctx context.Context, c *client.Client, id string) error { return c.Resume(ctx, id, time.Minute) },
	"ResumeAs": func(ctx context.Context, c *client.Client, id string) error {
		return nothing(c.ResumeAs(ctx, id, client.Resume{}))
	},
	"Kill": func(ctx context.Context, c *client.Client, id string) error { return c.Kill(ctx, id) },
	"Fork": func(ctx context.Context, c *client.Client, id string) error {
		return nothing(c.Fork(ctx, id, 1, time.Minute))
	},
	"Snapshot": func(ctx context.Context, c *client.Client, id string) error { return nothing(c.Snapshot(ctx, id, "x")) },
	"SnapshotAs": func(ctx context.Context, c *client.Client, id string) error {
		return nothing(c.SnapshotAs(ctx, id, client.NewSnapshot{Name: "x", Replace: true}))
	},
	"ExposeWithin": func(ctx context.Context, c *client.Client, id string) error {
		return nothing(c.ExposeWithin(ctx, id, 80, false, time.Millisecond))
	},
	"Processes": func(ctx context.Context, c *client.Client, id string) error { return nothing(c.Processes(ctx, id)) },
	"Ports":     func(ctx context.Context, c *client.Client, id string) error { return nothing(c.Ports(ctx, id)) },
	"Expose": func(ctx context.Context, c *client.Client, id string) error {
		return nothing(c.Expose(ctx, id, 80, false))
	},
	"ClosePort": func(ctx context.Context, c *client.Client, id string) error { return c.ClosePort(ctx, id, 80) },
	"FileURL": func(ctx context.Context, c *client.Client, id string) error {
		return nothing(c.FileURL(ctx, id, "/f", true, time.Minute))
	},
	"Logs": func(ctx context.Context, c *client.Client, id string) error {
		return nothing(c.Logs(ctx, id, client.LogQuery{Limit: 1}))
	},
	"Metrics": func(ctx context.Context, c *client.Client, id string) error {
		return nothing(c.Metrics(ctx, id, time.Time{}))
	},
	"Stat":  func(ctx context.Context, c *client.Client, id string) error { return nothing(c.Stat(ctx, id, "/")) },
	"Names": func(ctx context.Context, c *client.Client, id string) error { return nothing(c.Names(ctx, id, "/")) },
	"Download": func(ctx context.Context, c *client.Client, id string) error {
		return nothing(c.Download(ctx, id, "/etc/hostname"))
	},
	"Upload": func(ctx context.Context, c *client.Client, id string) error {
		return c.Upload(ctx, id, "/no/such", strings.NewReader("x"))
	},
	"Watch": func(ctx context.Context, c *client.Client, id string) error {
		return c.Watch(ctx, id, "/", false, func() {}, func(client.Event) error { return nil })
	},
	"Start": func(ctx context.Context, c *client.Client, id string) error {
		return nothing(c.Start(ctx, id, client.Command{Args: []string{"true"}}, nil))
	},
	"Attach": func(ctx context.Context, c *client.Client, id string) error {
		return nothing(c.Attach(ctx, id, client.Process{PID: 1, ID: "p1"}, 0, nil))
	},
	"Signal": func(ctx context.Context, c *client.Client, id string) error {
		return c.Signal(ctx, id, client.Process{PID: 1, ID: "p1"}, syscall.SIGTERM)
	},
}

const build, hash = "0c8bd1f7-4a0c-4b6a-9b5e-6d7c8e9f0a1b", "0000000000000000000000000000000000000000000000000000000000000000"

// ofTemplate are those that want a template.
var ofTemplate = map[string]call{
	"DeleteTemplate": func(ctx context.Context, c *client.Client, name string) error { return c.DeleteTemplate(ctx, name) },
	"Push": func(ctx context.Context, c *client.Client, name string) error {
		return nothing(c.Push(ctx, name, "registry.test/x:1"))
	},
	"LastBuild": func(ctx context.Context, c *client.Client, name string) error { return nothing(c.LastBuild(ctx, name)) },
	"CopyTemplate": func(ctx context.Context, c *client.Client, name string) error {
		return nothing(c.CopyTemplate(ctx, name, "y"))
	},
	"Build": func(ctx context.Context, c *client.Client, name string) error {
		return c.Build(ctx, name, build, client.NewBuild{Dockerfile: "FROM x"})
	},
	"BuildStatus": func(ctx context.Context, c *client.Client, name string) error {
		return nothing(c.BuildStatus(ctx, name, build, 0))
	},
}

// ofServer are the others.
var ofServer = map[string]call{
	"Server": func(ctx context.Context, c *client.Client, _ string) error { return nothing(c.Server(ctx)) },
	"Caller": func(ctx context.Context, c *client.Client, _ string) error { return nothing(c.Caller(ctx)) },
	"Sandboxes": func(ctx context.Context, c *client.Client, _ string) error {
		return nothing(c.Sandboxes(ctx, client.List{}))
	},
	"Create": func(ctx context.Context, c *client.Client, _ string) error {
		return nothing(c.Create(ctx, client.NewSandbox{}))
	},
	"Snapshots": func(ctx context.Context, c *client.Client, _ string) error { return nothing(c.Snapshots(ctx)) },
	"Templates": func(ctx context.Context, c *client.Client, _ string) error { return nothing(c.Templates(ctx)) },
	"Pull": func(ctx context.Context, c *client.Client, _ string) error {
		return nothing(c.Pull(ctx, "x", "registry.test/x:1"))
	},
	"Announce": func(ctx context.Context, c *client.Client, _ string) error {
		_, _, err := c.Announce(ctx, "x", 0, 0, 0)
		return err
	},
	"HasContext": func(ctx context.Context, c *client.Client, _ string) error {
		return nothing(c.HasContext(ctx, "x", hash))
	},
	"SendContext": func(ctx context.Context, c *client.Client, _ string) error {
		return c.SendContext(ctx, "x", hash, strings.NewReader(""))
	},
}

// each does something with every method that goes to a server.
func each(do func(name string, method call)) {
	for _, all := range []map[string]call{ofSandbox, ofTemplate, ofServer} {
		for name, method := range all {
			do(name, method)
		}
	}
}

// TestEveryMethod: each method that asks a server is in one of the tables above.
func TestEveryMethod(t *testing.T) {
	known := map[string]bool{}
	each(func(name string, _ call) { known[name] = true })
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range parsed.Decls {
			f, ok := d.(*ast.FuncDecl)
			if !ok || f.Recv == nil || !f.Name.IsExported() || f.Name.Name == "Close" || f.Name.Name == "Where" {
				continue
			}
			if star, ok := f.Recv.List[0].Type.(*ast.StarExpr); ok && star.X.(*ast.Ident).Name == "Client" && !known[f.Name.Name] {
				t.Errorf("%s of %s is tested by nothing", f.Name.Name, file)
			}
		}
	}
}

// TestNotThere: every method returns not found for what does not exist or is another owner's.
func TestNotThere(t *testing.T) {
	s := newSite(t)
	theirs := s.create(s.as("bob"))
	ann := s.as("ann")
	for name, method := range ofSandbox {
		for _, id := range []string{"sbaaaaaaaaaaaaaaaaaaaa", theirs.ID, "../x"} {
			err := method(t.Context(), ann, id)
			var told *client.Error
			if name == "Kill" && err == nil && id == theirs.ID {
				t.Error("it is killed by another")
			}
			if !client.IsNotFound(err) && !(id == "../x" && errors.As(err, &told)) || client.Unreachable(err) {
				t.Errorf("%s of %s: %v", name, id, err)
			}
		}
	}
	if box, err := s.as("bob").Sandbox(t.Context(), theirs.ID); err != nil || box.State != "running" {
		t.Errorf("%+v, %v", box, err)
	}
	for name, method := range ofTemplate {
		c := ann
		if name == "Push" {
			c = newSite(t, local).as("operator") // for others there is no such call
		}
		if err := method(t.Context(), c, "no-such"); !client.IsNotFound(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestRefused: without a key every method is refused, and the error says so.
func TestRefused(t *testing.T) {
	s := newSite(t)
	nobody := s.as("")
	each(func(name string, method call) {
		var told *client.Error
		err := method(t.Context(), nobody, "x")
		if !errors.As(err, &told) || told.Status != http.StatusUnauthorized || client.Unreachable(err) || client.IsNotFound(err) {
			t.Errorf("%s: %v", name, err)
		} else if name != "HasContext" && !strings.Contains(told.Message, "there is no key") { // HEAD has no words
			t.Errorf("%s: %v", name, err)
		}
	})
}

// TestCancelled: every method ends with its context, before its request and during it, and says so.
func TestCancelled(t *testing.T) {
	asked := make(chan struct{}, 100)
	silent := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body) // until then nobody sees that the client leaves
		asked <- struct{}{}
		<-r.Context().Done()
	}))
	defer silent.Close()
	c := newClient(t, client.Options{URL: silent.URL, Key: "ann"})
	each(func(name string, method call) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := method(ctx, c, "x"); !errors.Is(err, context.Canceled) || client.Unreachable(err) {
			t.Errorf("%s, before: %v", name, err)
		}
		ctx, cancel = context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- method(ctx, c, "x") }()
		<-asked
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) || client.Unreachable(err) {
			t.Errorf("%s, during: %v", name, err)
		}
	})
}

// TestUnreachable: the error of a server that does not answer differs from a refusal, and names the server's address.
func TestUnreachable(t *testing.T) {
	gone := httptest.NewServer(nil)
	gone.Close()
	c := newClient(t, client.Options{URL: gone.URL, Key: "ann"})
	each(func(name string, method call) {
		if err := method(t.Context(), c, "x"); !client.Unreachable(err) || !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("%s: %v", name, err)
		}
	})
	if _, err := c.Server(t.Context()); err == nil || !strings.HasPrefix(err.Error(), gone.URL+": ") {
		t.Error(err)
	}
}

// TestOthers: if another program or too old a server answers, the error says so; the answer is bounded, and redirects are not followed.
func TestOthers(t *testing.T) {
	var answer atomic.Pointer[http.HandlerFunc]
	var keys sync.Map
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		keys.Store(r.URL.Path, r.Header.Get("X-API-Key"))
		(*answer.Load())(w, r)
	}))
	defer web.Close()
	c := newClient(t, client.Options{URL: web.URL, Key: "secret"})
	for name, test := range map[string]struct {
		status int
		header string // of the API
		body   string
		want   string
	}{
		"another server":     {404, "", "<h1>not found</h1>", "what answers there is not a SoulBox server, or one too old for this client"},
		"an older one":       {200, "0", "{}", web.URL + ": " + client.ErrServerOld.Error()},
		"no number":          {200, "x", "{}", web.URL + ": " + client.ErrServerOld.Error()},
		"a newer one":        {200, "99", "{}", ""},
		"a proxy":            {502, "", "bad gateway", "the server answers 502 Bad Gateway"},
		"no JSON":            {200, "", "hello", "read the answer of " + web.URL + ": "},
		"nothing":            {200, "", "", "read the answer of " + web.URL + ": EOF"},
		"a refusal":          {409, "1", `{"code":409,"message":"it is paused"}`, "it is paused"},
		"a user that is not": {401, "1", `{"message":"invalid username: 'joe'"}`, "the sandbox has no user 'joe': name one of its "},
		"without end": {500, "1", `{"message":"` + strings.Repeat("x", 2<<20) + `"}`,
			"the server answers 500 Internal Server Error"},
		"elsewhere": {307, "", "", "the server answers 307 Temporary Redirect"},
	} {
		do := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			if test.header != "" {
				w.Header().Set(client.APIHeader, test.header)
			}
			w.Header().Set("Location", "/elsewhere")
			w.WriteHeader(test.status)
			_, _ = io.WriteString(w, test.body) // who reads no more is meant to
		})
		answer.Store(&do)
		_, err := c.Server(t.Context())
		if test.want == "" && err != nil || test.want != "" && (err == nil || !strings.HasPrefix(err.Error(), test.want)) {
			t.Errorf("%s: got %v, want %q", name, err, test.want)
		}
		old := errors.Is(err, client.ErrServerOld)
		if old != strings.HasSuffix(test.want, client.ErrServerOld.Error()) || old && client.Unreachable(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, there := keys.Load("/elsewhere"); there {
		t.Error("a redirect was followed, with the key")
	}
	if key, _ := keys.Load("/v1/server"); key != "secret" {
		t.Error(key)
	}
}

// TestNew: which URLs New accepts. A socket is dialled as one, and the trace shows no key.
func TestNew(t *testing.T) {
	for _, bad := range []string{"", "box.example.com", "ftp://box", "http://", "http://me:secret@box", "http://box:x", "://"} {
		if _, err := client.New(client.Options{URL: bad}); err == nil ||
			!strings.Contains(err.Error(), "is not the URL of a server; give one") {
			t.Errorf("%q: %v", bad, err)
		}
	}
	for given, want := range map[string]string{"http://box:1": "http://box:1", "https://box/": "https://box",
		"https://box/mcp":            "https://box",
		"https://box/sub/mcp/?a=b#c": "https://box/sub"} {
		if got := newClient(t, client.Options{URL: given}).Where(); got != want {
			t.Errorf("%s: %s, want %s", given, got, want)
		}
	}
	s := newSite(t)
	dir, err := os.MkdirTemp("", "s") // a socket's name is short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	socket := client.Socket(dir, 7)
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	web := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.Header.Set("X-API-Key", r.Header.Get(client.OwnerHeader))
		if agent := r.Header.Get("User-Agent"); agent != "me/1" {
			t.Error(agent)
		}
		s.handler.ServeHTTP(w, r)
	})}
	go func() { _ = web.Serve(l) }() // ends with the test
	t.Cleanup(func() { _ = web.Close() })
	var traced []string
	c := newClient(t, client.Options{Socket: socket, Owner: "ann", Key: "secret", Agent: "me/1",
		Trace: func(method, path string, status int, _ time.Duration) {
			traced = append(traced, fmt.Sprint(method, " ", path, " ", status))
		}})
	if who, err := c.Caller(t.Context()); err != nil || who != "ann" || c.Where() != socket {
		t.Errorf("%q at %s: %v", who, c.Where(), err)
	}
	if got := strings.Join(traced, ","); got != "GET /teams 200" {
		t.Error(got)
	}
	found, err := client.Sockets(dir)
	if err != nil || len(found) != 1 || found[0] != socket {
		t.Error(found, err)
	}
}
