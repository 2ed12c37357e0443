package api

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"soulbox.dev/soulbox/api/envd"
	"soulbox.dev/soulbox/api/envd/spec/filesystem/filesystemconnect"
	"soulbox.dev/soulbox/api/envd/spec/process/processconnect"
	"soulbox.dev/soulbox/internal/cursor"
	"soulbox.dev/soulbox/internal/sandboxtest"
	"soulbox.dev/soulbox/sandbox"
	"soulbox.dev/soulbox/template"
)

// apiTest is the whole HTTP face in front of the Fake. An owner's key is the owner's name.
type apiTest struct {
	*testing.T
	m       *sandbox.Manager
	control *Control
	gateway *Gateway
	front   *httptest.Server
}

const testDomain = "box.test"

func newAPITest(t *testing.T) *apiTest {
	t.Helper()
	return newAPITestOn(t, &sandboxtest.Fake{})
}

func newAPITestOn(t *testing.T, fake *sandboxtest.Fake) *apiTest {
	t.Helper()
	m, err := sandbox.NewManager(sandbox.Options{Dir: t.TempDir(), Runtime: fake, Templates: sandboxtest.Templates{}, Version: "test",
		MaxPerOwner: 20, ConnWait: 50 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	a := &apiTest{T: t, m: m, gateway: NewGateway(m, &url.URL{Scheme: "http", Host: testDomain}, slog.New(slog.DiscardHandler))}
	store := &template.Store{Dir: t.TempDir()}
	a.control = &Control{Manager: m, Store: store, Builds: template.NewBuilds(&template.Builder{Store: store, Manager: m,
		Log: slog.New(slog.DiscardHandler)}),
		Gateway: a.gateway, Log: slog.New(slog.DiscardHandler),
		Owner: func(r *http.Request) (string, error) {
			if key := r.Header.Get("X-API-Key"); key != "" {
				return key, nil
			}
			return "", errors.New("no key")
		}}
	mux := http.NewServeMux()
	for pattern, h := range a.control.Routes() {
		mux.Handle(pattern, h)
	}
	a.front = httptest.NewServer(a.gateway.Handler(mux))
	t.Cleanup(func() {
		a.gateway.Close()
		a.front.Close()
		a.control.Close()
	})
	return a
}

// reply is an answer.
type reply struct {
	code   int
	header http.Header
	text   string
	body   any
}

// ask sends a request: headers are name, value, …; a header Host sets the host.
func (a *apiTest) ask(method, path, body string, headers ...string) reply {
	a.Helper()
	req, err := http.NewRequestWithContext(a.Context(), method, a.front.URL+path, strings.NewReader(body))
	if err != nil {
		a.Fatal(err)
	}
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	for i := 0; i < len(headers); i += 2 {
		if headers[i] == "Host" {
			req.Host = headers[i+1]
			continue
		}
		if headers[i] == "Content-Type" {
			req.Header.Del("Content-Type")
		}
		req.Header.Add(headers[i], headers[i+1])
	}
	res, err := (&http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}).Do(req)
	if err != nil {
		a.Fatalf("%s %s: %v", method, path, err)
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		a.Fatalf("%s %s: %v", method, path, err)
	}
	r := reply{code: res.StatusCode, header: res.Header, text: strings.TrimSpace(string(text))}
	if len(text) > 0 && strings.HasPrefix(res.Header.Get("Content-Type"), "application/json") {
		if err := json.Unmarshal(text, &r.body); err != nil {
			a.Fatalf("%s %s: %q: %v", method, path, text, err)
		}
	}
	return r
}

// as sends a request with an owner's key.
func (a *apiTest) as(owner, method, path, body string) reply {
	a.Helper()
	return a.ask(method, path, body, "X-API-Key", owner)
}

// field returns a field of an answer by its path.
func (r reply) field(names ...string) any {
	at := r.body
	for _, n := range names {
		m, _ := at.(map[string]any)
		at = m[n]
	}
	return at
}

// create makes a sandbox and returns its id and token.
func (a *apiTest) create(owner, body string) (id, token string) {
	a.Helper()
	r := a.as(owner, "POST", "/v2/sandboxes", body)
	if r.code != http.StatusCreated {
		a.Fatalf("%d %s", r.code, r.text)
	}
	return fmt.Sprint(r.field("sandboxID")), fmt.Sprint(r.field("envdAccessToken"))
}

// TestControlPlane: statuses, bodies and headers as E2B's clients expect them (docs/protocol.md).
func TestControlPlane(t *testing.T) {
	a := newAPITest(t)
	first := a.as("ann", "POST", "/v2/sandboxes", `{"templateID":"base","metadata":{"k":"v"},"envVars":{"A":"1"},"timeout":62}`)
	if first.code != 201 || first.field("domain") != nil || first.field("trafficAccessToken") != nil ||
		first.field("envdVersion") != envd.Version {
		t.Fatalf("%d %s", first.code, first.text)
	}
	id := fmt.Sprint(first.field("sandboxID"))
	if !regexp.MustCompile(`^[a-z0-9]+$`).MatchString(id) {
		t.Error(id)
	}
	shared := a.as("ann", "POST", "/sandboxes",
		`{"templateID":"base","network":{"allowPublicTraffic":false,"denyOut":["0.0.0.0/0"],"allowOut":["example.com"]},`+
			`"autoPause":true,"autoResume":{"enabled":true}}`)
	if shared.code != 201 || shared.field("trafficAccessToken") == nil {
		t.Fatalf("%d %s", shared.code, shared.text)
	}
	second := fmt.Sprint(shared.field("sandboxID"))
	got := a.as("ann", "GET", "/sandboxes/"+second, "")
	for want, have := range map[any]any{"pause": got.field("lifecycle", "onTimeout"), true: got.field("lifecycle", "autoResume"),
		"running": got.field("state"), false: got.field("network", "allowPublicTraffic")} {
		if want != have {
			t.Errorf("%v is %v: %s", want, have, got.text)
		}
	}
	for _, test := range []struct {
		method, path, body string
		code               int
		want               string
	}{
		{"GET", "/sandboxes/" + id + "-client", "", 200, `"state":"running"`},
		{"GET", "/sandboxes/sbnothere", "", 404, `"code":404`},
		{"POST", "/v2/sandboxes", `{"templateID":"nothere"}`, 404, `"code":404,"message":"template 'nothere' not found"`},
		{"POST", "/v2/sandboxes", `{`, 400, `"code":400`},
		{"POST", "/v2/sandboxes", `{}`, 400, "templateID is missing"},
		{"POST", "/v2/sandboxes", `{"templateID":"base","timeout":-1}`, 400, "timeout is from 0"},
		{"POST", "/v2/sandboxes", `{"templateID":"base","timeout":9000000000000}`, 400, "timeout is from 0"},
		{"POST", "/v2/sandboxes", `{"templateID":"base","autoResume":{"enabled":true}}`, 400, "autoResume needs autoPause"},
		{"POST", "/v2/sandboxes", `{"templateID":"base","autoPauseMemory":false}`, 400,
			"autoPauseMemory=false only applies when autoPause is true"},
		{"POST", "/v2/sandboxes", `{"templateID":"base","volumeMounts":[{"name":"v","path":"/v"}]}`, 501, "volumes"},
		{"POST", "/v2/sandboxes", `{"templateID":"base","mcp":{"x":{}}}`, 501, "MCP"},
		{"POST", "/v2/sandboxes", `{"templateID":"base","network":{"allowOut":["example.com"]}}`, 400, "0.0.0.0/0"},
		{"POST", "/v2/sandboxes", `{"templateID":"base","network":{"denyOut":["example.com"]}}`, 400, "only addresses and ranges"},
		{"POST", "/v2/sandboxes", `{"templateID":"base","network":{"rules":{"x.com":[{"transform":{"headers":{"A":"b"}}}]}}}`, 501,
			"network.rules"},
		{"POST", "/v2/sandboxes", `{"templateID":"base","envVars":{"A=B":"x"}}`, 400, "environment variable"},
		{"POST", "/v2/sandboxes", strings.Repeat(" ", maxBody+1), 413, "more than"},
		{"GET", "/v2/sandboxes?state=gone", "", 400, "state is running or paused"},
		{"GET", "/v2/sandboxes?limit=101", "", 400, "limit is a number from 1 to 100"},
		{"GET", "/v2/sandboxes?order=up", "", 400, "order is asc or desc"},
		{"GET", "/v2/sandboxes?startedAfter=now", "", 400, "startedAfter"},
		{"GET", "/v2/sandboxes?metadata=%25zz", "", 400, "metadata"},
		{"GET", "/sandboxes?metadata=k%3Dv", "", 200, id},
		{"POST", "/sandboxes/" + id + "/timeout", `{"timeout":100}`, 204, ""},
		{"POST", "/sandboxes/" + id + "/timeout", ``, 400, "timeout is missing"},
		{"POST", "/sandboxes/" + id + "/refreshes", `{"duration":10}`, 204, ""},
		{"POST", "/sandboxes/" + id + "/refreshes", `{"duration":3601}`, 400, "duration"},
		{"PUT", "/sandboxes/" + id + "/network", `{"denyOut":["10.0.0.0/8"]}`, 204, ""},
		{"POST", "/v2/sandboxes/" + id + "/connect", ``, 200, id},
		{"POST", "/sandboxes/" + id + "/resume", `{}`, 409, `"code":409`},
		{"GET", "/sandboxes/" + id + "/metrics?start=2&end=1", "", 400, "before the start"},
		{"GET", "/sandboxes/" + id + "/metrics", "", 200, "["},
		{"GET", "/sandboxes/metrics?sandbox_ids=" + id + ",sbother", "", 200, `{"sandboxes":{`},
		{"GET", "/sandboxes/" + id + "/logs", "", 200, `"logEntries":[{`},
		{"GET", "/v2/sandboxes/" + id + "/logs?direction=backward&limit=1&level=info&search=running", "", 200, `"message":"running"`},
		{"GET", "/v2/sandboxes/" + id + "/logs?direction=up", "", 400, "direction"},
		{"POST", "/sandboxes/" + id + "/fork", `{"count":101}`, 400, "1 to 100"},
		{"POST", "/sandboxes/" + id + "/fork", `{"count":0}`, 400, "1 to 100"},
		{"POST", "/sandboxes/" + id + "/snapshots", `{"name":"Bad Name"}`, 400, "a name is"},
		{"POST", "/sandboxes/" + id + "/pause", `{}`, 204, ""},
		{"POST", "/sandboxes/" + id + "/pause", `{}`, 409, `"code":409`},
		{"GET", "/v2/sandboxes?state=paused", "", 200, `"state":"paused"`},
		{"POST", "/sandboxes/" + id + "/timeout", `{"timeout":100}`, 404, "connect to it first"},
		{"POST", "/sandboxes/" + id + "/refreshes", `{}`, 404, "connect to it first"},
		{"POST", "/v2/sandboxes/" + id + "/connect", `{"timeout":5}`, 201, id},
		{"GET", "/snapshots?limit=0", "", 400, "limit"},
		{"DELETE", "/templates/nothere%3Adefault", "", 404, `"code":404`},
		{"GET", "/templates/aliases/nothere", "", 404, `"code":404`},
		{"GET", "/templates", "", 200, "[]"},
		{"GET", "/teams", "", 200, `"teamID":"ann"`},
		{"POST", "/v3/templates", `{"name":"Bad Name"}`, 400, "a name is"},
		{"POST", "/v3/templates", `{"name":"a:"}`, 400, "a tag is empty"},
		{"POST", "/v3/templates", `{"name":"a","tags":[""]}`, 400, "a tag is empty"},
		{"POST", "/v3/templates", `{"name":"a","teamID":"bob"}`, 403, "is not that of your key"},
		{"GET", "/templates?teamID=bob", "", 403, "is not that of your key"},
		{"GET", "/templates?teamID=ann", "", 200, "[]"},
		{"POST", "/templates/tags", `{"target":"a","tags":[" "]}`, 400, "a tag is empty"},
		{"DELETE", "/templates/tags", `{"name":"a:","tags":["b"]}`, 400, "a tag is empty"},
		{"POST", "/v2/templates/x/builds/bdnothere", `{}`, 400, "malformed"},
		{"GET", "/templates/x/builds/bdnothere/status", "", 400, "malformed"},
		{"GET", "/templates/x/builds/bdnothere/logs", "", 400, "malformed"},
		{"POST", "/v2/templates/x/builds/2f7c0b3e-0000-4000-8000-0123456789ab", `{}`, 404, "no such build"},
		{"GET", "/templates/x/builds/2f7c0b3e-0000-4000-8000-0123456789ab/status", "", 404, "no such build"},
		{"GET", "/templates/x/files/..%2f..", "", 400, "not a hash"},
		{"POST", "/templates", `{"alias":"a"}`, 400, "give a dockerfile"},
		{"POST", "/templates/a", `{"dockerfile":"FROM x","teamID":"bob"}`, 403, "is not that of your key"},
		{"POST", "/templates/a/builds/bdnothere", "", 400, "malformed"},
		{"PUT", "/sandboxes/" + id, "", 404, "there is no PUT"},
		{"GET", "/sandboxes/" + id + "/nothere", "", 404, "there is no GET"},
		{"GET", "/volumes", "", 501, `"code":501`},
		{"POST", "/secrets", "{}", 501, `"code":501`},
		{"DELETE", "/sandboxes/" + id, "", 204, ""},
		{"DELETE", "/sandboxes/" + id, "", 404, `"code":404`},
		{"GET", "/sandboxes/" + id, "", 404, `"code":404`},
		{"GET", "/sandboxes/" + id + "/logs", "", 200, "killed by request"},
	} {
		r := a.as("ann", test.method, test.path, test.body)
		if r.code != test.code || !strings.Contains(r.text, test.want) {
			t.Errorf("%s %s %.80s: %d %.300s, want %d %s", test.method, test.path, test.body, r.code, r.text, test.code, test.want)
		}
		if r.code >= 400 && (r.field("code") != float64(r.code) || r.field("message") == "") {
			t.Errorf("%s %s: the error has not its form: %s", test.method, test.path, r.text)
		}
		if r.text == "" && r.code != 204 && r.header.Get("Content-Length") != "0" {
			t.Errorf("%s %s: no body, and no word of it", test.method, test.path)
		}
	}
	if r := a.ask("GET", "/sandboxes", ""); r.code != 401 || r.field("code") != 401. {
		t.Errorf("without a key: %d %s", r.code, r.text)
	}
	if r := a.ask("GET", "/sandboxes", "", "X-API-Key", "ann", "User-Agent", "e2b-js-sdk/0.16.1"); r.code != 400 ||
		!strings.Contains(r.text, "too old") {
		t.Errorf("an SDK of another protocol: %d %s", r.code, r.text)
	}
	a.control.MayAsk = func(string) bool { return false }
	if r := a.as("ann", "GET", "/sandboxes", ""); r.code != 429 || r.header.Get("Retry-After") != "1" {
		t.Errorf("too many requests: %d %v", r.code, r.header)
	}
}

// TestPages: every sandbox is on exactly one page, whatever is made and ended between two pages.
func TestPages(t *testing.T) {
	a := newAPITest(t)
	var made []string
	for range 7 {
		id, _ := a.create("ann", `{"templateID":"base"}`)
		made = append(made, id)
	}
	a.create("bob", `{"templateID":"base"}`)
	for _, order := range []string{"asc", "desc"} {
		var seen []string
		token := ""
		for n := 0; ; n++ {
			r := a.as("ann", "GET", "/v2/sandboxes?limit=3&order="+order+"&nextToken="+url.QueryEscape(token), "")
			for _, one := range r.body.([]any) {
				seen = append(seen, fmt.Sprint(one.(map[string]any)["sandboxID"]))
			}
			if n == 0 {
				a.as("ann", "DELETE", "/sandboxes/"+seen[2], "") // the one that ended the page
			}
			if token = r.header.Get("X-Next-Token"); token == "" {
				break
			}
		}
		want := slices.Clone(made)
		if order == "desc" {
			slices.Reverse(want)
		}
		if !slices.Equal(seen, want) {
			t.Errorf("%s: %v, want %v", order, seen, want)
		}
		made = slices.DeleteFunc(made, func(id string) bool { return id == seen[2] })
	}
	other := a.as("ann", "GET", "/v2/sandboxes?limit=1", "").header.Get("X-Next-Token")
	if last := ""; cursor.Decode("api-sandboxes", other, &last) != nil {
		t.Errorf("%s is not of the list, but of what the client has called it", other)
	}
	for path, want := range map[string]int{"/v2/sandboxes?nextToken=" + other: 200, "/v2/templates?nextToken=" + other: 400,
		"/v2/sandboxes?nextToken=x": 400, "/snapshots?nextToken=" + url.QueryEscape("1767225600000000000.snapshot"): 400} {
		if r := a.as("ann", "GET", path, ""); r.code != want {
			t.Errorf("%s: %d %s, want %d", path, r.code, r.text, want)
		}
	}
}

// TestNobodyElses: on every path, what belongs to another owner is answered in the words of what does not exist.
func TestNobodyElses(t *testing.T) {
	a := newAPITest(t)
	id, token := a.create("ann", `{"templateID":"base","autoPause":true,"autoResume":{"enabled":true}}`)
	if r := a.as("ann", "POST", "/sandboxes/"+id+"/snapshots", `{"name":"anns"}`); r.code != 201 {
		t.Fatal(r.text)
	}
	build := a.as("ann", "POST", "/v3/templates", `{"name":"annt"}`)
	bid := fmt.Sprint(build.field("buildID"))
	missing := "sb" + strings.Repeat("a", 20)
	mine := map[string]string{missing: id, "nothere": "anns", "bdaaaaaaaaaaaaaaaa": bid}
	for pattern := range a.control.Routes() {
		method, path, ok := strings.Cut(pattern, " ")
		if !ok || !strings.Contains(path, "{") || strings.HasPrefix(pattern, "PUT /templates") {
			continue
		}
		ask := func(sandboxID, name, build string) reply {
			what := sandboxID
			if strings.Contains(path, "/templates/") {
				what = name
			}
			p := strings.NewReplacer("{id}", what, "{hash}", strings.Repeat("a", 64), "{bid}", build, "{what}", "tags", "{name}", name,
				"{port}", "80", "{path...}", "health").Replace(path)
			r := a.as("bob", method, p, `{"timeout":1,"tags":["x"],"target":"anns"}`)
			r.text = strings.NewReplacer(sandboxID, "ID", name, "NAME", build, "BUILD").Replace(r.text)
			return r
		}
		theirs, none := ask(mine[missing], mine["nothere"], mine["bdaaaaaaaaaaaaaaaa"]), ask(missing, "nothere", "bdaaaaaaaaaaaaaaaa")
		if strings.Contains(pattern, "/files/") { // the same answer for every name: uploads belong to the caller
			theirs.text, none.text = "", ""
		}
		if theirs.code != none.code || theirs.text != none.text || theirs.code < 400 && !strings.Contains(pattern, "/files/") &&
			!strings.Contains(pattern, "/context/") {
			t.Errorf("%s: %d %s, and of what is missing %d %s", pattern, theirs.code, theirs.text, none.code, none.text)
		}
	}
	for _, path := range []string{"/v2/sandboxes", "/sandboxes", "/snapshots", "/templates", "/sandboxes/metrics?sandbox_ids=" + id} {
		if r := a.as("bob", "GET", path, ""); r.code != 200 || strings.Contains(r.text, id) || strings.Contains(r.text, "anns") {
			t.Errorf("%s: %d %s", path, r.code, r.text)
		}
	}
	if r := a.as("bob", "POST", "/v2/sandboxes", `{"templateID":"anns:default"}`); r.code != 404 {
		t.Errorf("%d %s", r.code, r.text)
	}
	if r := a.as("ann", "GET", "/sandboxes/"+id, ""); r.field("state") != "running" {
		t.Error(r.text)
	}

	// The sandbox's inside: only its own token or a signature gives access.
	_, foreign := a.create("bob", `{"templateID":"base"}`)
	host := fmt.Sprintf("%d-%s.%s", envd.Port, id, testDomain)
	for _, headers := range [][]string{
		{}, {envd.AccessHeader, foreign}, {envd.AccessHeader, "ann"}, {envd.AccessHeader, ""},
		{envd.AccessHeader, token, envd.AccessHeader, token}, {"X-API-Key", "ann"},
		{"Authorization", "Bearer " + token}, {TrafficHeader, token}, {SandboxHeader, id, PortHeader, "49983", envd.AccessHeader, foreign},
	} {
		for _, path := range []string{processconnect.ProcessListProcedure, processconnect.ProcessStartProcedure,
			filesystemconnect.FilesystemStatProcedure, "/files?path=/etc/passwd", "/metrics", "/envs", "/files/compose", "/init"} {
			r := a.ask("POST", path, "{}", append([]string{"Host", host}, headers...)...)
			want := 401.
			if path == "/init" { // this path exists for no client
				want = 404
			}
			if float64(r.code) != want || r.field("code") != want {
				t.Errorf("%s with %v: %d %s", path, headers, r.code, r.text)
			}
		}
	}
	if r := a.ask("POST", processconnect.ProcessListProcedure, "{}", "Host", host, envd.AccessHeader, token); r.code != 200 {
		t.Errorf("%d %s", r.code, r.text)
	}
	for _, path := range []string{"/init", "/freeze", "/unfreeze", "/upgrade", "/collapse", "/fsfreeze"} {
		if r := a.ask("POST", path, "{}", "Host", host, envd.AccessHeader, token); r.code != 404 {
			t.Errorf("%s: %d", path, r.code)
		}
	}
}

// TestHosts: a host that names a sandbox takes precedence over headers; headers count only on this machine's own names.
func TestHosts(t *testing.T) {
	a := newAPITest(t)
	id, token := a.create("ann", `{"templateID":"base"}`)
	other, _ := a.create("bob", `{"templateID":"base"}`)
	for _, test := range []struct {
		host    string
		headers []string
		code    int
		want    string
	}{
		{"49983-" + id + "." + testDomain, nil, 200, ""},
		{"49983-" + id + "-client." + testDomain + ":8080", nil, 200, ""},
		{"49983-" + strings.ToUpper(id) + "." + strings.ToUpper(testDomain) + ".", nil, 200, ""},
		{"49983-" + id + "." + testDomain, []string{SandboxHeader, other, PortHeader, "80"}, 200, ""},
		{"49983-" + other + "." + testDomain, []string{SandboxHeader, id, PortHeader, "49983"}, 401, ""},
		{"sandbox." + testDomain, []string{SandboxHeader, id, PortHeader, "49983"}, 200, ""},
		{"localhost:1", []string{SandboxHeader, id, PortHeader, "49983"}, 200, ""},
		{"127.0.0.1", []string{SandboxHeader, id}, 200, ""},
		{"[::1]:80", []string{SandboxHeader, id + "-client", PortHeader, "49983"}, 200, ""},
		{"evil.example", []string{SandboxHeader, id, PortHeader, "49983"}, 404, ""},
		{"api." + testDomain, []string{SandboxHeader, id, PortHeader, "49983"}, 404, ""},
		{testDomain, []string{SandboxHeader, id, PortHeader, "49983"}, 404, ""},
		{"localhost", []string{SandboxHeader, id, SandboxHeader, other}, 400, "Invalid sandbox ID"},
		{"localhost", []string{SandboxHeader, "../" + id}, 400, "Invalid sandbox ID"},
		{"localhost", []string{SandboxHeader, id, PortHeader, "049983"}, 400, ""},
		{"localhost", []string{SandboxHeader, id, PortHeader, "65536"}, 400, ""},
		{"49983-" + id + ".x." + testDomain, nil, 400, "Invalid sandbox ID"},
		{"49983." + testDomain, nil, 400, "Invalid sandbox ID"},
		{"x-" + id + "." + testDomain, nil, 400, ""},
		{"+49983-" + id + "." + testDomain, nil, 400, ""},
		{"49983-sbnothere." + testDomain, nil, 502, `"message":"The sandbox was not found","code":502`},
		{"8000-" + id + "." + testDomain, nil, 502, `"message":"The sandbox is running but port is not open"`},
	} {
		r := a.ask("POST", processconnect.ProcessListProcedure, "{}",
			append([]string{"Host", test.host, envd.AccessHeader, token}, test.headers...)...)
		if r.code != test.code || !strings.Contains(r.text, test.want) {
			t.Errorf("%s %v: %d %s, want %d %s", test.host, test.headers, r.code, r.text, test.code, test.want)
		}
	}
	if r := a.ask("GET", "/", "", "Host", "8000-"+id+"."+testDomain, "User-Agent", "Mozilla/5.0"); !strings.HasPrefix(r.text, "<html") {
		t.Errorf("a browser gets %s", r.text)
	}
}

// TestSignedURLs: a signature is valid for one operation on one file as one user, until its time.
func TestSignedURLs(t *testing.T) {
	if got := envd.Sign("hello.txt", envd.OpRead, "user", "0tQG31xiMp0IOQfaz9dcwi72L1CPo8e0",
		time.Time{}); got != "v1_gUtH/s9YCJWgCizjfUxuWfhFE4QSydOWEIIvfLwDr6E" {
		t.Fatal(got)
	}
	a := newAPITest(t)
	id, token := a.create("ann", `{"templateID":"base"}`)
	host := fmt.Sprintf("%d-%s.%s", envd.Port, id, testDomain)
	file := t.TempDir() + "/a b.txt"
	if err := os.WriteFile(file, []byte("0123456789"), 0o600); err != nil {
		t.Fatal(err)
	}
	soon := time.Now().Add(time.Minute)
	good := envd.SignedQuery(file, envd.OpRead, "", token, soon)
	if r := a.ask("GET", "/files?"+good.Encode(), "", "Host", host); r.code != 200 || r.text != "0123456789" {
		t.Fatalf("%d %s", r.code, r.text)
	}
	with := func(change func(url.Values)) string {
		q := url.Values{}
		for k, v := range good {
			q[k] = slices.Clone(v)
		}
		change(q)
		return q.Encode()
	}
	for want, queries := range map[string][]string{
		"invalid signature": {
			with(func(q url.Values) { q.Set("path", file+"/") }), with(func(q url.Values) { q.Set("path", "/"+file) }),
			with(func(q url.Values) { q.Set("path", strings.Replace(file, "/a", "/./a", 1)) }),
			with(func(q url.Values) { q.Set("path", "/etc/passwd") }), with(func(q url.Values) { q.Add("path", "/etc/passwd") }),
			with(func(q url.Values) { q.Set("username", "root") }),
			with(func(q url.Values) { q.Set("signature_expiration", fmt.Sprint(soon.Unix()+1)) }),
			with(func(q url.Values) { q.Del("signature_expiration") }),
			with(func(q url.Values) { q.Set("signature_expiration", "0"+q.Get("signature_expiration")) }),
			with(func(q url.Values) { q.Set("signature_expiration", "+"+q.Get("signature_expiration")) }),
			with(func(q url.Values) { q.Set("signature", q.Get("signature")+"=") }),
			with(func(q url.Values) { q.Set("signature", "v2"+q.Get("signature")[2:]) }),
			envd.SignedQuery(file+":write:0", envd.OpRead, "", token, soon).Encode() + "&username=0:read:",
			envd.SignedQuery(file, envd.OpWrite, "", token, soon).Encode(), envd.SignedQuery(file, envd.OpRead, "", "", soon).Encode(),
			envd.SignedQuery(file, envd.OpRead, "", "x"+token, soon).Encode(),
		},
		"signature is already expired": {envd.SignedQuery(file, envd.OpRead, "", token, time.Now().Add(-time.Second)).Encode()},
		"missing signature query parameter": {"path=" + url.QueryEscape(file), with(func(q url.Values) { q.Set("signature", "") }),
			with(func(q url.Values) { q.Add("signature", "x") })},
	} {
		for _, q := range queries {
			if r := a.ask("GET", "/files?"+q, "", "Host", host); r.code != 401 || r.field("message") != want {
				t.Errorf("%s: %d %s, want %s", q, r.code, r.text, want)
			}
		}
	}
	for _, path := range []string{"//files?", "/files/?", "/./files?", "/%66iles/compose?"} {
		if r := a.ask("GET", path+good.Encode(), "", "Host", host); r.code == 200 {
			t.Errorf("%s: %d %s", path, r.code, r.text)
		}
	}
	if r := a.ask("POST", "/files?"+good.Encode(), "", "Host", host); r.code != 401 {
		t.Errorf("a read writes: %d", r.code)
	}
	other, _ := a.create("ann", `{"templateID":"base"}`)
	if r := a.ask("GET", "/files?"+good.Encode(), "", "Host", fmt.Sprintf("%d-%s.%s", envd.Port, other, testDomain)); r.code != 401 {
		t.Errorf("another sandbox' file: %d", r.code)
	}
	if r := a.ask("GET", "/files?"+good.Encode(), "", "Host", host, "Range", "bytes=2-4"); r.code != 206 || r.text != "234" ||
		r.header.Get("Content-Range") != "bytes 2-4/10" {
		t.Errorf("%d %s %v", r.code, r.text, r.header)
	}
	write := envd.SignedQuery(file, envd.OpWrite, "", token, soon).Encode()
	if r := a.ask("POST", "/files?"+write, "new", "Host", host, "Content-Type", "application/octet-stream"); r.code != 400 &&
		r.code != 200 {
		t.Errorf("%d %s", r.code, r.text)
	}
}

// TestDocs: docs/e2b.md and docs/api.md list everything that is served, and nothing else.
func TestDocs(t *testing.T) {
	var text []byte
	for _, name := range []string{"../docs/e2b.md", "../docs/api.md"} {
		part, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		text = append(text, part...)
	}
	a := newAPITest(t)
	var served []string
	for pattern := range a.control.Routes() {
		if strings.Contains(pattern, " ") {
			served = append(served, pattern)
		}
	}
	for _, p := range []string{processconnect.ProcessListProcedure, processconnect.ProcessConnectProcedure,
		processconnect.ProcessStartProcedure, processconnect.ProcessUpdateProcedure,
		processconnect.ProcessStreamInputProcedure, processconnect.ProcessSendInputProcedure, processconnect.ProcessSendSignalProcedure,
		processconnect.ProcessCloseStdinProcedure,
		filesystemconnect.FilesystemStatProcedure, filesystemconnect.FilesystemMakeDirProcedure, filesystemconnect.FilesystemMoveProcedure,
		filesystemconnect.FilesystemListDirProcedure,
		filesystemconnect.FilesystemRemoveProcedure, filesystemconnect.FilesystemWatchDirProcedure,
		filesystemconnect.FilesystemCreateWatcherProcedure,
		filesystemconnect.FilesystemGetWatcherEventsProcedure, filesystemconnect.FilesystemRemoveWatcherProcedure} {
		served = append(served, "POST "+p)
	}
	served = append(served, "GET /v1/sandboxes/{id}/files", "POST /v1/sandboxes/{id}/files") // in addition to the control plane
	served = append(served, "GET /health", "GET /metrics", "GET /envs", "POST /init", "GET /files", "POST /files", "POST /files/compose")
	listed := map[string]bool{}
	for _, m := range regexp.MustCompile("(?m)^\\| `([A-Z]+ /[^`]*)`").FindAllStringSubmatch(string(text), -1) {
		listed[m[1]] = true
	}
	for _, s := range served {
		if !listed[s] {
			t.Errorf("%s is not in docs/e2b.md", s)
		}
		delete(listed, s)
	}
	for l := range listed {
		t.Errorf("%s is in docs/e2b.md and not served", l)
	}
}

// TestHealthWakesNobody: a health check without the token of a sandbox that is not public does not wake it.
func TestHealthWakesNobody(t *testing.T) {
	a := newAPITest(t)
	id, token := a.create("ann",
		`{"templateID":"base","autoPause":true,"autoResume":{"enabled":true},"network":{"allowPublicTraffic":false}}`)
	if r := a.as("ann", "POST", "/sandboxes/"+id+"/pause", "{}"); r.code != 204 {
		t.Fatal(r.text)
	}
	host := fmt.Sprintf("%d-%s.%s", envd.Port, id, testDomain)
	if r := a.ask("GET", "/health", "", "Host", host); r.code != 502 ||
		a.as("ann", "GET", "/sandboxes/"+id, "").field("state") != "paused" {
		t.Errorf("%d %s", r.code, r.text)
	}
	if r := a.ask("GET", "/health", "", "Host", host, envd.AccessHeader, token); r.code != 204 ||
		a.as("ann", "GET", "/sandboxes/"+id, "").field("state") != "running" {
		t.Errorf("%d %s", r.code, r.text)
	}
}

// TestCompose: files are joined and removed, but the result stays, even if a source names it by another path.
func TestCompose(t *testing.T) {
	a := newAPITest(t)
	id, token := a.create("ann", `{"templateID":"base"}`)
	dir := t.TempDir()
	if err := errors.Join(os.Mkdir(dir+"/d", 0o700), os.Symlink("d", dir+"/l"), os.WriteFile(dir+"/d/x", []byte("one "), 0o600),
		os.WriteFile(dir+"/d/y", []byte("two"), 0o600)); err != nil {
		t.Fatal(err)
	}
	compose := func(body string) reply {
		return a.ask("POST", "/files/compose", body, "Host", fmt.Sprintf("%d-%s.%s", envd.Port, id, testDomain), envd.AccessHeader, token)
	}
	if r := compose(fmt.Sprintf(`{"source_paths":["%[1]s/l/x","%[1]s/d/y"],"destination":"%[1]s/d/x"}`, dir)); r.code != 200 ||
		r.field("name") != "x" {
		t.Fatalf("%d %s", r.code, r.text)
	}
	if body, err := os.ReadFile(dir + "/d/x"); err != nil || string(body) != "one two" {
		t.Errorf("%q %v", body, err)
	}
	if _, err := os.Stat(dir + "/d/y"); err == nil {
		t.Error("a source is left")
	}
	if r := compose(fmt.Sprintf(`{"source_paths":["%[1]s/none"],"destination":"%[1]s/z"}`, dir)); r.code != 404 ||
		!strings.Contains(r.text, "none") {
		t.Errorf("%d %s", r.code, r.text)
	}
	for _, bad := range []string{`{`, `{"source_paths":[],"destination":"/x"}`, `{"source_paths":["` + dir + `"],"destination":"/x"}`} {
		if r := compose(bad); r.code != 400 {
			t.Errorf("%s: %d %s", bad, r.code, r.text)
		}
	}
}

// TestWatchersAreASandbox: one owner's watchers do not use up another's.
func TestWatchersAreASandbox(t *testing.T) {
	a := newAPITest(t)
	dir := t.TempDir()
	watch := func(id, token string) reply {
		return a.ask("POST", filesystemconnect.FilesystemCreateWatcherProcedure, `{"path":"`+dir+`"}`, "Host",
			fmt.Sprintf("%d-%s.%s", envd.Port, id, testDomain), envd.AccessHeader, token)
	}
	id, token := a.create("ann", `{"templateID":"base"}`)
	for i := range 65 {
		if r := watch(id, token); (r.code == 200) != (i < 64) {
			t.Fatalf("%d: %d %s", i, r.code, r.text)
		}
	}
	other, theirs := a.create("bob", `{"templateID":"base"}`)
	r := watch(other, theirs)
	if r.code != 200 {
		t.Errorf("%d %s", r.code, r.text)
	}
	poll := func(id, token string) reply {
		return a.ask("POST", filesystemconnect.FilesystemGetWatcherEventsProcedure, fmt.Sprintf(`{"watcherId":"%v"}`, r.field("watcherId")),
			"Host", fmt.Sprintf("%d-%s.%s", envd.Port, id, testDomain), envd.AccessHeader, token)
	}
	if r := poll(id, token); r.code != 404 {
		t.Errorf("another's watcher: %d %s", r.code, r.text)
	}
	if err := os.WriteFile(dir+"/new", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	sandboxtest.Eventually(t, "it is told", func() bool { return strings.Contains(poll(other, theirs).text, `"name":"new"`) })
}

// TestOnlyLargeBodiesAreCounted: SDKs may send any number of small bodies of unknown length at once.
func TestOnlyLargeBodiesAreCounted(t *testing.T) {
	a := newAPITest(t)
	asked := 0
	a.control.MayRead = func(string, int64) (func(), bool) { asked++; return nil, false }
	a.create("ann", `{"templateID":"base"}`)
	if asked != 0 {
		t.Errorf("a small body was asked for %d times", asked)
	}
	if r := a.as("ann", "POST", "/sandboxes", `{"templateID":"base"}`+strings.Repeat(" ", freeBody)); r.code != 429 ||
		r.header.Get("Retry-After") == "" {
		t.Errorf("%d %s", r.code, r.text)
	}
}

// TestSnapshotsOfOthers: a sandbox can begin from snapshots of MCP clients, whose sandboxes have no network, as from any other.
func TestSnapshotsOfOthers(t *testing.T) {
	a := newAPITest(t)
	sb, err := a.m.Create(t.Context(), sandbox.CreateOptions{Owner: "ann"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := sb.Snapshot(t.Context(), sandbox.SnapshotOptions{Name: "theirs"}); err != nil {
		t.Fatal(err)
	}
	for body, want := range map[string]int{`{"templateID":"theirs"}`: 201, `{"templateID":"theirs","allow_internet_access":false}`: 201,
		`{"templateID":"theirs","allow_internet_access":true}`: 400} {
		if r := a.as("ann", "POST", "/v2/sandboxes", body); r.code != want {
			t.Errorf("%s: %d %s", body, r.code, r.text)
		}
	}
	if r := a.as("ann", "PUT", "/sandboxes/"+sb.ID()+"/network", `{}`); r.code != 400 ||
		!strings.Contains(r.text, "made without a network") {
		t.Errorf("%d %s", r.code, r.text)
	}
}

// TestOldBuild: a Dockerfile that comes with the announcement, as clients before build system 2.0 send it, is built.
func TestOldBuild(t *testing.T) {
	a := newAPITest(t)
	for path, name := range map[string]string{"/templates": "^[a-z0-9]{20}$", "/templates/old": "^old$"} {
		r := a.as("ann", "POST", path, `{"dockerfile":"FROM nothere"}`)
		if r.code != 202 || !regexp.MustCompile(name).MatchString(fmt.Sprint(r.field("templateID"))) {
			t.Fatalf("%s: %d %s", path, r.code, r.text)
		}
		build := fmt.Sprintf("/templates/%v/builds/%v", r.field("templateID"), r.field("buildID"))
		if r := a.as("bob", "POST", build, ""); r.code != 404 {
			t.Errorf("%d %s", r.code, r.text)
		}
		if r := a.as("ann", "POST", build, ""); r.code != 202 {
			t.Errorf("%d %s", r.code, r.text)
		}
		sandboxtest.Eventually(t, "it has failed", func() bool {
			return strings.Contains(a.as("ann", "GET", build+"/status", "").text, "nothere")
		})
		last := fmt.Sprintf("/v1/templates/%v/builds/last", r.field("templateID"))
		if l := a.as("ann", "GET", last, ""); l.code != 200 || l.field("build") != r.field("buildID") {
			t.Errorf("the last build is not found: %d %s", l.code, l.text)
		}
		if l := a.as("bob", "GET", last, ""); l.code != 404 {
			t.Errorf("%d %s", l.code, l.text)
		}
	}
	r := a.as("ann", "POST", "/v3/templates", `{"name":"new"}`)
	if r := a.as("ann", "POST", fmt.Sprintf("/templates/new/builds/%v", r.field("buildID")), ""); r.code != 400 ||
		!strings.Contains(r.text, "/v2/") {
		t.Errorf("%d %s", r.code, r.text)
	}
}

// TestBuildsAreBounded: announced builds are counted, and failed ones are not kept for long.
func TestBuildsAreBounded(t *testing.T) {
	a := newAPITest(t)
	announce := func() reply { return a.as("ann", "POST", "/v3/templates", `{"name":"t"}`) }
	large, err := json.Marshal(map[string]any{"fromImage": "nothere",
		"steps": []map[string]any{{"type": "RUN", "args": []string{strings.Repeat("x", 1<<20)}}}})
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		r := announce()
		id := fmt.Sprint(r.field("buildID"))
		if r := a.as("ann", "POST", "/v2/templates/t/builds/"+id, string(large)); r.code != 202 {
			t.Fatal(r.text)
		}
		if r := a.as("ann", "POST", "/v2/templates/t/builds/"+id, `{}`); r.code != 409 {
			t.Errorf("%d %s", r.code, r.text)
		}
		sandboxtest.Eventually(t, "it has failed", func() bool {
			return a.as("ann", "GET", "/templates/t/builds/"+id+"/status", "").field("status") == string(template.BuildFailed)
		})
	}
	const waiting = 64 // as docs/limits.md says
	for i := range waiting + 1 {
		if r := announce(); (r.code == 202) != (i < waiting) || i == waiting && r.code != 429 {
			t.Fatalf("%d: %d %s", i, r.code, r.text)
		}
	}
	for _, body := range []string{`{"name":"t","memoryMB":17592186044417}`, `{"name":"t","cpuCount":1000000000}`,
		`{"name":"t","minFreeDiskMb":-1}`} {
		if r := a.as("bob", "POST", "/v3/templates", body); r.code != 400 {
			t.Errorf("%s: %d %s", body, r.code, r.text)
		}
	}
}
