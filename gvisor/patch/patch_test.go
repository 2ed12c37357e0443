package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestParseAndApply(t *testing.T) {
	from, to := t.TempDir(), t.TempDir()
	before := "one\ntwo\n\tthree\nfour\n"
	if err := os.WriteFile(filepath.Join(from, "a.go"), []byte(before), 0o644); err != nil {
		t.Fatal(err)
	}
	head := "why\n--- a.go " + digest([]byte(before)) + "\n"
	for name, c := range map[string]struct {
		patches   []string
		want, err string
	}{
		"a line replaced":  {patches: []string{head + "@@ 2,1 two\n+zwei\n"}, want: "one\nzwei\n\tthree\nfour\n"},
		"lines put before": {patches: []string{head + "@@ 3,0 three\n+\tx\n+\n"}, want: "one\ntwo\n\tx\n\n\tthree\nfour\n"},
		"lines gone":       {patches: []string{head + "@@ 2,2 two\n"}, want: "one\nfour\n"},
		"lines at the end": {patches: []string{head + "@@ 5,0 \n+five\n"}, want: "one\ntwo\n\tthree\nfour\nfive\n"},
		"two of one file": {patches: []string{head + "@@ 4,1 four\n+vier\n", head + "@@ 1,1 one\n+eins\n"},
			want: "eins\ntwo\n\tthree\nvier\n"},
		"another version of gVisor": {patches: []string{"--- a.go 00\n@@ 1,1 one\n"}, err: "another SHA-256"},
		"no such file":              {patches: []string{"--- b.go 00\n@@ 1,1 one\n"}, err: "not a file of this gVisor"},
		"another line":              {patches: []string{head + "@@ 1,1 two\n"}, err: "expects line 1"},
		"one line twice":            {patches: []string{head + "@@ 1,2 one\n", head + "@@ 2,1 two\n"}, err: "another hunk"},
		"beyond the end":            {patches: []string{head + "@@ 4,9 four\n"}, err: "there are 5"},
		"out of the tree":           {patches: []string{"--- ../a.go 00\n"}, err: "not 'PATH SHA-256'"},
		"no place":                  {patches: []string{head + "+x\n"}, err: "neither"},
		"a place that is none":      {patches: []string{head + "@@ x,1 one\n"}, err: "not 'LINE,COUNT TEXT'"},
		"prose alone":               {patches: []string{"why\n"}, err: "names no file"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := applied(from, to, c.patches)
			if c.err != "" {
				if err == nil || !strings.Contains(err.Error(), c.err) {
					t.Fatalf("got error %v, want %q", err, c.err)
				}
				return
			}
			if err != nil || got != c.want {
				t.Fatalf("got %q, %v, want %q", got, err, c.want)
			}
		})
	}
}

func applied(from, to string, patches []string) (string, error) {
	all := make(map[string]*change)
	for i, p := range patches {
		if err := parse(all, string(rune('a'+i)), p); err != nil {
			return "", err
		}
	}
	for name, c := range all {
		if err := c.apply(from, to, name); err != nil {
			return "", err
		}
	}
	body, err := os.ReadFile(filepath.Join(to, "a.go"))
	return string(body), err
}

// TestFromDiff makes patches from a diff and applies them: the result is what the diff was made from.
func TestFromDiff(t *testing.T) {
	from, to := t.TempDir(), t.TempDir()
	if err := os.WriteFile(filepath.Join(from, "a.go"), []byte("one\ntwo\nthree\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	diff := "diff --git a/a.go b/a.go\n--- a/a.go\n+++ b/a.go\n@@ -1,0 +2,1 @@ func x\n+one and a half\n@@ -3 +4 @@\n-three\n+drei\n"
	var patch strings.Builder
	if err := fromDiff(strings.NewReader(diff), &patch, from); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(patch.String(), "\nthree") {
		t.Errorf("the patch has a line of the original: %s", &patch)
	}
	if got, err := applied(from, to, []string{patch.String()}); err != nil || got != "one\none and a half\ntwo\ndrei\n" {
		t.Fatalf("got %q, %v", got, err)
	}
}
