//go:build linux

// Package kubenode adds a node to a control plane of kubetest: the kubelet of
// Kubernetes with containerd and runc, so that pods really run, on this
// machine, with the token files that a kubelet writes. Nothing in it imitates
// Kubernetes except the scheduler's part: with one node there is no choice, so
// every pod without a node is bound to this one.
//
// It is for tests as root on Linux. Processes, mounts and containers live in
// namespaces of the node's own and end with its first process. There is no
// kube-proxy and no cluster DNS, so services have no address inside; kubectl
// port-forward and pod addresses work. Images come from the test and are never
// pulled.
package kubenode

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"tabard.dev/tabard/test/kubetest"
)

// Name of the node, of which there is one.
const Name = "node-1"

const (
	readyTimeout = 2 * time.Minute // of busy cores; an idle machine needs 3 s
	callTimeout  = 30 * time.Second
	maxBridges   = 250 // one for each node that lives, or that was killed before it could clean up
)

// plugins is where Debian's containernetworking-plugins has its programs.
const plugins = "/usr/lib/cni"

// pauseImage is what holds a pod's namespaces.
const pauseImage = "kubenode.test/pause:1"

// Node is a machine of a cluster.
type Node struct {
	Address string // of the node in the pods' network

	t       testing.TB
	dir     string // short, since sockets are in it
	bridge  string
	subnet  string
	cluster *kubetest.Cluster
	runtime *kubetest.Process // containerd, the first process of the node's PID namespace
	kubelet *kubetest.Process
}

// New prepares a node for a control plane that is started with its
// APIServerArgs. It skips the test where a node cannot run: without root, or
// without what scripts/deps.sh installs. In CI, and with KUBE_BIN as root, it
// fails it instead, so that nothing goes untested there in silence.
func New(t testing.TB) *Node {
	t.Helper()
	kubetest.Bin(t, "kubelet")
	lacks := t.Skipf
	if os.Getenv("CI") != "" || os.Getenv("KUBE_BIN") != "" && os.Getuid() == 0 {
		lacks = t.Fatalf
	}
	if os.Getuid() != 0 {
		lacks("a node needs root")
	}
	for _, name := range []string{"containerd", "ctr", "runc", "ip", "mount", "nsenter", "busybox"} {
		if _, err := exec.LookPath(name); err != nil {
			lacks("a node needs %s; scripts/deps.sh installs it", name)
		}
	}
	if _, err := os.Stat(filepath.Join(plugins, "bridge")); err != nil {
		lacks("a node needs %s/bridge; scripts/deps.sh installs it", plugins)
	}
	dir, err := os.MkdirTemp("", "kubenode-")
	if err != nil {
		t.Fatal(err)
	}
	n := &Node{t: t, dir: dir}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Errorf("remove the node's files: %v", err)
		}
	})
	if err := n.makeCertificates(); err != nil {
		t.Fatal(err)
	}
	return n
}

// APIServerArgs are what the API server needs to reach the kubelet, and to
// hold it to what a node may do: tokens for its own pods alone, and only for
// the audiences that their volumes name.
func (n *Node) APIServerArgs() []string {
	return []string{
		"--enable-admission-plugins=NodeRestriction",
		"--kubelet-preferred-address-types=InternalIP",
		"--kubelet-client-certificate=" + n.file("client.crt"),
		"--kubelet-client-key=" + n.file("client.key"),
	}
}

// Join starts the node with these images and waits until it is ready.
func (n *Node) Join(c *kubetest.Cluster, images ...Image) {
	n.t.Helper()
	n.cluster = c
	if err := n.join(images); err != nil {
		n.t.Fatalf("start a node: %v", err)
	}
}

