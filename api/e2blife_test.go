package api

import (
	"fmt"
	"runtime"
	"strings"
	"testing"
	"time"

	"soulbox.dev/soulbox/api/envd"
	"soulbox.dev/soulbox/internal/sandboxtest"
)

// waiting counts the goroutines that are in a function.
func waiting(function string) int {
	stacks := make([]byte, 4<<20)
	n := 0
	for _, one := range strings.Split(string(stacks[:runtime.Stack(stacks, true)]), "\n\n") {
		if strings.Contains(one, function+"(") {
			n++
		}
	}
	return n
}

// TestPausesAtOnce: a pause of a sandbox that is being paused waits and succeeds; a connect resumes the sandbox afterwards. A pause of a
// paused sandbox is refused, as E2B does.
func TestPausesAtOnce(t *testing.T) {
	fake := &sandboxtest.Fake{HangSave: make(chan struct{})}
	a := newAPITestOn(t, fake)
	id, _ := a.create("ann", `{"templateID":"base"}`)
	ask := func(path string) chan int {
		code := make(chan int, 1)
		go func() { code <- a.as("ann", "POST", path, "{}").code }()
		return code
	}
	first := ask("/sandboxes/" + id + "/pause")
	fake.HangSave <- struct{}{}
	second, third := ask("/sandboxes/"+id+"/pause"), ask("/sandboxes/"+id+"/pause")
	sandboxtest.Eventually(t, "both wait", func() bool { return waiting("sandbox.(*Sandbox).takeTurn") == 2 })
	close(fake.HangSave)
	for i, code := range []chan int{first, second, third} {
		if got := <-code; got != 204 {
			t.Errorf("pause %d: %d", i, got)
		}
	}
	if r := a.as("ann", "POST", "/sandboxes/"+id+"/pause", "{}"); r.code != 409 {
		t.Errorf("once more: %d %s", r.code, r.text)
	}
	if r := a.as("ann", "POST", "/v2/sandboxes/"+id+"/connect", "{}"); r.code != 201 {
		t.Errorf("connect: %d %s", r.code, r.text)
	}
}

// TestConnectWhilePausing: a client that connects to a sandbox that is being paused finds it running.
func TestConnectWhilePausing(t *testing.T) {
	for path, want := range map[string]int{"/v2/sandboxes/%s/connect": 201, "/sandboxes/%s/resume": 201} {
		fake := &sandboxtest.Fake{HangSave: make(chan struct{})}
		a := newAPITestOn(t, fake)
		id, _ := a.create("ann", `{"templateID":"base"}`)
		paused, connected := make(chan int, 1), make(chan int, 1)
		go func() { paused <- a.as("ann", "POST", "/sandboxes/"+id+"/pause", "{}").code }()
		fake.HangSave <- struct{}{}
		go func() { connected <- a.as("ann", "POST", fmt.Sprintf(path, id), "{}").code }()
		sandboxtest.Eventually(t, "it waits", func() bool { return waiting("sandbox.(*Sandbox).Settle") == 1 })
		close(fake.HangSave)
		if p, c := <-paused, <-connected; p != 204 || c != want {
			t.Errorf("%s: %d %d", path, p, c)
		}
		if state := a.as("ann", "GET", "/sandboxes/"+id, "").field("state"); state != "running" {
			t.Errorf("%s: it is %v", path, state)
		}
	}
}

// TestTrafficWakes: a request that wakes a sandbox gives it the life with which it was made. A health check wakes none. A sandbox that was
// saved without memory is resumed only by clients that ask for that.
func TestTrafficWakes(t *testing.T) {
	a := newAPITest(t)
	id, token := a.create("ann", `{"templateID":"base","timeout":7200,"autoPause":true,"autoResume":{"enabled":true}}`)
	host := fmt.Sprintf("%d-%s.%s", envd.Port, id, testDomain)
	state := func() any { return a.as("ann", "GET", "/sandboxes/"+id, "").field("state") }
	pause := func(body string) {
		t.Helper()
		if r := a.as("ann", "POST", "/sandboxes/"+id+"/pause", body); r.code != 204 {
			t.Fatal(r.text)
		}
	}
	if r := a.as("ann", "POST", "/sandboxes/"+id+"/timeout", `{"timeout":60}`); r.code != 204 {
		t.Fatal(r.text)
	}
	pause("{}")
	if r := a.ask("GET", "/health", "", "Host", host); r.code != 502 || state() != "paused" {
		t.Errorf("health: %d %s, %v", r.code, r.text, state())
	}
	if r := a.inside(id, token, "GET", "/envs", ""); r.code != 200 || state() != "running" {
		t.Errorf("a call: %d %s, %v", r.code, r.text, state())
	}
	end, err := time.Parse(time.RFC3339, fmt.Sprint(a.as("ann", "GET", "/sandboxes/"+id, "").field("endAt")))
	if left := time.Until(end); err != nil || left < 7100*time.Second || left > 7200*time.Second {
		t.Errorf("it has %s left, %v", left, err)
	}
	pause(`{"memory":false}`)
	if r := a.inside(id, token, "GET", "/envs", ""); r.code != 502 || state() != "paused" {
		t.Errorf("files alone: %d %s, %v", r.code, r.text, state())
	}
	if r := a.ask("GET", "/", "", "Host", fmt.Sprintf("8000-%s.%s", id, testDomain)); r.code != 502 || state() != "paused" {
		t.Errorf("files alone, by a port: %d %s, %v", r.code, r.text, state())
	}
	if r := a.as("ann", "POST", "/v2/sandboxes/"+id+"/connect", `{}`); r.code != 201 || state() != "running" {
		t.Errorf("connect: %d %s, %v", r.code, r.text, state())
	}
}

