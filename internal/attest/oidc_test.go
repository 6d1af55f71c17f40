package attest_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"encoding/json"
	"fmt"
	"maps"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"tabard.dev/tabard/internal/attest"
	"tabard.dev/tabard/internal/cluster"
	"tabard.dev/tabard/internal/identity"
	"tabard.dev/tabard/internal/jwt/jwttest"
)

const (
	ciIssuer   = "https://ci.example.com"
	ciAudience = "https://tabard.example.com/identity"
	ciCRN      = "crn:v1:bluemix:public:iam-identity::a/4f1e0c0000000000000000000000aaaa::workload-issuer:WorkloadIssuer-1"
)

// ci is a CI service that an account has registered, with its key.
type ci struct {
	*attest.Workloads
	key     *ecdsa.PrivateKey
	issuers []*cluster.Issuer
	now     time.Time
}

func (c *ci) WorkloadIssuersOf(issuer string) []*cluster.Issuer {
	var out []*cluster.Issuer
	for _, i := range c.issuers {
		if i.Issuer == issuer {
			out = append(out, i)
		}
	}
	return out
}

type noClusters struct{}

func (noClusters) ClustersOf(string) []*cluster.Cluster          { return nil }
func (noClusters) ClusterGroupNames(c *cluster.Cluster) []string { return nil }
func (noClusters) ResourceGroupName(id string) string            { return "" }

func newCI(t *testing.T) *ci {
	t.Helper()
	c := &ci{key: jwttest.Key(t, elliptic.P256()), now: time.Date(2026, 11, 26, 12, 0, 0, 0, time.UTC)}
	now := func() time.Time { return c.now }
	c.Workloads = &attest.Workloads{Clusters: noClusters{}, Issuers: c, Keys: &attest.Keys{Now: now}, Now: now}
	c.issuers = []*cluster.Issuer{c.registration(t, "4f1e0c0000000000000000000000aaaa", ciCRN)}
	return c
}

func (c *ci) registration(t *testing.T, account, crn string) *cluster.Issuer {
	t.Helper()
	jwks, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{jwttest.JWK(c.key.Public(), "k1", "ES256")}})
	if err != nil {
		t.Fatal(err)
	}
	return &cluster.Issuer{
		ID: "WorkloadIssuer-" + account, CRN: crn, AccountID: account, Name: "ci", Issuer: ciIssuer, Audience: ciAudience, JWKS: jwks,
		Mapping: cluster.Mapping{Claims: map[string]string{
			"sub": "sub", "repository": "repository", "run": "run.number", "protected": "ref_protected", "teams": "teams", "odd": "https://ci.example.com/odd", "missing": "not.there",
		}, Pin: [][]string{{"repository"}}},
	}
}

func (c *ci) claims(change map[string]any) string {
	claims := map[string]any{
		"iss": ciIssuer, "aud": ciAudience, "sub": "repo:acme/shop:ref:refs/heads/main", "iat": c.now.Unix(), "exp": c.now.Add(5 * time.Minute).Unix(),
		"repository": "acme/shop", "run": map[string]any{"number": 12345678901234567}, "ref_protected": true,
		"teams": []any{"a", 1, map[string]any{}}, "https://ci.example.com/odd": "x", "secret": "not mapped", "issuer": "https://elsewhere", "crn": "crn:forged",
	}
	maps.Copy(claims, change)
	for k, v := range claims {
		if v == nil {
			delete(claims, k)
		}
	}
	b, err := json.Marshal(claims)
	if err != nil {
		panic(err)
	}
	return string(b)
}

func (c *ci) token(t *testing.T, change map[string]any) string {
	t.Helper()
	return jwttest.ES256(t, c.key, "k1", c.claims(change), "")
}

func TestAWorkloadIssuersTokenProvesWhatTheMappingNamesAndNothingElse(t *testing.T) {
	c := newCI(t)
	proofs, _, err := c.Verify(t.Context(), c.token(t, nil))
	if err != nil || len(proofs) != 1 {
		t.Fatalf("%d proofs, %v", len(proofs), err)
	}
	ev := proofs[0].Evidence
	want := map[string]any{
		"issuer": ciIssuer, "crn": ciCRN, "sub": "repo:acme/shop:ref:refs/heads/main", "repository": "acme/shop",
		"run": "12345678901234567", "protected": "true", "teams": []string{"a", "1"}, "odd": "x",
	}
	if fmt.Sprint(ev.Claims) != fmt.Sprint(want) {
		t.Errorf("claims %v, want %v", ev.Claims, want)
	}
	if ev.Type != identity.OIDC || ev.AccountID != c.issuers[0].AccountID || ev.CRN.String() != ciCRN || ev.Name != "ci:repo:acme/shop:ref:refs/heads/main" || ev.Namespace != "" {
		t.Errorf("evidence %+v", ev)
	}
}

