package attest_test

import (
	"crypto/elliptic"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"tabard.dev/tabard/internal/attest"
	"tabard.dev/tabard/internal/cluster"
	"tabard.dev/tabard/internal/identity"
	"tabard.dev/tabard/internal/jwt/jwttest"
	"tabard.dev/tabard/internal/trust"
)

// vouched are the workload issuers that the verifier knows.
type vouched []*cluster.Issuer

func (v vouched) WorkloadIssuersOf(issuer string) []*cluster.Issuer {
	return slices.DeleteFunc(slices.Clone(v), func(i *cluster.Issuer) bool { return i.Issuer != issuer })
}

// job is a verifier that knows a workload issuer, and the issuer's key.
type job struct{ *pod }

func newJob(t *testing.T) (*job, *cluster.Issuer) {
	t.Helper()
	j := &job{newPod(t)}
	i := &cluster.Issuer{
		ID: "WorkloadIssuer-1", CRN: "crn:v1:bluemix:public:iam-identity::a/" + home + "::workload-issuer:WorkloadIssuer-1", AccountID: home,
		Name: "ci", Issuer: "https://ci.test", Audience: "https://tabard.test", JWKS: j.cluster.JWKS,
		Mapping: cluster.Mapping{Claims: map[string]string{
			"repository": "repository", "owner": "project.owner.name", "dotted": "a.b", "run": "run", "protected": "protected", "groups": "groups",
			"absent": "nowhere.at.all", "object": "project",
		}},
	}
	j.Issuers = vouched{i}
	return j, i
}

func (j *job) token(t *testing.T, change object) string {
	t.Helper()
	all := object{
		"iss": "https://ci.test", "aud": "https://tabard.test", "sub": "repo:octo/app:ref:main", "kubernetes.io": nil,
		"repository": "octo/app", "project": object{"owner": object{"name": "octo"}}, "a.b": "top", "a": object{"b": "nested"},
		"run": 12345678901234567, "protected": true, "groups": []any{"one", 2, nil, object{}},
	}
	maps.Copy(all, change)
	return j.pod.token(t, all)
}

func TestATokenOfAWorkloadIssuerIsEvidenceOfWhatIsMapped(t *testing.T) {
	j, i := newJob(t)
	proofs, _, err := j.Verify(ctx, j.token(t, nil))
	if err != nil || len(proofs) != 1 {
		t.Fatalf("%d proofs, %v", len(proofs), err)
	}
	wantTrace(t, proofs[0].Trace, kubernetesChecks, "")
	ev := proofs[0].Evidence
	if ev.Type != identity.OIDC || ev.CRN.String() != i.CRN || ev.AccountID != home || ev.Namespace+ev.ServiceAccount != "" || ev.Name != "ci:repo:octo/app:ref:main" {
		t.Errorf("evidence %+v", ev)
	}
	want := object{
		"issuer": i.Issuer, "crn": i.CRN, "sub": "repo:octo/app:ref:main", "repository": "octo/app", "owner": "octo", "dotted": "top",
		"run": "12345678901234567", "protected": "true", "groups": []string{"one", "2"},
	}
	if fmt.Sprint(ev.Claims) != fmt.Sprint(want) {
		t.Errorf("claims %v, want %v", ev.Claims, want)
	}
}

func TestAWorkloadIssuerCannotSayWhoVouches(t *testing.T) {
	j, i := newJob(t)
	i.Mapping.Claims = map[string]string{"issuer": "fake", "crn": "fake", "sub": "fake", "kept": "fake"}
	proofs, _, err := j.Verify(ctx, j.token(t, object{"fake": "forged", "issuer": "forged", "crn": "forged"}))
	if err != nil {
		t.Fatal(err)
	}
	claims := proofs[0].Evidence.Claims
	if claims["issuer"] != i.Issuer || claims["crn"] != i.CRN || claims["sub"] != "repo:octo/app:ref:main" || claims["kept"] != "forged" {
		t.Errorf("claims %v", claims)
	}
}

