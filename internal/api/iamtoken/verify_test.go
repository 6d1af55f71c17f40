package iamtoken_test

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	josejwt "github.com/go-jose/go-jose/v4/jwt"
	"github.com/google/go-cmp/cmp"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/grant"
	"tabard.dev/tabard/internal/journal"
	"tabard.dev/tabard/internal/store"
)

func (s *stack) introspect(f url.Values, options ...option) *answer {
	s.T.Helper()
	return s.send("/identity/introspect", f.Encode(), options...)
}

func TestIntrospectionShowsALivingTokensClaims(t *testing.T) {
	s := start(t)
	raw := s.access(s.Owner.APIKey)
	want := claims(t, raw)
	want["active"] = true
	for _, options := range [][]option{nil, {bx}} {
		if diff := cmp.Diff(want, s.introspect(form("token", raw), options...).want(200)); diff != "" {
			t.Error(diff)
		}
	}
	a := s.introspect(form("apikey", s.Owner.APIKey))
	if e := s.event(a); e.Action != "iam-identity.user-apikey.introspect" || e.Outcome != activity.Success || e.AccountID != s.Owner.AccountID || e.Initiator.ID != s.Owner.IAMID {
		t.Errorf("a key that is tried leaves the event %+v", e)
	}
	m := a.want(200)
	if m["active"] != true || m["iam_id"] != s.Owner.IAMID || m["account"].(map[string]any)["bss"] != s.Owner.AccountID || m["realmid"] != "IBMid" {
		t.Errorf("introspection of an API key: %v", m)
	}
}

func TestIntrospectionSaysNothingAboutWhatIsNotActive(t *testing.T) {
	s := start(t)
	u := s.user(s.Owner.AccountID, "IBMid-ADA")
	key, secret := s.apiKey(s.Owner.AccountID, u.IAMID)
	m := s.post(apiKeyForm(secret), bx).want(200)
	raw, refresh := m["access_token"].(string), m["refresh_token"].(string)
	old := s.access(s.Owner.APIKey)
	k := s.issuer("https://cluster.test")
	k.cluster(s.Owner.AccountID, "c")
	inactive := func(why string, f url.Values) {
		t.Helper()
		if diff := cmp.Diff(map[string]any{"active": false}, s.introspect(f).want(200)); diff != "" {
			t.Errorf("%s: %s", why, diff)
		}
	}
	inactive("garbage", form("token", "garbage"))
	inactive("a refresh token", form("token", refresh))
	inactive("a service-account token", form("token", k.token()))
	inactive("a tampered token", form("token", raw[:len(raw)-4]+"AAAA"))
	inactive("an API key as a token", form("token", secret))
	inactive("an unknown API key", form("apikey", "unknown"))
	inactive("a token as an API key", form("apikey", raw))

	disabled := *key
	disabled.Disabled = true
	s.update(func(tx *directory.Tx) { s.d.APIKeys.Put(tx, &disabled) })
	inactive("a disabled key", form("apikey", secret))
	inactive("a token of a disabled key", form("token", raw))
	s.update(func(tx *directory.Tx) { s.d.APIKeys.Delete(tx, &disabled) })
	inactive("a deleted key", form("apikey", secret))
	inactive("a token of a deleted key", form("token", raw))
	s.clock.advance(time.Hour)
	inactive("an expired token", form("token", old))
}

func TestIntrospectionReadsItsFormLikeTheTokenEndpoint(t *testing.T) {
	s := start(t)
	raw := s.access(s.Owner.APIKey)
	s.introspect(form("other", "x")).wantError(400, grant.CodeMissing)
	s.introspect(url.Values{"token": {raw, raw}}).wantError(400, "BXNIM0107E")
	s.introspect(form("token", raw), basic("bx", "wrong")).wantError(401, grant.CodeClient)
	s.introspect(form("token", raw), with("Content-Type", "application/json")).wantError(415, "BXNIM0105E")
	s.introspect(form("token", strings.Repeat("x", 65<<10))).wantError(413, "BXNIM0106E")
	if a := s.send("/identity/introspect?token="+raw, ""); a.status != 400 {
		t.Errorf("a token in the URL is read: %d %s", a.status, a.raw)
	}
	s.introspect(form("token", raw+"\n")).want(200)
}

