//go:build linux

package kubenode

import (
	"strings"
	"testing"

	"tabard.dev/tabard/test/kubetest"
)

func TestAPodRunsWithTheTokenThatItsVolumeAsksFor(t *testing.T) {
	n := New(t)
	c := kubetest.Start(t, kubetest.Options{Controllers: true, ExtraArgs: n.APIServerArgs()})
	shell, err := Shell("example.com/shell:1")
	if err != nil {
		t.Fatal(err)
	}
	n.Join(c, shell)
	c.Apply(`
apiVersion: v1
kind: Pod
metadata: {name: reader, namespace: default}
spec:
  restartPolicy: Never
  securityContext: {runAsNonRoot: true, runAsUser: 65532}
  containers:
    - name: app
      image: example.com/shell:1
      command: [cat, /var/run/secrets/tokens/sa-token]
      volumeMounts: [{name: token, mountPath: /var/run/secrets/tokens, readOnly: true}]
  volumes:
    - name: token
      projected: {sources: [{serviceAccountToken: {path: sa-token, audience: iam, expirationSeconds: 3600}}]}
`)
	c.Kubectl("wait", "--for=jsonpath={.status.phase}=Succeeded", "pod/reader", "--timeout=60s")
	claims := kubetest.Claims(t, strings.TrimSpace(c.Kubectl("logs", "reader")))
	inner, _ := claims["kubernetes.io"].(map[string]any)
	pod, _ := inner["pod"].(map[string]any)
	node, _ := inner["node"].(map[string]any)
	if claims["sub"] != "system:serviceaccount:default:default" || pod["name"] != "reader" || node["name"] != Name {
		t.Fatalf("the token in the pod says %v", claims)
	}
}
