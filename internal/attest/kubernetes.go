package attest

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"unicode"

	"tabard.dev/tabard/internal/cluster"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/trust"
)

// podClaims are what a Kubernetes API server writes into a service-account
// token besides the registered claims. Further members, such as warnafter, say
// nothing about who the pod is.
type podClaims struct {
	Kubernetes struct {
		Namespace      string `json:"namespace"`
		ServiceAccount named  `json:"serviceaccount"`
		Pod            named  `json:"pod"`
		Node           named  `json:"node"`
	} `json:"kubernetes.io"`
	LegacySecret json.RawMessage `json:"kubernetes.io/serviceaccount/secret.name"`
}

type named struct {
	Name string `json:"name"`
	UID  string `json:"uid"`
}

// legacyIssuer is the iss of the tokens that Kubernetes keeps in Secrets: they
// never end, and are made for no audience.
const legacyIssuer = "kubernetes/serviceaccount"

const legacyHint = "This is a service-account token of the old kind, from a Secret: it never ends and is made for nobody in particular. Mount a projected token instead (volume source serviceAccountToken with audience iam and expirationSeconds 3600)."

func (p *presented) legacy() bool {
	return p.claims.Issuer == legacyIssuer || len(p.pod.LegacySecret) > 0
}

func (w *Workloads) tryCluster(ctx context.Context, c *cluster.Cluster, p *presented, s *steps) outcome {
	if r := w.Keys.check(ctx, c, "cluster", p.token, s); r != nil {
		return outcome{refusal: r}
	}
	hint := "The token was made for another audience; project it with audience: " + c.Audience + "."
	if p.legacy() {
		hint = legacyHint
	}
	if r := p.checkAudience(s, c.Audience, hint); r != nil {
		return outcome{refusal: r}
	}
	if r := checkTime(s, w.Now(), seconds(p.claims.IssuedAt), seconds(p.claims.NotBefore), seconds(p.claims.Expiry)); r != nil {
		return outcome{refusal: r}
	}
	if p.podErr != nil {
		return outcome{refusal: s.refuse(BadClaims, CheckClaims, "the claims of a service-account token", p.podErr.Error(),
			"The token is not a bound service-account token.")}
	}
	k := p.pod.Kubernetes
	namespace, account := k.Namespace, k.ServiceAccount.Name
	wanted := "sub system:serviceaccount:" + namespace + ":" + account
	if !segment(namespace) || !segment(account) || "sub "+p.claims.Subject != wanted {
		return outcome{refusal: s.refuse(BadClaims, CheckClaims, wanted, "sub "+p.claims.Subject,
			"The token is not a bound service-account token.")}
	}
	for what, v := range map[string]string{"pod": k.Pod.Name, "node": k.Node.Name} {
		if v != "" && !segment(v) {
			return outcome{refusal: s.refuse(BadClaims, CheckClaims, "the name of a "+what, v, "The token names a "+what+" that cannot be one.")}
		}
	}
	s.pass(CheckClaims, wanted, "sub "+p.claims.Subject)

	ev, err := w.PodEvidence(c, Pod{Namespace: namespace, ServiceAccount: account, Name: k.Pod.Name, UID: k.Pod.UID, Node: k.Node.Name})
	if err != nil {
		return outcome{refusal: s.refuse(BadClaims, CheckClaims, "a cluster CRN", c.CRN, "The cluster's record is broken.")}
	}
	o := evidenceProof(ev, s)
	if c.Review {
		o.proof.review = &pendingReview{
			reviewer: w.Reviewer, cluster: c, raw: p.raw, expires: seconds(p.claims.Expiry),
			subject: p.claims.Subject, accountUID: k.ServiceAccount.UID, podUID: k.Pod.UID,
		}
	}
	return o
}

// Pod is who a service-account token is about, by the names in its cluster.
// Those of the pod itself may be empty.
type Pod struct{ Namespace, ServiceAccount, Name, UID, Node string }

// Valid reports whether the names can be those of a pod.
func (p Pod) Valid() bool {
	for _, name := range []string{p.Name, p.UID, p.Node} {
		if name != "" && !segment(name) {
			return false
		}
	}
	return segment(p.Namespace) && segment(p.ServiceAccount)
}

// PodEvidence is the evidence that a token of a cluster gives once all its
// checks have passed. The names must be [Pod.Valid]. An error says that the
// cluster's record is broken.
func (w *Workloads) PodEvidence(c *cluster.Cluster, p Pod) (trust.Evidence, error) {
	name, err := crn.Parse(c.CRN)
	if err != nil {
		return trust.Evidence{}, fmt.Errorf("CRN of cluster %s: %w", c.ID, err)
	}
	ev := trust.Evidence{
		Type: c.Type, CRN: name, AccountID: c.AccountID,
		Namespace: p.Namespace, ServiceAccount: p.ServiceAccount,
		Name: strings.Join([]string{c.Name, p.Namespace, p.ServiceAccount, p.Name}, ":"),
		Claims: map[string]any{
			"crn": c.CRN, "service_instance": c.ID, "location": c.Location,
			"resource_group_id": c.ResourceGroupID,
			"namespace":         p.Namespace, "name": p.ServiceAccount,
		},
	}
	if groups := w.Clusters.ClusterGroupNames(c); len(groups) > 0 {
		ev.Claims["cluster_group"] = groups
	}
	optional(ev.Claims, "resource_group_name", w.Clusters.ResourceGroupName(c.ResourceGroupID))
	optional(ev.Claims, "pod", p.Name)
	optional(ev.Claims, "pod_uid", p.UID)
	optional(ev.Claims, "node", p.Node)
	return ev, nil
}

// maxSegment is the longest name that Kubernetes gives anything, in characters.
const maxSegment = 253

// segment reports whether a name can be one of Kubernetes: it stands between
// colons in the subject and in the workload's name.
func segment(s string) bool {
	return s != "" && len(s) <= maxSegment && !strings.ContainsFunc(s, func(r rune) bool {
		return r == ':' || unicode.IsSpace(r) || unicode.IsControl(r)
	})
}