func (s *stack) get(path string) *answer {
	return s.do(httptest.NewRequest(http.MethodGet, path, nil))
}

func TestAVerifierFindsTheKeysThroughDiscovery(t *testing.T) {
	s := start(t)
	raw := s.access(s.Owner.APIKey)
	var doc struct {
		Issuer        string
		JWKSURI       string   `json:"jwks_uri"`
		TokenEndpoint string   `json:"token_endpoint"`
		Introspection string   `json:"introspection_endpoint"`
		Algs          []string `json:"id_token_signing_alg_values_supported"`
		Grants        []string `json:"grant_types_supported"`
		ResponseTypes []string `json:"response_types_supported"`
		SubjectTypes  []string `json:"subject_types_supported"`
	}
	a := s.get("/identity/.well-known/openid-configuration")
	if err := json.Unmarshal([]byte(a.raw), &doc); err != nil {
		t.Fatal(err)
	}
	if doc.Issuer != issuerURL || doc.TokenEndpoint != issuerURL+"/token" || doc.Introspection != issuerURL+"/introspect" ||
		len(doc.Algs) == 0 || len(doc.Grants) != 6 || len(doc.ResponseTypes) == 0 || len(doc.SubjectTypes) == 0 {
		t.Errorf("discovery document %s", a.raw)
	}
	a = s.get(strings.TrimPrefix(doc.JWKSURI, "http://tabard.test"))
	var set jose.JSONWebKeySet
	if err := json.Unmarshal([]byte(a.raw), &set); err != nil {
		t.Fatal(err)
	}
	if cc := a.header.Get("Cache-Control"); cc != "public, max-age=300" || a.header.Get("Pragma") != "" {
		t.Errorf("the key set cannot be kept: %v", a.header)
	}
	for _, key := range set.Keys {
		if !key.IsPublic() || !key.Valid() {
			t.Errorf("key %s is not a valid public key", key.KeyID)
		}
	}
	parsed, err := josejwt.ParseSigned(raw, []jose.SignatureAlgorithm{jose.ES256})
	if err != nil {
		t.Fatal(err)
	}
	var c josejwt.Claims
	if err := parsed.Claims(set, &c); err != nil {
		t.Fatal(err)
	}
	if c.Issuer != doc.Issuer || len(c.Audience) != 0 || c.NotBefore != nil {
		t.Errorf("claims %+v", c)
	}
	if len(parsed.Headers[0].ExtraHeaders) != 0 {
		t.Errorf("header %+v, want alg and kid alone", parsed.Headers[0])
	}
}

// broken is a store that cannot commit.
type broken struct{}

func (broken) Commit(context.Context, store.Batch) error {
	return errors.New("write /secret/path/tabard.db: no space left on device")
}

func TestNoTokenLeavesWithoutADurableRecord(t *testing.T) {
	s := start(t)
	k := s.issuer("https://cluster.test")
	p := s.profile(s.Owner.AccountID, "p", trustUser(s.Owner.IAMID))
	s.link(p, k.cluster(s.Owner.AccountID, "c"))
	m := s.post(apiKeyForm(s.Owner.APIKey), bx).want(200)
	j := journal.New(journal.Config{Store: broken{}})
	defer j.Close()
	s.wire(j)
	for name, f := range map[string]url.Values{
		"apikey":            apiKeyForm(s.Owner.APIKey),
		"refresh":           refreshForm(m["refresh_token"].(string)),
		"cr-token":          crForm(k.token(), "profile_id", p.ID),
		"assume":            assumeForm(m["access_token"].(string), "profile_id", p.ID),
		"refused apikey":    apiKeyForm("unknown"),
		"refused cr-token":  crForm("garbage", "profile_id", p.ID),
		"not eligible":      crForm(k.token(), "profile_id", "Profile-none"),
		"no grant at all":   form("x", "y"),
		"an unknown client": nil,
	} {
		t.Run(name, func(t *testing.T) {
			defer s.as(t)()
			client := bx
			if f == nil {
				client = basic("no", "no")
			}
			a := s.post(f, client)
			a.wantError(503, grant.CodeUnavailable)
			if a.header.Get("Retry-After") != "1" {
				t.Errorf("Retry-After %q", a.header.Get("Retry-After"))
			}
			for _, secret := range []string{"refresh_token", "secret", "space"} {
				if strings.Contains(a.raw, secret) {
					t.Errorf("the answer says %q: %s", secret, a.raw)
				}
			}
		})
	}
}

