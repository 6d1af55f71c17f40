package kubernetes

import (
	"encoding/base64"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/IBM/go-sdk-core/v5/core"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"tabard.dev/tabard/test/kubetest"
)

func TestAPodOfARealClusterGetsATokenWithoutAKey(t *testing.T) {
	t.Parallel()
	k := kubetest.Start(t, kubetest.Options{Controllers: true})
	for _, ns := range []string{"shop", "billing"} {
		k.Namespace(ns, nil, nil)
		k.ServiceAccount(ns, "web", nil)
		k.ServiceAccount(ns, "other", nil)
	}
	s := newSite(t)
	s.resources("pod")
	cluster := s.register("my-cluster", uploaded(k))
	s.link("pod", cluster, "shop", "web")
	pod := k.Pod("shop", "web-1", "web")
	good := k.Token("shop", "web", "iam", 3600, pod)

	t.Run("with the published SDK, unmodified", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "sa-token")
		if err := os.WriteFile(file, []byte(good), 0o600); err != nil {
			t.Fatal(err)
		}
		authenticator, err := core.NewContainerAuthenticatorBuilder().SetIAMProfileName("pod").SetCRTokenFilename(file).SetURL(s.URL).Build()
		if err != nil {
			t.Fatal(err)
		}
		token, err := authenticator.GetToken()
		if err != nil {
			t.Fatal(err)
		}
		if names := s.names(t, token); !slices.Equal(names, []string{"store"}) {
			t.Errorf("the pod sees %v", names)
		}
		events := s.Events("--action", loginAction, "--outcome", "success")
		if len(events) != 1 {
			t.Fatalf("%d logins in the log", len(events))
		}
		if e := events[0]; e.Initiator.Name != "pod" || e.Initiator.AuthnID != "crn-"+cluster.CRN || e.Target.Name != "pod" {
			t.Errorf("the log says that %+v put on %+v", e.Initiator, e.Target)
		}
	})
	t.Run("also when the token is not bound to a pod", func(t *testing.T) {
		s.admitted(t, k.Token("shop", "web", "iam", 600, nil), "pod")
	})

	claims := func(change func(object)) string {
		c := kubetest.Claims(t, good)
		change(c)
		return k.Sign(c)
	}
	legacy := legacyToken(t, k, "shop", "web")
	for _, d := range []struct {
		name, token, code, check string
	}{
		{"in another namespace", k.Token("billing", "web", "iam", 600, nil), "BXNIM0398E", "profile-link"},
		{"under another service account", k.Token("shop", "other", "iam", 600, nil), "BXNIM0398E", "profile-link"},
		{"with a token for somebody else", k.Token("shop", "web", "https://vault.example.com", 600, pod), "BXNIM0405E", "token-audience"},
		{"with the token for the API server", k.Token("shop", "web", "", 600, pod), "BXNIM0405E", "token-audience"},
		{"with a token that is to live for two hours", k.Token("shop", "web", "iam", 7200, pod), "BXNIM0407E", "token-time"},
		// The API server makes no token that ends within 10 minutes; this is what
		// it made an hour ago.
		{"with a token that has expired", claims(func(c object) {
			hourAgo := time.Now().Add(-time.Hour).Unix()
			c["iat"], c["nbf"], c["exp"] = hourAgo, hourAgo, hourAgo+600
		}), "BXNIM0407E", "token-time"},
		{"with a token whose namespace was rewritten", rewritten(t, k.Token("billing", "web", "iam", 600, nil), "billing", "shop"), "BXNIM0405E", "token-signature"},
		{"with a token that is about nobody's service account", claims(func(c object) {
			c["sub"] = "system:serviceaccount:kube-system:admin"
		}), "BXNIM0405E", "token-claims"},
	} {
		t.Run("but not "+d.name, func(t *testing.T) { s.refused(t, d.token, "pod", d.code, d.check) })
	}
	t.Run("but not with the token of a secret", func(t *testing.T) {
		// It names another issuer than the cluster's, so that no account is
		// concerned; the operator's log has it.
		s.refused(t, legacy, "pod", "BXNIM0405E", "token-issuer")
	})
	t.Run("and every refusal is in the log", func(t *testing.T) {
		if n := len(s.Events("--action", loginAction, "--outcome", "failure")); n != 9 {
			t.Errorf("%d refused logins in the log, want 9", n)
		}
		if strings.Contains(s.Log(), good) {
			t.Error("a token stands in the server's log")
		}
	})
}

// rewritten changes a token's claims and keeps its signature.
func rewritten(t *testing.T, token, from, to string) string {
	t.Helper()
	parts := strings.Split(token, ".")
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil || !strings.Contains(string(payload), from) {
		t.Fatalf("the claims %s do not name %s: %v", payload, from, err)
	}
	parts[1] = base64.RawURLEncoding.EncodeToString([]byte(strings.ReplaceAll(string(payload), from, to)))
	return strings.Join(parts, ".")
}

