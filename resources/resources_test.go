package resources_test

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/mark3labs/mcp-go/server"

	"soulbox.dev/soulbox/access"
	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/internal/sandboxtest"
	"soulbox.dev/soulbox/mcpserver"
	"soulbox.dev/soulbox/resources"
	"soulbox.dev/soulbox/sandbox"
	"soulbox.dev/soulbox/template"
)

// site is the resources on a Fake, served as MCP. A key is its owner's name.
type site struct {
	*testing.T
	manager *sandbox.Manager
	store   *template.Store
	url     string
}

func newSite(t *testing.T) *site {
	t.Helper()
	fake, store := &sandboxtest.Fake{}, &template.Store{Dir: filepath.Join(t.TempDir(), "templates")}
	fake.EndAfter(t)
	m, err := sandbox.NewManager(sandbox.Options{Dir: t.TempDir(), Runtime: fake, Templates: sandboxtest.Templates{},
		MemoryBudget: 64 << 30, Times: sandbox.Times{OnTimeout: sandbox.ActionPause}})
	if err != nil {
		t.Fatal(err)
	}
	store.InUse = m.Images
	s := mcpserver.New(mcpserver.Options{MCP: server.NewMCPServer("test", "1"), Name: "test",
		Resources: resources.New(resources.Options{Manager: m, Store: store, NotFound: mcpserver.ErrNoResource})})
	h := s.HTTP(mcpserver.HTTPOptions{Allowances: &access.Allowances{Rate: 1e6}, Admission: mcpserver.Admission{
		Required:     func() bool { return true },
		Authenticate: func(_ context.Context, token string) (string, error) { return token, nil }}})
	web := httptest.NewServer(h)
	t.Cleanup(func() {
		h.Close(0)
		web.CloseClientConnections()
		web.Close()
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return &site{T: t, manager: m, store: store, url: web.URL}
}

func (s *site) client(owner string) *sandboxtest.MCP {
	return &sandboxtest.MCP{URL: s.url, Key: owner, Modern: true}
}

func (s *site) create(owner string) *sandbox.Sandbox {
	s.Helper()
	sb, err := s.manager.Create(s.Context(), sandbox.CreateOptions{Owner: owner})
	if err != nil {
		s.Fatal(err)
	}
	return sb
}

// run runs a command to its end.
func (s *site) run(sb *sandbox.Sandbox, command string) {
	s.Helper()
	c, err := sb.Agent(s.Context(), "test")
	if err != nil {
		s.Fatal(err)
	}
	sandboxtest.Run(s.T, c, command)
}

// template keeps a template with one file.
func (s *site) template(owner, name string) {
	s.Helper()
	var body bytes.Buffer
	w := tar.NewWriter(&body)
	err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "f", Mode: 0o644})
	if err = errors.Join(err, w.Close()); err == nil {
		_, err = s.store.Import(s.Context(), template.Manifest{Owner: owner, Name: name}, &body)
	}
	if err != nil {
		s.Fatal(err)
	}
}

// ask makes a request, which must succeed, and reads its result.
func ask[T any](s *site, owner, method string, params map[string]any) T {
	s.Helper()
	a, err := s.client(owner).Do(s.Context(), method, params)
	if err != nil || a.Error != nil {
		s.Fatalf("%s %v: %v %+v", method, params, err, a.Error)
	}
	var result T
	if err := json.Unmarshal(a.Result, &result); err != nil {
		s.Fatal(err)
	}
	return result
}

// content is what one read gives.
type content struct {
	URI, MimeType, Text, Blob string
	Meta                      map[string]any `json:"_meta"`
}

func (s *site) read(owner, uri string) content {
	s.Helper()
	r := ask[struct{ Contents []content }](s, owner, "resources/read", map[string]any{"uri": uri})
	if len(r.Contents) != 1 || r.Contents[0].URI != uri {
		s.Fatalf("%s: %+v", uri, r)
	}
	return r.Contents[0]
}

// page is one of a list.
type page struct {
	Resources  []struct{ URI, Name, Description, MimeType string }
	NextCursor string
}

func (p page) uris() (all []string) {
	for _, r := range p.Resources {
		all = append(all, r.URI)
	}
	return all
}

func (s *site) list(owner, cursor string) page {
	s.Helper()
	params := map[string]any{}
	if cursor != "" {
		params["cursor"] = cursor
	}
	return ask[page](s, owner, "resources/list", params)
}

