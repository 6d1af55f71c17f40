package attest_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"tabard.dev/tabard/internal/attest"
	"tabard.dev/tabard/internal/cluster"
	"tabard.dev/tabard/internal/identity"
	"tabard.dev/tabard/internal/jwt/jwttest"
)

var userChecks = kubernetesChecks

type providers []*identity.Provider

func (p providers) ProvidersOf(issuer string) []*identity.Provider {
	var out []*identity.Provider
	for _, one := range p {
		if one.Issuer == issuer {
			out = append(out, one)
		}
	}
	return out
}

// desk is a verifier that knows one identity provider, and the provider's key.
type desk struct {
	*attest.Users
	clock    *clock
	key      *ecdsa.PrivateKey
	provider *identity.Provider
}

func newProvider(account string, jwks []byte) *identity.Provider {
	return &identity.Provider{ID: "Idp-" + account[:4], AccountID: account, Name: "staff", Issuer: "https://idp.test", Audience: "tabard", JWKS: jwks}
}

func newDesk(t *testing.T, more ...*identity.Provider) *desk {
	t.Helper()
	d := &desk{clock: newClock(), key: jwttest.Key(t, elliptic.P256())}
	d.provider = newProvider(home, jwttest.Set(t, jwttest.JWK(d.key.Public(), "k1", "ES256")))
	d.Users = &attest.Users{Providers: append(providers{d.provider}, more...), Keys: &attest.Keys{Now: d.clock.Now}, Now: d.clock.Now}
	return d
}

func (d *desk) claims(change object) string {
	m := object{
		"iss": d.provider.Issuer, "aud": d.provider.Audience, "sub": "u-1", "name": "Ada Lovelace", "email": "ada@example.com", "email_verified": true,
		"iat": d.clock.Now().Unix(), "exp": d.clock.Now().Add(5 * time.Minute).Unix(), "groups": []string{"ops", "dev"}, "level": 3, "staff": true,
	}
	for k, v := range change {
		if m[k] = v; v == nil {
			delete(m, k)
		}
	}
	b, err := json.Marshal(m)
	if err != nil {
		panic(err)
	}
	return string(b)
}

func (d *desk) token(t *testing.T, change object) string {
	t.Helper()
	return jwttest.ES256(t, d.key, "k1", d.claims(change), "")
}

func TestAnIDTokenProvesAPersonAndItsClaims(t *testing.T) {
	d := newDesk(t)
	proofs, err := d.Verify(ctx, d.token(t, object{"nested": object{"a": "b"}, "mixed": []any{"a", 1, true, nil, object{}, []string{"x"}}, "none": nil, "empty": []string{}}))
	if err != nil || len(proofs) != 1 {
		t.Fatalf("%d proofs, %v", len(proofs), err)
	}
	p := proofs[0]
	wantTrace(t, p.Trace, userChecks, "")
	if p.Provider != d.provider || p.Subject != "u-1" || p.Email != "ada@example.com" || p.User.Realm != "https://idp.test" || p.User.AccountID != home || p.User.Name != "Ada Lovelace" {
		t.Errorf("proof %+v", p)
	}
	for name, want := range map[string]any{
		"sub": "u-1", "groups": []string{"ops", "dev"}, "level": "3", "staff": "true", "mixed": []string{"a", "1", "true"}, "empty": []string{}, "email": "ada@example.com",
	} {
		if got := p.User.Claims[name]; fmt.Sprintf("%#v", got) != fmt.Sprintf("%#v", want) {
			t.Errorf("claim %s is %#v, want %#v", name, got, want)
		}
	}
	for _, absent := range []string{"nested", "none"} {
		if v, ok := p.User.Claims[absent]; ok {
			t.Errorf("claim %s is %#v", absent, v)
		}
	}
}

func TestAPersonIsCalledByWhatTheTokenHas(t *testing.T) {
	d := newDesk(t)
	for want, change := range map[string]object{
		"Ada Lovelace": nil, "ada@example.com": {"name": nil}, "u-1": {"name": nil, "email": nil}, "u-2": {"name": "", "email": "", "sub": "u-2"},
	} {
		proofs, err := d.Verify(ctx, d.token(t, change))
		if err != nil || proofs[0].User.Name != want {
			t.Errorf("%+v, %v; want the name %q", proofs, err, want)
		}
	}
}

