// Package kubetest starts a real Kubernetes control plane on loopback for the
// tests: etcd, kube-apiserver and, when asked, kube-controller-manager, built
// from the module in test/k8s. Nothing in it imitates Kubernetes.
package kubetest

import (
	"testing"

	"k8s.io/client-go/kubernetes"
)

// Cluster is a running control plane.
type Cluster struct {
	T          testing.TB
	URL        string // of the API server, https://127.0.0.1:port
	Issuer     string // of service-account tokens
	CAFile     string // PEM file of the API server's certificate authority
	Kubeconfig string // file of an administrator
	Dir        string
}

// Client returns a client with an administrator's rights.
func (c *Cluster) Client() *kubernetes.Clientset { panic("not yet") }