// legacyToken is a token of the old kind, without an end, that the token
// controller puts into a secret.
func legacyToken(t *testing.T, k *kubetest.Cluster, ns, sa string) string {
	t.Helper()
	secrets := k.Client().CoreV1().Secrets(ns)
	_, err := secrets.Create(t.Context(), &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: sa + "-token", Annotations: map[string]string{corev1.ServiceAccountNameKey: sa}},
		Type:       corev1.SecretTypeServiceAccountToken,
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var token string
	eventually(t, "the token controller fills the secret", func() bool {
		secret, err := secrets.Get(t.Context(), sa+"-token", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		token = string(secret.Data[corev1.ServiceAccountTokenKey])
		return token != ""
	})
	return token
}

func TestARuleCanNameThePodItsNodeAndItsCluster(t *testing.T) {
	t.Parallel()
	k := kubetest.Start(t, kubetest.Options{Alg: "ES256"})
	k.Namespace("shop", nil, nil)
	k.ServiceAccount("shop", "web", nil)
	k.Node("node-1", nil)
	k.Node("node-2", nil)
	one, two := k.PodOn("shop", "web-1", "web", "node-1"), k.PodOn("shop", "web-2", "web", "node-2")
	oneToken, twoToken := k.Token("shop", "web", "iam", 600, one), k.Token("shop", "web", "iam", 600, two)
	free := k.Token("shop", "web", "iam", 600, nil)

	s := newSite(t)
	cluster := s.register("my-cluster", uploaded(k))
	var group struct {
		ID   string `json:"resource_group_id"`
		Name string
	}
	s.JSON(&group, "ks", "cluster-get", "my-cluster")

	for profile, conditions := range map[string][]string{
		"by-pod":      {"pod", "web-1"},
		"by-pod-uid":  {"pod_uid", string(one.UID)},
		"by-node":     {"node", "node-1"},
		"by-all":      {"node", "node-1", "pod", "web-1", "pod_uid", string(one.UID), "namespace", "shop", "name", "web"},
		"by-pod-node": {"pod", "web-1", "namespace", "shop", "service_instance", cluster.ID},
	} {
		t.Run(profile, func(t *testing.T) {
			s.ruled(profile, conditions...)
			s.admitted(t, oneToken, profile)
			s.refused(t, twoToken, profile, "BXNIM0398E", "profile-rule")
			s.refused(t, free, profile, "BXNIM0398E", "profile-rule")
		})
	}
	for profile, conditions := range map[string][]string{
		"by-crn":            {"crn", cluster.CRN},
		"by-cluster-id":     {"service_instance", cluster.ID},
		"by-location":       {"location", "us-south"},
		"by-namespace":      {"namespace", "shop"},
		"by-name":           {"name", "web"},
		"by-resource-group": {"resource_group_id", group.ID},
	} {
		t.Run(profile, func(t *testing.T) {
			s.ruled(profile, conditions...)
			for _, token := range []string{oneToken, twoToken, free} {
				s.admitted(t, token, profile)
			}
			conditions[1] = "another"
			s.ruled("not-"+profile, conditions...)
			s.refused(t, oneToken, "not-"+profile, "BXNIM0398E", "profile-rule")
		})
	}
	t.Run("a pod that comes again under its name is another pod", func(t *testing.T) {
		k.DeletePod("shop", "web-1")
		again := k.Token("shop", "web", "iam", 600, k.PodOn("shop", "web-1", "web", "node-1"))
		s.admitted(t, again, "by-pod")
		s.refused(t, again, "by-pod-uid", "BXNIM0398E", "profile-rule")
	})
}

func TestATokenOfOneClusterNeverPassesAsAnothers(t *testing.T) {
	t.Parallel()
	// The issuer is the one that clusters have when nobody says otherwise.
	const usual = "https://kubernetes.default.svc.cluster.local"
	a := kubetest.Start(t, kubetest.Options{Issuer: usual})
	b := kubetest.Start(t, kubetest.Options{Issuer: usual, Alg: "ES256"})
	tokens := map[*kubetest.Cluster]string{}
	for _, k := range []*kubetest.Cluster{a, b} {
		k.Namespace("shop", nil, nil)
		k.ServiceAccount("shop", "web", nil)
		tokens[k] = k.Token("shop", "web", "iam", 3600, k.Pod("shop", "web-1", "web"))
	}
	s := newSite(t)
	s.resources("a", "b")
	clusterA, clusterB := s.register("cluster-a", uploaded(a)), s.register("cluster-b", uploaded(b))
	s.link("a", clusterA, "shop", "web")
	s.link("b", clusterB, "shop", "web")

	t.Run("with the same issuer, namespace and service account", func(t *testing.T) {
		s.admitted(t, tokens[a], "a")
		s.admitted(t, tokens[b], "b")
		s.refused(t, tokens[a], "b", "BXNIM0398E", "profile-link")
		s.refused(t, tokens[b], "a", "BXNIM0398E", "profile-link")
	})
	t.Run("when it says that it was signed with the other's key", func(t *testing.T) {
		claims := kubetest.Claims(t, tokens[a])
		s.refused(t, a.SignAs(b.KeyID(), claims), "b", "BXNIM0405E", "token-signature")
		s.refused(t, a.SignAs(b.KeyID(), claims), "a", "BXNIM0405E", "token-signature")
		// Without a name all keys are tried; it stays a token of cluster a.
		s.refused(t, a.SignAs("", claims), "b", "BXNIM0398E", "profile-link")
	})
	t.Run("in an account where their registrations are swapped", func(t *testing.T) {
		swapped := s.account("swapped")
		swapped.resources("a", "b")
		// Each name has the other's keys: what decides is who signed, and not
		// what a registration is called.
		named := map[string]registered{"a": swapped.register("cluster-a", uploaded(b)), "b": swapped.register("cluster-b", uploaded(a))}
		for profile, c := range named {
			swapped.link(profile, c, "shop", "web")
		}
		byID := func(profile string) string {
			var p struct{ ID string }
			swapped.JSON(&p, "iam", "trusted-profile", profile)
			return p.ID
		}
		for _, x := range []struct {
			token, profile string
			status         int
		}{
			{tokens[a], "a", http.StatusBadRequest},
			{tokens[a], "b", http.StatusOK},
			{tokens[b], "a", http.StatusOK},
			{tokens[b], "b", http.StatusBadRequest},
		} {
			if got := exchangeByID(s, x.token, byID(x.profile)); got.Status != x.status {
				t.Errorf("profile %s: %d %s", x.profile, got.Status, got.Body)
			}
		}
	})
	t.Run("in an account that registered only the other", func(t *testing.T) {
		only := s.account("only")
		only.resources("mine")
		only.link("mine", only.register("cluster-b", uploaded(b)), "shop", "web")
		var p struct{ ID string }
		only.JSON(&p, "iam", "trusted-profile", "mine")
		if got := exchangeByID(s, tokens[b], p.ID); got.Status != http.StatusOK {
			t.Errorf("cluster b: %d %s", got.Status, got.Body)
		}
		if got := exchangeByID(s, tokens[a], p.ID); got.Status != http.StatusBadRequest {
			t.Errorf("cluster a: %d %s", got.Status, got.Body)
		}
	})
	t.Run("and one rule covers both through their group", func(t *testing.T) {
		owner := s.OwnerToken()
		created := s.Do(http.MethodPost, "/v1/cluster_groups", owner, object{"name": "fleet"})
		if created.Status != http.StatusCreated {
			t.Fatalf("%d %s", created.Status, created.Body)
		}
		member := func(method string, c registered) {
			t.Helper()
			got := s.Do(method, "/v1/cluster_groups/"+created.Field("id")+"/clusters/"+c.ID, owner, nil)
			if got.Status/100 != 2 {
				t.Fatalf("%s %s: %d %s", method, c.ID, got.Status, got.Body)
			}
		}
		s.ruled("fleet", "cluster_group", "fleet", "namespace", "shop")
		s.refused(t, tokens[a], "fleet", "BXNIM0398E", "profile-rule")
		member(http.MethodPut, clusterA)
		s.admitted(t, tokens[a], "fleet")
		s.refused(t, tokens[b], "fleet", "BXNIM0398E", "profile-rule")
		member(http.MethodPut, clusterB)
		s.admitted(t, tokens[b], "fleet")
		member(http.MethodDelete, clusterA)
		s.refused(t, tokens[a], "fleet", "BXNIM0398E", "profile-rule")
		s.admitted(t, tokens[b], "fleet")
	})
	t.Run("nor when its issuer is the other's", func(t *testing.T) {
		// Now the clusters differ in their issuers, and the attacker has the keys
		// of cluster a.
		c := kubetest.Start(t, kubetest.Options{})
		s.resources("c")
		s.link("c", s.register("cluster-c", uploaded(c)), "shop", "web")
		claims := kubetest.Claims(t, tokens[a])
		claims["iss"] = c.Issuer
		s.refused(t, a.Sign(claims), "c", "BXNIM0405E", "token-signature")
		s.refused(t, a.SignAs(c.KeyID(), claims), "c", "BXNIM0405E", "token-signature")
	})
}