func TestOnlyAVerifiedAddressIsAProof(t *testing.T) {
	d := newDesk(t)
	for _, tt := range []struct {
		verified any
		want     string
	}{
		{true, "ada@example.com"},
		{"true", "ada@example.com"},
		{false, ""},
		{nil, ""},
		{"false", ""},
		{"True", ""},
		{"yes", ""},
		{"", ""},
		{1, ""},
		{[]any{true}, ""},
		{object{"email": true}, ""},
	} {
		proofs, err := d.Verify(ctx, d.token(t, object{"email_verified": tt.verified}))
		if err != nil || proofs[0].Email != tt.want {
			t.Errorf("email_verified %v: %+v, %v", tt.verified, proofs, err)
		}
	}
	proofs, err := d.Verify(ctx, d.token(t, object{"email_verified": nil, "Email_Verified": true, "EMAIL_VERIFIED": "true"}))
	if err != nil || proofs[0].Email != "" {
		t.Errorf("verified under another name: %+v, %v", proofs, err)
	}
	proofs, err = d.Verify(ctx, d.token(t, object{"email": nil}))
	if err != nil || proofs[0].Email != "" {
		t.Errorf("no address: %+v, %v", proofs, err)
	}
}

func TestAnIDTokenOfEveryAsymmetricAlgorithmIsAProof(t *testing.T) {
	d := newDesk(t)
	p384, rsa := jwttest.Key(t, elliptic.P384()), jwttest.RSA(t)
	d.provider.JWKS = jwttest.Set(t, jwttest.JWK(d.key.Public(), "k1", "ES256"), jwttest.JWK(p384.Public(), "k2", ""), jwttest.JWK(rsa.Public(), "k3", "RS256"))
	for _, raw := range []string{
		d.token(t, nil),
		jwttest.Sign(t, `{"alg":"ES384","kid":"k2"}`, d.claims(nil), p384, 384),
		jwttest.Sign(t, `{"alg":"RS256","kid":"k3","typ":"JWT"}`, d.claims(nil), rsa, 256),
	} {
		if _, err := d.Verify(ctx, raw); err != nil {
			t.Error(err)
		}
	}
	_, err := d.Verify(ctx, jwttest.Sign(t, `{"alg":"RS512","kid":"k3"}`, d.claims(nil), rsa, 512))
	wantRefusal(t, err, attest.BadSignature, userChecks, attest.CheckSignature)
}

