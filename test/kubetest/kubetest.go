// Package kubetest starts a real Kubernetes control plane on loopback for the
// tests: etcd, kube-apiserver and, when asked, kube-controller-manager, built
// from the module in test/k8s. Nothing in it imitates Kubernetes. There are no
// nodes behind it unless a test starts one: pods are stored, bound to service
// accounts and given tokens, but nothing runs them.
//
// A control plane takes some 4 seconds and 350 MB, so tests of one function
// share one and keep apart by namespaces.
package kubetest

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

// Options shape a control plane.
type Options struct {
	Controllers bool     // run kube-controller-manager: default service accounts, deletion of namespaces, deployments
	Issuer      string   // of service-account tokens; the API server's URL when empty
	Alg         string   // of service-account tokens: RS256 (when empty) or ES256
	Users       []string // further lines of the token file: `token,name,uid,"group,group"`
	ExtraArgs   []string // further flags of kube-apiserver
}

// Cluster is a running control plane.
type Cluster struct {
	T          testing.TB
	URL        string // of the API server, https://127.0.0.1:port
	Issuer     string // of service-account tokens
	CAFile     string // PEM file of the API server's certificate authority
	Kubeconfig string // file of an administrator
	Dir        string // everything of this cluster; logs are *.log

	options      Options
	etcdAddress  string
	key          signingKey
	keyFiles     []string // public keys that the API server accepts, the present one first
	etcd, server *Process
	client       *kubernetes.Clientset
}

// adminToken is the administrator's credential; the API server listens on
// loopback only and dies with the test.
const adminToken = "admin-of-the-test"

const (
	startTimeout = 2 * time.Minute // of busy cores; an idle machine needs 4 s
	startTries   = 3               // a free port may be taken by somebody else before it is used
	callTimeout  = 30 * time.Second
)

// Bin is the path of a Kubernetes command: in KUBE_BIN, or where `make
// kube-binaries` puts it. Without KUBE_BIN a test whose commands are not built
// is skipped, except in CI.
func Bin(t testing.TB, name string) string {
	t.Helper()
	dir := os.Getenv("KUBE_BIN")
	asked := dir != "" || os.Getenv("CI") != ""
	if dir == "" {
		dir = filepath.Join(root(), ".cache", "kube")
	}
	bin := filepath.Join(dir, name)
	if _, err := os.Stat(bin); err != nil {
		if asked {
			t.Fatalf("%v; build it with `make kube-binaries`", err)
		}
		t.Skipf("%s is not built; build it with `make kube-binaries`", name)
	}
	return bin
}

// root is the repository's folder; tests run in a folder below it.
func root() string {
	dir, err := os.Getwd()
	for err == nil && dir != "/" {
		if _, statErr := os.Stat(filepath.Join(dir, "cmd", "tabard")); statErr == nil {
			return dir
		}
		dir = filepath.Dir(dir)
	}
	return "."
}

// Start starts a control plane, waits until it serves and ends it with the test.
func Start(t testing.TB, o Options) *Cluster {
	t.Helper()
	for _, name := range []string{"etcd", "kube-apiserver"} {
		Bin(t, name)
	}
	if o.Controllers {
		Bin(t, "kube-controller-manager")
	}
	var err error
	for range startTries {
		var c *Cluster
		if c, err = start(t, o); err == nil {
			return c
		}
		t.Logf("start a control plane: %v", err)
	}
	t.Fatalf("no control plane after %d tries: %v", startTries, err)
	return nil
}

func start(t testing.TB, o Options) (*Cluster, error) {
	t.Helper()
	c := &Cluster{T: t, Dir: t.TempDir(), options: o}
	t.Cleanup(func() {
		if t.Failed() {
			c.showLogs()
		}
	})
	ports, err := freePorts(3)
	if err != nil {
		return nil, err
	}
	c.URL = fmt.Sprintf("https://127.0.0.1:%d", ports[0])
	c.Issuer = o.Issuer
	if c.Issuer == "" {
		c.Issuer = c.URL
	}
	c.etcdAddress = fmt.Sprintf("http://127.0.0.1:%d", ports[1])
	if err := c.makeCertificates(); err != nil {
		return nil, err
	}
	if err := c.newSigningKey(false); err != nil {
		return nil, err
	}
	users := append([]string{adminToken + ",admin,admin,system:masters"}, o.Users...)
	if err := os.WriteFile(c.file("tokens.csv"), []byte(strings.Join(users, "\n")+"\n"), 0o600); err != nil {
		return nil, err
	}
	if c.Kubeconfig, err = c.writeKubeconfig("admin", adminToken); err != nil {
		return nil, err
	}
	config := c.RESTConfig()
	if c.client, err = kubernetes.NewForConfig(config); err != nil {
		return nil, err
	}

	peer := fmt.Sprintf("http://127.0.0.1:%d", ports[2])
	c.etcd, err = c.launch("etcd", "--name=t", "--data-dir="+c.file("etcd"),
		"--listen-client-urls="+c.etcdAddress, "--advertise-client-urls="+c.etcdAddress,
		"--listen-peer-urls="+peer, "--initial-advertise-peer-urls="+peer, "--initial-cluster=t="+peer,
		"--unsafe-no-fsync", "--log-level=error")
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() { c.etcd.Kill() })
	t.Cleanup(func() { c.server.Kill() })
	if err := c.serve(); err != nil {
		c.server.Kill()
		c.etcd.Kill()
		return nil, err
	}
	if o.Controllers {
		manager, err := c.launch("kube-controller-manager", "--kubeconfig="+c.Kubeconfig, "--leader-elect=false",
			"--bind-address=127.0.0.1", "--secure-port=0",
			"--service-account-private-key-file="+c.key.file, "--root-ca-file="+c.CAFile,
			"--controllers="+strings.Join([]string{
				"serviceaccount-controller", "serviceaccount-token-controller", "root-ca-certificate-publisher-controller",
				"namespace-controller", "garbage-collector-controller", "deployment-controller", "replicaset-controller",
				"statefulset-controller", "job-controller", "daemonset-controller",
			}, ","))
		if err != nil {
			return nil, err
		}
		t.Cleanup(manager.Kill)
		if err := c.waitForDefaultAccount(manager); err != nil {
			return nil, err
		}
	}
	return c, nil
}

