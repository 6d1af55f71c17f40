package kube

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
)

// ServiceAccountDir is where the kubelet puts a pod's service account into it.
const ServiceAccountDir = "/var/run/secrets/kubernetes.io/serviceaccount"

// Pod is where a pod finds what it needs to reach its cluster's API server. The
// zero value is the place where the kubelet puts it.
type Pod struct {
	Dir    string                   // default [ServiceAccountDir]
	Getenv func(name string) string // default os.Getenv
}

// InCluster returns how the pod that this process runs in reaches the API
// server. The token is read anew for each request, as the kubelet replaces it.
func InCluster() (Config, error) { return Pod{}.Config() }

// Config returns how the pod reaches the API server.
func (p Pod) Config() (Config, error) {
	if p.Getenv == nil {
		p.Getenv = os.Getenv
	}
	dir := cmp.Or(p.Dir, ServiceAccountDir)
	host, port := p.Getenv("KUBERNETES_SERVICE_HOST"), p.Getenv("KUBERNETES_SERVICE_PORT")
	if host == "" || port == "" {
		return Config{}, errors.New("this is not a pod of a cluster: KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set. Give --kubeconfig FILE")
	}
	ca, err := readBounded(filepath.Join(dir, "ca.crt"))
	if err != nil {
		return Config{}, fmt.Errorf("read the cluster's CA: %w", err)
	}
	token := tokenFile(filepath.Join(dir, "token"), "")
	if _, err := token(context.Background()); err != nil {
		return Config{}, fmt.Errorf("%w (does the pod have automountServiceAccountToken: false?)", err)
	}
	return Config{URL: "https://" + net.JoinHostPort(host, port), CA: ca, Token: token}, nil
}

// Namespace returns the namespace that the pod is in.
func (p Pod) Namespace() (string, error) {
	b, err := readBounded(filepath.Join(cmp.Or(p.Dir, ServiceAccountDir), "namespace"))
	if err != nil {
		return "", fmt.Errorf("read the pod's namespace: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}

// tokenFile returns a Config.Token that reads a file each time. Where the file
// cannot be read it returns the other token, unless that is empty.
func tokenFile(file, other string) func(context.Context) (string, error) {
	return func(context.Context) (string, error) {
		b, err := readBounded(file)
		if err != nil {
			if other != "" {
				return other, nil
			}
			return "", fmt.Errorf("read the token: %w", err)
		}
		token := strings.TrimSpace(string(b))
		if token == "" {
			return "", fmt.Errorf("the token file %s is empty", file)
		}
		return token, nil
	}
}