func TestATokenOfAWorkloadIssuerIsCheckedLikeAnyOther(t *testing.T) {
	j, _ := newJob(t)
	now := j.clock.Now()
	other := jwttest.Key(t, elliptic.P256())
	good := strings.Split(j.token(t, nil), ".")
	claims, err := jsonOf(good[1])
	if err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		raw    string
		reason attest.Reason
		check  string
	}{
		"the issuer with a slash":       {j.token(t, object{"iss": "https://ci.test/"}), attest.UnknownIssuer, attest.CheckIssuer},
		"another key":                   {jwttest.ES256(t, other, "k1", claims, ""), attest.BadSignature, attest.CheckSignature},
		"the public key as a secret":    {jwttest.Sign(t, `{"alg":"HS256","kid":"k1"}`, claims, []byte("x"), 256), attest.Malformed, attest.CheckForm},
		"the cluster's audience":        {j.token(t, object{"aud": "iam"}), attest.WrongAudience, attest.CheckAudience},
		"no audience":                   {j.token(t, object{"aud": nil}), attest.WrongAudience, attest.CheckAudience},
		"expired":                       {j.token(t, object{"exp": now.Unix()}), attest.Expired, attest.CheckTime},
		"an hour old":                   {j.token(t, object{"iat": now.Add(-time.Hour).Unix(), "exp": now.Add(5 * time.Hour).Unix()}), attest.Expired, attest.CheckTime},
		"no time":                       {j.token(t, object{"iat": nil}), attest.BadTime, attest.CheckTime},
		"no subject":                    {j.token(t, object{"sub": nil}), attest.BadClaims, attest.CheckClaims},
		"a subject without end":         {j.token(t, object{"sub": strings.Repeat("x", 1025)}), attest.BadClaims, attest.CheckClaims},
		"a claim twice":                 {jwttest.ES256(t, j.key, "k1", strings.TrimSuffix(claims, "}")+`,"repository":"octo/app"}`, ""), attest.Malformed, attest.CheckForm},
		"a claim twice, deep down":      {jwttest.ES256(t, j.key, "k1", strings.TrimSuffix(claims, "}")+`,"x":{"y":{"z":1,"z":2}}}`, ""), attest.Malformed, attest.CheckForm},
		"a claim twice, in a list":      {jwttest.ES256(t, j.key, "k1", strings.TrimSuffix(claims, "}")+`,"x":[{"z":1,"z":2}]}`, ""), attest.Malformed, attest.CheckForm},
		"living for six hours, and new": {j.token(t, object{"exp": now.Add(6 * time.Hour).Unix()}), "", ""},
		"of any Kubernetes form":        {j.token(t, object{"kubernetes.io": "a text"}), "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			proofs, _, err := j.Verify(ctx, tt.raw)
			if tt.reason == "" {
				if err != nil || len(proofs) != 1 {
					t.Errorf("%d proofs, %v", len(proofs), err)
				}
				return
			}
			wantRefusal(t, err, tt.reason, kubernetesChecks, tt.check)
		})
	}
}

// jsonOf decodes one part of a token.
func jsonOf(part string) (string, error) {
	b, err := base64.RawURLEncoding.DecodeString(part)
	return string(b), err
}

// A pod's token proves nothing as a workload issuer's, and the other way round,
// even where one issuer is registered as both.
func TestAClusterAndAWorkloadIssuerOfOneNameKeepApart(t *testing.T) {
	j, i := newJob(t)
	i.Issuer, i.Audience = j.cluster.Issuer, j.cluster.Audience
	proofs, _, err := j.Verify(ctx, j.pod.token(t, nil))
	if err != nil || len(proofs) != 2 || proofs[0].Evidence.Type != identity.IKSSA || proofs[1].Evidence.Type != identity.OIDC {
		t.Fatalf("%+v, %v", proofs, err)
	}
	if _, ok := proofs[1].Evidence.Claims["namespace"]; ok {
		t.Error("the workload issuer proves a namespace that nobody mapped")
	}
	// What is no pod's token is the workload issuer's alone.
	proofs, _, err = j.Verify(ctx, j.pod.token(t, object{"kubernetes.io": "a text"}))
	if err != nil || len(proofs) != 1 || proofs[0].Evidence.Type != identity.OIDC {
		t.Errorf("%+v, %v", proofs, err)
	}
}

