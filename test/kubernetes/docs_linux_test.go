package kubernetes

import (
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
	sh := harness.StartShell(t, s.Server, map[string]string{"bin/kubectl": kubetest.Bin(t, "kubectl")}, []string{"HOME=" + home, "KUBECONFIG="},
		"https://tabard.example.com", s.address)
	sh.Timeout = 3 * time.Minute // images are unpacked and pods started, on busy cores
	sh.Follow(filepath.Join(harness.Root(), "docs", "kubernetes.md"))
}
