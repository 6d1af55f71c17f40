package directory_test

import (
	"context"
	"fmt"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/store/sqlite"
)

// A role that was taken away must not come back out of a catalog that somebody
// was making at the time.
func TestACatalogIsNeverOlderThanTheLastChange(t *testing.T) {
	s, err := sqlite.Open(context.Background(), filepath.Join(t.TempDir(), "tabard.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	builtin, err := access.ParseCatalog(access.Builtin())
	if err != nil {
		t.Fatal(err)
	}
	d, err := directory.Open(context.Background(), directory.Config{Store: s, Catalog: builtin, Now: time.Now})
	if err != nil {
		t.Fatal(err)
	}
	update := func(f func(*directory.Tx)) {
		t.Helper()
		if err := d.Update(context.Background(), "me", func(tx *directory.Tx) error { f(tx); return nil }); err != nil {
			t.Fatal(err)
		}
	}
	stop := make(chan struct{})
	var readers sync.WaitGroup
	for _, account := range []string{"a", "a", "b"} {
		readers.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					d.Catalog(account)
				}
			}
		})
	}
	defer readers.Wait()
	defer close(stop)
	role := func(account string, n int) *access.CustomRole {
		return &access.CustomRole{
			ID: fmt.Sprintf("%s-%d", account, n), AccountID: account, Name: fmt.Sprintf("R%d", n), DisplayName: "R",
			Service: "kms", Actions: []string{"kms.secrets.read"},
		}
	}
	kept := role("b", 0)
	update(func(tx *directory.Tx) { d.CustomRoles.Put(tx, kept) })
	for n := range 100 {
		r := role("a", n)
		update(func(tx *directory.Tx) { d.CustomRoles.Put(tx, r) })
		if !d.Catalog("a").Grants(r.CRN(), "kms", "kms.secrets.read") {
			t.Fatalf("role %d is not known after its creation", n)
		}
		update(func(tx *directory.Tx) { d.CustomRoles.Delete(tx, r) })
		if d.Catalog("a").Grants(r.CRN(), "kms", "kms.secrets.read") {
			t.Fatalf("role %d still grants after its removal", n)
		}
		if d.Catalog("b").Grants(r.CRN(), "kms", "kms.secrets.read") || !d.Catalog("b").Grants(kept.CRN(), "kms", "kms.secrets.read") {
			t.Fatal("one account's roles are in the other one's catalog")
		}
	}
}
