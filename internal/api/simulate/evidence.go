package simulate

import (
	"encoding/json"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/attest"
	"tabard.dev/tabard/internal/cluster"
	"tabard.dev/tabard/internal/grant"
	"tabard.dev/tabard/internal/identity"
	"tabard.dev/tabard/internal/trust"
	"tabard.dev/tabard/internal/vpc"
)

// description is a workload in the caller's words. Clusters, instances and
// issuers are named by id or name and must be the account's; what they are is
// read from their records, as it is for a token.
type description struct {
	Type string `json:"type"` // kubernetes, instance or oidc

	Cluster        string `json:"cluster"`
	Namespace      string `json:"namespace"`
	ServiceAccount string `json:"service_account"`
	Pod            string `json:"pod"`
	PodUID         string `json:"pod_uid"`
	Node           string `json:"node"`

	Instance string `json:"instance"`

	Issuer string                     `json:"issuer"` // name, id or URL of a workload issuer
	Claims map[string]json.RawMessage `json:"claims"` // of its token, as the issuer writes them
}

// Types of description.
const (
	typeKubernetes = "kubernetes"
	typeInstance   = "instance"
	typeOIDC       = "oidc"
)

// read finds what a description names, in the caller's account, and demands
// that he may see it.
func (d *description) read(c *api.Call) (grant.Description, error) {
	for field, value := range map[string]string{
		"cluster": d.Cluster, "namespace": d.Namespace, "service_account": d.ServiceAccount, "pod": d.Pod, "pod_uid": d.PodUID,
		"node": d.Node, "instance": d.Instance, "issuer": d.Issuer,
	} {
		if len(value) > maxText {
			return grant.Description{}, tooLong("evidence."+field, maxText)
		}
	}
	switch d.Type {
	case typeKubernetes:
		return d.ofPod(c)
	case typeInstance:
		return d.ofInstance(c)
	case typeOIDC:
		return d.ofJob(c)
	}
	return grant.Description{}, api.Invalid("evidence.type must be %s, %s or %s.", typeKubernetes, typeInstance, typeOIDC).On("evidence.type")
}

func (d *description) ofPod(c *api.Call) (grant.Description, error) {
	pod := attest.Pod{Namespace: d.Namespace, ServiceAccount: d.ServiceAccount, Name: d.Pod, UID: d.PodUID, Node: d.Node}
	if !pod.Valid() {
		return grant.Description{}, api.Invalid("Evidence of a pod needs namespace and service_account, and may have pod, pod_uid and node, each a name as Kubernetes gives them.").On("evidence")
	}
	found, err := find(c, "cluster", d.Cluster, c.Directory.ClustersByAccount.Get(c.Account()),
		func(k *cluster.Cluster) []string { return []string{k.ID, k.Name, k.CRN} })
	if err != nil {
		return grant.Description{}, err
	}
	if err := seeCluster(c, found); err != nil {
		return grant.Description{}, err
	}
	return grant.Description{Cluster: found, Pod: pod}, nil
}

func (d *description) ofInstance(c *api.Call) (grant.Description, error) {
	found, err := find(c, "instance", d.Instance, c.Directory.InstancesByAccount.Get(c.Account()),
		func(i *vpc.Instance) []string { return []string{i.ID, i.Name, i.CRN} })
	if err != nil {
		return grant.Description{}, err
	}
	err = c.Authorize("is.instance.instance.read", c.InAccount("is.instance", access.Region, c.Region, access.ResourceType, "instance",
		access.Resource, found.ID, access.ResourceGroupID, found.ResourceGroupID, "instanceId", found.ID))
	return grant.Description{Instance: found}, err
}

func (d *description) ofJob(c *api.Call) (grant.Description, error) {
	if len(d.Claims) > maxClaims {
		return grant.Description{}, api.Invalid("evidence.claims has more than %d claims.", maxClaims).On("evidence.claims")
	}
	for name, value := range d.Claims {
		if len(name) > maxText || len(value) > maxToken {
			return grant.Description{}, tooLong("a claim of evidence.claims", maxToken)
		}
	}
	found, err := find(c, "workload issuer", d.Issuer, c.Directory.WorkloadIssuersByAccount.Get(c.Account()),
		func(i *cluster.Issuer) []string { return []string{i.ID, i.Name, i.CRN, i.Issuer} })
	if err != nil {
		return grant.Description{}, err
	}
	return grant.Description{Issuer: found, Claims: d.Claims}, seeIssuer(c, found)
}

// find returns the one of the account's objects that has a reference among its
// names; the first name, its id, counts before the others.
func find[T any](c *api.Call, noun, ref string, all []*T, names func(*T) []string) (*T, error) {
	var found *T
	rank := 0
	for _, one := range all {
		for i, name := range names(one) {
			if name == ref && ref != "" && (found == nil || i < rank) {
				found, rank = one, i
			}
		}
	}
	if found == nil {
		return nil, api.NotFound(noun, ref)
	}
	return found, nil
}

func seeCluster(c *api.Call, k *cluster.Cluster) error {
	return c.Authorize("containers-kubernetes.cluster.read", c.InAccount("containers-kubernetes",
		access.ServiceInstance, k.ID, access.Region, k.Location, access.ResourceGroupID, k.ResourceGroupID))
}

func seeIssuer(c *api.Call, i *cluster.Issuer) error {
	return c.Authorize("iam-identity.workload-issuer.get", c.InAccount("iam-identity", access.ResourceType, "workload-issuer", access.Resource, i.ID))
}

// authorizeProved demands that the caller may see what a token has proved: the
// answer shows what its registration says of it.
func authorizeProved(c *api.Call, ev *trust.Evidence) error {
	if ev == nil {
		return nil
	}
	if ev.Type == identity.OIDC {
		if i, ok := c.Directory.WorkloadIssuers.Get(ev.CRN.Resource); ok && i.AccountID == c.Account() {
			return seeIssuer(c, i)
		}
	} else if k, ok := c.Directory.Clusters.Get(ev.CRN.Instance); ok && k.AccountID == c.Account() {
		return seeCluster(c, k)
	}
	return denied("What the token proves is not registered in account %s any more.", c.Account())
}