func TestEachFaultOfAnIDTokenHasItsReason(t *testing.T) {
	d := newDesk(t)
	at := func(x time.Duration) int64 { return d.clock.Now().Add(x).Unix() }
	with := func(change object) string { return d.token(t, change) }
	part := strings.Split(with(nil), ".")
	other := jwttest.Key(t, elliptic.P256())
	type refusal struct {
		reason attest.Reason
		check  string
	}
	malformed, unknown := refusal{attest.Malformed, attest.CheckForm}, refusal{attest.UnknownIssuer, attest.CheckIssuer}
	signature, audience := refusal{attest.BadSignature, attest.CheckSignature}, refusal{attest.WrongAudience, attest.CheckAudience}
	expired, badTime := refusal{attest.Expired, attest.CheckTime}, refusal{attest.BadTime, attest.CheckTime}
	claims, fine := refusal{attest.BadClaims, attest.CheckClaims}, refusal{}
	twice := func(member string) string {
		return jwttest.ES256(t, d.key, "k1", strings.TrimSuffix(d.claims(nil), "}")+","+member+"}", "")
	}
	for _, tt := range []struct {
		name string
		raw  string
		want refusal
	}{
		{"nothing", "", malformed},
		{"a word", "assertion", malformed},
		{"alg none", jwttest.Sign(t, `{"alg":"none","kid":"k1"}`, d.claims(nil), nil, 256), malformed},
		{"the type of an access token", jwttest.ES256(t, d.key, "k1", d.claims(nil), `,"typ":"at+jwt"`), malformed},
		{"a subject twice", twice(`"sub":"u-2"`), malformed},
		{"an address twice", twice(`"email":"eve@example.com"`), malformed},
		{"a verification twice", twice(`"email_verified":true`), malformed},
		{"a group twice", twice(`"groups":["admin"]`), malformed},
		{"a subject that is a number", with(object{"sub": 1}), malformed},
		{"an address that is a list", with(object{"email": []string{"ada@example.com"}}), malformed},
		{"an audience that is a number", with(object{"aud": 1}), malformed},
		{"a list", jwttest.ES256(t, d.key, "k1", `[]`, ""), malformed},

		{"an issuer that nobody registered", with(object{"iss": "https://other.test"}), unknown},
		{"the issuer with a slash", with(object{"iss": "https://idp.test/"}), unknown},
		{"no issuer", with(object{"iss": nil}), unknown},
		{"an issuer under another name", with(object{"iss": nil, "ISS": "https://idp.test"}), unknown},

		{"no signature", part[0] + "." + part[1] + ".", signature},
		{"another key of the same id", jwttest.ES256(t, other, "k1", d.claims(nil), ""), signature},
		{"another key of an unknown id", jwttest.ES256(t, other, "k2", d.claims(nil), ""), signature},
		{"an RSA header on the elliptic-curve key", jwttest.Sign(t, `{"alg":"RS256","kid":"k1"}`, d.claims(nil), jwttest.RSA(t), 256), signature},
		{"changed claims", part[0] + "." + strings.Split(with(object{"sub": "u-2"}), ".")[1] + "." + part[2], signature},

		{"another audience", with(object{"aud": "other"}), audience},
		{"no audience", with(object{"aud": nil}), audience},
		{"an empty audience", with(object{"aud": ""}), audience},
		{"an audience in another case", with(object{"aud": "Tabard"}), audience},
		{"the audience as a list of one", with(object{"aud": []string{"tabard"}}), fine},
		{"several audiences without a party", with(object{"aud": []string{"tabard", "other"}}), audience},
		{"several audiences for another party", with(object{"aud": []string{"tabard", "other"}, "azp": "other"}), audience},
		{"several audiences for us", with(object{"aud": []string{"other", "tabard"}, "azp": "tabard"}), fine},
		{"several audiences without ours, for us", with(object{"aud": []string{"other", "more"}, "azp": "tabard"}), audience},
		{"the party under another name", with(object{"aud": []string{"tabard", "other"}, "AZP": "tabard"}), audience},

		{"expired", with(object{"exp": at(-time.Second), "iat": at(-time.Minute)}), expired},
		{"expiring now", with(object{"exp": at(0), "iat": at(-time.Minute)}), expired},
		{"made an hour ago for a day", with(object{"exp": at(23 * time.Hour), "iat": at(-time.Hour)}), expired},
		{"made nearly an hour ago for a day", with(object{"exp": at(23 * time.Hour), "iat": at(time.Second - time.Hour)}), fine},
		{"made now for a year", with(object{"exp": at(365 * 24 * time.Hour)}), fine},
		{"no end", with(object{"exp": nil}), badTime},
		{"no beginning", with(object{"iat": nil}), badTime},
		{"made in the future", with(object{"iat": at(31 * time.Second)}), badTime},
		{"made so far in the future that the sum overflows", jwttest.ES256(t, d.key, "k1", strings.Replace(d.claims(nil), fmt.Sprintf(`"iat":%d`, at(0)), `"iat":9223372036854775000`, 1), ""), malformed},
		{"not valid before later", with(object{"nbf": at(31 * time.Second)}), badTime},
		{"made before time began", with(object{"iat": -1}), badTime},

		{"no subject", with(object{"sub": nil}), claims},
		{"an empty subject", with(object{"sub": ""}), claims},
		{"a subject under another name", with(object{"sub": nil, "Sub": "u-1"}), claims},
		{"a subject that is too long", with(object{"sub": strings.Repeat("x", 256)}), claims},
		{"a subject that is long", with(object{"sub": strings.Repeat("x", 255)}), fine},
	} {
		t.Run(tt.name, func(t *testing.T) {
			proofs, err := d.Verify(ctx, tt.raw)
			if tt.want == fine {
				if err != nil || len(proofs) != 1 {
					t.Errorf("%d proofs, %v", len(proofs), err)
				}
				return
			}
			if len(proofs) != 0 {
				t.Fatalf("%d proofs", len(proofs))
			}
			r := wantRefusal(t, err, tt.want.reason, userChecks, tt.want.check)
			aimed := []string{home}
			if tt.want == malformed || tt.want == unknown {
				aimed = nil
			}
			if got := accounts(r); !slices.Equal(got, aimed) {
				t.Errorf("accounts %v, want %v", got, aimed)
			}
			if part[2] != "" && strings.Contains(fmt.Sprint(r.Trace, r.Error()), part[2]) {
				t.Error("the refusal holds the token's signature")
			}
		})
	}
}

