package template

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"soulbox.dev/soulbox/sandbox"
)

// TestIgnoreFiles: if Dockerfile.dockerignore exists, it counts and .dockerignore does not. Neither counts if the sender has already left
// out the ignored files.
func TestIgnoreFiles(t *testing.T) {
	w := newWorkshop(t)
	files := map[string]string{"a": "a", "b": "b", ".dockerignore": "a\n", "Dockerfile.dockerignore": "b\n*.dockerignore\n.dockerignore\n"}
	dir := t.TempDir()
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for _, try := range []struct {
		open     func() (*Files, error)
		filtered bool
		want     string
	}{
		{func() (*Files, error) { return w.store.ContextFiles(t.Context(), "", files) }, false, "a"},
		{func() (*Files, error) { return w.store.ContextDir(t.Context(), "", dir) }, false, "a"},
		{func() (*Files, error) { return w.store.ContextFiles(t.Context(), "", files) }, true, ".dockerignore Dockerfile.dockerignore a b"},
		{func() (*Files, error) {
			return w.store.ContextFiles(t.Context(), "", map[string]string{"a": "a", "b": "b", ".dockerignore": "a\n"})
		}, false, ".dockerignore b"},
	} {
		f, err := try.open()
		if err != nil {
			t.Fatal(err)
		}
		req := BuildRequest{Name: "ignores", Dockerfile: "FROM scratch\nCOPY . /\n", Context: f, Filtered: try.filtered}
		if _, err := w.builder.Build(t.Context(), req, nil); err != nil {
			t.Fatal(err)
		}
		names := f.root.Names()
		slices.Sort(names)
		if got := strings.Join(names, " "); got != try.want {
			t.Errorf("there are %q, not %q", got, try.want)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
	bad := map[string]string{"Dockerfile.dockerignore": "[a-\n"}
	if _, _, err := w.try(t.Context(), BuildRequest{Name: "bad", Dockerfile: "FROM scratch\nCOPY . /\n"}, bad); err == nil ||
		!strings.Contains(err.Error(), "Dockerfile.dockerignore") {
		t.Errorf("a pattern that is none: %v", err)
	}
	if _, err := w.store.Get("", "bad"); !errors.Is(err, sandbox.ErrNoTemplate) {
		t.Error(err)
	}
}
