package kubetest

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"strings"

	authnv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

// Namespace creates a namespace.
func (c *Cluster) Namespace(name string, labels, annotations map[string]string) *corev1.Namespace {
	c.T.Helper()
	ctx, cancel := c.context()
	defer cancel()
	n, err := c.client.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels, Annotations: annotations},
	}, metav1.CreateOptions{})
	if err != nil {
		c.T.Fatal(err)
	}
	return n
}

// ServiceAccount creates a service account.
func (c *Cluster) ServiceAccount(ns, name string, annotations map[string]string) *corev1.ServiceAccount {
	c.T.Helper()
	ctx, cancel := c.context()
	defer cancel()
	a, err := c.client.CoreV1().ServiceAccounts(ns).Create(ctx, &corev1.ServiceAccount{
		ObjectMeta: metav1.ObjectMeta{Name: name, Annotations: annotations},
	}, metav1.CreateOptions{})
	if err != nil {
		c.T.Fatal(err)
	}
	return a
}

// DeleteServiceAccount deletes a service account.
func (c *Cluster) DeleteServiceAccount(ns, name string) {
	c.T.Helper()
	ctx, cancel := c.context()
	defer cancel()
	if err := c.client.CoreV1().ServiceAccounts(ns).Delete(ctx, name, metav1.DeleteOptions{}); err != nil {
		c.T.Fatal(err)
	}
}

// Node creates a node that no kubelet stands behind.
func (c *Cluster) Node(name string, labels map[string]string) *corev1.Node {
	c.T.Helper()
	ctx, cancel := c.context()
	defer cancel()
	n, err := c.client.CoreV1().Nodes().Create(ctx, &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels},
	}, metav1.CreateOptions{})
	if err != nil {
		c.T.Fatal(err)
	}
	return n
}

// Pod creates a pod of a service account and returns it as it was admitted.
// Nothing schedules it.
func (c *Cluster) Pod(ns, name, sa string) *corev1.Pod {
	c.T.Helper()
	return c.PodOn(ns, name, sa, "")
}

// PodOn creates a pod that is bound to a node.
func (c *Cluster) PodOn(ns, name, sa, node string) *corev1.Pod {
	c.T.Helper()
	ctx, cancel := c.context()
	defer cancel()
	p, err := c.client.CoreV1().Pods(ns).Create(ctx, &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: corev1.PodSpec{
			ServiceAccountName: sa, NodeName: node,
			Containers: []corev1.Container{{Name: "app", Image: "registry.k8s.io/pause:3.10"}},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		c.T.Fatal(err)
	}
	return p
}

// DeletePod deletes a pod at once, without the kubelet's consent.
func (c *Cluster) DeletePod(ns, name string) {
	c.T.Helper()
	ctx, cancel := c.context()
	defer cancel()
	var now int64
	if err := c.client.CoreV1().Pods(ns).Delete(ctx, name, metav1.DeleteOptions{GracePeriodSeconds: &now}); err != nil {
		c.T.Fatal(err)
	}
}

// Token asks the API server for a token of a service account, as a kubelet does
// for a projected volume. An empty audience is the API server's own; a pod binds
// the token to it. The API server refuses fewer than 600 seconds.
func (c *Cluster) Token(ns, sa, audience string, seconds int64, pod *corev1.Pod) string {
	c.T.Helper()
	ctx, cancel := c.context()
	defer cancel()
	r := &authnv1.TokenRequest{Spec: authnv1.TokenRequestSpec{ExpirationSeconds: &seconds}}
	if audience != "" {
		r.Spec.Audiences = []string{audience}
	}
	if pod != nil {
		r.Spec.BoundObjectRef = &authnv1.BoundObjectReference{APIVersion: "v1", Kind: "Pod", Name: pod.Name, UID: pod.UID}
	}
	r, err := c.client.CoreV1().ServiceAccounts(ns).CreateToken(ctx, sa, r, metav1.CreateOptions{})
	if err != nil {
		c.T.Fatal(err)
	}
	return r.Status.Token
}

// KubeconfigFor writes a kubeconfig file with a service account's token of an
// hour and returns its path.
func (c *Cluster) KubeconfigFor(ns, sa string) string {
	c.T.Helper()
	file, err := c.writeKubeconfig(ns+"-"+sa, c.Token(ns, sa, "", 3600, nil))
	if err != nil {
		c.T.Fatal(err)
	}
	return file
}

func (c *Cluster) writeKubeconfig(user, token string) (string, error) {
	config := clientcmdapi.NewConfig()
	config.Clusters["kubetest"] = &clientcmdapi.Cluster{Server: c.URL, CertificateAuthority: c.CAFile}
	config.AuthInfos[user] = &clientcmdapi.AuthInfo{Token: token}
	config.Contexts["kubetest"] = &clientcmdapi.Context{Cluster: "kubetest", AuthInfo: user}
	config.CurrentContext = "kubetest"
	file := c.file(user + ".kubeconfig")
	if err := clientcmd.WriteToFile(*config, file); err != nil {
		return "", fmt.Errorf("write the kubeconfig of %s: %w", user, err)
	}
	return file, nil
}

// Kubectl runs kubectl as the administrator and returns what it printed; it
// fails the test unless it ends with status 0.
func (c *Cluster) Kubectl(args ...string) string {
	c.T.Helper()
	out, err := c.TryKubectl("", args...)
	if err != nil {
		c.T.Fatal(err)
	}
	return out
}

// Apply applies manifests as the administrator.
func (c *Cluster) Apply(yaml string) string {
	c.T.Helper()
	out, err := c.TryKubectl(yaml, "apply", "-f", "-")
	if err != nil {
		c.T.Fatal(err)
	}
	return out
}

// TryKubectl runs kubectl as the administrator with a standard input. The error
// has what it wrote to standard error.
func (c *Cluster) TryKubectl(stdin string, args ...string) (string, error) {
	c.T.Helper()
	cmd := exec.Command(Bin(c.T, "kubectl"), append([]string{"--request-timeout=60s"}, args...)...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+c.Kubeconfig, "HOME="+c.Dir)
	cmd.Dir = c.Dir
	var out, errOut bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &errOut
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("kubectl %s: %w\n%s%s", strings.Join(args, " "), err, &out, &errOut)
	}
	return out.String(), nil
}
