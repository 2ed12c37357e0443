package template

import (
	"bytes"
	"compress/gzip"
	"context"
	"path/filepath"
	"testing"
	"time"

	"soulbox.dev/soulbox/access"
	"soulbox.dev/soulbox/internal/sandboxtest"
)

// TestImportOrder: an import that waits for a merge has released its decoder, because the holder of the merge may wait for one.
func TestImportOrder(t *testing.T) {
	s := &Store{Dir: t.TempDir()}
	s.Accounts = access.NewAccounts(map[access.Resource]access.Bound{access.Merges: {Total: 1, Share: 1},
		access.Work: {Total: 1, Share: 1}})
	merge, err := s.Accounts.Take("ann", access.Merges, 1)
	if err != nil {
		t.Fatal(err)
	}
	var packed bytes.Buffer
	z := gzip.NewWriter(&packed)
	if _, err := z.Write([]byte(pack(t, file("a", "a")))); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	imported := make(chan error, 1)
	go func() {
		_, err := s.Import(ctx, Manifest{Owner: "ann", Name: "imported"}, &packed)
		imported <- err
	}()
	sandboxtest.Eventually(t, "the layer is there", func() bool {
		names, _ := filepath.Glob(s.file("layers", "[^.]*"))
		return len(names) > 0
	})
	decoder, err := s.Accounts.Wait(ctx, "ann", access.Work, 1)
	if err != nil {
		t.Fatal("the import keeps its decoder while it waits:", err)
	}
	decoder()
	merge()
	if err := <-imported; err != nil {
		t.Fatal(err)
	}
}
