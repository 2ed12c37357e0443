package resources

import (
	"strings"
	"testing"
)

// id has the form of a sandbox' id.
const id = "sbaaaaaaaaaaaaaaaaaaaa"

// TestURIs parses URIs. Any other URI is not found, whatever is wrong with it.
func TestURIs(t *testing.T) {
	for uri, want := range map[string]parsedURI{
		"sandbox://" + id:                                      {kind: kindSandbox, name: id},
		"sandbox://" + id + "/logs":                            {kind: kindLogs, name: id},
		"sandbox://" + id + "/logs?offset=7":                   {kind: kindLogs, name: id, offset: 7},
		"sandbox://" + id + "/metrics":                         {kind: kindMetrics, name: id},
		"sandbox://" + id + "/files/etc/hosts":                 {kind: kindFile, name: id, path: "/etc/hosts"},
		"sandbox://" + id + "/files/":                          {kind: kindFile, name: id, path: "/"},
		"sandbox://" + id + "/files//etc/hosts":                {kind: kindFile, name: id, path: "//etc/hosts"},
		"sandbox://" + id + "/files/a%20b%3F%23%25c":           {kind: kindFile, name: id, path: "/a b?#%c"},
		"sandbox://" + id + "/files/a?offset=3&limit=4":        {kind: kindFile, name: id, path: "/a", offset: 3, limit: 4},
		"sandbox://" + id + "/processes/p1/output":             {kind: kindOutput, name: id, process: "p1"},
		"sandbox://" + id + "/processes/my%20tag/output":       {kind: kindOutput, name: id, process: "my tag"},
		"template://base":                                      {kind: kindTemplate, name: "base"},
		"template://debian:trixie":                             {kind: kindTemplate, name: "debian:trixie"},
		"template://debian:trixie/builds/x-1/log":              {kind: kindTemplate, name: "debian:trixie", build: "x-1"},
		"template://base/builds/x-1/log?offset=10&limit=20":    {kind: kindTemplate, name: "base", build: "x-1", offset: 10, limit: 20},
		fileURI(id, "/a b/%?#/\xff"):                           {kind: kindFile, name: id, path: "/a b/%?#/\xff"},
		outputURI(id, "p7"):                                    {kind: kindOutput, name: id, process: "p7"},
		part(sandboxURI(id)+"/logs?offset=3", 12):              {kind: kindLogs, name: id, offset: 12},
		part("template://base/builds/x-1/log?offset=1", 1<<40): {kind: kindTemplate, name: "base", build: "x-1", offset: 1 << 40},
	} {
		if got, ok := parse(uri); !ok || got != want {
			t.Errorf("%s: got %+v, %v; want %+v", uri, got, ok, want)
		}
	}
	for _, uri := range []string{
		"", "sandbox:", "sandbox://", "sandbox:" + id, "sandbox://not-an-id", "sandbox://" + strings.ToUpper(id),
		"SANDBOX//" + id, "file:///etc/passwd", "http://" + id + "/files/a", "sandbox://" + id + ":1/logs", "sandbox://me@" + id + "/logs",
		"sandbox://" + id + "/", "sandbox://" + id + "/files", "sandbox://" + id + "/nothing", "sandbox://" + id + "?offset=1",
		"sandbox://" + id + "/logs#x", "sandbox://" + id + "/logs?", "sandbox://" + id + "/metrics?offset=1",
		"sandbox://" + id + "/files/%zz", "sandbox://" + id + "/files/a?offset=-1", "sandbox://" + id + "/files/a?offset=x",
		"sandbox://" + id + "/files/a?offset=1&offset=2", "sandbox://" + id + "/files/a?other=1", "sandbox://" + id + "/files/a?offset",
		"sandbox://" + id + "/files/a?offset=9223372036854775808", "sandbox://" + id + "/processes//output",
		"sandbox://" + id + "/processes/a/b/output", "sandbox://" + id + "/processes/a%2Fb/output", "sandbox://" + id + "/processes/p1",
		"sandbox://" + id + "/files/" + strings.Repeat("a", 8192),
		"template://", "template://base?offset=1", "template://base/", "template://base/builds/x", "template://base/builds//log",
		"template://base/builds/x/log/more", "template://base/builds/x/log?offset=-1", "template:///builds/x/log?other=1",
		"template://" + strings.Repeat("a", 257),
	} {
		if got, ok := parse(uri); ok {
			t.Errorf("%.80s: got %+v", uri, got)
		}
	}
}
