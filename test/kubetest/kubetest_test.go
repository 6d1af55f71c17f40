package kubetest_test

import (
	"context"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	authnv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"tabard.dev/tabard/test/kubetest"
)

func TestAControlPlaneIssuesTokensAndSurvivesARotation(t *testing.T) {
	c := kubetest.Start(t, kubetest.Options{Controllers: true, Alg: "ES256"})
	c.Namespace("shop", map[string]string{"team": "a"}, nil)
	c.ServiceAccount("shop", "web", nil)
	c.Node("node-1", nil)
	pod := c.PodOn("shop", "web-1", "web", "node-1")
	token := c.Token("shop", "web", "iam", 600, pod)
	if sub := kubetest.Claims(t, token)["sub"]; sub != "system:serviceaccount:shop:web" {
		t.Fatalf("sub is %v", sub)
	}
	review := func(token string) bool {
		t.Helper()
		r, err := c.Client().AuthenticationV1().TokenReviews().Create(context.Background(),
			&authnv1.TokenReview{Spec: authnv1.TokenReviewSpec{Token: token, Audiences: []string{"iam"}}}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return r.Status.Authenticated
	}
	if !review(token) {
		t.Fatal("the API server does not know its own token")
	}
	claims := kubetest.Claims(t, token)
	claims["exp"] = time.Now().Add(time.Minute).Unix()
	if !review(c.Sign(claims)) {
		t.Error("a token signed with the API server's key is not the API server's")
	}
	if _, err := os.Stat(kubetest.Bin(t, "kubectl")); err == nil {
		c.Apply("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a, namespace: shop}\n")
		if out := c.Kubectl("get", "configmap", "a", "-n", "shop", "-o", "name"); strings.TrimSpace(out) != "configmap/a" {
			t.Errorf("kubectl printed %q", out)
		}
	}
	if c.KubeconfigFor("shop", "web") == "" {
		t.Error("no kubeconfig")
	}
	c.RotateSigningKey(true)
	if !review(token) {
		t.Error("the old key is not kept")
	}
	c.RotateSigningKey(false)
	if review(token) {
		t.Error("the old key is kept")
	}
	if !strings.Contains(string(c.JWKS()), c.KeyID()) {
		t.Error("the new key is not published")
	}
	c.OpenDiscovery()
	c.Stop()
	if _, err := http.Get(c.URL); err == nil {
		t.Error("the API server serves after Stop")
	}
	c.Restart()
	c.DeletePod("shop", "web-1")
}
