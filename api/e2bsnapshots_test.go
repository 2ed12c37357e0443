package api

import (
	"fmt"
	"regexp"
	"strings"
	"testing"

	"soulbox.dev/soulbox/template"
)

// TestSnapshotNames: snapshots have ids, names and tags as in E2B, can be used and deleted by each of them, and sandboxes made from one
// name it.
func TestSnapshotNames(t *testing.T) {
	a := newAPITest(t)
	id, _ := a.create("ann", `{"templateID":"base"}`)
	for body, want := range map[string]string{
		`{}`:                       `^\{"names":\[\],"snapshotID":"[a-z0-9]{20}:default"\}$`,
		`{"name":"snap"}`:          `^\{"names":\["ann/snap"\],"snapshotID":"ann/snap:default"\}$`,
		`{"name":"ann/snap:v2"}`:   `^\{"names":\["ann/snap"\],"snapshotID":"ann/snap:v2"\}$`,
		`{"name":"other:default"}`: `^\{"names":\["ann/other"\],"snapshotID":"ann/other:default"\}$`,
	} {
		made := a.as("ann", "POST", "/sandboxes/"+id+"/snapshots", body)
		if made.code != 201 || !regexp.MustCompile(want).MatchString(made.text) {
			t.Errorf("%s: %d %s", body, made.code, made.text)
			continue
		}
		snap := fmt.Sprint(made.field("snapshotID"))
		copy, _ := a.create("ann", `{"templateID":"`+snap+`"}`)
		kept := strings.TrimSuffix(strings.TrimPrefix(snap, "ann/"), ":default")
		if got := a.as("ann", "GET", "/sandboxes/"+copy, "").field("templateID"); got != kept {
			t.Errorf("a sandbox of %s is of %v", snap, got)
		}
		if r := a.as("ann", "GET", "/snapshots", ""); !strings.Contains(r.text, made.text) {
			t.Errorf("%s is not in %s", made.text, r.text)
		}
		if r := a.as("ann", "DELETE", "/templates/"+strings.ReplaceAll(strings.ReplaceAll(snap, "/", "%2F"), ":", "%3A"),
			""); r.code != 204 {
			t.Errorf("delete %s: %d %s", snap, r.code, r.text)
		}
	}
	for _, bad := range []string{`{"name":"snap:"}`, `{"name":"bob/snap"}`, `{"name":"a:b:c"}`} {
		if r := a.as("ann", "POST", "/sandboxes/"+id+"/snapshots", bad); r.code != 400 {
			t.Errorf("%s: %d %s", bad, r.code, r.text)
		}
	}
}

// TestSnapshotKept: a snapshot of the same name is replaced by E2B's call, as it does, and by ours only if that is wanted.
func TestSnapshotKept(t *testing.T) {
	a := newAPITest(t)
	id, _ := a.create("ann", `{"templateID":"base"}`)
	other, _ := a.create("ann", `{"templateID":"base"}`)
	for _, c := range []struct {
		id, path, body string
		code           int
		text, of       string
	}{
		{id, "/v1/sandboxes/", `{"name":"s"}`, 201, `"ann/s:default"`, id},
		{other, "/v1/sandboxes/", `{"name":"s"}`, 409, `there is a snapshot \"s\": delete it, take another name, or ask to replace it`, id},
		{other, "/v1/sandboxes/", `{"name":"s","replace":true}`, 201, `"ann/s:default"`, other},
		{id, "/sandboxes/", `{"name":"s"}`, 201, `"ann/s:default"`, id},
		{id, "/v1/sandboxes/", `{}`, 201, `"names":[]`, id},
		{id, "/v1/sandboxes/", `{"name":"s:"}`, 400, "a tag is empty", id},
		{"sbnothere", "/v1/sandboxes/", `{"name":"s"}`, 404, "sbnothere", id},
	} {
		if r := a.as("ann", "POST", c.path+c.id+"/snapshots", c.body); r.code != c.code || !strings.Contains(r.text, c.text) {
			t.Errorf("%s %s: %d %s", c.path, c.body, r.code, r.text)
		}
		if s, err := a.m.FindSnapshot("ann", "s"); err != nil || s.Sandbox != c.of {
			t.Errorf("%s %s: it is of %s, want %s; %v", c.path, c.body, s.Sandbox, c.of, err)
		}
	}
	for wait, want := range map[string]int{"1": 200, "-1": 400, "50001": 400} {
		if r := a.as("ann", "PUT", "/v1/sandboxes/"+id+"/ports/80", `{"waitMs":`+wait+`}`); r.code != want {
			t.Errorf("wait for %s: %d %s", wait, r.code, r.text)
		}
	}
	if r := a.as("ann", "DELETE", "/v1/sandboxes/"+id+"/ports/82", ""); r.code != 404 || !strings.Contains(r.text, "port is not exposed") {
		t.Errorf("%d %s", r.code, r.text)
	}
}

