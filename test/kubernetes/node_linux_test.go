package kubernetes

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"tabard.dev/tabard/test/harness"
	"tabard.dev/tabard/test/kubenode"
	"tabard.dev/tabard/test/kubetest"
)

// nodeSite is a server of Tabard and a cluster with a node that runs pods.
type nodeSite struct {
	*harness.Server
	cluster *kubetest.Cluster
	address string // of the server, for pods
}

func newNodeSite(t *testing.T) *nodeSite {
	t.Helper()
	node := kubenode.New(t)
	lister := listerBinary(t)
	shell, err := kubenode.Shell("docker.io/curlimages/curl:8.11.1")
	if err != nil {
		t.Fatal(err)
	}
	s := &nodeSite{
		cluster: kubetest.Start(t, kubetest.Options{Controllers: true, ExtraArgs: node.APIServerArgs()}),
		Server:  harness.Start(t, "--driver", "none"),
	}
	node.Join(s.cluster, shell, kubenode.Image{
		Name:       "images.example.com/resource-lister:1.0.0",
		Files:      map[string]string{"/resource-lister": lister},
		Entrypoint: []string{"/resource-lister"}, User: "65532:65532",
	})
	s.address = "http://" + node.Expose(strings.TrimPrefix(s.URL, "http://"))
	return s
}

func listerBinary(t *testing.T) string {
	t.Helper()
	bin := os.Getenv("LISTER_BIN")
	if bin == "" {
		bin = filepath.Join(t.TempDir(), "resource-lister")
		cmd := exec.Command("go", "build", "-o", bin, ".")
		cmd.Dir = filepath.Join(harness.Root(), "examples", "resource-lister")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	return bin
}
