package attest

import (
	"context"
	"slices"
	"strings"
	"time"

	josejwt "github.com/go-jose/go-jose/v4/jwt"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/cluster"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/jwt"
	"tabard.dev/tabard/internal/trust"
)

// Clusters is the part of the directory that tells which cluster a token can
// come from.
type Clusters interface {
	// ClustersOf returns the clusters registered with exactly this issuer. Two
	// accounts may have registered the same one.
	ClustersOf(issuer string) []*cluster.Cluster
	// ResourceGroupName returns a resource group's name, or "".
	ResourceGroupName(id string) string
}

// Kubernetes verifies projected service-account tokens.
type Kubernetes struct {
	Clusters Clusters
	Keys     *Keys
	Now      func() time.Time
}

var kubernetesChecks = []string{CheckForm, CheckIssuer, CheckSignature, CheckAudience, CheckTime, CheckClaims}

// kubernetesClaims are what a Kubernetes API server writes into a bound
// service-account token.
type kubernetesClaims struct {
	Issuer   string           `json:"iss"`
	Subject  string           `json:"sub"`
	Audience josejwt.Audience `json:"aud"`
	// Times are pointers, so that an absent one is told from zero.
	IssuedAt   *josejwt.NumericDate `json:"iat"`
	Expiry     *josejwt.NumericDate `json:"exp"`
	NotBefore  *josejwt.NumericDate `json:"nbf"`
	Kubernetes struct {
		Namespace      string `json:"namespace"`
		ServiceAccount named  `json:"serviceaccount"`
		Pod            named  `json:"pod"`
		Node           named  `json:"node"`
	} `json:"kubernetes.io"`
}

type named struct {
	Name string `json:"name"`
	UID  string `json:"uid"`
}

func seconds(d *josejwt.NumericDate) int64 {
	if d == nil {
		return 0
	}
	return int64(*d)
}

// Verify returns the evidence that a service-account token gives: one proof for
// each account that registered the cluster with keys that verify it. The error
// is a *Refusal.
func (k *Kubernetes) Verify(ctx context.Context, raw string) ([]Proof, error) {
	start := steps{names: kubernetesChecks}
	t, err := jwt.Parse(raw, jwt.Asymmetric, "", "JWT")
	if err != nil {
		r := start.refuse(Malformed, CheckForm, "a signed JWT ("+algorithms()+")", err.Error(), "The compute resource token is not a JWT that can be checked.")
		r.Cause = err
		return nil, r
	}
	// The claims are read once. Until a key has verified the signature over
	// these very bytes, only the issuer is looked at, to find the key.
	var claims kubernetesClaims
	if err := t.Unverified(&claims); err != nil {
		r := start.refuse(Malformed, CheckForm, "claims in JSON, each once", err.Error(), "The compute resource token's claims cannot be read.")
		r.Cause = err
		return nil, r
	}
	start.pass(CheckForm, "a signed JWT", t.Alg+" kid "+t.KeyID)

	clusters := k.Clusters.ClustersOf(claims.Issuer)
	if len(clusters) == 0 {
		return nil, start.refuse(UnknownIssuer, CheckIssuer, "a registered cluster", claims.Issuer,
			"No registered cluster has the token's issuer; register it with 'tabard ks cluster-register NAME --issuer URL'.")
	}
	start.pass(CheckIssuer, "a registered cluster", claims.Issuer)

	var proofs []Proof
	var nearest *Refusal // over all accounts, and
	var aimed []Aimed    // for each of them
	for _, c := range clusters {
		s := steps{names: kubernetesChecks, trace: slices.Clone(start.trace)}
		proof, refusal := k.verifyFor(ctx, c, t, &claims, s)
		if refusal == nil {
			proofs = append(proofs, proof)
			continue
		}
		if nearest == nil || progress(refusal.Trace) > progress(nearest.Trace) {
			nearest = refusal
		}
		seen := slices.IndexFunc(aimed, func(a Aimed) bool { return a.AccountID == c.AccountID })
		switch {
		case seen < 0:
			aimed = append(aimed, Aimed{AccountID: c.AccountID, Trace: refusal.Trace})
		case progress(refusal.Trace) > progress(aimed[seen].Trace):
			aimed[seen].Trace = refusal.Trace
		}
	}
	if len(proofs) > 0 {
		return proofs, nil
	}
	nearest.Aimed = aimed
	return nil, nearest
}

// progress counts the checks that passed before one failed.
func progress(t activity.Trace) int {
	failed, _ := t.Failed()
	return slices.Index(kubernetesChecks, failed.Name)
}

func (k *Kubernetes) verifyFor(ctx context.Context, c *cluster.Cluster, t *jwt.Token, claims *kubernetesClaims, s steps) (Proof, *Refusal) {
	if r := k.Keys.check(ctx, c, "cluster", t, &s); r != nil {
		return Proof{}, r
	}
	if !claims.Audience.Contains(c.Audience) {
		return Proof{}, s.refuse(WrongAudience, CheckAudience, c.Audience, strings.Join(claims.Audience, ", "),
			"The token was made for another audience; project it with audience: "+c.Audience+".")
	}
	s.pass(CheckAudience, c.Audience, strings.Join(claims.Audience, ", "))

	if r := checkTime(&s, k.Now(), seconds(claims.IssuedAt), seconds(claims.NotBefore), seconds(claims.Expiry)); r != nil {
		return Proof{}, r
	}

	namespace, account := claims.Kubernetes.Namespace, claims.Kubernetes.ServiceAccount.Name
	wanted := "sub system:serviceaccount:" + namespace + ":" + account
	if namespace == "" || account == "" || "sub "+claims.Subject != wanted {
		return Proof{}, s.refuse(BadClaims, CheckClaims, wanted, "sub "+claims.Subject,
			"The token is not a bound service-account token.")
	}
	s.pass(CheckClaims, wanted, "sub "+claims.Subject)

	name, err := crn.Parse(c.CRN)
	if err != nil {
		return Proof{}, s.refuse(BadClaims, CheckClaims, "a cluster CRN", c.CRN, "The cluster's record is broken.")
	}
	pod := claims.Kubernetes.Pod.Name
	ev := trust.Evidence{
		Type: c.Type, CRN: name, AccountID: c.AccountID,
		Namespace: namespace, ServiceAccount: account,
		Name: strings.Join([]string{c.Name, namespace, account, pod}, ":"),
		Claims: map[string]any{
			"crn": c.CRN, "service_instance": c.ID, "location": c.Location,
			"resource_group_id": c.ResourceGroupID,
			"namespace":         namespace, "name": account,
		},
	}
	optional(ev.Claims, "resource_group_name", k.Clusters.ResourceGroupName(c.ResourceGroupID))
	optional(ev.Claims, "pod", pod)
	return Proof{Evidence: ev, Trace: s.trace}, nil
}

// optional sets a claim that was proved; an absent one meets no condition.
func optional(claims map[string]any, name, value string) {
	if value != "" {
		claims[name] = value
	}
}

func algorithms() string {
	names := make([]string, len(jwt.Asymmetric))
	for i, a := range jwt.Asymmetric {
		names[i] = string(a)
	}
	return strings.Join(names, ", ")
}
