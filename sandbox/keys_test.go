package sandbox_test

import (
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"soulbox.dev/soulbox/sandbox"
)

func TestKeys(t *testing.T) {
	dir := t.TempDir()
	mine, server := &sandbox.Keys{Dir: dir}, &sandbox.Keys{Dir: dir} // two processes
	if _, err := server.Owner("e2b_" + strings.Repeat("0", 40)); !errors.Is(err, sandbox.ErrKey) {
		t.Fatal(err)
	}
	secret, key, err := mine.Create("ann@example.com", 0)
	if err != nil || !regexp.MustCompile(`^e2b_[0-9a-f]{40}$`).MatchString(secret) {
		t.Fatal(secret, err)
	}
	if owner, err := server.Owner(secret); owner != "ann@example.com" || err != nil {
		t.Fatal(owner, err)
	}
	for _, wrong := range []string{"", secret[:43], secret + "0", strings.ToUpper(secret), key.Hash, key.ID} {
		if _, err := server.Owner(wrong); !errors.Is(err, sandbox.ErrKey) {
			t.Errorf("%q: %v", wrong, err)
		}
	}
	body, err := os.ReadFile(filepath.Join(dir, "keys"))
	if err != nil || strings.Contains(string(body), secret[4:]) {
		t.Fatalf("the file tells the secret: %v", err)
	}
	if info, err := os.Stat(filepath.Join(dir, "keys")); err != nil || info.Mode().Perm() != 0o600 {
		t.Fatal(info.Mode(), err)
	}
	if err := mine.Revoke(key.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := server.Owner(secret); !errors.Is(err, sandbox.ErrKey) {
		t.Fatal("a revoked key admits", err)
	}
	if all, err := server.List(); err != nil || len(all) != 1 {
		t.Fatal(all, err)
	}
	if err := mine.Revoke("nope"); !errors.Is(err, sandbox.ErrNoKey) {
		t.Fatal(err)
	}
	brief, _, err := mine.Create("bob", time.Nanosecond)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := server.Owner(brief); !errors.Is(err, sandbox.ErrKey) {
		t.Fatal("an expired key admits", err)
	}
	for _, owner := range []string{"", "a b", "-x", "../x", strings.Repeat("a", 65), "a\nb"} {
		if _, _, err := mine.Create(owner, 0); !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("owner %q: %v", owner, err)
		}
	}
}

// TestKeysAtOnce: of keys made by many processes at once none is lost.
func TestKeysAtOnce(t *testing.T) {
	dir := t.TempDir()
	var all sync.WaitGroup
	for range 20 {
		all.Go(func() {
			if _, _, err := (&sandbox.Keys{Dir: dir}).Create("ann", 0); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if keys, err := (&sandbox.Keys{Dir: dir}).List(); err != nil || len(keys) != 20 {
		t.Fatal(len(keys), err)
	}
}
