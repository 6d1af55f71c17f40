package cli

import (
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"tabard.dev/tabard/internal/kube"
)

// What --token-review makes in a cluster.
const (
	reviewerNamespace = "tabard-system"
	reviewerAccount   = "tabard-reviewer"
	reviewerSecret    = "tabard-reviewer-token" //nolint:gosec // the name of a Secret
)

// Bounds on waiting for the cluster to fill in the reviewer's token.
const (
	secretWait = 10 * time.Second
	secretPoll = 250 * time.Millisecond

	// requestedLife is asked for where the cluster fills in none. Clusters may
	// give less.
	requestedLife = 365 * 24 * time.Hour
)

// reviewerObjects are what the server's reviewer needs: a service account that
// may have tokens reviewed and read the issuer's keys, and may do nothing else.
func reviewerObjects() []struct {
	path, what, name string
	body             map[string]any
} {
	meta := func(name string) map[string]any {
		return map[string]any{"name": name, "labels": map[string]any{"app.kubernetes.io/managed-by": "tabard"}}
	}
	binding := func(name, role string) map[string]any {
		return map[string]any{
			"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": meta(name),
			"roleRef":  map[string]any{"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role},
			"subjects": []any{map[string]any{"kind": "ServiceAccount", "namespace": reviewerNamespace, "name": reviewerAccount}},
		}
	}
	secret := meta(reviewerSecret)
	secret["annotations"] = map[string]any{"kubernetes.io/service-account.name": reviewerAccount}
	in := "/api/v1/namespaces/" + reviewerNamespace
	bindings := "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings"
	roles := "/apis/rbac.authorization.k8s.io/v1/clusterroles"
	return []struct {
		path, what, name string
		body             map[string]any
	}{
		{"/api/v1/namespaces", "namespace", reviewerNamespace, map[string]any{"apiVersion": "v1", "kind": "Namespace", "metadata": meta(reviewerNamespace)}},
		{in + "/serviceaccounts", "service account", reviewerAccount, map[string]any{
			"apiVersion": "v1", "kind": "ServiceAccount", "metadata": meta(reviewerAccount), "automountServiceAccountToken": false}},
		// Cluster roles that come with Kubernetes allow more: system:auth-delegator
		// also lets its bearer ask what everybody may do.
		{roles, "cluster role", reviewerAccount, map[string]any{
			"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": meta(reviewerAccount),
			"rules": []any{
				map[string]any{"apiGroups": []string{"authentication.k8s.io"}, "resources": []string{"tokenreviews"}, "verbs": []string{"create"}},
				map[string]any{"nonResourceURLs": []string{"/openid/v1/jwks", "/.well-known/openid-configuration"}, "verbs": []string{"get"}},
			},
		}},
		{bindings, "cluster role binding", reviewerAccount, binding(reviewerAccount, reviewerAccount)},
		{in + "/secrets", "secret", reviewerSecret, map[string]any{
			"apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/service-account-token", "metadata": secret}},
	}
}

// reviewer makes the reviewer in a cluster and returns its token. It may be run
// again: what is there already is brought into the same form.
func (s *session) reviewer(name, server string, c *kube.Client) (string, error) {
	for _, o := range reviewerObjects() {
		path := o.path + "/" + o.name + "?fieldManager=tabard"
		if err := c.Patch(s.ctx(), path, kube.ApplyPatch, o.body, nil); err != nil {
			return "", clusterError(server, "make the "+o.what+" "+o.name+" in the cluster", err)
		}
	}
	token, err := s.secretToken(c)
	if err != nil {
		return "", clusterError(server, "read the reviewer's token", err)
	}
	if token != "" {
		return token, nil
	}
	made, err := kube.RequestToken(s.ctx(), c, reviewerNamespace, reviewerAccount, "", requestedLife)
	if err != nil {
		return "", clusterError(server, "make the reviewer's token", err)
	}
	s.warn("the cluster fills in no lasting token, so the reviewer's ends on %s. Before that run: tabard ks cluster-update %s --token-review --kubeconfig FILE",
		made.Expires.UTC().Format(timeForm), name)
	return made.Token, nil
}

// secretToken returns what the cluster's token controller puts into the secret,
// or "" when it does not within a while.
func (s *session) secretToken(c *kube.Client) (string, error) {
	for deadline := time.Now().Add(secretWait); time.Now().Before(deadline); {
		var secret struct {
			Data struct {
				Token string `json:"token"`
			} `json:"data"`
		}
		err := c.Do(s.ctx(), http.MethodGet, "/api/v1/namespaces/"+reviewerNamespace+"/secrets/"+reviewerSecret, nil, &secret)
		// The controller deletes a secret whose service account it has not seen yet.
		if err != nil && kube.Code(err) != http.StatusNotFound {
			return "", err
		}
		if secret.Data.Token != "" {
			token, err := base64.StdEncoding.DecodeString(secret.Data.Token)
			return string(token), err
		}
		select {
		case <-s.ctx().Done():
			return "", errInterrupted
		case <-time.After(secretPoll):
		}
	}
	return "", nil
}

// confirmReviewer asks before anything is made in a cluster.
func (s *session) confirmReviewer(server string, force bool) error {
	if force {
		return nil
	}
	var made []string
	for _, o := range reviewerObjects() {
		made = append(made, o.what+" "+o.name)
	}
	return s.confirm(false, "make the reviewer's objects in the cluster at %s (%s)", server, strings.Join(made, ", "))
}

// reviewerFile reads a token that somebody made for the server's reviewer.
func reviewerFile(file string) (string, error) {
	text, err := readFile(file)
	if err != nil {
		return "", during(err, "read the reviewer's token")
	}
	text = strings.TrimSpace(text)
	if text == "" || strings.ContainsAny(text, " \n\t") {
		return "", fmt.Errorf("read the reviewer's token: %w", errors.New(file+" does not hold one token and nothing else"))
	}
	return text, nil
}