func TestNodeAndGroupsAreClaimsOfAPod(t *testing.T) {
	p := newPod(t)
	p.cluster.GroupIDs = []string{"prod", "eu"} // the directory of the tests shows ids
	proofs, _, err := p.Verify(ctx, p.token(t, object{"kubernetes.io": object{
		"namespace": "apps", "serviceaccount": object{"name": "lister", "uid": "u1"}, "pod": object{"name": "pod-1", "uid": "u2"},
		"node": object{"name": "node-1", "uid": "u3"}, "warnafter": 1750000000, "cluster_group": "forged", "more": []any{object{}},
	}, "cluster_group": "forged", "node": "forged"}))
	if err != nil {
		t.Fatal(err)
	}
	claims := proofs[0].Evidence.Claims
	// What is proved and what is said to be are one list.
	if said := trust.ClaimsOf(identity.IKSSA); !slices.Equal(slices.Sorted(maps.Keys(claims)), slices.Sorted(slices.Values(said))) {
		t.Errorf("claims %v are proved, %v said to be", slices.Sorted(maps.Keys(claims)), said)
	}
	if claims["node"] != "node-1" || claims["pod_uid"] != "u2" || !slices.Equal(claims["cluster_group"].([]string), []string{"prod", "eu"}) {
		t.Errorf("claims %v", claims)
	}
}

func TestANameThatKubernetesCannotHaveProvesNothing(t *testing.T) {
	p := newPod(t)
	names := func(namespace, account, pod, node string) string {
		return p.token(t, object{
			"sub": "system:serviceaccount:" + namespace + ":" + account,
			"kubernetes.io": object{
				"namespace": namespace, "serviceaccount": object{"name": account}, "pod": object{"name": pod}, "node": object{"name": node},
			},
		})
	}
	for name, raw := range map[string]string{
		"a colon in the namespace":       names("apps:lister", "x", "", ""),
		"a colon in the service account": names("apps", "lister:x", "", ""),
		"a colon in the pod":             names("apps", "lister", "a:b", ""),
		"a line break in the node":       names("apps", "lister", "a", "b\nc"),
		"a space":                        names("apps", "li ster", "", ""),
		"a name without end":             names("apps", strings.Repeat("x", 254), "", ""),
	} {
		_, _, err := p.Verify(ctx, raw)
		t.Log(name)
		wantRefusal(t, err, attest.BadClaims, kubernetesChecks, attest.CheckClaims)
	}
}

func TestATokenOfTheOldKindIsRefusedWithAWayOut(t *testing.T) {
	p := newPod(t)
	legacy := func(iss string) string {
		return p.token(t, object{
			"iss": iss, "aud": nil, "exp": nil, "iat": nil, "nbf": nil, "kubernetes.io": nil,
			"kubernetes.io/serviceaccount/namespace": "apps", "kubernetes.io/serviceaccount/secret.name": "lister-token-x",
			"kubernetes.io/serviceaccount/service-account.name": "lister", "kubernetes.io/serviceaccount/service-account.uid": "u1",
		})
	}
	_, _, err := p.Verify(ctx, legacy("kubernetes/serviceaccount"))
	r := wantRefusal(t, err, attest.UnknownIssuer, kubernetesChecks, attest.CheckIssuer)
	if !strings.Contains(r.Detail, "projected") {
		t.Errorf("detail %s", r.Detail)
	}
	p.cluster.Issuer = "kubernetes/serviceaccount"
	_, _, err = p.Verify(ctx, legacy("kubernetes/serviceaccount"))
	r = wantRefusal(t, err, attest.WrongAudience, kubernetesChecks, attest.CheckAudience)
	if !strings.Contains(r.Detail, "projected") {
		t.Errorf("detail %s", r.Detail)
	}
}

