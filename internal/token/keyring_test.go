package token_test

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"flag"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-jose/go-jose/v4"
	"pgregory.net/rapid"

	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/store/sqlite"
	"tabard.dev/tabard/internal/token"
)

var ctx = context.Background()

// clock is set by the test.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func newClock() *clock { return &clock{now: time.Date(2026, time.June, 15, 12, 0, 0, 0, time.UTC)} }

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

func sealer(t testing.TB, first byte) *token.Sealer {
	t.Helper()
	s, err := token.NewSealer(append([]byte{first}, make([]byte, 31)...))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func openDirectory(t testing.TB, file string, now func() time.Time) (*directory.Directory, func()) {
	t.Helper()
	s, err := sqlite.Open(ctx, file)
	if err != nil {
		t.Fatal(err)
	}
	d, err := directory.Open(ctx, directory.Config{Store: s, Now: now})
	if err != nil {
		t.Fatal(err)
	}
	return d, func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
}

const (
	rotation = 24 * time.Hour
	lead     = time.Hour
	maxLife  = 2 * time.Hour
)

func ringConfig(t testing.TB, d *directory.Directory, now func() time.Time) token.KeyRingConfig {
	return token.KeyRingConfig{
		Directory: d, Sealer: sealer(t, 1), Now: now, Log: slog.New(slog.NewTextHandler(io.Discard, nil)),
		Use: "access-token", Alg: "ES256", Rotation: rotation, Lead: lead, MaxLife: maxLife,
	}
}

// newRing opens a key ring in a directory of its own, with an issuer over it.
func newRing(t testing.TB, c *clock, change ...func(*token.KeyRingConfig)) (*token.KeyRing, *token.Issuer) {
	t.Helper()
	d, done := openDirectory(t, filepath.Join(t.TempDir(), "tabard.db"), c.Now)
	t.Cleanup(done)
	cfg := ringConfig(t, d, c.Now)
	for _, f := range change {
		f(&cfg)
	}
	k, err := token.NewKeyRing(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	return k, &token.Issuer{Keys: k, URL: issuerURL, Now: c.Now}
}

func kids(set jose.JSONWebKeySet) []string {
	out := make([]string, len(set.Keys))
	for i, k := range set.Keys {
		out[i] = k.KeyID
	}
	return out
}

func kidOf(t testing.TB, raw string) string {
	t.Helper()
	sig, err := jose.ParseSignedCompact(raw, []jose.SignatureAlgorithm{jose.ES256, jose.RS256})
	if err != nil {
		t.Fatal(err)
	}
	return sig.Signatures[0].Header.KeyID
}

// Ten days in steps of a quarter of an hour: there is always a signer, every key was
// published for the time of its lead before it signed, every token verifies
// until its last second, and keys that no token names are gone.
func TestKeysRotateWithoutAGapOverManyPeriods(t *testing.T) {
	c := newClock()
	k, issuer := newRing(t, c)
	const step = 15 * time.Minute
	type issued struct {
		raw     string
		expires time.Time
	}
	var alive []issued
	publishedSince := map[string]time.Time{}
	signed := []string{}
	start := c.Now()
	for c.Now().Before(start.Add(10 * rotation)) {
		if err := k.Rotate(ctx); err != nil {
			t.Fatal(err)
		}
		now := c.Now()
		set := k.JWKS()
		for _, kid := range kids(set) {
			if _, ok := publishedSince[kid]; !ok {
				publishedSince[kid] = now
			}
		}
		if n := len(set.Keys); n < 1 || n > 3 {
			t.Fatalf("at %s %d keys are published: %v", now, n, kids(set))
		}
		raw, claims, err := issuer.Issue(token.Claims{IAMID: "iam-Profile-1", Account: token.Account{BSS: account}}, token.AccessLife)
		if err != nil {
			t.Fatalf("at %s: %v", now, err)
		}
		kid := kidOf(t, raw)
		if !slices.Contains(signed, kid) {
			if len(signed) > 0 && now.Sub(publishedSince[kid]) < lead-step {
				t.Errorf("key %s signs %s after its publication", kid, now.Sub(publishedSince[kid]))
			}
			signed = append(signed, kid)
		}
		alive = append(alive, issued{raw, time.Unix(claims.Expires, 0)})
		for len(alive) > 0 && !now.Before(alive[0].expires) {
			if _, err := issuer.Verify(alive[0].raw); !errors.Is(err, token.ErrExpired) {
				t.Fatalf("at %s an expired token of key %s: %v", now, kidOf(t, alive[0].raw), err)
			}
			alive = alive[1:]
		}
		for _, a := range []issued{alive[0], alive[len(alive)-1]} {
			if _, err := issuer.Verify(a.raw); err != nil {
				t.Fatalf("at %s a token of key %s: %v", now, kidOf(t, a.raw), err)
			}
			if !slices.Contains(kids(set), kidOf(t, a.raw)) {
				t.Fatalf("at %s key %s has a living token and is not published", now, kidOf(t, a.raw))
			}
		}
		c.advance(step)
	}
	if len(signed) != 10 {
		t.Errorf("%d keys signed in ten periods: %v", len(signed), signed)
	}
}

// Whenever the server looks after its keys, it can sign, its newest token
// verifies until it expires, and the set does not grow: however long it slept.
func TestASleepingServerRecovers(t *testing.T) {
	if f := flag.Lookup("rapid.checks"); f.Value.String() == f.DefValue { // each one is a database
		if err := flag.Set(f.Name, "25"); err != nil {
			t.Fatal(err)
		}
		defer flag.Set(f.Name, f.DefValue)
	}
	file := filepath.Join(t.TempDir(), "tabard.db")
	rapid.Check(t, func(rt *rapid.T) {
		c := newClock()
		_ = os.Remove(file)
		_ = os.Remove(file + "-wal")
		_ = os.Remove(file + "-shm")
		d, done := openDirectory(t, file, c.Now)
		defer done()
		k, err := token.NewKeyRing(ctx, ringConfig(t, d, c.Now))
		if err != nil {
			rt.Fatal(err)
		}
		issuer := &token.Issuer{Keys: k, URL: issuerURL, Now: c.Now}
		var last string
		var ends time.Time
		for range rapid.IntRange(1, 8).Draw(rt, "naps") {
			nap := rapid.SampledFrom([]time.Duration{time.Second, time.Minute, lead / 2, lead, rotation - lead, rotation, rotation + lead, 3 * rotation, 1000 * rotation})
			c.advance(max(0, nap.Draw(rt, "nap")+time.Duration(rapid.IntRange(-2, 2).Draw(rt, "seconds"))*time.Second))
			if last != "" && c.Now().Before(ends) {
				if _, err := issuer.Verify(last); err != nil {
					rt.Fatalf("before the rotation a living token: %v", err)
				}
			}
			if err := k.Rotate(ctx); err != nil {
				rt.Fatal(err)
			}
			if last != "" && c.Now().Before(ends) {
				if _, err := issuer.Verify(last); err != nil {
					rt.Fatalf("after the rotation a living token: %v", err)
				}
			}
			raw, claims, err := issuer.Issue(token.Claims{IAMID: "iam-Profile-1", Account: token.Account{BSS: account}}, token.AccessLife)
			if err != nil {
				rt.Fatalf("no signer at %s: %v", c.Now(), err)
			}
			last, ends = raw, time.Unix(claims.Expires, 0)
			if n := len(k.JWKS().Keys); n > 4 {
				rt.Fatalf("%d keys", n)
			}
			if d.SigningKeys.Len() != len(k.JWKS().Keys) {
				rt.Fatalf("%d keys stored, %d published", d.SigningKeys.Len(), len(k.JWKS().Keys))
			}
		}
	})
}

func TestRunKeepsTheKeysTurning(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, done := openDirectory(t, filepath.Join(t.TempDir(), "tabard.db"), time.Now)
		k, err := token.NewKeyRing(ctx, ringConfig(t, d, time.Now))
		if err != nil {
			t.Fatal(err)
		}
		stop, cancel := context.WithCancel(ctx)
		var running sync.WaitGroup
		running.Go(func() { k.Run(stop) })
		signed := map[string]bool{}
		for range 3 * 24 * 4 {
			time.Sleep(15*time.Minute + time.Second)
			raw, err := k.Sign(map[string]string{}, "")
			if err != nil {
				t.Fatalf("at %s: %v", time.Now(), err)
			}
			signed[kidOf(t, raw)] = true
		}
		if len(signed) < 3 {
			t.Errorf("%d keys signed in three days", len(signed))
		}
		cancel()
		running.Wait()
		done()
		time.Sleep(time.Minute) // what the database driver starts ends by itself
	})
}