// TestList: an owner's sandboxes, the newest first, with what can be read of each as it is; a page does not change by what is made
// meanwhile; templates come last.
func TestList(t *testing.T) {
	s := newSite(t)
	if got := s.list("ann", "").uris(); !slices.Equal(got, []string{"template://host"}) {
		t.Errorf("of nobody: %q", got)
	}
	s.template("ann", "mine")
	s.template("bob", "his")
	s.template("", "everybodys")
	var own []*sandbox.Sandbox
	for range 12 {
		own = append(own, s.create("ann"))
	}
	theirs := s.create("bob")
	if err := errors.Join(own[10].Pause(t.Context(), sandbox.PauseOptions{}), own[9].Kill(sandbox.CauseKilled)); err != nil {
		t.Fatal(err)
	}
	c, err := own[11].Agent(t.Context(), "test")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Start(t.Context(), agent.StartRequest{Command: "sleep 600", Tag: "a\x1b[31mtag"}); err != nil {
		t.Fatal(err)
	}
	s.run(own[11], "true")
	first := s.list("ann", "")
	s.create("ann") // newer than all
	second := s.list("ann", first.NextCursor)
	of := func(sb *sandbox.Sandbox, more ...string) (all []string) {
		for _, rest := range append([]string{"", "/logs", "/metrics"}, more...) {
			all = append(all, "sandbox://"+sb.ID()+rest)
		}
		return all
	}
	want := append(of(own[11], "/files/home/user", "/processes/p2/output", "/processes/p1/output"), of(own[10])...) // it is paused
	for i := 8; i > 0; i-- {                                                                                        // one is over
		want = append(want, of(own[i], "/files/home/user")...)
	}
	if got := first.uris(); !slices.Equal(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
	for _, r := range first.Resources {
		if strings.HasSuffix(r.URI, "/p1/output") && (r.Name != own[11].ID()+` p1 a\x1b[31mtag` ||
			r.Description != "Output of a running process") ||
			strings.HasSuffix(r.URI, "/p2/output") && r.Description != "Output of a process that has exited" ||
			r.URI == "sandbox://"+own[10].ID() && r.Description != "Sandbox "+own[10].ID()+", paused" {
			t.Errorf("%+v", r)
		}
	}
	want = append(of(own[0], "/files/home/user"), "template://host", "template://everybodys", "template://mine")
	got := second.uris()
	slices.Sort(got[min(5, len(got)):])
	if !slices.Equal(got, want) || second.NextCursor != "" {
		t.Errorf("got  %q, cursor %q\nwant %q", got, second.NextCursor, want)
	}
	if got := s.list("bob", "").uris(); got[0] != "sandbox://"+theirs.ID() || slices.Contains(got, "template://mine") ||
		!slices.Contains(got, "template://his") {
		t.Errorf("%q", got)
	}
	for _, cursor := range []string{"x", "!", base64.RawURLEncoding.EncodeToString([]byte("sandboxes " + own[0].ID()))} {
		a, err := s.client("ann").Do(t.Context(), "resources/list", map[string]any{"cursor": cursor})
		if err != nil || a.Error == nil || a.Error.Code != -32602 || a.Error.Message != "the cursor does not come from resources/list" {
			t.Errorf("%s: %v %+v", cursor, err, a.Error)
		}
	}
}

// TestListOutputs: of many processes the latest are listed.
func TestListOutputs(t *testing.T) {
	s := newSite(t)
	sb := s.create("ann")
	c, err := sb.Agent(t.Context(), "test")
	if err != nil {
		t.Fatal(err)
	}
	for range 55 {
		sandboxtest.Run(t, c, "true")
	}
	got := s.list("ann", "").uris()
	in := "sandbox://" + sb.ID() + "/processes/"
	if !slices.Contains(got, in+"p55/output") || !slices.Contains(got, in+"p6/output") || slices.Contains(got, in+"p5/output") {
		t.Errorf("%q", got)
	}
}

// TestReadFiles reads files in whole and in ranges: text as text, where a character that a range cuts is left for the next range, and other
// content as bytes. Each part says how to read on.
func TestReadFiles(t *testing.T) {
	s := newSite(t)
	sb, dir := s.create("ann"), t.TempDir()
	base := "sandbox://" + sb.ID() + "/files" + dir
	for name, body := range map[string]string{"a.txt": "aä€b", "esc.txt": "\x1b[31mred", "b.bin": "\x00\xff\x01", "odd %?#": "odd",
		"empty": "", "big": strings.Repeat("x", 1<<20+10), "d/in": "in"} {
		if err := errors.Join(os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755),
			os.WriteFile(filepath.Join(dir, name), []byte(body), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	blob := base64.StdEncoding.EncodeToString
	for _, test := range []struct{ uri, mime, text, blob, size, next string }{
		{"/a.txt", "text/plain; charset=utf-8", "aä€b", "", "7", ""},
		{"/a.txt?offset=1&limit=3", "text/plain; charset=utf-8", "ä", "", "7", "3"}, // € is cut
		{"/a.txt?offset=3", "text/plain; charset=utf-8", "€b", "", "7", ""},
		{"/a.txt?offset=3&limit=2", "text/plain; charset=utf-8", "", blob([]byte("\xe2\x82")), "7", "5"}, // less than a character
		{"/a.txt?offset=700", "text/plain; charset=utf-8", "", "", "7", ""},
		{"/esc.txt", "text/plain; charset=utf-8", "", blob([]byte("\x1b[31mred")), "8", ""},
		{"/b.bin", "application/octet-stream", "", blob([]byte("\x00\xff\x01")), "3", ""},
		{"/odd%20%25%3F%23", "text/plain; charset=utf-8", "odd", "", "3", ""},
		{"/empty", "text/plain; charset=utf-8", "", "", "0", ""},
		{"/big", "text/plain; charset=utf-8", strings.Repeat("x", 1<<20), "", "1048586", "1048576"},
		{"/big?limit=5000000&offset=1048576", "text/plain; charset=utf-8", strings.Repeat("x", 10), "", "1048586", ""},
	} {
		got := s.read("ann", base+test.uri)
		next := ""
		if test.next != "" {
			next, _, _ = strings.Cut(base+test.uri, "?")
			next += "?offset=" + test.next
		}
		said, _ := got.Meta["next"].(string)
		if got.Text != test.text || got.Blob != test.blob || !strings.EqualFold(got.MimeType, test.mime) || said != next ||
			test.size != fmt.Sprint(int64(got.Meta["size"].(float64))) {
			t.Errorf("%s: got %q %.40q %.40q %v", test.uri, got.MimeType, got.Text, got.Blob, got.Meta)
		}
	}
	var names []string
	for line := range strings.Lines(s.read("ann", base).Text) {
		f := strings.Split(line, "\t")
		if len(f) != 3 {
			t.Errorf("%q", line)
		}
		names = append(names, strings.TrimPrefix(strings.Join(f[:2], " "), dir+"/"))
	}
	slices.Sort(names)
	if got := strings.Join(names, ","); !strings.HasPrefix(got, "a.txt 7,b.bin 3,big 1048586,d/ ") ||
		!strings.HasSuffix(got, ",odd %?# 3") {
		t.Error(got)
	}
}

// TestReadOutput reads what processes write, in ranges by their bytes, and inert.
func TestReadOutput(t *testing.T) {
	s := newSite(t)
	sb := s.create("ann")
	s.run(sb, `printf 'aä\033[31mb'`)
	s.run(sb, `printf 'ä\303'`)
	base := "sandbox://" + sb.ID() + "/processes/"
	for _, test := range []struct{ uri, text, next string }{
		{"p1/output", `aä\x1b[31mb`, ""},
		{"p1/output?offset=1&limit=2", "ä", "3"},
		{"p1/output?offset=1&limit=4", `ä\x1b[`, "5"},
		{"p1/output?limit=2", "a", "1"},             // ä is cut
		{"p1/output?offset=2&limit=1", `\xa4`, "3"}, // who asks for half a character gets it
		{"p1/output?offset=900", "", ""},
		{"p2/output", `ä\xc3`, ""}, // nothing more comes
	} {
		got := s.read("ann", base+test.uri)
		next := ""
		if test.next != "" {
			next, _, _ = strings.Cut(base+test.uri, "?")
			next += "?offset=" + test.next
		}
		if said, _ := got.Meta["next"].(string); got.Text != test.text || got.MimeType != "text/plain" || said != next {
			t.Errorf("%s: got %q %v", test.uri, got.Text, got.Meta)
		}
	}
}

// TestReadSandbox reads what a sandbox is, what has happened to it and what it uses, in each of its states, and templates.
func TestReadSandbox(t *testing.T) {
	s := newSite(t)
	sb := s.create("ann")
	uri := "sandbox://" + sb.ID()
	fields := func(uri string, has string, hasNot ...string) {
		t.Helper()
		got := s.read("ann", uri)
		var d map[string]any
		if err := json.Unmarshal([]byte(got.Text), &d); err != nil || got.MimeType != "application/json" {
			t.Fatalf("%s: %v", got.MimeType, err)
		}
		for name := range strings.FieldsSeq(has) {
			name, want, _ := strings.Cut(name, "=")
			if v, ok := d[name]; !ok || want != "" && fmt.Sprint(v) != want {
				t.Errorf("%s: %s is %v, want %q", uri, name, v, want)
			}
		}
		for _, name := range hasNot {
			if v, ok := d[name]; ok {
				t.Errorf("%s: %s is %v", uri, name, v)
			}
		}
	}
	fields(uri, "sandbox_id="+sb.ID()+" state=running template=host cpu=2 memory_mb=1024 disk_mb=10240 pids=512 created_at ends_at",
		"ended_at", "paused_at", "metadata")
	fields(uri+"/metrics", "time now totals samples")
	if err := sb.Pause(t.Context(), sandbox.PauseOptions{}); err != nil {
		t.Fatal(err)
	}
	fields(uri, "state=paused paused_at cause life_left_ms", "on_disk", "auto_resume", "ended_at")
	fields(uri+"/metrics", "time totals samples", "now")
	if err := sb.Kill(sandbox.CauseKilled); err != nil {
		t.Fatal(err)
	}
	fields(uri, "state=killed ended_at cause", "ends_at", "paused_at")
	log := s.read("ann", uri+"/logs")
	lines := strings.Split(strings.TrimSuffix(log.Text, "\n"), "\n")
	if len(lines) < 3 || log.MimeType != "application/jsonl" || log.Meta["last"] != float64(len(lines)) ||
		!strings.Contains(lines[0], "creating") {
		t.Errorf("%s %v", log.Text, log.Meta)
	}
	if rest := s.read("ann", uri+"/logs?offset=1"); rest.Text != strings.Join(lines[1:], "\n")+"\n" {
		t.Errorf("%s", rest.Text)
	}
	s.template("ann", "mine:1")
	fields("template://mine:1", "name=mine:1", "original", "Original")
	fields("template://host", "name=host")
}

// TestReadBuildLog reads the log of a build that has failed, in ranges, by its owner alone.
func TestReadBuildLog(t *testing.T) {
	s := newSite(t)
	build := template.NewBuildID()
	b := &template.Builder{Store: s.store, Manager: s.manager}
	if _, err := b.Build(t.Context(), template.BuildRequest{ID: build, Owner: "ann", Name: "mine", Dockerfile: "FROM no-such-template\n"},
		func(template.Line) {}); err == nil {
		t.Fatal("it was built")
	}
	uri := "template://mine/builds/" + build + "/log"
	whole := s.read("ann", uri)
	if whole.MimeType != "application/jsonl" || !strings.Contains(whole.Text, "no-such-template") ||
		whole.Meta["size"] != float64(len(whole.Text)) {
		t.Errorf("%+v", whole)
	}
	part := s.read("ann", uri+"?offset=2&limit=5")
	if part.Text != whole.Text[2:7] || part.Meta["next"] != uri+"?offset=7" {
		t.Errorf("%+v", part)
	}
	if end := s.read("ann", uri+"?offset=1000000"); end.Text != "" || end.Meta["next"] != nil {
		t.Errorf("%+v", end)
	}
	s.missing("bob", uri)
}

// missing wants a URI not to be there, in both eras of the protocol. It gives the words.
func (s *site) missing(owner, uri string) string {
	s.Helper()
	said := ""
	for modern, code := range map[bool]int{true: -32602, false: -32002} {
		c := s.client(owner)
		if c.Modern = modern; !modern {
			c.Open(s.T)
		}
		a, err := c.Do(s.Context(), "resources/read", map[string]any{"uri": uri})
		if err != nil || a.Error == nil || a.Error.Code != code || !strings.HasPrefix(a.Error.Message, "resource not found: ") {
			s.Errorf("%.80s: %v %s %+v", uri, err, a.Result, a.Error)
			continue
		}
		said = a.Error.Message
	}
	return said
}

// TestNotFound: what is another owner's gives the same error as what does not exist, for every kind.
func TestNotFound(t *testing.T) {
	s := newSite(t)
	sb := s.create("ann")
	s.run(sb, "true")
	s.template("ann", "mine")
	const nobodys = "sbaaaaaaaaaaaaaaaaaaaa"
	for _, rest := range []string{"", "/logs", "/metrics", "/files/etc/hosts", "/files/", "/processes/p1/output"} {
		s.read("ann", "sandbox://"+sb.ID()+rest)
		got, want := s.missing("bob", "sandbox://"+sb.ID()+rest), s.missing("bob", "sandbox://"+nobodys+rest)
		if got != strings.ReplaceAll(want, nobodys, sb.ID()) {
			t.Errorf("%s: %s, but %s", rest, got, want)
		}
	}
	if got, want := s.missing("bob", "template://mine"),
		s.missing("bob", "template://none"); got != strings.Replace(want, "none", "mine", 1) {
		t.Errorf("%s, but %s", got, want)
	}
	for _, uri := range []string{"sandbox://" + sb.ID() + "/files/no/such", "sandbox://" + sb.ID() + "/processes/p9/output",
		"file:///etc/hosts", "sandbox://" + sb.ID() + "/files/a?offset=-1", "template://mine/builds/x/log", "x" +
			strings.Repeat("€", 3000)} {
		s.missing("ann", uri)
	}
	a, err := s.client("ann").Do(t.Context(), "resources/read", map[string]any{"uri": "sandbox://" + sb.ID() + "/files/dev/null"})
	if err != nil || a.Error == nil || a.Error.Code != -32602 || !strings.Contains(a.Error.Message, "exec can look at it") {
		t.Errorf("a device: %v %+v", err, a.Error)
	}
}

// TestComplete completes names that the caller may use.
func TestComplete(t *testing.T) {
	s := newSite(t)
	sb, dir := s.create("ann"), t.TempDir()
	other := s.create("ann")
	s.create("bob")
	s.run(sb, "true")
	s.run(sb, "true")
	s.template("ann", "mine")
	s.template("bob", "my-own")
	for _, name := range []string{"aa/x", "ab", "b"} {
		if err := errors.Join(os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755),
			os.WriteFile(filepath.Join(dir, name), nil, 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	ids := []string{sb.ID(), other.ID()}
	slices.Sort(ids)
	in := strings.TrimPrefix(dir, "/") + "/"
	const files, outputs = "sandbox://{id}/files/{+path}", "sandbox://{id}/processes/{process_id}/output"
	for _, test := range []struct {
		owner, template, argument, value, id string
		want                                 []string
	}{
		{"ann", "sandbox://{id}", "id", "", "", ids},
		{"ann", "sandbox://{id}", "id", sb.ID()[:12], "", []string{sb.ID()}},
		{"ann", "sandbox://{id}", "id", "zz", "", nil},
		{"carl", "sandbox://{id}", "id", "", "", nil},
		{"ann", outputs, "process_id", "p", sb.ID(), []string{"p1", "p2"}},
		{"ann", outputs, "process_id", "p2", sb.ID(), []string{"p2"}},
		{"bob", outputs, "process_id", "p", sb.ID(), nil},
		{"ann", outputs, "process_id", "p", "", nil},
		{"ann", files, "path", in, sb.ID(), []string{in + "aa/", in + "ab", in + "b"}},
		{"ann", files, "+path", in + "a", sb.ID(), []string{in + "aa/", in + "ab"}},
		{"ann", files, "path", "/" + in + "aa/", sb.ID(), []string{in + "aa/x"}}, // as models write it
		{"ann", files, "path", in + "no/such", sb.ID(), nil},
		{"bob", files, "path", in, sb.ID(), nil},
		{"ann", "template://{name}", "name", "m", "", []string{"mine"}},
		{"bob", "template://{name}", "name", "", "", []string{"host", "my-own"}},
		{"ann", "sandbox://{id}", "other", "", "", nil},
	} {
		got := ask[struct {
			Completion struct {
				Values []string
				Total  int
			}
		}](s, test.owner, "completion/complete", map[string]any{"ref": map[string]any{"type": "ref/resource", "uri": test.template},
			"argument": map[string]any{"name": test.argument, "value": test.value},
			"context":  map[string]any{"arguments": map[string]any{"id": test.id}}}).Completion
		slices.Sort(got.Values)
		if !slices.Equal(got.Values, test.want) || got.Total != len(test.want) {
			t.Errorf("%s %s %q: got %q of %d, want %q", test.owner, test.template, test.value, got.Values, got.Total, test.want)
		}
	}
}
