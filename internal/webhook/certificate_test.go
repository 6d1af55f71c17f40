package webhook

import (
	"crypto/x509"
	"log/slog"
	"maps"
	"slices"
	"testing"
	"time"
)

var newYear = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func testKeeper(life time.Duration) *keeper {
	return &keeper{
		names: []string{"tabard-webhook.tabard-system.svc", "127.0.0.1"}, life: life, namespace: "tabard-system", secret: "s",
		log: slog.New(slog.DiscardHandler), metrics: newMetrics(),
	}
}

// stepped takes the step that is due.
func stepped(t *testing.T, k *keeper, m *material, published bool, now time.Time) *material {
	t.Helper()
	next, err := k.step(m, published, now)
	if err != nil {
		t.Fatal(err)
	}
	return next
}

// stored is the Secret that holds material.
func stored(t *testing.T, k *keeper, m *material) *object {
	t.Helper()
	o, err := k.encode(m, nil)
	if err != nil {
		t.Fatal(err)
	}
	return o
}

// reread is material as the next reader of the Secret finds it.
func reread(t *testing.T, k *keeper, m *material) *material {
	t.Helper()
	out, err := parse(stored(t, k, m))
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// trusts says why an API server that knows a bundle does not trust what a
// replica serves.
func trusts(bundle []*x509.Certificate, p *pair, now time.Time) error {
	pool := x509.NewCertPool()
	for _, c := range bundle {
		pool.AddCert(c)
	}
	_, err := p.certificate.Verify(x509.VerifyOptions{Roots: pool, DNSName: "tabard-webhook.tabard-system.svc", CurrentTime: now})
	return err
}

func TestAtEveryMomentOfAYearEachReplicaIsTrustedByEachAPIServer(t *testing.T) {
	k := testKeeper(90 * 24 * time.Hour)
	secret := stepped(t, k, nil, false, newYear)
	// Two replicas look in turn, and an API server may be one look behind the
	// configuration.
	var slow []*x509.Certificate
	configuration := secret.bundle
	serving := []*pair{secret.current, secret.current}
	rotations, steps := 0, 0
	for now := newYear; now.Before(newYear.AddDate(1, 0, 0)); {
		for i := range serving {
			seen := reread(t, k, secret)
			next := stepped(t, k, seen, slices.EqualFunc(configuration, seen.bundle, (*x509.Certificate).Equal), now)
			if next != seen {
				steps++
				secret = next
			}
			slow, configuration = configuration, next.bundle
			if !serving[i].certificate.Equal(next.current.certificate) {
				rotations++
			}
			serving[i] = next.current
			for j, p := range serving {
				for name, bundle := range map[string][]*x509.Certificate{"an API server": configuration, "a slow API server": slow} {
					if err := trusts(bundle, p, now); err != nil {
						t.Fatalf("%s: replica %d is not trusted by %s: %v", now, j, name, err)
					}
				}
			}
			if len(secret.bundle) > 2 {
				t.Fatalf("%s: %d authorities", now, len(secret.bundle))
			}
		}
		interval := k.interval()
		if secret.next == nil && len(secret.bundle) == 1 { // nothing happens between change-overs
			interval = min(max(secret.current.renewal().Add(-3*interval).Sub(now), interval), 24*time.Hour)
		}
		now = now.Add(interval)
	}
	if rotations != 2*6 || steps != 3*6 {
		t.Errorf("%d rotations in %d steps, want 6 of each replica, in 3 steps each", rotations, steps)
	}
}

func TestANextCertificateIsNotServedBeforeItsAuthorityIsOut(t *testing.T) {
	k := testKeeper(time.Hour)
	first := stepped(t, k, nil, false, newYear)
	now := newYear.Add(45 * time.Minute)
	announced := stepped(t, k, reread(t, k, first), true, now)
	if announced.next == nil || len(announced.bundle) != 2 || !announced.current.certificate.Equal(first.current.certificate) {
		t.Fatalf("announced %+v", announced)
	}
	if m := stepped(t, k, announced, true, now.Add(k.changeover()-time.Second)); m != announced {
		t.Error("the next certificate is served too soon")
	}
	now = now.Add(k.changeover())
	if m := stepped(t, k, announced, false, now); m != announced {
		t.Error("the next certificate is served although its authority is not out")
	}
	served := stepped(t, k, announced, true, now)
	if served.next != nil || !served.current.certificate.Equal(announced.next.certificate) || len(served.bundle) != 2 {
		t.Fatalf("served %+v", served)
	}
	if m := stepped(t, k, served, true, now.Add(time.Second)); m != served {
		t.Error("the old authority leaves too soon")
	}
	now = now.Add(k.changeover())
	left := stepped(t, k, served, true, now)
	if len(left.bundle) != 1 || trusts(left.bundle, left.current, now) != nil {
		t.Fatalf("left %+v", left)
	}
}

func TestACertificateThatCannotBeServedIsReplacedAtOnce(t *testing.T) {
	k := testKeeper(time.Hour)
	first := stepped(t, k, nil, false, newYear)
	late := stepped(t, k, reread(t, k, first), true, newYear.Add(2*time.Hour))
	if late.current.certificate.Equal(first.current.certificate) || len(late.bundle) != 1 {
		t.Errorf("after the end of the certificate there is %+v", late)
	}
	k.names = append(k.names, "192.0.2.7")
	moved := stepped(t, k, reread(t, k, first), true, newYear.Add(time.Minute))
	if !moved.current.good(k.names, newYear) || len(moved.bundle) != 2 {
		t.Errorf("under another address there is %+v", moved)
	}
}

func TestWhatASecretHoldsIsCheckedBeforeItIsServed(t *testing.T) {
	k := testKeeper(time.Hour)
	good := stored(t, k, stepped(t, k, nil, false, newYear))
	other := stored(t, k, stepped(t, k, nil, false, newYear))
	if _, err := parse(good); err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string]map[string][]byte{
		"another key":        {keyKey: other.Data[keyKey]},
		"another authority":  {keyBundle: other.Data[keyBundle]},
		"no authority":       {keyBundle: nil},
		"no key":             {keyKey: nil},
		"garbage":            {keyCertificate: []byte("garbage")},
		"garbage as next":    {keyNext: []byte("garbage")},
		"a next of nobody's": {keyNext: other.Data[keyCertificate], keyNextKey: other.Data[keyKey]},
		"garbage among":      {keyBundle: append([]byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"), good.Data[keyBundle]...)},
	} {
		o := *good
		o.Data = maps.Clone(good.Data)
		maps.Copy(o.Data, data)
		if _, err := parse(&o); err == nil {
			t.Errorf("%s is taken", name)
		}
	}
}

func TestTheAuthoritysKeyIsKeptNowhere(t *testing.T) {
	k := testKeeper(time.Hour)
	m := stepped(t, k, nil, false, newYear)
	if o := stored(t, k, m); len(o.Data) != 3 || m.current.certificate.IsCA || m.current.key.PublicKey.Equal(m.bundle[0].PublicKey) {
		t.Errorf("the Secret holds %d entries", len(o.Data))
	}
}
