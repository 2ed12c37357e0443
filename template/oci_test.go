package template

import (
	"errors"
	"fmt"
	"log"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/registry"

	"soulbox.dev/soulbox/sandbox"
)

// TestRegistry: an image that was pulled, changed and pushed keeps its digest where it should, in this store and in another.
func TestRegistry(t *testing.T) {
	server := httptest.NewServer(registry.New(registry.Logger(log.New(testWriter{t}, "", 0))))
	defer server.Close()
	host := strings.TrimPrefix(server.URL, "http://")
	w := newWorkshop(t)
	w.builder.Pull = w.store.Puller([]string{host})
	mini, err := w.store.Get("", "mini")
	if err != nil {
		t.Fatal(err)
	}
	first, err := w.store.Push(t.Context(), mini, host+"/base:1")
	if err != nil {
		t.Fatal(err)
	}
	if again, err := w.store.Push(t.Context(), mini, host+"/base:again"); err != nil || again != first {
		t.Errorf("the same template is %s and %s: %v", first, again, err)
	}
	pulled, err := w.store.Pull(t.Context(), Manifest{Name: "pulled"}, host+"/base:1")
	if err != nil {
		t.Fatal(err)
	}
	if pulled.Image != mini.Image || pulled.Layers[0].Digest != mini.Layers[0].Digest {
		t.Errorf("%+v, was %+v", pulled, mini)
	}
	if back, err := w.store.Push(t.Context(), pulled, host+"/copy:1"); err != nil || back != first {
		t.Errorf("an image that was not changed is %s, was %s: %v", back, first, err)
	}
	built := w.build("changed", "FROM "+host+"/base@"+first+"\nRUN echo changed > /changed\nENV X=1\nUSER user\n", nil)
	pushed, err := w.store.Push(t.Context(), built.Manifest, host+"/changed:1")
	if err != nil {
		t.Fatal(err)
	}
	other := newWorkshop(t)
	got, err := other.store.Pull(t.Context(), Manifest{Name: "pulled"}, host+"/changed:1")
	if err != nil {
		t.Fatal(err)
	}
	if got.Image != built.Image || len(got.Layers) != 2 || got.Layers[0].Digest != mini.Layers[0].Digest || got.Config.User != "user" ||
		got.Config.Env[0] != "X=1" {
		t.Errorf("%+v", got)
	}
	if back, err := other.store.Push(t.Context(), got, host+"/back:1"); err != nil || back != pushed {
		t.Errorf("it is %s, was %s: %v", back, pushed, err)
	}
	got.Name = "pulled"
	if err := other.store.Put(got); err != nil {
		t.Fatal(err)
	}
	if out := other.in("pulled", "", "cat /changed; echo $X; id -un"); out != "changed\n1\nuser\n" {
		t.Errorf("%q", out)
	}
	for _, to := range []string{filepath.Join(t.TempDir(), "layout"), filepath.Join(t.TempDir(), "saved.tar")} {
		if err := w.store.Export(built.Manifest, to); err != nil {
			t.Fatal(err)
		}
		in, err := other.store.ImportFile(t.Context(), Manifest{Name: "imported"}, to)
		if err != nil {
			t.Fatal(err)
		}
		if in.Image != built.Image || in.Config.User != "user" {
			t.Errorf("%s: %+v", to, in)
		}
	}
}

type testWriter struct{ *testing.T }

func (w testWriter) Write(p []byte) (int, error) { return len(p), nil }

// TestPullErrors: errors distinguish name, network and credentials, and content that does not match its digest is refused.
func TestPullErrors(t *testing.T) {
	store := &Store{Dir: t.TempDir()}
	inner := registry.New(registry.Logger(log.New(testWriter{t}, "", 0)))
	spoil := false
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case strings.Contains(r.URL.Path, "/private/"):
			http.Error(w, "no", http.StatusForbidden)
		case spoil && strings.Contains(r.URL.Path, "/blobs/sha256:") && r.Method == http.MethodGet:
			rec := httptest.NewRecorder()
			inner.ServeHTTP(rec, r)
			if body := rec.Body.Bytes(); len(body) > 1000 {
				body[500] ^= 1
			}
			w.WriteHeader(rec.Code)
			_, _ = w.Write(rec.Body.Bytes())
		default:
			inner.ServeHTTP(w, r)
		}
	}))
	host := strings.TrimPrefix(server.URL, "http://")
	m, err := store.Import(t.Context(), Manifest{Name: "x"},
		strings.NewReader(tarOf(t, map[string]string{"f": strings.Repeat("random enough ", 9000)})))
	if err != nil {
		t.Fatal(err)
	}
	m.Layers[0], err = store.begin("").newLayer(t.Context(), strings.NewReader(tarOf(t, randomFiles())), maxImage, "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := store.Push(t.Context(), m, host+"/good:1"); err != nil {
		t.Fatal(err)
	}
	for ref, want := range map[string]string{
		host + "/nothere:1":   "has no such image",
		host + "/private/x:1": "requires other credentials",
		"127.0.0.1:1/x:1":     "cannot be reached",
	} {
		if _, err := store.Pull(t.Context(), Manifest{Name: "pulled"}, ref); !errors.Is(err, ErrPull) ||
			!strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", ref, err)
		}
	}
	for _, ref := range []string{"", "UPPER", "a b", "x:y:z"} {
		if _, err := store.Pull(t.Context(), Manifest{Name: "pulled"}, ref); !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("%q: %v", ref, err)
		}
	}
	if _, err := puller(t, nil)(host + "/good:1"); !errors.Is(err, ErrPull) || !strings.Contains(err.Error(), "private network") {
		t.Errorf("a registry on this machine: %v", err)
	}
	if _, err := puller(t, []string{host})(host + "/good:1"); err != nil {
		t.Error(err)
	}
	spoil = true
	other := &Store{Dir: t.TempDir()}
	if _, err := other.Pull(t.Context(), Manifest{Name: "pulled"}, host+"/good:1"); err == nil {
		t.Error("a spoilt layer is taken")
	}
	if left, _ := filepath.Glob(filepath.Join(other.Dir, "layers", "*")); len(left) > 0 {
		t.Errorf("it is kept: %v", left)
	}
	server.Close()
	if _, err := store.Pull(t.Context(), Manifest{Name: "pulled"}, host+"/good:1"); !errors.Is(err, ErrPull) {
		t.Error(err)
	}
}

func randomFiles() map[string]string {
	files := map[string]string{}
	for i := range 200 {
		files[fmt.Sprint("f", i)] = fmt.Sprint(i * 7919 * 104729)
	}
	return files
}

// puller returns a function that pulls for a build in a store of its own.
func puller(t *testing.T, private []string) func(reference string) (Manifest, error) {
	s := &Store{Dir: t.TempDir()}
	return func(reference string) (Manifest, error) {
		return s.Puller(private)(t.Context(), s.begin(""), reference)
	}
}