// OpenShift's issuers are in-cluster names that nobody outside can ask, or
// documents in object storage.
func TestOpenShiftTokensOfEveryIssuerFormAreEvidence(t *testing.T) {
	for _, issuer := range []string{
		"https://kubernetes.default.svc",
		"https://my-cluster-oidc.s3.us-east-2.amazonaws.com",
		"https://rh-oidc.s3.us-east-1.amazonaws.com/27bd6cg0vs7nn08mue83fbof94dj4m9a",
		"https://d3gt1gce2zmg3d.cloudfront.net/27bd6cg0vs7nn08mue83fbof94dj4m9a",
		"https://storage.googleapis.com/my-cluster-oidc",
		"https://myaccount.blob.core.windows.net/my-cluster",
	} {
		p := newPod(t)
		p.cluster.Type, p.cluster.Issuer = identity.ROKSSA, issuer
		proofs, _, err := p.Verify(ctx, p.token(t, object{"jti": "7b1f"}))
		if err != nil || len(proofs) != 1 || proofs[0].Evidence.Type != identity.ROKSSA {
			t.Errorf("%s: %v, %v", issuer, proofs, err)
		}
		if err := p.cluster.Validate(); err != nil {
			t.Error(err)
		}
	}
	// The same in object storage, with a path, fetched.
	p := newPod(t)
	i := newIssuer(t, jwttest.JWK(p.key.Public(), "k1", "ES256"))
	c := i.cluster()
	c.Issuer += "/27bd6cg0vs7nn08mue83fbof94dj4m9a"
	i.Config.Handler = http.StripPrefix("/27bd6cg0vs7nn08mue83fbof94dj4m9a", i.Config.Handler)
	i.set(func(i *issuer) {
		i.discovery = func(w http.ResponseWriter, _ *http.Request) {
			fmt.Fprintf(w, `{"issuer":%q,"jwks_uri":%q}`, c.Issuer, c.Issuer+"/keys")
		}
	})
	p.Clusters = registered{c}
	if _, _, err := p.Verify(ctx, p.token(t, object{"iss": c.Issuer})); err != nil {
		t.Error(err)
	}
}

func TestAKeyOfTwoClustersOfAnAccountIsOfNeither(t *testing.T) {
	twin := uploaded("decaf", nil)
	twin.Name = "twin"
	p := newPod(t, twin)
	twin.JWKS = p.cluster.JWKS
	_, _, err := p.Verify(ctx, p.token(t, nil))
	r := wantRefusal(t, err, attest.Ambiguous, kubernetesChecks, attest.CheckSignature)
	if text := fmt.Sprint(r.Trace); !strings.Contains(text, "my-cluster, twin") || len(r.Aimed) != 1 {
		t.Errorf("%s, %v", text, r.Aimed)
	}
	// Another account's token of the same cluster is not hindered.
	third := uploaded("latte", p.cluster.JWKS)
	third.AccountID, third.CRN = away, strings.Replace(third.CRN, home, away, 1)
	p.Clusters = registered{p.cluster, third, twin}
	proofs, _, err := p.Verify(ctx, p.token(t, nil))
	if err != nil || len(proofs) != 1 || proofs[0].Evidence.AccountID != away {
		t.Errorf("%+v, %v", proofs, err)
	}
}

// Somebody registers another one's issuer with an API server that takes its
// time.
func TestNobodyHoldsUpTheTokensOfOthers(t *testing.T) {
	p := newPod(t)
	sealer := newSealer(t)
	p.Keys.Opener = sealer
	slow := newAPIServer(t, nil)
	stop := make(chan struct{})
	t.Cleanup(func() { close(stop) })
	var gaveUp atomic.Bool
	slow.answer = func(_ http.ResponseWriter, r *http.Request) {
		select {
		case <-stop:
		case <-r.Context().Done():
			gaveUp.Store(true)
		}
	}
	claimed := uploaded("decaf", nil)
	claimed.AccountID = away
	p.Clusters = registered{slow.behind(claimed, sealer), p.cluster}
	proofs, _, err := p.Verify(ctx, p.token(t, nil))
	if err != nil || len(proofs) != 1 || proofs[0].Evidence.AccountID != home {
		t.Fatalf("%+v, %v", proofs, err)
	}
	if gaveUp.Load() {
		t.Error("the answer waited until the other account's server was given up")
	}
}