func (n *Node) join(images []Image) error {
	if err := n.addBridge(); err != nil {
		return err
	}
	if err := n.configure(); err != nil {
		return err
	}
	n.t.Cleanup(n.stop)
	if err := n.startRuntime(); err != nil {
		return err
	}
	pause := Image{Name: pauseImage, Files: map[string]string{"/bin/busybox": mustFind("busybox")}, Entrypoint: []string{"/bin/busybox", "sleep", "100000000"}}
	for _, image := range append([]Image{pause}, images...) {
		if err := n.load(image); err != nil {
			return fmt.Errorf("load image %s: %w", image.Name, err)
		}
	}
	if err := n.startKubelet(); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	var binder sync.WaitGroup
	binder.Go(func() { n.bindPods(ctx) })
	n.t.Cleanup(func() { cancel(); binder.Wait() })
	return n.poll(n.kubelet, n.ready)
}

func mustFind(name string) string {
	path, err := exec.LookPath(name)
	if err != nil {
		return name // New has looked for it
	}
	return path
}

// addBridge takes the first free name and the network that goes with it; the
// kernel lets one of several takers have it.
func (n *Node) addBridge() error {
	for i := range maxBridges {
		name := fmt.Sprintf("kubenode%d", i)
		if out, err := exec.Command("ip", "link", "add", name, "type", "bridge").CombinedOutput(); err != nil {
			if bytes.Contains(out, []byte("File exists")) {
				continue
			}
			return fmt.Errorf("add a bridge: %w\n%s", err, out)
		}
		n.bridge, n.subnet, n.Address = name, fmt.Sprintf("10.213.%d.0/24", i), fmt.Sprintf("10.213.%d.1", i)
		n.t.Cleanup(func() {
			if err := run("ip", "link", "delete", name); err != nil {
				n.t.Error(err)
			}
		})
		n.keepForwarding()
		return errors.Join(
			run("ip", "address", "add", n.Address+"/24", "dev", name),
			run("ip", "link", "set", name, "up"),
		)
	}
	return errors.New("add a bridge: all names are taken; `ip link delete` those of tests that were killed")
}

// keepForwarding puts back at the end whether the machine forwards packets,
// which the bridge's plugin turns on.
func (n *Node) keepForwarding() {
	const file = "/proc/sys/net/ipv4/ip_forward"
	was, err := os.ReadFile(file)
	if err != nil {
		n.t.Error(err)
		return
	}
	n.t.Cleanup(func() {
		if err := os.WriteFile(file, was, 0o644); err != nil {
			n.t.Error(err)
		}
	})
}

func run(name string, args ...string) error {
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, out)
	}
	return nil
}

// configure writes the files of containerd, its network plugin and the kubelet.
//
// The kubelet keeps to cgroup v1 where that is what the machine has. It makes no
// cgroups of its own, so that containers have only those that runc makes, and no
// rules in the machine's packet filter.
func (n *Node) configure() error {
	for name, text := range map[string]string{
		"containerd.toml": fmt.Sprintf(`version = 2
root = %q
state = %q
[grpc]
  address = %q
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = %q
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = %q
    conf_dir = %q
`, n.file("images"), n.file("state"), n.file("cri.sock"), pauseImage, plugins, n.file("cni")),
		"cni/pods.conflist": fmt.Sprintf(`{"cniVersion": "0.4.0", "name": "pods", "plugins": [{
  "type": "bridge", "bridge": %q, "isGateway": true,
  "ipam": {"type": "host-local", "dataDir": %q, "ranges": [[{"subnet": %q}]], "routes": [{"dst": "0.0.0.0/0"}]}
}]}
`, n.bridge, n.file("addresses"), n.subnet),
		"kubelet.yaml": fmt.Sprintf(`apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
containerRuntimeEndpoint: unix://%s
address: %s
readOnlyPort: 0
healthzPort: 0
authentication: {anonymous: {enabled: false}, webhook: {enabled: false}, x509: {clientCAFile: %s}}
authorization: {mode: AlwaysAllow}
failCgroupV1: false
failSwapOn: false
makeIPTablesUtilChains: false
cgroupDriver: cgroupfs
cgroupsPerQOS: false
enforceNodeAllocatable: []
evictionHard: {memory.available: "0%%"}
imageGCHighThresholdPercent: 100
resolvConf: /etc/resolv.conf
podLogsDir: %s
volumePluginDir: %s
`, n.file("cri.sock"), n.Address, n.file("ca.crt"), n.file("logs"), n.file("plugins")),
	} {
		if err := os.MkdirAll(filepath.Dir(n.file(name)), 0o700); err != nil {
			return err
		}
		if err := os.WriteFile(n.file(name), []byte(text), 0o600); err != nil {
			return err
		}
	}
	admin := n.cluster.RESTConfig()
	config := clientcmdapi.NewConfig()
	config.Clusters["c"] = &clientcmdapi.Cluster{Server: n.cluster.URL, CertificateAuthority: n.cluster.CAFile}
	// The kubelet has the rights of a node, not those of an administrator.
	config.AuthInfos["node"] = &clientcmdapi.AuthInfo{
		Token: admin.BearerToken, Impersonate: "system:node:" + Name, ImpersonateGroups: []string{"system:nodes"},
	}
	config.Contexts["c"] = &clientcmdapi.Context{Cluster: "c", AuthInfo: "node"}
	config.CurrentContext = "c"
	return clientcmd.WriteToFile(*config, n.file("kubeconfig"))
}