// serve starts the API server and waits until it is ready.
func (c *Cluster) serve() error {
	args := []string{
		"--etcd-servers=" + c.etcdAddress, "--bind-address=127.0.0.1", "--advertise-address=127.0.0.1",
		"--secure-port=" + c.URL[strings.LastIndex(c.URL, ":")+1:], "--endpoint-reconciler-type=none",
		"--cert-dir=" + c.file("certs"), "--tls-cert-file=" + c.file("server.crt"), "--tls-private-key-file=" + c.file("server.key"),
		"--token-auth-file=" + c.file("tokens.csv"), "--authorization-mode=Node,RBAC", "--anonymous-auth=true",
		"--service-account-issuer=" + c.Issuer, "--service-account-signing-key-file=" + c.key.file,
		"--service-cluster-ip-range=10.96.0.0/24",
	}
	for _, f := range c.keyFiles {
		args = append(args, "--service-account-key-file="+f)
	}
	var err error
	if c.server, err = c.launch("kube-apiserver", append(args, c.options.ExtraArgs...)...); err != nil {
		return err
	}
	pem, err := os.ReadFile(c.CAFile)
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pem)
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport, Timeout: 5 * time.Second}
	return poll(startTimeout, func() (bool, error) {
		if err := c.server.Ended(); err != nil {
			return false, fmt.Errorf("kube-apiserver ended before it served: %w\n%s", err, c.server.Tail())
		}
		if err := c.etcd.Ended(); err != nil {
			return false, fmt.Errorf("etcd ended: %w\n%s", err, c.etcd.Tail())
		}
		req, err := http.NewRequest(http.MethodGet, c.URL+"/readyz", nil)
		if err != nil {
			return false, err
		}
		req.Header.Set("Authorization", "Bearer "+adminToken)
		resp, err := client.Do(req)
		if err != nil {
			return false, nil // not listening yet
		}
		defer resp.Body.Close()
		return resp.StatusCode == http.StatusOK, nil
	})
}

func (c *Cluster) waitForDefaultAccount(manager *Process) error {
	return poll(startTimeout, func() (bool, error) {
		if err := manager.Ended(); err != nil {
			return false, fmt.Errorf("kube-controller-manager ended: %w\n%s", err, manager.Tail())
		}
		ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
		defer cancel()
		_, err := c.client.CoreV1().ServiceAccounts("default").Get(ctx, "default", metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return false, nil
		}
		return err == nil, err
	})
}

// poll asks until the answer is yes, an error or late.
func poll(timeout time.Duration, done func() (bool, error)) error {
	deadline := time.Now().Add(timeout)
	for {
		if ok, err := done(); ok || err != nil {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("not within %s", timeout)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func freePorts(n int) ([]int, error) {
	ports := make([]int, 0, n)
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, fmt.Errorf("find a free port: %w", err)
		}
		defer l.Close() // all are held until all are found, so that none is found twice
		ports = append(ports, l.Addr().(*net.TCPAddr).Port)
	}
	return ports, nil
}

func (c *Cluster) file(name string) string { return filepath.Join(c.Dir, name) }

func (c *Cluster) showLogs() {
	logs, _ := filepath.Glob(c.file("*.log"))
	for _, f := range logs {
		c.T.Logf("%s:\n%s", filepath.Base(f), Tail(f))
	}
}

// Client returns a client with an administrator's rights.
func (c *Cluster) Client() *kubernetes.Clientset { return c.client }

// RESTConfig is the administrator's configuration for other clients.
func (c *Cluster) RESTConfig() *rest.Config {
	return &rest.Config{
		Host: c.URL, BearerToken: adminToken, TLSClientConfig: rest.TLSClientConfig{CAFile: c.CAFile},
		QPS: 1000, Burst: 1000, Timeout: callTimeout,
	}
}

// Stop ends the API server as a crash would; the store stays.
func (c *Cluster) Stop() { c.server.Kill() }

// Restart starts the API server again on its address, after Stop or without,
// and waits until it is ready.
func (c *Cluster) Restart() {
	c.T.Helper()
	c.server.Kill()
	if err := c.serve(); err != nil {
		c.T.Fatalf("restart the API server: %v", err)
	}
}

// RotateSigningKey restarts the API server with a new key for service-account
// tokens. With keepOld it still accepts and publishes the keys it had.
func (c *Cluster) RotateSigningKey(keepOld bool) {
	c.T.Helper()
	if err := c.newSigningKey(keepOld); err != nil {
		c.T.Fatal(err)
	}
	c.Restart()
}

// OpenDiscovery lets anybody read the issuer's discovery document and keys,
// which a fresh cluster refuses.
func (c *Cluster) OpenDiscovery() {
	c.T.Helper()
	ctx, cancel := c.context()
	defer cancel()
	_, err := c.client.RbacV1().ClusterRoleBindings().Create(ctx, &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: "open-discovery"},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "system:service-account-issuer-discovery"},
		Subjects:   []rbacv1.Subject{{APIGroup: rbacv1.GroupName, Kind: rbacv1.GroupKind, Name: "system:unauthenticated"}},
	}, metav1.CreateOptions{})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		c.T.Fatal(err)
	}
}

func (c *Cluster) context() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), callTimeout)
}