func TestAPublicKeyOfAProviderIsNotASharedSecret(t *testing.T) {
	d := newDesk(t)
	rsa := jwttest.RSA(t)
	d.provider.JWKS = jwttest.Set(t, jwttest.JWK(d.key.Public(), "k1", "ES256"), jwttest.JWK(rsa.Public(), "k3", ""))
	for kid, public := range map[string]any{"k1": d.key.Public(), "k3": rsa.Public()} {
		for form, secret := range jwttest.SecretsOf(t, public, kid) {
			for bits, alg := range map[int]string{256: "HS256", 384: "HS384", 512: "HS512"} {
				raw := jwttest.Sign(t, `{"alg":"`+alg+`","kid":"`+kid+`"}`, d.claims(nil), secret, bits)
				if proofs, err := d.Verify(ctx, raw); err == nil {
					t.Errorf("%s with %s of %s: %d proofs", alg, form, kid, len(proofs))
				}
			}
		}
	}
}

func TestAHeaderCannotChooseTheProvidersKey(t *testing.T) {
	d := newDesk(t)
	attacker := jwttest.Key(t, elliptic.P256())
	for name, more := range jwttest.Headers(t, attacker, "k1") {
		if proofs, err := d.Verify(ctx, jwttest.ES256(t, attacker, "k1", d.claims(nil), more)); err == nil {
			t.Errorf("%s: %d proofs", name, len(proofs))
		}
	}
	for _, kid := range jwttest.KeyIDs {
		if proofs, err := d.Verify(ctx, jwttest.ES256(t, attacker, kid, d.claims(nil), "")); err == nil {
			t.Errorf("key id %q: %d proofs", kid, len(proofs))
		}
	}
}

func TestADisabledProviderProvesNothing(t *testing.T) {
	d := newDesk(t)
	d.provider.Disabled = true
	_, err := d.Verify(ctx, d.token(t, nil))
	wantRefusal(t, err, attest.UnknownIssuer, userChecks, attest.CheckIssuer)
	second := newProvider(away, d.provider.JWKS)
	d.Providers = providers{d.provider, second}
	if proofs, err := d.Verify(ctx, d.token(t, nil)); err != nil || len(proofs) != 1 || proofs[0].Provider != second {
		t.Errorf("%+v, %v", proofs, err)
	}
}

func TestAnIssuerOfTwoAccountsIsProvedToEachByItsOwnRegistration(t *testing.T) {
	d := newDesk(t)
	second := newProvider(away, d.provider.JWKS)
	d.Providers = providers{d.provider, second}
	proofs, err := d.Verify(ctx, d.token(t, nil))
	if err != nil || len(proofs) != 2 || proofs[0].User.AccountID != home || proofs[1].User.AccountID != away || proofs[1].Provider != second {
		t.Fatalf("%+v, %v", proofs, err)
	}
	// The second one knows another key under the same id, or wants another
	// audience: then it takes no part.
	for name, change := range map[string]func(){
		"key": func() {
			second.JWKS = jwttest.Set(t, jwttest.JWK(jwttest.Key(t, elliptic.P256()).Public(), "k1", "ES256"))
		},
		"audience": func() { second.JWKS, second.Audience = d.provider.JWKS, "their-client" },
	} {
		change()
		second.Revision++
		proofs, err = d.Verify(ctx, d.token(t, nil))
		if err != nil || len(proofs) != 1 || proofs[0].User.AccountID != home {
			t.Errorf("another %s: %+v, %v", name, proofs, err)
		}
	}
	// When neither is met, each account sees its own checks, and the caller how
	// far he came.
	second.Audience = "their-client"
	second.JWKS = jwttest.Set(t, jwttest.JWK(jwttest.Key(t, elliptic.P256()).Public(), "k1", "ES256"))
	second.Revision++
	_, err = d.Verify(ctx, d.token(t, object{"aud": "nobody"}))
	r := wantRefusal(t, err, attest.WrongAudience, userChecks, attest.CheckAudience)
	if !slices.Equal(accounts(r), []string{home, away}) {
		t.Fatalf("accounts %v", accounts(r))
	}
	wantTrace(t, r.Aimed[0].Trace, userChecks, attest.CheckAudience)
	wantTrace(t, r.Aimed[1].Trace, userChecks, attest.CheckSignature)
	if strings.Contains(fmt.Sprint(r.Aimed[0].Trace), "their-client") || strings.Contains(fmt.Sprint(r.Aimed[1].Trace), `"tabard"`) {
		t.Errorf("one account sees the other's registration: %+v", r.Aimed)
	}
}