// startRuntime starts containerd as the first process of namespaces of its
// own: when it ends, the kernel ends what runs in them and drops their mounts.
// What containerd, its plugins and the kubelet keep at fixed places is in
// memory there.
func (n *Node) startRuntime() error {
	const script = `set -e
mount --make-rprivate /
mount -t proc proc /proc
for d in /run/containerd /run/netns /var/lib/cni /var/lib/kubelet /var/log/containers; do
    mkdir -p "$d"
    mount -t tmpfs tmpfs "$d"
done
exec containerd --config "$1"
`
	var err error
	first := exec.Command("sh", "-c", script, "sh", n.file("containerd.toml"))
	first.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS}
	n.runtime, err = kubetest.StartProcess(first, n.file("containerd.log"))
	if err != nil {
		return err
	}
	return n.poll(n.runtime, func() bool { return n.ctr(nil, "version") == nil })
}

func (n *Node) startKubelet() error {
	var err error
	n.kubelet, err = kubetest.StartProcess(exec.Command("nsenter", "--mount", "--pid", "--target", strconv.Itoa(n.runtime.PID()),
		kubetest.Bin(n.t, "kubelet"), "--config="+n.file("kubelet.yaml"), "--kubeconfig="+n.file("kubeconfig"),
		"--root-dir="+n.file("kubelet"), "--cert-dir="+n.file("kubelet-certs"), "--hostname-override="+Name, "--node-ip="+n.Address), n.file("kubelet.log"))
	return err
}

// ctr calls containerd.
func (n *Node) ctr(stdin io.Reader, args ...string) error {
	_, err := n.ctrOutput(stdin, args...)
	return err
}

func (n *Node) ctrOutput(stdin io.Reader, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), readyTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, "ctr", append([]string{"--address", n.file("cri.sock"), "--namespace", "k8s.io"}, args...)...)
	var out, errOut bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, &out, &errOut
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("ctr %s: %w\n%s", strings.Join(args, " "), err, &errOut)
	}
	return out.String(), nil
}

func (n *Node) ready() bool {
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	node, err := n.cluster.Client().CoreV1().Nodes().Get(ctx, Name, metav1.GetOptions{})
	if err != nil {
		return false
	}
	for _, c := range node.Status.Conditions {
		if c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue {
			return true
		}
	}
	return false
}