func TestARingIsTheSameAfterARestart(t *testing.T) {
	c := newClock()
	file := filepath.Join(t.TempDir(), "tabard.db")
	d, done := openDirectory(t, file, c.Now)
	k, err := token.NewKeyRing(ctx, ringConfig(t, d, c.Now))
	if err != nil {
		t.Fatal(err)
	}
	issuer := &token.Issuer{Keys: k, URL: issuerURL, Now: c.Now}
	raw, _, err := issuer.Issue(token.Claims{IAMID: "iam-Profile-1", Account: token.Account{BSS: account}}, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	before := kids(k.JWKS())
	done()
	c.advance(time.Minute)
	d, done = openDirectory(t, file, c.Now)
	defer done()
	if k, err = token.NewKeyRing(ctx, ringConfig(t, d, c.Now)); err != nil {
		t.Fatal(err)
	}
	if after := kids(k.JWKS()); !slices.Equal(before, after) {
		t.Errorf("keys %v, before the restart %v", after, before)
	}
	issuer = &token.Issuer{Keys: k, URL: issuerURL, Now: c.Now}
	if _, err := issuer.Verify(raw); err != nil {
		t.Errorf("a token from before the restart: %v", err)
	}
}

func TestSealedKeysAreUnreadableUnderAnotherMasterKey(t *testing.T) {
	c := newClock()
	file := filepath.Join(t.TempDir(), "tabard.db")
	d, done := openDirectory(t, file, c.Now)
	defer done()
	cfg := ringConfig(t, d, c.Now)
	if _, err := token.NewKeyRing(ctx, cfg); err != nil {
		t.Fatal(err)
	}
	cfg.Sealer = sealer(t, 2)
	if _, err := token.NewKeyRing(ctx, cfg); err == nil || !strings.Contains(err.Error(), "master key") {
		t.Errorf("error %v, want one that speaks of the master key", err)
	}
	if d.SigningKeys.Len() != 1 {
		t.Errorf("%d keys: the ring that could not be opened made one", d.SigningKeys.Len())
	}
}

func TestNoPrivateKeyLiesOpenInTheStore(t *testing.T) {
	c := newClock()
	dir := t.TempDir()
	d, done := openDirectory(t, filepath.Join(dir, "tabard.db"), c.Now)
	cfg := ringConfig(t, d, c.Now)
	if _, err := token.NewKeyRing(ctx, cfg); err != nil {
		t.Fatal(err)
	}
	row := d.SigningKeys.All()[0]
	der, err := cfg.Sealer.Open(row.Sealed, "signing key "+row.ID)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := x509.ParsePKCS8PrivateKey(der); err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(row.Sealed, der[20:]) {
		t.Error("the sealed key is the key")
	}
	done()
	files, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(b, der) || bytes.Contains(b, der[36:68]) {
			t.Errorf("%s holds the private key", f)
		}
	}
}

