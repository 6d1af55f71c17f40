package kubernetes

import (
	"io"
	"net"
	"net/http"
	"os/exec"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"tabard.dev/tabard/test/harness"
	"tabard.dev/tabard/test/kubetest"
)

// webhookSite is a cluster with the chart in it, whose API server calls
// replicas of the webhook that run beside it, as their service account there.
type webhookSite struct {
	*kubetest.Cluster
	t          *testing.T
	kubeconfig string
	balancer   *balancer
	iamURL     string
}

func newWebhookSite(t *testing.T, o kubetest.Options) *webhookSite {
	t.Helper()
	s := &webhookSite{Cluster: kubetest.Start(t, o), t: t, balancer: newBalancer(t), iamURL: "https://tabard.example.com"}
	s.apply(render(t, "createNamespace=true"))
	s.install()
	s.kubeconfig = s.KubeconfigFor(webhookNamespace, "tabard-webhook")
	return s
}

// install applies the chart, but for the address that the API server calls.
func (s *webhookSite) install() {
	s.t.Helper()
	yaml := render(s.t, "createNamespace=true")
	service := regexp.MustCompile(`(?m)^      service:\n(?:        .*\n)*?        path: (.*)\n        port: 443\n`)
	if len(service.FindAllString(yaml, -1)) != 2 {
		s.t.Fatal("the chart has other services than two")
	}
	s.apply(service.ReplaceAllString(yaml, "      url: https://"+s.balancer.address()+"$1\n"))
}

// apply applies manifests as kubectl apply --server-side does.
func (s *webhookSite) apply(yaml string) {
	s.t.Helper()
	if _, err := s.TryKubectl(yaml, "apply", "--server-side", "--force-conflicts", "-f", "-"); err != nil {
		s.t.Fatal(err)
	}
}

// replica is a running webhook.
type replica struct {
	t       *testing.T
	cmd     *exec.Cmd
	address string
	metrics string
	log     *harness.Output
	done    chan struct{}
}

// start starts a webhook, waits until it is ready and lets calls go to it.
func (s *webhookSite) start(args ...string) *replica {
	s.t.Helper()
	bin, err := harness.Binary()
	if err != nil {
		s.t.Fatal(err)
	}
	r := &replica{t: s.t, address: freePort(s.t), metrics: freePort(s.t), log: &harness.Output{}, done: make(chan struct{})}
	r.cmd = exec.Command(bin, append([]string{
		"ks", "webhook", "--iam-url", s.iamURL, "--kubeconfig", s.kubeconfig, "--namespace", webhookNamespace,
		"--listen", r.address, "--metrics", r.metrics, "--certificate-name", "127.0.0.1", "--drain", "100ms", "--log-level", "debug",
	}, args...)...)
	r.cmd.Stderr = r.log
	if err := r.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	go func() { _ = r.cmd.Wait(); close(r.done) }()
	s.t.Cleanup(func() {
		r.kill()
		if s.t.Failed() {
			s.t.Logf("webhook %s:\n%s", r.address, r.log)
		}
	})
	await(s.t, "the webhook is ready", func() bool {
		select {
		case <-r.done:
			s.t.Fatalf("the webhook ended\n%s", r.log)
		default:
		}
		code, _ := r.monitor("/readyz")
		return code == http.StatusOK
	})
	s.balancer.add(r.address)
	return r
}

func (r *replica) monitor(path string) (int, string) {
	resp, err := http.Get("http://" + r.metrics + path)
	if err != nil {
		return 0, ""
	}
	defer resp.Body.Close()
	b, _ := io.ReadAll(resp.Body)
	return resp.StatusCode, string(b)
}

func (r *replica) metric(name string) string {
	_, all := r.monitor("/metrics")
	for line := range strings.Lines(all) {
		if value, ok := strings.CutPrefix(line, name+" "); ok {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

func (r *replica) kill() {
	_ = r.cmd.Process.Kill()
	<-r.done
}

// leave ends the webhook as a kubelet does.
func (r *replica) leave() {
	r.t.Helper()
	_ = r.cmd.Process.Signal(syscall.SIGTERM)
	<-r.done
	if code := r.cmd.ProcessState.ExitCode(); code != 0 {
		r.t.Errorf("the webhook ended with %d\n%s", code, r.log)
	}
}

// balancer stands for the Service in front of the replicas: it forwards
// connections to each in turn.
type balancer struct {
	l        net.Listener
	mu       sync.Mutex
	backends []string
	next     int
}

func newBalancer(t *testing.T) *balancer {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b := &balancer{l: l}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			go b.forward(in)
		}
	}()
	return b
}

func (b *balancer) address() string { return b.l.Addr().String() }

func (b *balancer) add(address string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.backends = append(b.backends, address)
}

func (b *balancer) remove(address string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for i, a := range b.backends {
		if a == address {
			b.backends = append(b.backends[:i:i], b.backends[i+1:]...)
			return
		}
	}
}

func (b *balancer) forward(in net.Conn) {
	defer in.Close()
	b.mu.Lock()
	if len(b.backends) == 0 {
		b.mu.Unlock()
		return
	}
	b.next++
	to := b.backends[b.next%len(b.backends)]
	b.mu.Unlock()
	out, err := net.Dial("tcp", to)
	if err != nil {
		return
	}
	defer out.Close()
	go func() { _, _ = io.Copy(out, in); out.Close() }()
	_, _ = io.Copy(in, out)
}

func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func await(t *testing.T, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !done(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("after a minute it is not so that %s", what)
		}
	}
}