// bindPods gives this node the pods that have none.
func (n *Node) bindPods(ctx context.Context) {
	pods := n.cluster.Client().CoreV1()
	for ctx.Err() == nil {
		// An error means a control plane that is stopped, perhaps by the test.
		list, err := pods.Pods("").List(ctx, metav1.ListOptions{FieldSelector: "spec.nodeName="})
		if err == nil {
			for _, p := range list.Items {
				err := pods.Pods(p.Namespace).Bind(ctx, &corev1.Binding{
					ObjectMeta: metav1.ObjectMeta{Name: p.Name, UID: p.UID},
					Target:     corev1.ObjectReference{Kind: "Node", Name: Name},
				}, metav1.CreateOptions{})
				if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) && ctx.Err() == nil {
					n.t.Logf("bind pod %s/%s: %v", p.Namespace, p.Name, err)
				}
			}
		}
		select {
		case <-ctx.Done():
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// Expose makes what listens on this machine's loopback reachable for pods, and
// returns the address for them.
func (n *Node) Expose(loopback string) string {
	n.t.Helper()
	l, err := net.Listen("tcp", net.JoinHostPort(n.Address, "0"))
	if err != nil {
		n.t.Fatal(err)
	}
	var all sync.WaitGroup
	ctx, cancel := context.WithCancel(context.Background())
	all.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			all.Go(func() { forward(ctx, conn, loopback) })
		}
	})
	n.t.Cleanup(func() { cancel(); l.Close(); all.Wait() })
	return l.Addr().String()
}

// forward copies both ways until one side ends or ctx does.
func forward(ctx context.Context, conn net.Conn, address string) {
	defer conn.Close()
	other, err := new(net.Dialer).DialContext(ctx, "tcp", address)
	if err != nil {
		return
	}
	defer other.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close(); other.Close() })
	defer stop()
	var both sync.WaitGroup
	for _, pair := range [][2]net.Conn{{conn, other}, {other, conn}} {
		both.Go(func() {
			_, _ = io.Copy(pair[0], pair[1]) // an error is the end, like the end of the stream
			if half, ok := pair[0].(*net.TCPConn); ok {
				_ = half.CloseWrite() // fails when the connection is gone already
			}
		})
	}
	both.Wait()
}

func (n *Node) file(name string) string { return filepath.Join(n.dir, name) }

// poll waits until done, or until the process that it needs has ended.
func (n *Node) poll(p *kubetest.Process, done func() bool) error {
	for deadline := time.Now().Add(readyTimeout); !done(); time.Sleep(100 * time.Millisecond) {
		if err := p.Ended(); err != nil {
			return fmt.Errorf("%s ended: %w\n%s", p.Name(), err, p.Tail())
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s is not ready within %s\n%s", p.Name(), readyTimeout, p.Tail())
		}
	}
	return nil
}

// stop ends everything at once. The cgroups of containers outlive them and are
// removed by name, since others on this machine may use the same parent.
func (n *Node) stop() {
	if n.runtime == nil {
		return
	}
	containers, err := n.ctrOutput(nil, "containers", "list", "--quiet")
	if err != nil {
		n.t.Logf("list what runs on the node: %v", err)
	}
	if n.t.Failed() {
		n.t.Logf("kubelet.log:\n%s\ncontainerd.log:\n%s", kubetest.Tail(n.file("kubelet.log")), kubetest.Tail(n.file("containerd.log")))
	}
	n.runtime.Kill()
	n.kubelet.Kill()
	for id := range strings.FieldsSeq(containers) {
		for _, pattern := range []string{"/sys/fs/cgroup/k8s.io/", "/sys/fs/cgroup/*/k8s.io/"} {
			groups, _ := filepath.Glob(pattern + id) // the pattern is well-formed
			for _, group := range groups {
				if err := removeGroup(group); err != nil {
					n.t.Logf("remove a container's cgroup: %v", err)
				}
			}
		}
	}
}

// removeGroup retries while the kernel still counts a dead process in it.
func removeGroup(dir string) error {
	var err error
	for range 50 {
		if err = os.Remove(dir); err == nil || errors.Is(err, os.ErrNotExist) {
			return nil
		}
		time.Sleep(20 * time.Millisecond)
	}
	return err
}
