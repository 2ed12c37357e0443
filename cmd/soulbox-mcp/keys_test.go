package main

import (
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"soulbox.dev/soulbox/internal/sandboxtest"
)

// TestKeysFileOfNobody: a server with a file of keys lets nobody in by none, whatever is in the file, and says so.
func TestKeysFileOfNobody(t *testing.T) {
	for _, body := range []string{"[]", "null", "", `[{"id":"1","ow`} {
		state := sandboxtest.Dir(t)
		if err := os.WriteFile(filepath.Join(state, "keys"), []byte(body), 0o600); err != nil {
			t.Fatal(err)
		}
		w := serve(t, state)
		for _, key := range []string{"", "e2b_" + strings.Repeat("0", 40)} {
			c := &sandboxtest.MCP{URL: w.url, Key: key, Modern: true}
			if a, err := c.Do(t.Context(), "tools/list", nil); err != nil || a.Status != http.StatusUnauthorized {
				t.Errorf("keys %q, MCP: %d %v", body, a.Status, err)
			}
			for _, path := range []string{"/v1/sandboxes", "/sandboxes", "/metrics"} {
				if status, _ := w.get(path, key); status != http.StatusUnauthorized {
					t.Errorf("keys %q, %s: %d", body, path, status)
				}
			}
		}
		if status, _ := w.get("/health", ""); status != http.StatusOK {
			t.Errorf("keys %q: health is %d", body, status)
		}
		if log := w.log.String(); !strings.Contains(log, "nobody is let in") {
			t.Errorf("keys %q: the log does not say so: %s", body, log)
		}
		w.stop()
	}
}
