package kubernetes

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
)

// bare is a pod of the sample without a volume, a variable or a profile's name:
// whatever it has of these is the webhook's.
const bare = `
apiVersion: v1
kind: Pod
metadata: {name: lister, namespace: %s}
spec:
  restartPolicy: Never
  serviceAccountName: web
  automountServiceAccountToken: false
  securityContext: {runAsNonRoot: true, runAsUser: 65532}
  containers:
    - name: app
      image: images.example.com/resource-lister:1.0.0
      args: [--once]
`

// report is what the sample prints of a list or of what kept it from one.
type report struct {
	Profile   string
	Reached   string
	Resources []struct{ Name string }
	Error     struct{ ErrorCode, ErrorDetails, TransactionID, Hint string }
}

func TestAPodOfAnAnnotatedServiceAccountNeedsNothingElse(t *testing.T) {
	n := newNodeSite(t)
	s := &site{n.Server}
	s.Login()
	k := n.cluster
	hook := &webhookSite{Cluster: k, t: t, balancer: newBalancer(t), iamURL: n.address}
	hook.apply(render(t, "createNamespace=true"))
	hook.install()
	hook.kubeconfig = k.KubeconfigFor(webhookNamespace, "tabard-webhook")
	hook.start("--insecure-http")

	c := s.register("my-cluster", uploaded(k))
	s.resources("my-profile")
	s.link("my-profile", c, "shop", "web")
	annotated := map[string]string{profileAnnotation: "my-profile"}
	k.Namespace("shop", map[string]string{identityLabel: "required"}, nil)
	k.Namespace("other", nil, nil)
	k.Namespace("strict", map[string]string{identityLabel: "required"}, nil)
	k.ServiceAccount("shop", "web", annotated)
	k.ServiceAccount("other", "web", annotated)
	k.ServiceAccount("strict", "web", nil)

	// ran runs the pod to its end and returns what it has printed.
	ran := func(t *testing.T, ns, phase string) report {
		t.Helper()
		k.Apply(fmt.Sprintf(bare, ns))
		k.Kubectl("wait", "-n", ns, "--for=jsonpath={.status.phase}="+phase, "pod/lister", "--timeout=120s")
		log := k.Kubectl("logs", "-n", ns, "lister")
		if strings.Contains(log, "eyJ") {
			t.Errorf("the log has a token:\n%s", log)
		}
		var r report
		if err := json.Unmarshal([]byte(log), &r); err != nil || r.Profile != "my-profile" {
			t.Fatalf("%v:\n%s", err, log)
		}
		return r
	}
	t.Run("where the profile trusts it", func(t *testing.T) {
		if r := ran(t, "shop", "Succeeded"); r.Reached != "list-resources" || len(r.Resources) != 1 || r.Resources[0].Name != "store" {
			t.Errorf("%+v", r)
		}
	})
	t.Run("and is told why elsewhere", func(t *testing.T) {
		r := ran(t, "other", "Failed")
		if r.Reached != "read-token" || r.Error.ErrorCode != "BXNIM0398E" || !strings.Contains(r.Error.ErrorDetails, "my-cluster:other:web:lister") || r.Error.Hint == "" {
			t.Errorf("%+v", r)
		}
		s.explains(t, r.Error.TransactionID, "profile-link")
	})
	t.Run("but does not come in without the annotation where an identity is demanded", func(t *testing.T) {
		out, err := k.TryKubectl(fmt.Sprintf(bare, "strict"), "apply", "-f", "-")
		if err == nil || !strings.Contains(out+err.Error(), "service account web names no trusted profile") {
			t.Errorf("%v %s", err, out)
		}
	})
}