func TestASealedKeyCannotStandInForAnother(t *testing.T) {
	c := newClock()
	d, done := openDirectory(t, filepath.Join(t.TempDir(), "tabard.db"), c.Now)
	defer done()
	cfg := ringConfig(t, d, c.Now)
	if _, err := token.NewKeyRing(ctx, cfg); err != nil {
		t.Fatal(err)
	}
	row := *d.SigningKeys.All()[0]
	forged := row
	forged.ID, forged.Revision = "forged", 0
	if err := d.Update(ctx, "", func(tx *directory.Tx) error { d.SigningKeys.Put(tx, &forged); return nil }); err != nil {
		t.Fatal(err)
	}
	if _, err := token.NewKeyRing(ctx, cfg); err == nil {
		t.Error("a sealed key was opened under another id")
	}
}

func TestRingsOfOneInstallationDoNotShareKeys(t *testing.T) {
	c := newClock()
	d, done := openDirectory(t, filepath.Join(t.TempDir(), "tabard.db"), c.Now)
	defer done()
	cfg := ringConfig(t, d, c.Now)
	tokens, err := token.NewKeyRing(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	cfg.Use, cfg.Alg = "host/1", "RS256"
	host, err := token.NewKeyRing(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	a, b := kids(tokens.JWKS()), kids(host.JWKS())
	if len(a) != 1 || len(b) != 1 || a[0] == b[0] {
		t.Fatalf("key ids %v and %v, made in the same minute", a, b)
	}
	raw, err := host.Sign(token.Claims{
		IAMID: "iam-Profile-1", Account: token.Account{BSS: account}, Issuer: issuerURL,
		IssuedAt: c.Now().Unix(), Expires: c.Now().Add(time.Hour).Unix(),
	}, "")
	if err != nil {
		t.Fatal(err)
	}
	issuer := &token.Issuer{Keys: tokens, URL: issuerURL, Now: c.Now}
	if _, err := issuer.Verify(raw); !errors.Is(err, token.ErrUnknownKey) {
		t.Errorf("a token signed by the host's ring: error %v", err)
	}
}

func TestAChangeOfKeysIsToldInItsOwnTransaction(t *testing.T) {
	c := newClock()
	var told [][]string
	k, _ := newRing(t, c, func(cfg *token.KeyRingConfig) {
		cfg.Changed = func(_ *directory.Tx, set jose.JSONWebKeySet) { told = append(told, kids(set)) }
	})
	for range 30 {
		c.advance(time.Hour)
		if err := k.Rotate(ctx); err != nil {
			t.Fatal(err)
		}
		if last := told[len(told)-1]; !slices.Equal(last, kids(k.JWKS())) {
			t.Fatalf("told of %v, published are %v", last, kids(k.JWKS()))
		}
	}
	if len(told) != 3 || len(told[0]) != 1 || len(told[1]) != 2 || len(told[2]) != 1 {
		t.Errorf("told %v, want the first key, the next one beside it, and the next one alone", told)
	}
}

func TestRotationThatIsNotDueWritesNothing(t *testing.T) {
	c := newClock()
	k, _ := newRing(t, c)
	before := kids(k.JWKS())
	for range 100 {
		if err := k.Rotate(ctx); err != nil {
			t.Fatal(err)
		}
		c.advance(time.Minute)
	}
	if after := kids(k.JWKS()); !slices.Equal(before, after) {
		t.Errorf("keys %v, then %v", before, after)
	}
}

func TestAClockBeforeTheFirstKeyIsAnErrorAndNoPanic(t *testing.T) {
	c := newClock()
	k, issuer := newRing(t, c)
	c.advance(-48 * time.Hour)
	if err := k.Rotate(ctx); err != nil {
		t.Error(err)
	}
	if _, _, err := issuer.Issue(token.Claims{}, time.Hour); err == nil || !strings.Contains(err.Error(), "clock") {
		t.Errorf("error %v", err)
	}
}

func TestARingWithImpossiblePeriodsIsRefused(t *testing.T) {
	c := newClock()
	d, done := openDirectory(t, filepath.Join(t.TempDir(), "tabard.db"), c.Now)
	defer done()
	for name, change := range map[string]func(*token.KeyRingConfig){
		"a symmetric algorithm":            func(cfg *token.KeyRingConfig) { cfg.Alg = "HS256" },
		"no algorithm":                     func(cfg *token.KeyRingConfig) { cfg.Alg = "none" },
		"a rotation shorter than the lead": func(cfg *token.KeyRingConfig) { cfg.Rotation = 2 * cfg.Lead },
	} {
		cfg := ringConfig(t, d, c.Now)
		change(&cfg)
		if _, err := token.NewKeyRing(ctx, cfg); err == nil {
			t.Errorf("%s was taken", name)
		}
	}
}

func TestTheKeySetHoldsNothingPrivate(t *testing.T) {
	for _, alg := range []string{"ES256", "RS256"} {
		k, _ := newRing(t, newClock(), func(cfg *token.KeyRingConfig) { cfg.Alg = alg })
		for _, key := range k.JWKS().Keys {
			if !key.IsPublic() || !key.Valid() || key.Algorithm != alg || key.Use != "sig" || key.KeyID != "202606151200" {
				t.Errorf("key %+v", key)
			}
			b, err := key.MarshalJSON()
			if err != nil || bytes.Contains(b, []byte(`"d"`)) {
				t.Errorf("key %s, %v", b, err)
			}
		}
	}
}
