package kubernetes

import (
	"bytes"
	"crypto/tls"
	"encoding/json"
	"flag"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/IBM/go-sdk-core/v5/core"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"tabard.dev/tabard/test/harness"
	"tabard.dev/tabard/test/kubetest"
)

var updateManifests = flag.Bool("update-manifests", false, "write the manifests in deploy/kubernetes anew")

const (
	profileAnnotation = "iam.tabard.dev/trusted-profile"
	identityLabel     = "iam.tabard.dev/identity"
	webhookNamespace  = "tabard-system"
)

func chart() string { return filepath.Join(harness.Root(), "deploy", "charts", "tabard-kubernetes") }

// render renders the chart with real helm.
func render(t *testing.T, set ...string) string {
	t.Helper()
	args := []string{"template", "tabard-kubernetes", chart(), "--namespace", webhookNamespace, "--kube-version", "1.35.0", "--set", "iamURL=https://tabard.example.com"}
	for _, s := range set {
		args = append(args, "--set", s)
	}
	return helm(t, args...)
}

func helm(t *testing.T, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), kubetest.Bin(t, "helm"), args...)
	home := t.TempDir()
	cmd.Env = append(os.Environ(), "HELM_CACHE_HOME="+home, "HELM_CONFIG_HOME="+home, "HELM_DATA_HOME="+home)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil {
		t.Fatalf("helm %s: %v\n%s%s", strings.Join(args, " "), err, out.String(), errOut.String())
	}
	return out.String()
}

// manifests are the plain ones: what is written above each, and the chart's
// values that it comes of.
var manifests = map[string]struct {
	head   string
	values []string
}{
	"webhook.yaml": {`# The admission webhook, as the chart deploy/charts/tabard-kubernetes makes it by
# itself; written by a test, do not edit. Set --iam-url and the image first.
`, nil},
	"controller.yaml": {`# The controller of TrustedProfileBindings, as the chart
# deploy/charts/tabard-kubernetes makes it with controller.enabled; written by a
# test, do not edit. Its resource comes from crds/ of the chart. Set --iam-url,
# --cluster and the image first.
`, []string{"webhook.enabled=false", "controller.enabled=true", "controller.cluster=my-cluster"}},
}

func TestThePlainManifestsAreTheRenderedChart(t *testing.T) {
	helm(t, "lint", "--strict", chart(), "--set", "iamURL=https://tabard.example.com")
	for name, m := range manifests {
		rendered := render(t, append([]string{"createNamespace=true"}, m.values...)...)
		want := m.head + regexp.MustCompile(`(?m)^# Source: .*\n`).ReplaceAllString(rendered, "")
		file := filepath.Join(harness.Root(), "deploy", "kubernetes", name)
		if *updateManifests {
			if err := os.WriteFile(file, []byte(want), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		got, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if string(got) != want {
			t.Errorf("deploy/kubernetes/%s is not what the chart makes; write it anew with: go test ./kubernetes -run PlainManifests -update-manifests", name)
		}
	}
}

// rich is a pod that uses many of the fields that an injection could touch.
const rich = `{
  "metadata": {"name": "rich", "labels": {"app": "x"}, "annotations": {"note": "kept"}},
  "spec": {
    "serviceAccountName": "web", "hostNetwork": true, "dnsPolicy": "ClusterFirstWithHostNet", "priority": 0,
    "securityContext": {"runAsUser": 1000, "fsGroup": 2000},
    "volumes": [{"name": "data", "emptyDir": {}}, {"name": "pod", "downwardAPI": {"items": [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]}}],
    "initContainers": [{"name": "side", "image": "side", "restartPolicy": "Always"}, {"name": "init", "image": "init", "env": [{"name": "A", "value": "$(B)"}]}],
    "containers": [
      {"name": "app", "image": "app", "command": ["a", "b"], "env": [
        {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
        {"name": "RESOURCE_CONTROLLER_AUTH_TYPE", "value": "noAuth"}],
       "envFrom": [{"configMapRef": {"name": "c", "optional": true}}],
       "volumeMounts": [{"name": "data", "mountPath": "/data"}], "ports": [{"containerPort": 80}], "resources": {"requests": {"cpu": "1"}}},
      {"name": "own", "image": "own", "volumeMounts": [{"name": "data", "mountPath": "/var/run/secrets/tokens"}]}]
  }}`

func podOf(t *testing.T, text string) *corev1.Pod {
	t.Helper()
	var p corev1.Pod
	if err := json.Unmarshal([]byte(text), &p); err != nil {
		t.Fatal(err)
	}
	return &p
}

func (s *webhookSite) create(ns string, p *corev1.Pod) (*corev1.Pod, error) {
	return s.Client().CoreV1().Pods(ns).Create(s.t.Context(), p, metav1.CreateOptions{})
}

func simple(account string) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{GenerateName: "p-"},
		Spec:       corev1.PodSpec{ServiceAccountName: account, Containers: []corev1.Container{{Name: "app", Image: "app"}}},
	}
}

