package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"strings"
	"testing"

	"soulbox.dev/soulbox/internal/sandboxtest"
)

// TestBuildsOfAllFaces: the HTTP API shows a build that MCP began as building, and a build of the HTTP API has its log as a resource.
func TestBuildsOfAllFaces(t *testing.T) {
	w := serve(t, importMini(t))
	at, c := strings.TrimSuffix(w.url, "/mcp"), w.client("", true)
	ask := func(method, path, body string) (status int, answer map[string]any) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), method, at+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		text, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatal(err)
		}
		_ = json.Unmarshal(text, &answer) // some answers have no body
		return res.StatusCode, answer
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_, _ = c.Call(ctx, "template_build", map[string]any{"name": "long", "dockerfile": "FROM mini\nRUN sleep 1000\n"}) // cancelled
	}()
	id := ""
	sandboxtest.Eventually(t, "it has a sandbox", func() bool {
		a, err := c.Call(t.Context(), "sandbox_list", map[string]any{"metadata": map[string]any{"template": "long"}})
		must(t, a, err)
		if m := regexp.MustCompile(`"build":"([0-9a-f-]{36})"`).FindStringSubmatch(string(a.Result)); m != nil {
			id = m[1]
		}
		return id != ""
	})
	if code, s := ask("GET", "/templates/long/builds/"+id+"/status", ""); code != 200 || s["status"] != "building" {
		t.Errorf("%d %v", code, s)
	}
	cancel()
	<-ended
	sandboxtest.Eventually(t, "it has failed", func() bool {
		_, s := ask("GET", "/templates/long/builds/"+id+"/status", "")
		return s["status"] == "error"
	})
	_, made := ask("POST", "/v3/templates", `{"name":"rest"}`)
	build := fmt.Sprintf("/templates/rest/builds/%v", made["buildID"])
	if code, s := ask("POST", "/v2"+build,
		`{"fromTemplate":"mini","steps":[{"type":"RUN","args":["echo seen; sleep 1000"]}]}`); code != 202 {
		t.Fatal(code, s)
	}
	sandboxtest.Eventually(t, "its log is a resource", func() bool {
		a, err := c.Do(t.Context(), "resources/read", map[string]any{"uri": fmt.Sprintf("template://rest/builds/%v/log", made["buildID"])})
		return err == nil && strings.Contains(string(a.Result), `\"seen\"`)
	})
}