// TestTemplatesByBuild: a template is also found by the id of its build; lists have pages, and say which templates are public.
func TestTemplatesByBuild(t *testing.T) {
	a := newAPITest(t)
	for _, m := range []template.Manifest{{Name: "tool", Owner: "ann", Build: template.NewBuildID(), Image: "sha256:1"},
		{Name: "tool:v1", Owner: "ann", Build: template.NewBuildID(), Image: "sha256:2"}, {Name: "shared", Image: "sha256:3"}} {
		if err := a.control.Store.Put(m); err != nil {
			t.Fatal(err)
		}
		if got := a.control.templateName("ann", strings.Split(m.Name, ":")[0]+":"+m.BuildID()); got != m.Name {
			t.Errorf("%s: %s", m.Name, got)
		}
		if r := a.as("ann", "GET", "/templates/x/builds/"+m.BuildID()+"/status", ""); m.Owner == "ann" &&
			(r.code != 200 || r.field("status") != "ready") {
			t.Errorf("%d %s", r.code, r.text)
		}
	}
	first := a.as("ann", "GET", "/v2/templates?limit=2", "")
	next := first.header.Get("X-Next-Token")
	rest := a.as("ann", "GET", "/v2/templates?limit=2&nextToken="+next, "")
	all := append(first.body.([]any), rest.body.([]any)...)
	if len(all) != 3 || next == "" || rest.header.Get("X-Next-Token") != "" {
		t.Fatalf("%s %s %q", first.text, rest.text, next)
	}
	for _, one := range all {
		m := one.(map[string]any)
		if m["public"] != (m["templateID"] == "shared") || !template.ValidBuildID(fmt.Sprint(m["buildID"])) {
			t.Errorf("%v", m)
		}
	}
}

// TestTeamMetrics: an owner sees the metrics of their own sandboxes only.
func TestTeamMetrics(t *testing.T) {
	a := newAPITest(t)
	id, _ := a.create("ann", `{"templateID":"base"}`)
	a.create("ann", `{"templateID":"base"}`)
	a.create("bob", `{"templateID":"base"}`)
	if r := a.as("ann", "DELETE", "/sandboxes/"+id, ""); r.code != 204 {
		t.Fatal(r.text)
	}
	for path, want := range map[string]string{
		"/teams/ann/metrics": `"concurrentSandboxes":1,"sandboxStartRate":0.00666`,
		"/teams/ann/metrics/max?metric=concurrent_sandboxes": `"value":1}`,
		"/teams/ann/metrics/max?metric=sandbox_start_rate":   `"value":0.00666`,
		"/teams/ann/metrics?end=1":                           `[]`,
	} {
		if r := a.as("ann", "GET", path, ""); r.code != 200 || !strings.Contains(r.text, want) {
			t.Errorf("%s: %d %s", path, r.code, r.text)
		}
	}
	for path, code := range map[string]int{"/teams/bob/metrics": 403, "/teams/ann/metrics/max?metric=x": 400,
		"/teams/ann/metrics?start=2&end=1": 400} {
		if r := a.as("ann", "GET", path, ""); r.code != code {
			t.Errorf("%s: %d %s", path, r.code, r.text)
		}
	}
}
