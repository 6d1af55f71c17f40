package attest_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"tabard.dev/tabard/internal/attest"
	"tabard.dev/tabard/internal/cluster"
	"tabard.dev/tabard/internal/identity"
	"tabard.dev/tabard/internal/jwt"
	"tabard.dev/tabard/internal/jwt/jwttest"
)

// registered are the clusters that the verifier knows.
type registered []*cluster.Cluster

func (r registered) ClustersOf(issuer string) []*cluster.Cluster {
	var out []*cluster.Cluster
	for _, c := range r {
		if c.Issuer == issuer {
			out = append(out, c)
		}
	}
	return out
}

func (r registered) ClusterGroupNames(c *cluster.Cluster) []string { return c.GroupIDs }

func (r registered) ResourceGroupName(id string) string {
	return map[string]string{"rg-1": "default"}[id]
}

const away = "4f1e0c00000000000000000000000002"

// pod is a verifier that knows one cluster, and the cluster's key.
type pod struct {
	*attest.Workloads
	clock   *clock
	key     *ecdsa.PrivateKey
	cluster *cluster.Cluster
}

func newPod(t *testing.T, more ...*cluster.Cluster) *pod {
	t.Helper()
	p := &pod{clock: newClock(), key: jwttest.Key(t, elliptic.P256())}
	p.cluster = uploaded("c0ffee", jwttest.Set(t, jwttest.JWK(p.key.Public(), "k1", "ES256")))
	p.Workloads = &attest.Workloads{
		Clusters: append(registered{p.cluster}, more...), Keys: &attest.Keys{Now: p.clock.Now}, Now: p.clock.Now,
	}
	return p
}

type object = map[string]any