func TestATestTokenIsVerifiedAgainstWhatIsNotRegisteredYet(t *testing.T) {
	p := newReviewedPod(t)
	fresh := *p.cluster
	fresh.Issuer = "https://not-yet.test"
	raw := p.token(t, object{"iss": fresh.Issuer})
	if _, _, err := p.Verify(ctx, raw); err == nil {
		t.Fatal("it is registered")
	}
	proof, err := p.Try(ctx, &fresh, raw+"\n")
	if err != nil {
		t.Fatal(err)
	}
	wantTrace(t, proof.Trace, append(slices.Clone(kubernetesChecks), attest.CheckReview), "")
	p.wantAsked(t, 1)

	_, err = p.Try(ctx, &fresh, p.token(t, nil))
	wantRefusal(t, err, attest.UnknownIssuer, kubernetesChecks, attest.CheckIssuer)
	p.server.set(func(s *apiServer) { s.status = stands(object{"authenticated": false}) })
	_, err = p.Try(ctx, &fresh, raw)
	wantRefusal(t, err, attest.ReviewDenied, append(slices.Clone(kubernetesChecks), attest.CheckReview), attest.CheckReview)

	// The keys are those of the changed registration, whatever is remembered.
	if _, _, err := p.Verify(ctx, p.token(t, nil)); err != nil {
		t.Fatal(err)
	}
	changed := *p.cluster
	changed.Review, changed.JWKS = false, jwttest.Set(t, jwk(t, "k1"))
	_, err = p.Try(ctx, &changed, p.token(t, nil))
	wantRefusal(t, err, attest.BadSignature, kubernetesChecks, attest.CheckSignature)
	if _, _, err := p.Verify(ctx, p.token(t, nil)); err != nil {
		t.Errorf("what was tried counts: %v", err)
	}

	j, i := newJob(t)
	j.Issuers = nil
	if proof, err := j.TryIssuer(ctx, i, j.token(t, nil)); err != nil || proof.Evidence.Type != identity.OIDC {
		t.Errorf("%+v, %v", proof, err)
	}
}

// FuzzPodClaims gives a verifier all that a cluster could sign: a proof is about
// the service account that the subject names.
func FuzzPodClaims(f *testing.F) {
	f.Add(`{"namespace":"apps","serviceaccount":{"name":"lister","uid":"u1"},"pod":{"name":"pod-1","uid":"u2"},"node":{"name":"n"}}`, "system:serviceaccount:apps:lister")
	f.Add(`{"namespace":"apps","warnafter":1,"serviceaccount":{"name":"lister"}}`, "system:serviceaccount:apps:lister")
	f.Add(`{"namespace":"a:b","serviceaccount":{"name":"c"}}`, "system:serviceaccount:a:b:c")
	f.Add(`null`, "")
	key := jwttest.Key(f, elliptic.P256())
	c := uploaded("c0ffee", jwttest.Set(f, jwttest.JWK(key.Public(), "k1", "ES256")))
	clock := newClock()
	w := &attest.Workloads{Clusters: registered{c}, Keys: &attest.Keys{Now: clock.Now}, Now: clock.Now}
	f.Fuzz(func(t *testing.T, claims, subject string) {
		sub, err := json.Marshal(subject)
		if err != nil {
			t.Skip("a subject that JSON cannot hold")
		}
		now := clock.Now().Unix()
		raw := jwttest.ES256(t, key, "k1", fmt.Sprintf(`{"iss":%q,"aud":"iam","iat":%d,"exp":%d,"sub":%s,"kubernetes.io":%s}`, c.Issuer, now, now+600, sub, claims), "")
		proofs, _, err := w.Verify(ctx, raw)
		if err != nil {
			return
		}
		ev := proofs[0].Evidence
		if len(proofs) != 1 || ev.Namespace == "" || ev.ServiceAccount == "" || subject != "system:serviceaccount:"+ev.Namespace+":"+ev.ServiceAccount ||
			strings.Count(subject, ":") != 3 || strings.Count(ev.Name, ":") != 3 || ev.Claims["namespace"] != ev.Namespace || ev.Claims["name"] != ev.ServiceAccount {
			t.Errorf("%s of %q gave %+v", claims, subject, ev)
		}
	})
}