// A cluster and a provider may have one issuer, and share the cache of keys.
func TestKeysOfAClusterAreNotThoseOfAProvider(t *testing.T) {
	d := newDesk(t)
	podKey := jwttest.Key(t, elliptic.P256())
	c := uploaded("c0ffee", jwttest.Set(t, jwttest.JWK(podKey.Public(), "k1", "ES256")))
	c.Issuer, c.Audience = d.provider.Issuer, d.provider.Audience
	pods := &attest.Workloads{Clusters: registered{c}, Keys: d.Keys, Now: d.clock.Now}
	claims := d.claims(object{
		"sub":           "system:serviceaccount:apps:lister",
		"kubernetes.io": object{"namespace": "apps", "serviceaccount": object{"name": "lister"}},
	})
	byPod, byProvider := jwttest.ES256(t, podKey, "k1", claims, ""), jwttest.ES256(t, d.key, "k1", claims, "")
	for range 2 { // in either order of the first fetch
		if _, err := d.Verify(ctx, byProvider); err != nil {
			t.Error(err)
		}
		if _, _, err := pods.Verify(ctx, byPod); err != nil {
			t.Error(err)
		}
		_, err := d.Verify(ctx, byPod)
		wantRefusal(t, err, attest.BadSignature, userChecks, attest.CheckSignature)
		_, _, err = pods.Verify(ctx, byProvider)
		wantRefusal(t, err, attest.BadSignature, kubernetesChecks, attest.CheckSignature)
		d.Keys = &attest.Keys{Now: d.clock.Now}
		pods.Keys = d.Keys
	}
	if a, b := attest.KeySource(d.provider), c; a.ID == b.ID {
		t.Error("they share a place in the cache")
	}
}

func TestAProvidersKeysAreFetchedAndTheirLossIsNotTheTokensFault(t *testing.T) {
	d := newDesk(t)
	i := newIssuer(t, jwttest.JWK(d.key.Public(), "k1", "ES256"))
	d.provider.Issuer, d.provider.JWKS = i.URL, nil
	d.provider.CA = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: i.Certificate().Raw}))
	for range 5 {
		if _, err := d.Verify(ctx, d.token(t, nil)); err != nil {
			t.Fatal(err)
		}
	}
	i.wantFetches(t, 1)
	// A rotation is noticed.
	next := jwttest.Key(t, elliptic.P256())
	i.set(func(i *issuer) { i.keys = jwttest.Set(t, jwttest.JWK(next.Public(), "k2", "ES256")) })
	d.clock.advance(11 * time.Second)
	if _, err := d.Verify(ctx, jwttest.ES256(t, next, "k2", d.claims(nil), "")); err != nil {
		t.Error(err)
	}
	_, err := d.Verify(ctx, d.token(t, nil))
	wantRefusal(t, err, attest.BadSignature, userChecks, attest.CheckSignature)

	i.set(func(i *issuer) { i.discovery = fails })
	d.clock.advance(2 * time.Hour)
	_, err = d.Verify(ctx, jwttest.ES256(t, next, "k2", d.claims(nil), ""))
	r := wantRefusal(t, err, attest.KeysUnavailable, userChecks, attest.CheckSignature)
	if r.Cause == nil || strings.Contains(r.Detail, i.URL) || !slices.Equal(accounts(r), []string{home}) {
		t.Errorf("refusal %+v", r)
	}
}

func TestTheKeySourceOfAProviderIsTheProvider(t *testing.T) {
	p := newProvider(home, []byte("{}"))
	p.Revision, p.CA = 7, "pem"
	c := attest.KeySource(p)
	if want := (cluster.Cluster{Meta: p.Meta, ID: p.ID, Name: p.Name, Issuer: p.Issuer, CA: p.CA, JWKS: p.JWKS}); fmt.Sprintf("%+v", *c) != fmt.Sprintf("%+v", want) {
		t.Errorf("%+v, want %+v", *c, want)
	}
}
