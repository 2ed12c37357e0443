package access_test

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"soulbox.dev/soulbox/access"
	"soulbox.dev/soulbox/internal/durable"
	"soulbox.dev/soulbox/internal/sandboxtest"
)

func TestKeys(t *testing.T) {
	dir := t.TempDir()
	mine, server := &access.Keys{Dir: dir}, &access.Keys{Dir: dir} // two processes
	if _, _, err := server.Admit("e2b_" + strings.Repeat("0", 40)); !errors.Is(err, access.ErrKey) {
		t.Fatal(err)
	}
	secret, key, err := mine.Create("ann@example.com", 0)
	if err != nil || !regexp.MustCompile(`^e2b_[0-9a-f]{40}$`).MatchString(secret) {
		t.Fatal(secret, err)
	}
	if owner, _, err := server.Admit(secret); owner != "ann@example.com" || err != nil {
		t.Fatal(owner, err)
	}
	for _, wrong := range []string{"", secret[:43], secret + "0", strings.ToUpper(secret), key.Hash, key.ID} {
		if _, _, err := server.Admit(wrong); !errors.Is(err, access.ErrKey) {
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
	if _, _, err := server.Admit(secret); !errors.Is(err, access.ErrKey) {
		t.Fatal("a revoked key admits", err)
	}
	if all, err := server.List(); err != nil || len(all) != 1 {
		t.Fatal(all, err)
	}
	if err := mine.Revoke("nope"); !errors.Is(err, access.ErrNoKey) {
		t.Fatal(err)
	}
	brief, _, err := mine.Create("bob", time.Nanosecond)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := server.Admit(brief); !errors.Is(err, access.ErrKey) {
		t.Fatal("an expired key admits", err)
	}
	for _, owner := range []string{"", "a b", "-x", "../x", strings.Repeat("a", 65), "a\nb"} {
		if _, _, err := mine.Create(owner, 0); !errors.Is(err, access.ErrInvalid) {
			t.Errorf("owner %q: %v", owner, err)
		}
	}
}

// TestKeysAtOnce: when many processes make keys at once, none is lost.
func TestKeysAtOnce(t *testing.T) {
	dir := t.TempDir()
	var all sync.WaitGroup
	for range 20 {
		all.Go(func() {
			if _, _, err := (&access.Keys{Dir: dir}).Create("ann", 0); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if keys, err := (&access.Keys{Dir: dir}).List(); err != nil || len(keys) != 20 {
		t.Fatal(len(keys), err)
	}
}

// TestKeysFileIsThere: whatever the file contains, keys are needed, and only complete, valid ones are admitted.
func TestKeysFileIsThere(t *testing.T) {
	for name, spoil := range map[string]func(path string) error{
		"empty list": func(path string) error { return os.WriteFile(path, []byte("[]"), 0o600) },
		"null":       func(path string) error { return os.WriteFile(path, []byte("null"), 0o600) },
		"empty":      func(path string) error { return os.WriteFile(path, nil, 0o600) },
		"half": func(path string) error {
			return os.WriteFile(path, []byte(`[{"id":"1","owner":"ann","sha256":"`), 0o600)
		},
		"no list":    func(path string) error { return os.WriteFile(path, []byte(`{"keys":[]}`), 0o600) },
		"unreadable": func(path string) error { return os.Mkdir(path, 0o700) },
		"dangling":   func(path string) error { return os.Symlink("nowhere", path) },
	} {
		keys := &access.Keys{Dir: t.TempDir()}
		if keys.Exist() {
			t.Fatal("there are keys before there is a file")
		}
		if err := spoil(filepath.Join(keys.Dir, "keys")); err != nil {
			t.Fatal(err)
		}
		if !keys.Exist() {
			t.Errorf("%s: no keys are needed", name)
		}
		if owner, _, err := keys.Admit("e2b_" + strings.Repeat("0", 40)); err == nil {
			t.Errorf("%s: it admits %q", name, owner)
		}
	}
}

// TestKeysEnd: what a key admitted ends soon after the key is revoked or expires; what its owner's other key admitted does not, and what
// depends on the owner ends with the last key. A file that cannot be read ends nothing.
func TestKeysEnd(t *testing.T) {
	dir := t.TempDir()
	operator, server := &access.Keys{Dir: dir}, &access.Keys{Dir: dir}
	go server.Watch(t.Context(), slog.New(slog.DiscardHandler)) // ends with the test
	admit := func(valid time.Duration) (access.Key, context.Context) {
		t.Helper()
		secret, key, err := operator.Create("ann", valid)
		if err != nil {
			t.Fatal(err)
		}
		owner, ctx, err := server.Admit(secret)
		if err != nil || owner != "ann" || ctx.Err() != nil {
			t.Fatal(owner, ctx, err)
		}
		return key, ctx
	}
	ended := func(what string, ctx context.Context) {
		t.Helper()
		sandboxtest.Eventually(t, what, func() bool { return ctx.Err() != nil })
		if !errors.Is(context.Cause(ctx), access.ErrKey) {
			t.Error(context.Cause(ctx))
		}
	}
	first, one := admit(0)
	second, two := admit(0)
	_, brief := admit(time.Minute)
	all, err := server.OwnerValid("ann")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := server.OwnerValid("bob"); !errors.Is(err, access.ErrKey) {
		t.Fatal("an owner without a key", err)
	}
	if err := operator.Revoke(first.ID); err != nil {
		t.Fatal(err)
	}
	ended("the revoked key's end", one)
	if err := errors.Join(two.Err(), brief.Err(), all.Err()); err != nil {
		t.Fatal("another key's ended", err)
	}
	path := filepath.Join(dir, "keys")
	body, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, body[:len(body)/2], 0o600); err != nil {
		t.Fatal(err)
	}
	sandboxtest.Eventually(t, "the server sees that the file is broken", func() bool {
		_, err := server.List()
		return err != nil
	})
	if err := errors.Join(two.Err(), all.Err()); err != nil {
		t.Fatal("a broken file ends what was admitted", err)
	}
	expired := strings.Replace(string(body), `"expires": "`, `"expires": "2001-01-01T00:00:00Z", "was": "`, 1)
	if err := errors.Join(os.WriteFile(path+".new", []byte(expired), 0o600), os.Rename(path+".new", path)); err != nil {
		t.Fatal(err)
	}
	ended("the expired key's end", brief)
	if err := operator.Revoke(second.ID); err != nil {
		t.Fatal(err)
	}
	ended("the last key's end", two)
	ended("the owner's end", all)
}

// TestPowerFailsAtKeys cuts the power at each step of a change: the next process finds the old or the new keys, never a part of them.
func TestPowerFailsAtKeys(t *testing.T) {
	for cut := 0; ; cut++ {
		dir := t.TempDir()
		if _, _, err := (&access.Keys{Dir: dir}).Create("ann", 0); err != nil {
			t.Fatal(err)
		}
		n := 0
		_, _, failed := (&access.Keys{Dir: dir, Disk: durable.Disk{Fault: func(_, _ string, size int) (int, error) {
			if n++; n > cut {
				return size / 2, errors.New("no power")
			}
			return size, nil
		}}}).Create("bob", 0)
		all, err := (&access.Keys{Dir: dir}).List()
		if want := map[bool]int{true: 1, false: 2}[failed != nil]; err != nil || len(all) != want || all[0].Owner != "ann" {
			t.Fatalf("step %d: %v, then %+v, %v", cut, failed, all, err)
		}
		if failed == nil {
			if cut < 3 {
				t.Fatalf("there are only %d steps", cut)
			}
			return
		}
	}
}