func TestAnAPIKeyIsNotTriedWithoutADurableRecord(t *testing.T) {
	s := start(t)
	j := journal.New(journal.Config{Store: broken{}})
	defer j.Close()
	s.wire(j)
	a := s.introspect(form("apikey", s.Owner.APIKey))
	a.wantError(503, grant.CodeUnavailable)
	if strings.Contains(a.raw, s.Owner.IAMID) || a.header.Get("Retry-After") != "1" {
		t.Errorf("answer %s", a.raw)
	}
	if m := s.introspect(form("apikey", "unknown")).want(200); m["active"] != false {
		t.Errorf("answer %v", m)
	}
}

func TestNoSecretStandsInAnyEvent(t *testing.T) {
	s := start(t)
	k := s.issuer("https://cluster.test")
	p := s.profile(s.Owner.AccountID, "p", trustUser(s.Owner.IAMID))
	s.link(p, k.cluster(s.Owner.AccountID, "c"))
	other := s.issuer("https://unknown.test")
	m := s.post(apiKeyForm(s.Owner.APIKey), bx).want(200)
	access, refresh := m["access_token"].(string), m["refresh_token"].(string)
	good, unknown := k.token(), other.token()
	assumed := s.post(assumeForm(access, "profile_id", p.ID)).want(200)["access_token"].(string)
	profile := s.post(crForm(good, "profile_id", p.ID)).want(200)["access_token"].(string)
	const wrong = "wrong-api-key-that-somebody-typed"
	for _, f := range []url.Values{
		refreshForm(refresh), refreshForm(access), refreshForm(wrong),
		crForm(unknown, "profile_id", p.ID), crForm(access, "profile_id", p.ID), crForm(refresh, "profile_id", p.ID),
		crForm(wrong, "profile_id", p.ID), crForm(wrong+"."+wrong+"."+wrong, "profile_id", p.ID), crForm(good, "profile_id", "Profile-none"),
		crForm(good+"x", "profile_id", p.ID), assumeForm(good, "profile_id", p.ID), assumeForm(wrong, "profile_id", p.ID),
		assumeForm(assumed, "profile_id", p.ID), apiKeyForm(wrong), apiKeyForm(access),
	} {
		s.post(f, bx)
		s.post(f, basic("bx", wrong))
	}
	s.send("/identity/token?apikey="+wrong, apiKeyForm(wrong).Encode())
	signature := func(raw string) string { return raw[strings.LastIndexByte(raw, '.')+1:] }
	secrets := []string{
		s.Owner.APIKey, wrong, s.Sealer.Hash(s.Owner.APIKey), s.Sealer.Hash(wrong),
		signature(access), signature(refresh), signature(good), signature(unknown), signature(assumed), signature(profile),
	}
	n := 0
	for _, account := range []string{s.Owner.AccountID, s.Other.AccountID} {
		stored, err := s.Store.Events(t.Context(), store.Query{AccountID: account, Limit: 1000})
		if err != nil {
			t.Fatal(err)
		}
		n += len(stored)
		for _, e := range stored {
			for _, secret := range secrets {
				if strings.Contains(string(e.Doc), secret) {
					t.Errorf("%q stands in the event %s", secret, e.Doc)
				}
			}
		}
	}
	if n < 30 {
		t.Errorf("only %d events", n)
	}
}