func TestATokenThatIsNotTheIssuersOwnIsRefused(t *testing.T) {
	c := newCI(t)
	other := jwttest.Key(t, elliptic.P256())
	hours := func(n int) int64 { return c.now.Add(time.Duration(n) * time.Hour).Unix() }
	doubled := strings.Replace(c.claims(nil), `"repository":`, `"repository":"evil/shop","repository":`, 1)
	for name, tt := range map[string]struct {
		raw    string
		reason attest.Reason
	}{
		"another key":                       {jwttest.ES256(t, other, "k1", c.claims(nil), ""), attest.BadSignature},
		"a key that is not published":       {jwttest.ES256(t, c.key, "k2", c.claims(nil), ""), attest.BadSignature},
		"a shared secret":                   {jwttest.Sign(t, `{"alg":"HS256","kid":"k1"}`, c.claims(nil), []byte("x"), 256), attest.Malformed},
		"no signature":                      {jwttest.Sign(t, `{"alg":"none"}`, c.claims(nil), nil, 256), attest.Malformed},
		"another audience":                  {c.token(t, map[string]any{"aud": "https://github.com/acme"}), attest.WrongAudience},
		"the audience of pods":              {c.token(t, map[string]any{"aud": "iam"}), attest.WrongAudience},
		"no audience":                       {c.token(t, map[string]any{"aud": nil}), attest.WrongAudience},
		"an issuer with a slash more":       {c.token(t, map[string]any{"iss": ciIssuer + "/"}), attest.UnknownIssuer},
		"an issuer of an enterprise":        {c.token(t, map[string]any{"iss": ciIssuer + "/acme"}), attest.UnknownIssuer},
		"the issuer in another case":        {c.token(t, map[string]any{"iss": "https://CI.example.com"}), attest.UnknownIssuer},
		"expired":                           {c.token(t, map[string]any{"iat": hours(-1), "exp": c.now.Unix()}), attest.Expired},
		"an old one that lives for a day":   {c.token(t, map[string]any{"iat": hours(-2), "exp": hours(22)}), attest.Expired},
		"of tomorrow":                       {c.token(t, map[string]any{"iat": hours(1), "exp": hours(2)}), attest.BadTime},
		"without an end":                    {c.token(t, map[string]any{"exp": nil}), attest.BadTime},
		"without a subject":                 {c.token(t, map[string]any{"sub": nil}), attest.BadClaims},
		"an empty subject":                  {c.token(t, map[string]any{"sub": ""}), attest.BadClaims},
		"a claim that stands twice":         {jwttest.ES256(t, c.key, "k1", doubled, ""), attest.Malformed},
		"a header that brings its own keys": {jwttest.ES256(t, other, "k1", c.claims(nil), `,"jku":"https://evil.example/keys"`), attest.Malformed},
	} {
		t.Run(name, func(t *testing.T) {
			proofs, _, err := c.Verify(t.Context(), tt.raw)
			var r *attest.Refusal
			if !asRefusal(err, &r) || r.Reason != tt.reason || len(proofs) != 0 {
				t.Errorf("%d proofs, error %v, want %s", len(proofs), err, tt.reason)
			}
		})
	}
}

func asRefusal(err error, r **attest.Refusal) bool {
	refusal, ok := err.(*attest.Refusal) //nolint:errorlint // it is documented to be one
	*r = refusal
	return ok
}

// GitLab's tokens live as long as the job may: they count for an hour.
func TestALongLivedTokenCountsWhileItIsYoung(t *testing.T) {
	c := newCI(t)
	raw := c.token(t, map[string]any{"exp": c.now.Add(10 * time.Hour).Unix()})
	if _, _, err := c.Verify(t.Context(), raw); err != nil {
		t.Fatal(err)
	}
	c.now = c.now.Add(time.Hour)
	if _, _, err := c.Verify(t.Context(), raw); err == nil {
		t.Error("it counts after an hour")
	}
}

func TestTwoAccountsThatRegisteredOneIssuerEachGetTheirOwnEvidence(t *testing.T) {
	c := newCI(t)
	const account = "4f1e0c0000000000000000000000bbbb"
	second := c.registration(t, account, strings.Replace(ciCRN, "aaaa", "bbbb", 1))
	second.Audience = "https://other.example.com/identity"
	c.issuers = append(c.issuers, second)
	proofs, _, err := c.Verify(t.Context(), c.token(t, nil))
	if err != nil || len(proofs) != 1 || proofs[0].Evidence.AccountID != c.issuers[0].AccountID {
		t.Fatalf("made for the first one's audience: %+v, %v", proofs, err)
	}
	proofs, _, err = c.Verify(t.Context(), c.token(t, map[string]any{"aud": []string{ciAudience, second.Audience}}))
	if err != nil || len(proofs) != 2 {
		t.Fatalf("made for both: %d proofs, %v", len(proofs), err)
	}
	for n, p := range proofs {
		if p.Evidence.Claims["crn"] != c.issuers[n].CRN || p.Evidence.AccountID != c.issuers[n].AccountID {
			t.Errorf("evidence %+v", p.Evidence)
		}
	}
}

func TestATestTokenIsVerifiedAgainstARegistrationThatDoesNotStandYet(t *testing.T) {
	c := newCI(t)
	i := c.issuers[0]
	c.issuers = nil
	proof, err := c.TryIssuer(t.Context(), i, c.token(t, nil)+"\n")
	if err != nil || proof.Evidence.Claims["repository"] != "acme/shop" {
		t.Fatalf("%+v, %v", proof, err)
	}
	if _, err := c.TryIssuer(t.Context(), i, c.token(t, map[string]any{"iss": "https://elsewhere"})); err == nil {
		t.Error("another issuer's token passed")
	}
	if _, _, err := c.Verify(t.Context(), c.token(t, nil)); err == nil {
		t.Error("it counts before it is registered")
	}
}