func env(c corev1.Container) map[string]string {
	out := map[string]string{}
	for _, v := range c.Env {
		out[v.Name] = v.Value
	}
	return out
}

func injected(p *corev1.Pod) bool {
	for _, v := range p.Spec.Volumes {
		if v.Name == "tabard-identity-token" {
			return true
		}
	}
	return false
}

// identityPart takes what the webhook adds off a pod and returns it.
func identityPart(p *corev1.Pod) (volume *corev1.Volume, mounts map[string]corev1.VolumeMount, vars map[string]map[string]string) {
	mounts, vars = map[string]corev1.VolumeMount{}, map[string]map[string]string{}
	var volumes []corev1.Volume
	for _, v := range p.Spec.Volumes {
		if v.Name == "tabard-identity-token" {
			volume = &v
		} else {
			volumes = append(volumes, v)
		}
	}
	p.Spec.Volumes = volumes
	added := regexp.MustCompile(`^(IAM_IDENTITY|IAM_POLICY_MANAGEMENT|IAM_ACCESS_GROUPS|RESOURCE_CONTROLLER|RESOURCE_MANAGER|USER_MANAGEMENT|ACCOUNT_MANAGEMENT|VPC)_(AUTH_TYPE|AUTH_URL|IAM_PROFILE_NAME|CR_TOKEN_FILENAME)$`)
	for _, list := range [][]corev1.Container{p.Spec.InitContainers, p.Spec.Containers} {
		for i := range list {
			c := &list[i]
			var keptEnv []corev1.EnvVar
			for _, v := range c.Env {
				if added.MatchString(v.Name) && v.Value != "noAuth" {
					if vars[c.Name] == nil {
						vars[c.Name] = map[string]string{}
					}
					vars[c.Name][v.Name] = v.Value
				} else {
					keptEnv = append(keptEnv, v)
				}
			}
			c.Env = keptEnv
			var keptMounts []corev1.VolumeMount
			for _, m := range c.VolumeMounts {
				if m.Name == "tabard-identity-token" {
					mounts[c.Name] = m
				} else {
					keptMounts = append(keptMounts, m)
				}
			}
			c.VolumeMounts = keptMounts
		}
	}
	return volume, mounts, vars
}