// claims are those of a good token with some of them replaced; nil takes one
// away.
func (p *pod) claims(change object) string {
	m := object{
		"iss": p.cluster.Issuer, "aud": []string{"iam"}, "sub": "system:serviceaccount:apps:lister",
		"iat": p.clock.Now().Unix(), "nbf": p.clock.Now().Unix(), "exp": p.clock.Now().Add(time.Hour).Unix(),
		"kubernetes.io": object{
			"namespace": "apps", "serviceaccount": object{"name": "lister", "uid": "u1"}, "pod": object{"name": "pod-1", "uid": "u2"},
		},
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

func (p *pod) token(t *testing.T, change object) string {
	t.Helper()
	return jwttest.ES256(t, p.key, "k1", p.claims(change), "")
}

// accounts are those that a refusal was aimed at.
func accounts(r *attest.Refusal) []string {
	var out []string
	for _, a := range r.Aimed {
		out = append(out, a.AccountID)
	}
	return out
}

func TestAServiceAccountTokenIsEvidenceOfItsPod(t *testing.T) {
	p := newPod(t)
	proofs, _, err := p.Verify(ctx, p.token(t, nil))
	if err != nil || len(proofs) != 1 {
		t.Fatalf("%d proofs, %v", len(proofs), err)
	}
	wantTrace(t, proofs[0].Trace, kubernetesChecks, "")
	ev := proofs[0].Evidence
	if ev.Type != identity.IKSSA || ev.CRN.String() != p.cluster.CRN || ev.AccountID != home || ev.Namespace != "apps" ||
		ev.ServiceAccount != "lister" || ev.Name != "my-cluster:apps:lister:pod-1" {
		t.Errorf("evidence %+v", ev)
	}
	want := object{
		"crn": p.cluster.CRN, "service_instance": "c0ffee", "location": "us-south", "resource_group_id": "rg-1",
		"resource_group_name": "default", "namespace": "apps", "name": "lister", "pod": "pod-1", "pod_uid": "u2",
	}
	if fmt.Sprint(ev.Claims) != fmt.Sprint(want) {
		t.Errorf("claims %v, want %v", ev.Claims, want)
	}
}

func TestAClaimThatWasNotProvedIsAbsent(t *testing.T) {
	p := newPod(t)
	p.cluster.ResourceGroupID = "rg-without-a-name"
	proofs, _, err := p.Verify(ctx, p.token(t, object{
		"kubernetes.io": object{"namespace": "apps", "serviceaccount": object{"name": "lister"}},
		"pod":           "forged", "resource_group_name": "forged", "location": "forged",
	}))
	if err != nil {
		t.Fatal(err)
	}
	claims := proofs[0].Evidence.Claims
	for _, absent := range []string{"pod", "resource_group_name"} {
		if v, ok := claims[absent]; ok {
			t.Errorf("%s = %v", absent, v)
		}
	}
	if claims["location"] != "us-south" {
		t.Errorf("location %v", claims["location"])
	}
}

func TestATokenOfEveryClusterAlgorithmIsEvidence(t *testing.T) {
	p := newPod(t)
	p256, p384, p521, rsa := jwttest.Key(t, elliptic.P256()), jwttest.Key(t, elliptic.P384()), jwttest.Key(t, elliptic.P521()), jwttest.RSA(t)
	for _, declared := range []bool{true, false} {
		alg := func(name string) string {
			if declared {
				return name
			}
			return ""
		}
		p.cluster.JWKS = jwttest.Set(t,
			jwttest.JWK(p256.Public(), "p256", alg("ES256")), jwttest.JWK(p384.Public(), "p384", alg("ES384")),
			jwttest.JWK(p521.Public(), "p521", alg("ES512")), jwttest.JWK(rsa.Public(), "rsa", alg("RS256")))
		p.cluster.Revision++
		for _, raw := range []string{
			jwttest.Sign(t, `{"alg":"ES256","kid":"p256"}`, p.claims(nil), p256, 256),
			jwttest.Sign(t, `{"alg":"ES384","kid":"p384"}`, p.claims(nil), p384, 384),
			jwttest.Sign(t, `{"alg":"ES512","kid":"p521"}`, p.claims(nil), p521, 512),
			jwttest.Sign(t, `{"alg":"RS256","kid":"rsa"}`, p.claims(nil), rsa, 256),
			jwttest.Sign(t, `{"alg":"RS256","kid":"rsa","typ":"JWT"}`, p.claims(nil), rsa, 256),
		} {
			if _, _, err := p.Verify(ctx, raw); err != nil {
				t.Errorf("%v", err)
			}
		}
		// A key that says what it is for is for nothing else.
		_, _, err := p.Verify(ctx, jwttest.Sign(t, `{"alg":"RS512","kid":"rsa"}`, p.claims(nil), rsa, 512))
		if declared {
			wantRefusal(t, err, attest.BadSignature, kubernetesChecks, attest.CheckSignature)
		} else if err != nil {
			t.Error(err)
		}
	}
}

func TestEachFaultOfAServiceAccountTokenHasItsReason(t *testing.T) {
	p := newPod(t)
	now := p.clock.Now()
	at := func(d time.Duration) int64 { return now.Add(d).Unix() }
	other := jwttest.Key(t, elliptic.P256())
	with := func(change object) string { return p.token(t, change) }
	forKubernetes := func(change object) string {
		k := object{"namespace": "apps", "serviceaccount": object{"name": "lister"}}
		for key, v := range change {
			k[key] = v
		}
		return with(object{"kubernetes.io": k})
	}
	sub := func(s string) string { return with(object{"sub": s}) }
	type refusal struct {
		reason attest.Reason
		check  string
	}
	malformed, unknown := refusal{attest.Malformed, attest.CheckForm}, refusal{attest.UnknownIssuer, attest.CheckIssuer}
	signature, audience := refusal{attest.BadSignature, attest.CheckSignature}, refusal{attest.WrongAudience, attest.CheckAudience}
	expired, badTime := refusal{attest.Expired, attest.CheckTime}, refusal{attest.BadTime, attest.CheckTime}
	claims, fine := refusal{attest.BadClaims, attest.CheckClaims}, refusal{}
	good := with(nil)
	part := strings.Split(good, ".")

	for _, tt := range []struct {
		name string
		raw  string
		want refusal
	}{
		{"nothing", "", malformed},
		{"a word", "token", malformed},
		{"an API key", "abcdefghijklmnopqrstuvwxyz0123456789ABCD", malformed},
		{"too long", good + strings.Repeat("A", jwt.MaxLength), malformed},
		{"alg none", jwttest.Sign(t, `{"alg":"none","kid":"k1"}`, p.claims(nil), nil, 256), malformed},
		{"JSON in place of the compact form", fmt.Sprintf(`{"protected":%q,"payload":%q,"signature":%q}`, part[0], part[1], part[2]), malformed},
		{"a fourth part", good + ".x", malformed},
		{"the type of an access token", jwttest.ES256(t, p.key, "k1", p.claims(nil), `,"typ":"at+jwt"`), malformed},
		{"the type of a refresh token", jwttest.ES256(t, p.key, "k1", p.claims(nil), `,"typ":"rt+jwt"`), malformed},
		{"an issuer twice", jwttest.ES256(t, p.key, "k1", strings.TrimSuffix(p.claims(nil), "}")+`,"iss":"https://other"}`, ""), malformed},
		{"an audience twice", jwttest.ES256(t, p.key, "k1", strings.TrimSuffix(p.claims(nil), "}")+`,"aud":"other"}`, ""), malformed},
		{"a namespace twice", jwttest.ES256(t, p.key, "k1",
			strings.Replace(p.claims(nil), `"namespace":"apps"`, `"namespace":"apps","namespace":"kube-system"`, 1), ""), malformed},
		{"an issuer that is a number", with(object{"iss": 1}), malformed},
		{"an issuer that is a list", with(object{"iss": []string{p.cluster.Issuer}}), malformed},
		{"a subject that is a number", with(object{"sub": 1}), malformed},
		{"an audience that is a number", with(object{"aud": 1}), malformed},
		{"an audience of numbers", with(object{"aud": []any{"iam", 1}}), malformed},
		{"a namespace that is a list", forKubernetes(object{"namespace": []string{"apps"}}), malformed},
		{"Kubernetes claims that are a text", with(object{"kubernetes.io": "apps/lister"}), malformed},
		{"an end that is a text", with(object{"exp": "tomorrow"}), malformed},
		{"an end that is not a number at all", with(object{"exp": object{}}), malformed},

		{"an issuer that nobody registered", with(object{"iss": "https://other.test"}), unknown},
		{"the issuer with a slash", with(object{"iss": p.cluster.Issuer + "/"}), unknown},
		{"the issuer in upper case", with(object{"iss": strings.ToUpper(p.cluster.Issuer)}), unknown},
		{"no issuer", with(object{"iss": nil}), unknown},
		{"an issuer under another name", with(object{"iss": nil, "ISS": p.cluster.Issuer}), unknown},

		{"an empty signature", part[0] + "." + part[1] + ".", signature},
		{"another key of the same id", jwttest.ES256(t, other, "k1", p.claims(nil), ""), signature},
		{"another key of an unknown id", jwttest.ES256(t, other, "k2", p.claims(nil), ""), signature},
		{"an RSA header on the elliptic-curve key", jwttest.Sign(t, `{"alg":"RS256","kid":"k1"}`, p.claims(nil), jwttest.RSA(t), 256), signature},
		{"a larger curve than the key's", jwttest.Sign(t, `{"alg":"ES384","kid":"k1"}`, p.claims(nil), jwttest.Key(t, elliptic.P384()), 384), signature},
		{"changed claims", part[0] + "." + strings.Split(with(object{"sub": "system:serviceaccount:kube-system:root"}), ".")[1] + "." + part[2], signature},

		{"another audience", with(object{"aud": "https://kubernetes.default.svc"}), audience},
		{"no audience", with(object{"aud": nil}), audience},
		{"an empty audience", with(object{"aud": ""}), audience},
		{"an empty list of audiences", with(object{"aud": []string{}}), audience},
		{"other audiences", with(object{"aud": []string{"iam2", "IAM", "ia", " iam"}}), audience},
		{"the audience under another name", with(object{"aud": nil, "Aud": "iam"}), audience},
		{"the audience among others", with(object{"aud": []string{"other", "iam"}}), fine},
		{"the audience as a text", with(object{"aud": "iam"}), fine},

		{"expired", with(object{"exp": at(-time.Second), "iat": at(-time.Hour)}), expired},
		{"expiring now", with(object{"exp": at(0), "iat": at(-time.Hour)}), expired},
		{"expired for years", with(object{"exp": 1, "iat": 1}), expired},
		{"living for one more second", with(object{"exp": at(time.Second)}), fine},
		{"no end", with(object{"exp": nil}), badTime},
		{"an end of null", jwttest.ES256(t, p.key, "k1", strings.Replace(p.claims(nil), fmt.Sprintf(`"exp":%d`, at(time.Hour)), `"exp":0`, 1), ""), badTime},
		{"no beginning", with(object{"iat": nil}), badTime},
		{"the end under another name", with(object{"exp": nil, "EXP": at(time.Hour)}), badTime},
		{"made in the future", with(object{"iat": at(31 * time.Second)}), badTime},
		{"made a little in the future", with(object{"iat": at(30 * time.Second)}), fine},
		{"not valid before later", with(object{"nbf": at(31 * time.Second)}), badTime},
		{"not valid before a little later", with(object{"nbf": at(30 * time.Second)}), fine},
		{"without a time before which it is not valid", with(object{"nbf": nil}), fine},
		{"living for an hour and a second", with(object{"exp": at(time.Hour + time.Second)}), badTime},
		{"living for a year", with(object{"exp": at(365 * 24 * time.Hour)}), badTime},
		{"made long ago for a long life", with(object{"iat": at(-24 * time.Hour)}), badTime},
		{"made before time began", with(object{"iat": -1}), badTime},
		{"made so long ago that the subtraction overflows", with(object{"iat": -1 << 61, "exp": 1 << 61}), badTime},

		{"a subject of another service account", sub("system:serviceaccount:apps:other"), claims},
		{"a subject of another namespace", sub("system:serviceaccount:other:lister"), claims},
		{"a subject that is a user", sub("system:node:lister"), claims},
		{"a subject that is longer", sub("system:serviceaccount:apps:lister:x"), claims},
		{"no subject", with(object{"sub": nil}), claims},
		{"no Kubernetes claims", with(object{"kubernetes.io": nil}), claims},
		{"no namespace", forKubernetes(object{"namespace": ""}), claims},
		{"no service account", forKubernetes(object{"serviceaccount": object{}}), claims},
		{"nothing but the subject's frame", with(object{
			"sub": "system:serviceaccount::", "kubernetes.io": object{"namespace": "", "serviceaccount": object{"name": ""}},
		}), claims},
		{"Kubernetes claims under another name", with(object{"kubernetes.io": nil, "Kubernetes.io": object{
			"namespace": "apps", "serviceaccount": object{"name": "lister"},
		}}), claims},
	} {
		t.Run(tt.name, func(t *testing.T) {
			proofs, _, err := p.Verify(ctx, tt.raw)
			if tt.want == fine {
				if err != nil || len(proofs) != 1 {
					t.Errorf("%d proofs, %v", len(proofs), err)
				}
				return
			}
			if len(proofs) != 0 {
				t.Fatalf("%d proofs", len(proofs))
			}
			r := wantRefusal(t, err, tt.want.reason, kubernetesChecks, tt.want.check)
			aimed := []string{home}
			if tt.want == malformed || tt.want == unknown {
				aimed = nil
			}
			if got := accounts(r); !slices.Equal(got, aimed) {
				t.Errorf("accounts %v, want %v", got, aimed)
			}
			for _, a := range r.Aimed {
				wantTrace(t, a.Trace, kubernetesChecks, tt.want.check)
			}
			if strings.Contains(fmt.Sprint(r.Trace, r.Error()), part[2]) && part[2] != "" {
				t.Error("the refusal holds the token's signature")
			}
		})
	}
}

func TestKeysThatCannotBeFetchedAreNotTheTokensFault(t *testing.T) {
	i := newIssuer(t, jwk(t, "k1"))
	i.set(func(i *issuer) { i.discovery = fails })
	p := newPod(t)
	p.Clusters = registered{i.cluster()}
	_, _, err := p.Verify(ctx, p.token(t, object{"iss": i.URL}))
	r := wantRefusal(t, err, attest.KeysUnavailable, kubernetesChecks, attest.CheckSignature)
	if r.Cause == nil || strings.Contains(r.Detail, i.URL) {
		t.Errorf("detail %q, cause %v", r.Detail, r.Cause)
	}
}

func TestATokenOfAFetchedKeyIsEvidence(t *testing.T) {
	p := newPod(t)
	i := newIssuer(t, jwttest.JWK(p.key.Public(), "k1", "ES256"))
	p.Clusters = registered{i.cluster()}
	for range 10 {
		if _, _, err := p.Verify(ctx, p.token(t, object{"iss": i.URL})); err != nil {
			t.Fatal(err)
		}
	}
	i.wantFetches(t, 1)
}

func TestAHeaderCannotChooseTheClustersKey(t *testing.T) {
	p := newPod(t)
	attacker := jwttest.Key(t, elliptic.P256())
	hostile := map[string]string{}
	for name, more := range jwttest.Headers(t, attacker, "k1") {
		hostile["the header "+name] = jwttest.ES256(t, attacker, "k1", p.claims(nil), more)
	}
	for _, kid := range jwttest.KeyIDs {
		hostile[fmt.Sprintf("the key id %q", kid)] = jwttest.ES256(t, attacker, kid, p.claims(nil), "")
	}
	for name, secret := range jwttest.SecretsOf(t, p.key.Public(), "k1") {
		for _, alg := range []string{"HS256", "ES256"} {
			hostile[alg+" with the public key as "+name] = jwttest.Sign(t, `{"alg":"`+alg+`","kid":"k1"}`, p.claims(nil), secret, 256)
		}
	}
	for name, raw := range hostile {
		t.Run(name, func(t *testing.T) {
			proofs, _, err := p.Verify(ctx, raw)
			var r *attest.Refusal
			if len(proofs) != 0 || !errors.As(err, &r) || r.Reason != attest.Malformed && r.Reason != attest.BadSignature {
				t.Errorf("%d proofs, %v", len(proofs), err)
			}
		})
	}
}

func TestAKeyOfAnotherClusterProvesNothingAboutThisOne(t *testing.T) {
	key := jwttest.Key(t, elliptic.P256())
	other := uploaded("decaf", jwttest.Set(t, jwttest.JWK(key.Public(), "k1", "ES256")))
	other.Issuer = "https://other.test"
	p := newPod(t, other)
	_, _, err := p.Verify(ctx, jwttest.ES256(t, key, "k1", p.claims(nil), ""))
	wantRefusal(t, err, attest.BadSignature, kubernetesChecks, attest.CheckSignature)
	proofs, _, err := p.Verify(ctx, jwttest.ES256(t, key, "k1", p.claims(object{"iss": other.Issuer}), ""))
	if err != nil || len(proofs) != 1 || proofs[0].Evidence.CRN.Instance != "decaf" {
		t.Errorf("%v, %v", proofs, err)
	}
}

// Somebody registers the issuer of a cluster that is not his, with keys of his
// own. His tokens count in his account, and the cluster's in its own.
func TestAnIssuerRegisteredTwiceCountsByItsKeys(t *testing.T) {
	mine := jwttest.Key(t, elliptic.P256())
	impostor := uploaded("decaf", jwttest.Set(t, jwttest.JWK(mine.Public(), "k1", "ES256")))
	impostor.AccountID = away
	impostor.CRN = strings.Replace(impostor.CRN, home, away, 1)
	p := newPod(t, impostor)
	for name, tt := range map[string]struct {
		raw     string
		account string
	}{
		"the cluster's token":  {p.token(t, nil), home},
		"the impostor's token": {jwttest.ES256(t, mine, "k1", p.claims(nil), ""), away},
	} {
		proofs, refused, err := p.Verify(ctx, tt.raw)
		if err != nil || len(proofs) != 1 || proofs[0].Evidence.AccountID != tt.account || proofs[0].Evidence.CRN.AccountID() != tt.account {
			t.Errorf("%s: %v, %v", name, proofs, err)
		}
		if len(refused) != 1 || refused[0].AccountID == tt.account || refused[0].Reason != attest.BadSignature {
			t.Errorf("%s: refused %+v", name, refused)
		}
	}
	_, _, err := p.Verify(ctx, jwttest.ES256(t, jwttest.Key(t, elliptic.P256()), "k1", p.claims(nil), ""))
	if r := wantRefusal(t, err, attest.BadSignature, kubernetesChecks, attest.CheckSignature); !slices.Equal(accounts(r), []string{home, away}) {
		t.Errorf("accounts %v", accounts(r))
	}
	// Registered by two accounts with the same keys, it is evidence in both.
	impostor.JWKS = p.cluster.JWKS
	impostor.Revision++
	if proofs, _, err := p.Verify(ctx, p.token(t, nil)); err != nil || len(proofs) != 2 {
		t.Errorf("%d proofs, %v", len(proofs), err)
	}
	// The refusal is that of the registration that came furthest, and each
	// account learns of its own.
	impostor.Audience = "other"
	_, _, err = p.Verify(ctx, p.token(t, object{"aud": "iam", "exp": p.clock.Now().Unix()}))
	r := wantRefusal(t, err, attest.Expired, kubernetesChecks, attest.CheckTime)
	if !slices.Equal(accounts(r), []string{home, away}) {
		t.Fatalf("accounts %v", accounts(r))
	}
	wantTrace(t, r.Aimed[0].Trace, kubernetesChecks, attest.CheckTime)
	wantTrace(t, r.Aimed[1].Trace, kubernetesChecks, attest.CheckAudience)
	if strings.Contains(fmt.Sprint(r.Aimed[0].Trace), "other") {
		t.Errorf("one account sees the audience of the other: %+v", r.Aimed[0].Trace)
	}
}

// Clusters that were set up alike have one issuer, and their keys tell them
// apart: a token of one is evidence for that one only.
func TestClustersOfOneIssuerAreToldApartByTheirKeys(t *testing.T) {
	key := jwttest.Key(t, elliptic.P256())
	sibling := uploaded("decaf", jwttest.Set(t, jwttest.JWK(key.Public(), "k2", "ES256")))
	p := newPod(t, sibling)
	for id, raw := range map[string]string{
		p.cluster.ID: p.token(t, nil),
		sibling.ID:   jwttest.ES256(t, key, "k2", p.claims(nil), ""),
	} {
		proofs, _, err := p.Verify(ctx, raw)
		if err != nil || len(proofs) != 1 || proofs[0].Evidence.Claims["service_instance"] != id {
			t.Errorf("token of %s: %v, %v", id, proofs, err)
		}
	}
	// The account gets one refusal: that of the cluster whose token it is.
	_, _, err := p.Verify(ctx, jwttest.ES256(t, key, "k2", p.claims(object{"aud": "other"}), ""))
	r := wantRefusal(t, err, attest.WrongAudience, kubernetesChecks, attest.CheckAudience)
	if len(r.Aimed) != 1 {
		t.Fatalf("%d refusals in one account", len(r.Aimed))
	}
	wantTrace(t, r.Aimed[0].Trace, kubernetesChecks, attest.CheckAudience)
}

func TestTwoKeysOfOneIDAreBothTried(t *testing.T) {
	p := newPod(t)
	first, second := jwttest.Key(t, elliptic.P256()), jwttest.RSA(t)
	p.cluster.JWKS = jwttest.Set(t,
		jwttest.JWK(first.Public(), "k1", "ES256"), jwttest.JWK(second.Public(), "k1", "RS256"), jwttest.JWK(p.key.Public(), "k1", ""))
	p.cluster.Revision++
	for name, raw := range map[string]string{
		"first":  jwttest.ES256(t, first, "k1", p.claims(nil), ""),
		"second": jwttest.Sign(t, `{"alg":"RS256","kid":"k1"}`, p.claims(nil), second, 256),
		"third":  p.token(t, nil),
	} {
		if _, _, err := p.Verify(ctx, raw); err != nil {
			t.Errorf("the %s key: %v", name, err)
		}
	}
	_, _, err := p.Verify(ctx, jwttest.ES256(t, jwttest.Key(t, elliptic.P256()), "k1", p.claims(nil), ""))
	wantRefusal(t, err, attest.BadSignature, kubernetesChecks, attest.CheckSignature)
}

func TestASmallRSAKeyOfAClusterProvesNothing(t *testing.T) {
	p := newPod(t)
	key := jwttest.SmallRSA(t)
	p.cluster.JWKS = jwttest.Set(t, jose.JSONWebKey{Key: key.Public(), KeyID: "k1"})
	p.cluster.Revision++
	_, _, err := p.Verify(ctx, jwttest.Sign(t, `{"alg":"RS256","kid":"k1"}`, p.claims(nil), key, 256))
	wantRefusal(t, err, attest.BadSignature, kubernetesChecks, attest.CheckSignature)
}