// TestNetworkAsGiven: a client gets its network back in its own words, and "*" is every name.
func TestNetworkAsGiven(t *testing.T) {
	a := newAPITest(t)
	for _, test := range []struct{ allow, deny string }{{`["8.8.8.8"]`, `["0.0.0.0/0"]`}, {`["*"]`, `["8.8.8.8"]`}, {`["*"]`, ``},
		{`["1.1.1.1"]`, ``}, {`["*","A.example"]`, `["0.0.0.0/0"]`}, {``, `["10.1.2.3/8","8.8.8.8"]`}} {
		body, want := "", ""
		for name, list := range map[string]string{"allowOut": test.allow, "denyOut": test.deny} {
			if list != "" {
				body += fmt.Sprintf(`,"%s":%s`, name, list)
			}
		}
		for _, list := range []string{test.allow, test.deny} {
			want += list + " "
		}
		id, _ := a.create("ann", `{"templateID":"base","network":{"maskRequestHost":"h"`+body+`}}`)
		got := ""
		r := a.as("ann", "GET", "/sandboxes/"+id, "")
		for _, name := range []string{"allowOut", "denyOut"} {
			if list, ok := r.field("network", name).([]any); ok {
				got += strings.ReplaceAll(fmt.Sprintf("%q", list), " ", ",")
			}
			got += " "
		}
		if got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
	if r := a.as("ann", "POST", "/v2/sandboxes",
		`{"templateID":"base","network":{"allowOut":["a b"],"denyOut":["0.0.0.0/0"]}}`); r.code != 400 {
		t.Errorf("%d %s", r.code, r.text)
	}
}

// TestInsecure: a sandbox that is made without a token needs none if the operator allows that, and has one otherwise; paths for the
// operator alone are not served.
func TestInsecure(t *testing.T) {
	a := newAPITest(t)
	make := func(body string) (string, string) {
		t.Helper()
		r := a.as("ann", "POST", "/sandboxes", `{"templateID":"base","autoPause":true,"autoResume":{"enabled":true}`+body+`}`)
		token, _ := r.field("envdAccessToken").(string)
		if r.code != 201 {
			t.Fatal(r.text)
		}
		return fmt.Sprint(r.field("sandboxID")), token
	}
	asked := func(id, method, path string) int {
		return a.ask(method, path, "", "Host", fmt.Sprintf("%d-%s.%s", envd.Port, id, testDomain)).code
	}
	id, token := make(`,"secure":false`)
	if token == "" || asked(id, "GET", "/envs") != 401 {
		t.Errorf("it is not allowed, and there is a sandbox without a token: %q", token)
	}
	a.gateway.Insecure = true
	if asked(id, "GET", "/envs") != 401 {
		t.Error("a sandbox that was told its token needs none")
	}
	for _, body := range []string{"", `,"secure":true`} {
		if id, token := make(body); token == "" || asked(id, "GET", "/envs") != 401 {
			t.Errorf("%q: no token", body)
		}
	}
	id, token = make(`,"secure":false`)
	if got := a.as("ann", "GET", "/sandboxes/"+id, ""); token != "" || got.field("envdAccessToken") != nil ||
		asked(id, "GET", "/envs") != 200 || asked(id, "POST", "/init") != 404 {
		t.Errorf("%q: %s", token, got.text)
	}
	if r := a.as("ann", "POST", "/sandboxes/"+id+"/pause", "{}"); r.code != 204 {
		t.Fatal(r.text)
	}
	if asked(id, "GET", "/health") != 502 || asked(id, "GET", "/envs") != 200 {
		t.Error("its health wakes it, or nothing does")
	}
	a.gateway.Insecure = false
	if asked(id, "GET", "/envs") != 401 {
		t.Error("it needs no token on a server that does not allow that")
	}
	a.gateway.Insecure = true
	if r := a.as("ann", "POST", "/sandboxes",
		`{"templateID":"base","secure":false,"network":{"allowPublicTraffic":false}}`); r.code != 400 {
		t.Errorf("%d %s", r.code, r.text)
	}
}

// TestGatewayAnswers: the gateway's own answers have their charset, and name sandbox and port, also on pages for people; paths for E2B's
// own servers are not served.
func TestGatewayAnswers(t *testing.T) {
	a := newAPITest(t)
	id, token := a.create("ann", `{"templateID":"base"}`)
	host := fmt.Sprintf("8001-%s.%s", id, testDomain)
	if r := a.ask("GET", "/", "", "Host", host, "User-Agent", "Mozilla/5.0"); r.code != 502 ||
		r.header.Get("Content-Type") != "text/html; charset=utf-8" ||
		!strings.Contains(r.text, "<code>"+id+"</code>, port <code>8001</code>") || !strings.HasPrefix(r.text, "<html") {
		t.Errorf("%d %v %s", r.code, r.header, r.text)
	}
	if r := a.ask("GET", "/", "", "Host", host); r.header.Get("Content-Type") != "application/json; charset=utf-8" ||
		r.field("port") != 8001. || r.field("sandboxId") != id {
		t.Errorf("%d %v %s", r.code, r.header, r.text)
	}
	for _, path := range []string{"/init", "/freeze", "/upgrade"} {
		if shown, none := a.inside(id, token, "POST", path, "{}"), a.inside(id, "", "POST", path, "{}"); shown.code != 404 ||
			none.code != 404 {
			t.Errorf("%s: %d %d", path, shown.code, none.code)
		}
	}
}