func TestTheWebhookGivesPodsTheirIdentity(t *testing.T) {
	s := newWebhookSite(t, kubetest.Options{Controllers: true})
	s.start()
	s.Namespace("shop", nil, nil)
	s.ServiceAccount("shop", "web", map[string]string{profileAnnotation: "shop-web"})
	s.ServiceAccount("shop", "plain", nil)

	t.Run("and nothing else of a pod changes", func(t *testing.T) {
		if _, err := s.create("shop", podOf(t, rich)); err != nil {
			t.Fatal(err)
		}
		got, err := s.Client().CoreV1().Pods("shop").Get(t.Context(), "rich", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		volume, mounts, vars := identityPart(got)
		if volume == nil || volume.Projected == nil || len(volume.Projected.Sources) != 1 {
			t.Fatalf("volume %+v", volume)
		}
		if k := volume.Projected.Sources[0].ServiceAccountToken; k == nil || k.Audience != "iam" || *k.ExpirationSeconds != 3600 || k.Path != "sa-token" {
			t.Errorf("token %+v", k)
		}
		for _, name := range []string{"side", "init", "app"} {
			m := mounts[name]
			if m.MountPath != "/var/run/secrets/tokens" || !m.ReadOnly {
				t.Errorf("%s: mount %+v", name, m)
			}
			for _, prefix := range []string{"IAM_IDENTITY", "IAM_POLICY_MANAGEMENT", "IAM_ACCESS_GROUPS", "RESOURCE_CONTROLLER", "RESOURCE_MANAGER", "USER_MANAGEMENT", "ACCOUNT_MANAGEMENT", "VPC"} {
				want := map[string]string{
					"_AUTH_TYPE": "container", "_AUTH_URL": s.iamURL, "_IAM_PROFILE_NAME": "shop-web", "_CR_TOKEN_FILENAME": "/var/run/secrets/tokens/sa-token",
				}
				if name == "app" && prefix == "RESOURCE_CONTROLLER" {
					want = nil // the container says itself how it authenticates there
				}
				for suffix := range want {
					if vars[name][prefix+suffix] != want[suffix] {
						t.Errorf("%s: %s is %q", name, prefix+suffix, vars[name][prefix+suffix])
					}
				}
				if want == nil && vars[name][prefix+"_AUTH_URL"] != "" {
					t.Errorf("%s: the container's choice for %s did not stand", name, prefix)
				}
			}
		}
		if _, ok := mounts["own"]; ok || vars["own"] != nil {
			t.Errorf("a container that mounts its own volume there got %v %v", mounts["own"], vars["own"])
		}

		s.DeletePod("shop", "rich")
		bare := podOf(t, rich)
		bare.Annotations["iam.tabard.dev/inject"] = "false"
		without, err := s.create("shop", bare)
		if err != nil {
			t.Fatal(err)
		}
		if injected(without) {
			t.Fatal("the pod that wants to be left alone was not")
		}
		delete(without.Annotations, "iam.tabard.dev/inject")
		apiToken := func(p *corev1.Pod) { // its name is drawn anew for each pod
			for i := range p.Spec.Volumes {
				if strings.HasPrefix(p.Spec.Volumes[i].Name, "kube-api-access-") {
					p.Spec.Volumes[i].Name = "kube-api-access"
				}
			}
			for _, list := range [][]corev1.Container{p.Spec.InitContainers, p.Spec.Containers} {
				for i := range list {
					for j := range list[i].VolumeMounts {
						if strings.HasPrefix(list[i].VolumeMounts[j].Name, "kube-api-access-") {
							list[i].VolumeMounts[j].Name = "kube-api-access"
						}
					}
				}
			}
		}
		identityPart(without) // makes lists that are empty absent, as it did in the other
		apiToken(got)
		apiToken(without)
		if !reflect.DeepEqual(got.Spec, without.Spec) {
			a, _ := json.MarshalIndent(got.Spec, "", " ")
			b, _ := json.MarshalIndent(without.Spec, "", " ")
			t.Errorf("with\n%s\nwithout\n%s", a, b)
		}
		if !reflect.DeepEqual(got.Labels, without.Labels) || !reflect.DeepEqual(got.Annotations, without.Annotations) {
			t.Errorf("metadata %v %v, without %v %v", got.Labels, got.Annotations, without.Labels, without.Annotations)
		}
	})
	t.Run("with every option of the chart", func(t *testing.T) {
		ca, err := os.ReadFile(s.CAFile)
		if err != nil {
			t.Fatal(err)
		}
		values, err := json.Marshal(map[string]any{
			"caBundle": string(ca), "excludedNamespaces": []string{"kube-public"}, "imagePullSecrets": []any{map[string]string{"name": "pull"}},
			"webhook": map[string]any{
				"services": []string{"vpc", "iam_identity"}, "serviceURLs": true, "checkProfiles": true, "profile": "our: webhook #1",
				"priorityClassName": "system-cluster-critical", "nodeSelector": map[string]string{"a": "b"}, "tolerations": []any{map[string]string{"operator": "Exists"}},
				"affinity": map[string]any{"nodeAffinity": map[string]any{}},
			},
			"controller": map[string]any{"enabled": true, "cluster": "my: cluster", "profile": "our: controller #2"},
		})
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(t.TempDir(), "values.yaml")
		if err := os.WriteFile(file, values, 0o600); err != nil {
			t.Fatal(err)
		}
		yaml := helm(t, "template", "tabard-kubernetes", chart(), "--namespace", webhookNamespace, "--kube-version", "1.35.0",
			"--set", "iamURL=https://tabard.example.com", "--values", file)
		if _, err := s.TryKubectl(yaml, "apply", "--server-side", "--force-conflicts", "-f", "-"); err != nil {
			t.Fatal(err)
		}
		defer s.install()
		m, err := s.Client().CoreV1().ConfigMaps(webhookNamespace).Get(t.Context(), "tabard-ca", metav1.GetOptions{})
		if err != nil || strings.TrimSpace(m.Data["ca.crt"]) != strings.TrimSpace(string(ca)) {
			t.Errorf("the authority of Tabard's certificate: %v, %v", m, err)
		}
		for name, profile := range map[string]string{"tabard-webhook": "our: webhook #1", "tabard-controller": "our: controller #2"} {
			d, err := s.Client().AppsV1().Deployments(webhookNamespace).Get(t.Context(), name, metav1.GetOptions{})
			if err != nil {
				t.Fatal(err)
			}
			spec := d.Spec.Template.Spec
			for _, arg := range []string{"--ca-file=/etc/tabard/ca.crt", "--profile=" + profile} {
				if !slices.Contains(spec.Containers[0].Args, arg) {
					t.Errorf("%s is started with %q, without %s", name, spec.Containers[0].Args, arg)
				}
			}
			mounted := slices.ContainsFunc(spec.Containers[0].VolumeMounts, func(m corev1.VolumeMount) bool { return m.MountPath == "/etc/tabard" && m.Name == "ca" })
			there := slices.ContainsFunc(spec.Volumes, func(v corev1.Volume) bool {
				return v.Name == "ca" && v.ConfigMap != nil && v.ConfigMap.Name == "tabard-ca"
			})
			if !mounted || !there || d.Spec.Template.Annotations["iam.tabard.dev/ca"] == "" {
				t.Errorf("%s does not get the authority: %+v", name, spec)
			}
		}
	})
	t.Run("from both plain manifests together", func(t *testing.T) {
		defer s.install()
		for name := range manifests {
			s.Kubectl("apply", "--server-side", "--force-conflicts", "-f", filepath.Join(harness.Root(), "deploy", "kubernetes", name))
		}
		list, err := s.Client().AppsV1().Deployments(webhookNamespace).List(t.Context(), metav1.ListOptions{})
		if err != nil || len(list.Items) != 2 {
			t.Errorf("%d deployments, %v", len(list.Items), err)
		}
	})
	t.Run("until the annotation is gone", func(t *testing.T) {
		if p, err := s.create("shop", simple("plain")); err != nil || injected(p) {
			t.Fatal("a pod of a service account that names no profile: ", err)
		}
		s.ServiceAccount("shop", "soon", map[string]string{profileAnnotation: "p", "iam.tabard.dev/services": "vpc"})
		p, err := s.create("shop", simple("soon"))
		if err != nil || env(p.Spec.Containers[0])["VPC_IAM_PROFILE_NAME"] != "p" || len(p.Spec.Containers[0].Env) != 4 {
			t.Fatalf("%v: %v", err, p.Spec.Containers[0].Env)
		}
		s.Kubectl("annotate", "serviceaccount", "soon", "-n", "shop", profileAnnotation+"-")
		if p, err := s.create("shop", simple("soon")); err != nil || injected(p) {
			t.Fatal("the annotation's removal is not noticed: ", err)
		}
	})
	t.Run("in a deployment", func(t *testing.T) {
		s.Apply(`{"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web", "namespace": "shop"}, "spec": {"replicas": 2,
			"selector": {"matchLabels": {"app": "web"}}, "template": {"metadata": {"labels": {"app": "web"}},
			"spec": {"serviceAccountName": "web", "containers": [{"name": "app", "image": "app"}]}}}}`)
		await(t, "the deployment has two pods with an identity", func() bool {
			list, err := s.Client().CoreV1().Pods("shop").List(t.Context(), metav1.ListOptions{LabelSelector: "app=web"})
			return err == nil && len(list.Items) == 2 && injected(&list.Items[0]) && injected(&list.Items[1])
		})
	})
	t.Run("that a value names by id, and with nothing expanded in it", func(t *testing.T) {
		s.ServiceAccount("shop", "byid", map[string]string{profileAnnotation: "iam-Profile-0f0f0f0f-0000-4000-8000-0123456789ab", "iam.tabard.dev/services": "vpc"})
		p, err := s.create("shop", simple("byid"))
		if err != nil || env(p.Spec.Containers[0])["VPC_IAM_PROFILE_ID"] != "Profile-0f0f0f0f-0000-4000-8000-0123456789ab" {
			t.Fatalf("%v: %v", err, p.Spec.Containers[0].Env)
		}
		s.ServiceAccount("shop", "odd", map[string]string{profileAnnotation: `a "b" $(HOME)`, "iam.tabard.dev/services": "vpc"})
		if p, err = s.create("shop", simple("odd")); err != nil || env(p.Spec.Containers[0])["VPC_IAM_PROFILE_NAME"] != `a "b" $$(HOME)` {
			t.Fatalf("%v: %v", err, p.Spec.Containers[0].Env)
		}
	})
	t.Run("and says what is wrong with an annotation", func(t *testing.T) {
		s.ServiceAccount("shop", "wrong", map[string]string{profileAnnotation: "p", "iam.tabard.dev/services": "not a service"})
		p, warnings, err := s.createWarned("shop", simple("wrong"))
		if err != nil || injected(p) || len(warnings) != 1 || !strings.Contains(warnings[0], `"not a service"`) {
			t.Fatal(err, warnings)
		}
	})
}

// createWarned creates a pod and returns what the API server warned of.
func (s *webhookSite) createWarned(ns string, p *corev1.Pod) (*corev1.Pod, []string, error) {
	s.t.Helper()
	w := &warnings{}
	cfg := rest.CopyConfig(s.RESTConfig())
	cfg.WarningHandler = w
	c, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		s.t.Fatal(err)
	}
	out, err := c.CoreV1().Pods(ns).Create(s.t.Context(), p, metav1.CreateOptions{})
	return out, w.texts, err
}

