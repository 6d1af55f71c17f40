package kubernetes

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"tabard.dev/tabard/test/harness"
	"tabard.dev/tabard/test/kubetest"
)

// The guide is followed line by line, with pods that really run.
func TestTheGuideToKubernetesDoesWhatItSays(t *testing.T) {
	s := newNodeSite(t)
	s.Login()
	home := t.TempDir()
	if err := os.Mkdir(filepath.Join(home, ".kube"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(s.cluster.Kubeconfig, filepath.Join(home, ".kube", "config")); err != nil {
		t.Fatal(err)
	}
	sh := harness.StartShell(t, s.Server,
		map[string]string{"bin/kubectl": kubetest.Bin(t, "kubectl"), "bin/helm": kubetest.Bin(t, "helm")},
		[]string{"HOME=" + home, "KUBECONFIG="},
		"--set iamURL=https://tabard.example.com", "--set insecureHTTP=true --set iamURL="+s.address,
		"https://tabard.example.com", s.address)
	sh.Timeout = 3 * time.Minute // images are unpacked and pods started, on busy cores
	sh.Instead = map[string]func(){
		`kubectl rollout status --namespace tabard-system deployment/tabard-webhook --timeout 120s
kubectl rollout status --namespace tabard-system deployment/tabard-controller --timeout 120s
`: func() { s.runInstalled(t) },
	}
	sh.Follow(filepath.Join(harness.Root(), "docs", "kubernetes.md"))
}

// runInstalled runs the webhook and the controller that helm has installed
// beside the node, as their service accounts: without kube-proxy, neither they
// nor the API server would reach the address of a Service.
func (s *nodeSite) runInstalled(t *testing.T) {
	t.Helper()
	hook := &webhookSite{
		Cluster: s.cluster, t: t, balancer: newBalancer(t), iamURL: s.address,
		kubeconfig: s.cluster.KubeconfigFor(webhookNamespace, "tabard-webhook"),
	}
	patch := "["
	for i, path := range []string{"/require", "/inject"} {
		if got := s.cluster.Kubectl("get", "mutatingwebhookconfiguration", "tabard-webhook", "-o",
			fmt.Sprintf("jsonpath={.webhooks[%d].clientConfig.service.path}", i)); got != path {
			t.Fatalf("webhook %d is at %q, want %q", i, got, path)
		}
		patch += fmt.Sprintf(`{"op":"remove","path":"/webhooks/%[1]d/clientConfig/service"},{"op":"add","path":"/webhooks/%[1]d/clientConfig/url","value":"https://%[2]s%[3]s"},`,
			i, hook.balancer.address(), path)
	}
	s.cluster.Kubectl("patch", "mutatingwebhookconfiguration", "tabard-webhook", "--type", "json", "--patch", patch[:len(patch)-1]+"]")
	hook.start("--insecure-http")
	(&bindings{Server: s.Server, t: t, k: s.cluster}).controller(t)
}
