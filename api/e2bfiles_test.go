package api

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"

	"soulbox.dev/soulbox/api/envd"
	"soulbox.dev/soulbox/api/envd/spec/filesystem/filesystemconnect"
	"soulbox.dev/soulbox/internal/sandboxtest"
)

// inside sends a request to envd of a sandbox.
func (a *apiTest) inside(id, token, method, path, body string, headers ...string) reply {
	a.Helper()
	return a.ask(method, path, body, append([]string{"Host", fmt.Sprintf("%d-%s.%s", envd.Port, id, testDomain), envd.AccessHeader, token},
		headers...)...)
}

// TestUploadIsToldAsWritten: an upload gives the events of envd's own, which writes to the file itself: over an existing file a write, for
// a new one a create and a write. Other renames stay renames.
func TestUploadIsToldAsWritten(t *testing.T) {
	a := newAPITest(t)
	id, token := a.create("ann", `{"templateID":"base"}`)
	dir := t.TempDir()
	if err := os.WriteFile(dir+"/old", []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	made := a.inside(id, token, "POST", filesystemconnect.FilesystemCreateWatcherProcedure, `{"path":"`+dir+`"}`)
	upload := func(name string) {
		t.Helper()
		if r := a.inside(id, token, "POST", "/files?path="+dir+"/"+name, "new", "Content-Type", "application/octet-stream"); r.code != 200 {
			t.Fatalf("%d %s", r.code, r.text)
		}
	}
	upload("old")
	upload("fresh")
	if err := os.Rename(dir+"/fresh", dir+"/old"); err != nil {
		t.Fatal(err)
	}
	want := []string{"WRITE old", "CREATE fresh", "WRITE fresh", "RENAME fresh", "CREATE old"}
	var told []string
	sandboxtest.Eventually(t, "all is told", func() bool {
		r := a.inside(id, token, "POST", filesystemconnect.FilesystemGetWatcherEventsProcedure,
			fmt.Sprintf(`{"watcherId":"%v"}`, made.field("watcherId")))
		var got struct{ Events []struct{ Name, Type string } }
		if err := json.Unmarshal([]byte(r.text), &got); err != nil {
			t.Fatalf("%s: %v", r.text, err)
		}
		for _, e := range got.Events {
			told = append(told, strings.TrimPrefix(e.Type, "EVENT_TYPE_")+" "+e.Name)
		}
		return len(told) >= len(want)
	})
	if !slices.Equal(told, want) {
		t.Errorf("%q, want %q", told, want)
	}
}

// TestUploadReplacesMetadata: a file that is overwritten, in any way, keeps only the new metadata; its other attributes stay the user's.
func TestUploadReplacesMetadata(t *testing.T) {
	a := newAPITest(t)
	id, token := a.create("ann", `{"templateID":"base"}`)
	dir := t.TempDir()
	file := dir + "/f"
	upload := func(headers ...string) {
		t.Helper()
		if r := a.inside(id, token, "POST", "/files?path="+file, "x",
			append([]string{"Content-Type", "application/octet-stream"}, headers...)...); r.code != 200 {
			t.Fatalf("%d %s", r.code, r.text)
		}
	}
	metadata := func() string {
		r := a.inside(id, token, "POST", filesystemconnect.FilesystemStatProcedure, `{"path":"`+file+`"}`)
		return fmt.Sprint(r.field("entry", "metadata"))
	}
	upload()
	if err := syscall.Setxattr(file, "user.own", []byte("kept"), 0); err != nil {
		t.Skipf("the host's temporary directory has no user attributes (%v); make conformance has them", err)
	}
	upload("X-Metadata-Colour", "blue", "X-Metadata-Size", "9")
	if got := metadata(); got != "map[colour:blue size:9]" {
		t.Error(got)
	}
	upload("X-Metadata-Colour", "red")
	if got := metadata(); got != "map[colour:red]" {
		t.Error(got)
	}
	upload()
	if got := metadata(); got != "<nil>" {
		t.Error(got)
	}
	upload("X-Metadata-Colour", "red")
	if err := os.WriteFile(dir+"/part", []byte("y"), 0o600); err != nil {
		t.Fatal(err)
	}
	if r := a.inside(id, token, "POST", "/files/compose",
		fmt.Sprintf(`{"source_paths":["%s/part"],"destination":"%s"}`, dir, file)); r.code != 200 {
		t.Fatalf("%d %s", r.code, r.text)
	}
	if got := metadata(); got != "<nil>" {
		t.Error(got)
	}
	value := make([]byte, 16)
	if n, err := syscall.Getxattr(file, "user.own", value); err != nil || string(value[:n]) != "kept" {
		t.Errorf("the user's own attribute: %q %v", value[:max(n, 0)], err)
	}
}