type warnings struct{ texts []string }

func (w *warnings) HandleWarningHeader(_ int, _, text string) { w.texts = append(w.texts, text) }

func TestANamespaceCanDemandAnIdentity(t *testing.T) {
	s := newWebhookSite(t, kubetest.Options{})
	r := s.start()
	s.Namespace("strict", map[string]string{identityLabel: "required"}, nil)
	s.Namespace("loose", nil, nil)
	for _, ns := range []string{"strict", "loose"} {
		s.ServiceAccount(ns, "web", map[string]string{profileAnnotation: "p"})
		s.ServiceAccount(ns, "plain", nil)
	}
	refused := func(t *testing.T, p *corev1.Pod, about string) {
		t.Helper()
		_, err := s.create("strict", p)
		if !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), about) {
			t.Errorf("error %v, want one about %s", err, about)
		}
	}
	t.Run("and pods without one are refused with what to do", func(t *testing.T) {
		refused(t, simple("plain"), "kubectl annotate serviceaccount plain -n strict iam.tabard.dev/trusted-profile=PROFILE")
		if p, err := s.create("loose", simple("plain")); err != nil || injected(p) {
			t.Error(err)
		}
		if p, err := s.create("strict", simple("web")); err != nil || !injected(p) {
			t.Error(err)
		}
	})
	t.Run("from which no pod can exempt itself", func(t *testing.T) {
		p := simple("web")
		p.Annotations = map[string]string{"iam.tabard.dev/inject": "false"}
		if p, err := s.create("strict", p); err != nil || !injected(p) {
			t.Error("the pod came in without: ", err)
		}
		p = simple("plain")
		p.Annotations = map[string]string{"iam.tabard.dev/inject": "false"}
		refused(t, p, "names no trusted profile")
		p = simple("plain")
		p.Annotations = map[string]string{"kubernetes.io/config.mirror": "x"}
		refused(t, p, "")
		p = simple("web")
		p.Spec.Volumes = []corev1.Volume{{Name: "tabard-identity-token", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}}}
		refused(t, p, "rename it")
		p = simple("web")
		p.Spec.Volumes = []corev1.Volume{{Name: "own", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}}}
		p.Spec.Containers[0].VolumeMounts = []corev1.VolumeMount{{Name: "own", MountPath: "/var/run/secrets/tokens"}}
		refused(t, p, "mount it elsewhere")
		if _, err := s.create("loose", p); err != nil {
			t.Error(err)
		}
	})
	t.Run("also while service accounts cannot be read", func(t *testing.T) {
		s.Kubectl("delete", "clusterrolebinding", "tabard-webhook")
		await(t, "the webhook may read nothing", func() bool { _, err := s.create("strict", simple("web")); return err != nil })
		refused(t, simple("web"), "service account web could not be read")
		p, warned, err := s.createWarned("loose", simple("web"))
		if err != nil || injected(p) || len(warned) != 1 || !strings.Contains(warned[0], "could not be read") {
			t.Error(err, warned)
		}
		s.install()
		await(t, "the webhook may read again", func() bool { _, err := s.create("strict", simple("web")); return err == nil })
	})
	t.Run("also while the webhook is down", func(t *testing.T) {
		s.balancer.remove(r.address)
		r.leave()
		if _, err := s.create("strict", simple("web")); err == nil || !strings.Contains(err.Error(), "require.iam.tabard.dev") {
			t.Errorf("error %v", err)
		}
		if p, err := s.create("loose", simple("web")); err != nil || injected(p) {
			t.Error(err)
		}
		s.start()
		if p, err := s.create("strict", simple("web")); err != nil || !injected(p) {
			t.Error(err)
		}
	})
}

func TestWhoeverCallsTheWebhookGetsNothingOfValue(t *testing.T) {
	s := newWebhookSite(t, kubetest.Options{})
	r := s.start()
	s.Namespace("shop", nil, nil)
	s.ServiceAccount("shop", "web", map[string]string{profileAnnotation: "p", "secret": "in another annotation"})
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
	call := func(method, path, contentType, body string) (int, string) {
		t.Helper()
		req, err := http.NewRequest(method, "https://"+r.address+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", contentType)
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, _ := io.ReadAll(resp.Body)
		return resp.StatusCode, string(b)
	}
	review := func(request string) string {
		return `{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview","request":` + request + `}`
	}
	pod := func(ns, account string) string {
		a, _ := json.Marshal(account)
		n, _ := json.Marshal(ns)
		return review(`{"uid":"u","resource":{"group":"","version":"v1","resource":"pods"},"operation":"CREATE","namespace":` + string(n) +
			`,"object":{"spec":{"serviceAccountName":` + string(a) + `,"containers":[{"name":"c"}]}}}`)
	}
	code, body := call("POST", "/inject", "application/json", pod("shop", "web"))
	if code != http.StatusOK || !strings.Contains(body, `"uid":"u"`) || strings.Contains(body, "in another annotation") {
		t.Errorf("%d %s", code, body)
	}
	for _, account := range []string{"../../secrets/tabard-webhook-certificate", "web/token", "web?x=y", "..", "", "web\n", strings.Repeat("a", 300)} {
		code, body := call("POST", "/require", "application/json", pod(webhookNamespace, account))
		if code != http.StatusOK || !strings.Contains(body, `"allowed":false`) || strings.Contains(body, "PRIVATE") {
			t.Errorf("%q: %d %s", account, code, body)
		}
	}
	if _, body := call("POST", "/require", "application/json", pod("shop/serviceaccounts/web?", "web")); !strings.Contains(body, `"allowed":false`) {
		t.Error(body)
	}
	for name, c := range map[string]struct {
		method, path, contentType, body string
		want                            int
	}{
		"another path":    {"POST", "/", "application/json", pod("shop", "web"), http.StatusNotFound},
		"another method":  {"GET", "/inject", "application/json", "", http.StatusMethodNotAllowed},
		"another type":    {"POST", "/inject", "text/plain", pod("shop", "web"), http.StatusUnsupportedMediaType},
		"no JSON":         {"POST", "/inject", "application/json", "{", http.StatusBadRequest},
		"no review":       {"POST", "/inject", "application/json", "{}", http.StatusBadRequest},
		"an old version":  {"POST", "/inject", "application/json", strings.Replace(pod("shop", "web"), "/v1", "/v1beta1", 1), http.StatusBadRequest},
		"no request":      {"POST", "/inject", "application/json", review("null"), http.StatusBadRequest},
		"another object":  {"POST", "/inject", "application/json", strings.Replace(pod("shop", "web"), `"pods"`, `"nodes"`, 1), http.StatusBadRequest},
		"another verb":    {"POST", "/inject", "application/json", strings.Replace(pod("shop", "web"), "CREATE", "UPDATE", 1), http.StatusBadRequest},
		"no pod":          {"POST", "/inject", "application/json", strings.Replace(pod("shop", "web"), `"object":{`, `"object":null,"x":{`, 1), http.StatusBadRequest},
		"an endless body": {"POST", "/inject", "application/json", strings.Repeat(" ", 5<<20), http.StatusRequestEntityTooLarge},
	} {
		if code, body := call(c.method, c.path, c.contentType, c.body); code != c.want {
			t.Errorf("%s: %d %s", name, code, body)
		}
	}
	if _, err := s.Client().CoreV1().Pods("shop").Create(t.Context(), simple("web"), metav1.CreateOptions{}); err != nil {
		t.Error(err)
	}
	t.Run("not even with the webhook's own credential", func(t *testing.T) {
		for _, c := range [][]string{
			{"get", "secrets", "-A"}, {"get", "secret", "other", "-n", webhookNamespace}, {"create", "token", "web", "-n", "shop"},
			{"get", "pods", "-A"}, {"delete", "mutatingwebhookconfiguration", "tabard-webhook"}, {"create", "secret", "generic", "x", "-n", webhookNamespace},
			{"annotate", "serviceaccount", "web", "-n", "shop", "a=b"},
		} {
			out, err := s.TryKubectl("", append([]string{"--kubeconfig", s.kubeconfig}, c...)...)
			if err == nil || !strings.Contains(out+err.Error(), "orbidden") {
				t.Errorf("kubectl %s: %v %s", strings.Join(c, " "), err, out)
			}
		}
	})
}

func TestTheWebhookCanAskWhetherProfilesExist(t *testing.T) {
	s := newWebhookSite(t, kubetest.Options{})
	s.Namespace("strict", map[string]string{identityLabel: "required"}, nil)
	s.Namespace("loose", nil, nil)
	for _, ns := range []string{"strict", "loose"} {
		s.ServiceAccount(ns, "web", map[string]string{profileAnnotation: "shop-web"})
		s.ServiceAccount(ns, "lost", map[string]string{profileAnnotation: "gone"})
	}
	tabard := harness.Start(t, "--driver", "none")
	tabard.Login()
	keys := filepath.Join(t.TempDir(), "jwks.json")
	if err := os.WriteFile(keys, s.JWKS(), 0o600); err != nil {
		t.Fatal(err)
	}
	tabard.CLI("ks", "cluster-register", "c", "--issuer", s.Issuer, "--jwks", keys)
	var cluster struct{ CRN string }
	tabard.JSON(&cluster, "ks", "cluster-get", "c")
	tabard.CLI("iam", "trusted-profile-create", "shop-web")
	tabard.CLI("iam", "trusted-profile-create", "tabard-webhook")
	tabard.CLI("iam", "trusted-profile-link-create", "tabard-webhook", "--name", "webhook", "--cr-type", "IKS_SA",
		"--link-crn", cluster.CRN, "--link-namespace", webhookNamespace, "--link-name", "tabard-webhook")
	token := filepath.Join(t.TempDir(), "sa-token")
	if err := os.WriteFile(token, []byte(s.Token(webhookNamespace, "tabard-webhook", "iam", 3600, nil)), 0o600); err != nil {
		t.Fatal(err)
	}
	s.iamURL = tabard.URL
	s.start("--check-profiles", "--token-file", token)

	warned := func(t *testing.T, ns, account, about string) {
		t.Helper()
		p, got, err := s.createWarned(ns, simple(account))
		switch {
		case err != nil || !injected(p):
			t.Error("the pod is not let in: ", err)
		case about == "" && len(got) > 0, about != "" && (len(got) != 1 || !strings.Contains(got[0], about)):
			t.Errorf("warnings %q, want one about %q", got, about)
		}
	}
	t.Run("unless its own may not see profiles", func(t *testing.T) {
		warned(t, "strict", "web", "could not be checked")
		warned(t, "loose", "lost", "could not be checked")
		tabard.CLI("iam", "trusted-profile-policy-create", "tabard-webhook", "--roles", "Viewer", "--service-name", "iam-identity")
	})
	t.Run("and refuse or warn", func(t *testing.T) {
		await(t, "the webhook may see profiles", func() bool {
			_, got, err := s.createWarned("strict", simple("web"))
			return err == nil && len(got) == 0
		})
		warned(t, "loose", "web", "")
		warned(t, "loose", "lost", `no trusted profile "gone"`)
		if _, err := s.create("strict", simple("lost")); !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), `no trusted profile "gone"`) {
			t.Error(err)
		}
	})
	t.Run("and what a pod got is all that the published SDK needs", func(t *testing.T) {
		tabard.CLI("iam", "trusted-profile-link-create", "shop-web", "--name", "web", "--cr-type", "IKS_SA",
			"--link-crn", cluster.CRN, "--link-namespace", "strict", "--link-name", "web")
		p, err := s.create("strict", simple("web"))
		if err != nil {
			t.Fatal(err)
		}
		volume, _, _ := identityPart(p.DeepCopy())
		source := volume.Projected.Sources[0].ServiceAccountToken
		file := filepath.Join(t.TempDir(), source.Path)
		if err := os.WriteFile(file, []byte(s.Token("strict", "web", source.Audience, *source.ExpirationSeconds, p)), 0o600); err != nil {
			t.Fatal(err)
		}
		for name, value := range env(p.Spec.Containers[0]) {
			if strings.HasSuffix(name, "_CR_TOKEN_FILENAME") {
				value = file // no kubelet mounts the volume here
			}
			t.Setenv(name, value)
		}
		for _, service := range []string{"iam_identity", "iam_policy_management", "iam_access_groups", "resource_controller", "resource_manager", "user_management", "account_management", "vpc"} {
			a, err := core.GetAuthenticatorFromEnvironment(service)
			if err != nil || a == nil {
				t.Fatalf("%s: %v", service, err)
			}
			container, ok := a.(*core.ContainerAuthenticator)
			if !ok {
				t.Fatalf("%s: the SDK authenticates by %s", service, a.AuthenticationType())
			}
			if token, err := container.GetToken(); err != nil || token == "" {
				t.Errorf("%s: %v", service, err)
			}
		}
	})
	t.Run("until one appears", func(t *testing.T) {
		tabard.CLI("iam", "trusted-profile-create", "gone")
		await(t, "pods for it come in", func() bool { _, err := s.create("strict", simple("lost")); return err == nil })
	})
	t.Run("and lets pods in while Tabard is down", func(t *testing.T) {
		tabard.Stop()
		s.ServiceAccount("strict", "new", map[string]string{profileAnnotation: "unknown"})
		warned(t, "strict", "new", "could not be checked")
	})
}
