package kubernetes

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"tabard.dev/tabard/test/harness"
	"tabard.dev/tabard/test/kubetest"
)

// bindings is a cluster that is registered at a server, with what the manifests
// of the controller bring, and a profile for the controller to put on. The
// controllers run outside of it, with the rights of the manifests' service
// account and nothing else.
type bindings struct {
	*harness.Server
	t      *testing.T
	k      *kubetest.Cluster
	crn    string
	crType string
}

func newBindings(t *testing.T) *bindings { return newBindingsOf(t, "IKS_SA") }

// newBindingsOf is newBindings with a cluster of a type of compute resource.
func newBindingsOf(t *testing.T, crType string) *bindings {
	t.Helper()
	w := &bindings{t: t, k: kubetest.Start(t, kubetest.Options{}), Server: harness.Start(t, "--driver", "none"), crType: crType}
	for _, file := range []string{"deploy/charts/tabard-kubernetes/crds/trustedprofilebindings.yaml", "deploy/kubernetes/controller.yaml"} {
		w.k.Kubectl("apply", "-f", filepath.Join(repository(t), file))
	}
	w.k.Kubectl("wait", "--for=condition=Established", "crd/trustedprofilebindings.iam.tabard.dev", "--timeout=60s")
	w.Login()
	a := w.Do("POST", "/v1/clusters", w.OwnerToken(), map[string]any{"name": "my-cluster", "type": crType, "issuer": w.k.Issuer, "jwks": json.RawMessage(w.k.JWKS())})
	if w.crn = a.Field("crn"); a.Status != http.StatusCreated || w.crn == "" {
		t.Fatalf("%d %s", a.Status, a.Body)
	}
	w.CLI("iam", "trusted-profile-create", "tabard-controller")
	w.CLI("iam", "trusted-profile-policy-create", "tabard-controller", "--roles", "Editor", "--service-name", "iam-identity")
	w.CLI("iam", "trusted-profile-policy-create", "tabard-controller", "--roles", "Viewer", "--service-name", "containers-kubernetes")
	w.linkByHand("tabard-controller", "tabard-system", "tabard-controller")
	return w
}

func repository(t *testing.T) string {
	t.Helper()
	dir, err := filepath.Abs(harness.Root())
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// forbidController takes the controller's profile what it may do in a service.
func (w *bindings) forbidController(service string) {
	w.t.Helper()
	var policies []json.RawMessage
	w.JSON(&policies, "iam", "trusted-profile-policies", "tabard-controller")
	for _, p := range policies {
		var policy struct{ ID string }
		if err := json.Unmarshal(p, &policy); err != nil {
			w.t.Fatal(err)
		}
		if bytes.Contains(p, []byte(`"`+service+`"`)) {
			w.CLI("iam", "trusted-profile-policy-delete", "tabard-controller", policy.ID, "-f")
		}
	}
}

func (w *bindings) linkByHand(profile, namespace, account string) {
	w.t.Helper()
	w.CLI("iam", "trusted-profile-link-create", profile, "--name", "by hand", "--cr-type", w.crType, "--link-crn", w.crn, "--link-namespace", namespace, "--link-name", account)
}

// controllerRun is a running controller.
type controllerRun struct {
	t       *testing.T
	cmd     *exec.Cmd
	done    chan error
	log     *harness.Output
	Metrics string
}

func (w *bindings) controller(t *testing.T, args ...string) *controllerRun {
	t.Helper()
	bin, err := harness.Binary()
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "sa-token")
	if err := os.WriteFile(file, []byte(w.k.Token("tabard-system", "tabard-controller", "iam", 3600, nil)), 0o600); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &controllerRun{t: t, log: &harness.Output{}, done: make(chan error, 1), Metrics: l.Addr().String()}
	l.Close()
	r.cmd = exec.Command(bin, append([]string{
		"ks", "controller", "--kubeconfig", w.k.KubeconfigFor("tabard-system", "tabard-controller"), "--token-file", file,
		"--iam-url", w.URL, "--cluster", "my-cluster", "--namespace", "tabard-system", "--metrics", r.Metrics,
		"--resync", "2s", "--sweep", "5s", "--lease-duration", "9s",
	}, args...)...)
	r.cmd.Stderr = r.log
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { r.done <- r.cmd.Wait() }()
	t.Cleanup(func() {
		r.Kill()
		if t.Failed() {
			t.Logf("log of the controller:\n%s", r.log)
		}
	})
	return r
}

func (r *controllerRun) Kill() {
	_ = r.cmd.Process.Kill()
	r.wait()
}

func (r *controllerRun) wait() error {
	select {
	case err := <-r.done:
		r.done <- err
		return err
	case <-time.After(time.Minute):
		r.t.Fatalf("the controller does not end\n%s", r.log)
		return nil
	}
}

// Stop ends the controller as a kubelet does.
func (r *controllerRun) Stop() {
	r.t.Helper()
	if err := r.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		r.t.Fatal(err)
	}
	if err := r.wait(); err != nil {
		r.t.Errorf("the controller ended with %v\n%s", err, r.log)
	}
}

func (r *controllerRun) metric(t *testing.T, line string) bool {
	t.Helper()
	resp, err := http.Get("http://" + r.Metrics + "/metrics")
	if err != nil {
		return false
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return err == nil && slices.Contains(strings.Split(string(b), "\n"), line)
}

func (w *bindings) namespace(name, allowed string, accounts ...string) {
	w.t.Helper()
	var annotations map[string]string
	if allowed != "" {
		annotations = map[string]string{"iam.tabard.dev/allowed-profiles": allowed}
	}
	w.k.Namespace(name, nil, annotations)
	for _, a := range accounts {
		w.k.ServiceAccount(name, a, nil)
	}
}

func bindingYAML(namespace, name, account, profile string) string {
	field := "profileName"
	if strings.Contains(profile, "Profile-") {
		field = "profileID"
	}
	return fmt.Sprintf("apiVersion: iam.tabard.dev/v1alpha1\nkind: TrustedProfileBinding\nmetadata: {namespace: %s, name: %s}\nspec: {serviceAccountName: %s, %s: %s}\n",
		namespace, name, account, field, profile)
}

func (w *bindings) bind(namespace, name, account, profile string) {
	w.t.Helper()
	w.k.Apply(bindingYAML(namespace, name, account, profile))
}

type bindingState struct {
	Metadata struct {
		UID        string
		Finalizers []string
	}
	Status struct {
		LinkID, ProfileID string
		Conditions        []struct{ Type, Status, Reason, Message string }
	}
}

func (w *bindings) get(namespace, name string) (s bindingState, ok bool) {
	w.t.Helper()
	raw, err := w.k.Client().CoreV1().RESTClient().Get().
		AbsPath("/apis/iam.tabard.dev/v1alpha1/namespaces/" + namespace + "/trustedprofilebindings/" + name).DoRaw(w.t.Context())
	if err != nil {
		return s, false
	}
	if err := json.Unmarshal(raw, &s); err != nil {
		w.t.Fatal(err)
	}
	return s, true
}

// stands waits until a binding has a condition and returns its message.
func (w *bindings) stands(t *testing.T, namespace, name, status, reason string) string {
	t.Helper()
	var last bindingState
	for deadline := time.Now().Add(90 * time.Second); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		last, _ = w.get(namespace, name)
		if c := last.Status.Conditions; len(c) == 1 && c[0].Type == "Ready" && c[0].Status == status && c[0].Reason == reason {
			if c[0].Message == "" {
				t.Error("the condition has no message")
			}
			return c[0].Message
		}
	}
	t.Fatalf("%s/%s stands at %+v, want %s %s", namespace, name, last, status, reason)
	return ""
}

func (w *bindings) until(t *testing.T, what string, f func() bool) {
	t.Helper()
	for deadline := time.Now().Add(90 * time.Second); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		if f() {
			return
		}
	}
	t.Fatalf("not in time: %s", what)
}

// links are the names and service accounts of a profile's links.
func (w *bindings) links(profile string) []string {
	w.t.Helper()
	var links []struct {
		Name string
		Link struct{ Namespace, Name string }
	}
	w.JSON(&links, "iam", "trusted-profile-links", profile)
	out := []string{}
	for _, l := range links {
		name := l.Name
		if i := strings.LastIndex(name, ":"); i > 0 {
			name = name[:i]
		}
		out = append(out, name+" "+l.Link.Namespace+"/"+l.Link.Name)
	}
	slices.Sort(out)
	return out
}

func (w *bindings) hasLinks(t *testing.T, profile string, want ...string) {
	t.Helper()
	if got := w.links(profile); !slices.Equal(got, want) {
		t.Errorf("the links of %s are %q, want %q", profile, got, want)
	}
}

// admits reports whether a pod of a service account can put on a profile.
func (w *bindings) admits(namespace, account, profile string) bool {
	w.t.Helper()
	a := w.Do("POST", "/identity/token", "", url.Values{
		"grant_type": {"urn:ibm:params:oauth:grant-type:cr-token"}, "profile_name": {profile},
		"cr_token": {w.k.Token(namespace, account, "iam", 600, nil)},
	})
	return a.Status == http.StatusOK
}

func (w *bindings) profile(names ...string) {
	w.t.Helper()
	for _, n := range names {
		w.CLI("iam", "trusted-profile-create", n)
	}
}

func (w *bindings) profileID(name string) string {
	w.t.Helper()
	var p struct{ ID string }
	w.JSON(&p, "iam", "trusted-profile", name)
	return p.ID
}

func (w *bindings) allow(namespace, profiles string) {
	w.t.Helper()
	w.k.Kubectl("annotate", "namespace", namespace, "--overwrite", "iam.tabard.dev/allowed-profiles="+profiles)
}

func (w *bindings) unbind(namespace, name string) {
	w.t.Helper()
	w.k.Kubectl("delete", "trustedprofilebinding", "-n", namespace, name, "--timeout=90s")
}

func TestABindingInTheClusterLinksAServiceAccountToAProfile(t *testing.T) {
	w := newBindings(t)
	r := w.controller(t)

	t.Run("and its pods can put the profile on until it is deleted", func(t *testing.T) {
		w.profile("shop-reader")
		w.namespace("shop", "shop-*, backup", "web", "other")
		if w.admits("shop", "web", "shop-reader") {
			t.Fatal("admitted without a binding")
		}
		w.bind("shop", "web", "web", "shop-reader")
		w.stands(t, "shop", "web", "True", "Linked")
		w.hasLinks(t, "shop-reader", "tpb:shop/web shop/web")
		if !w.admits("shop", "web", "shop-reader") || w.admits("shop", "other", "shop-reader") {
			t.Error("not exactly the bound service account is admitted")
		}
		if out := w.k.Kubectl("get", "tpb", "-n", "shop"); !strings.Contains(out, "Linked") || !strings.Contains(out, "shop-reader") {
			t.Errorf("kubectl shows\n%s", out)
		}
		w.until(t, "an event", func() bool {
			return strings.Contains(w.k.Kubectl("get", "events.events.k8s.io", "-n", "shop", "-o", "json"), "can take on the trusted profile shop-reader")
		})
		w.until(t, "the metric", func() bool { return r.metric(t, `tabard_controller_bindings{reason="Linked"} 1`) })
		w.unbind("shop", "web")
		w.hasLinks(t, "shop-reader")
		if w.admits("shop", "web", "shop-reader") {
			t.Error("still admitted")
		}
	})
	t.Run("by the profile's ID as well", func(t *testing.T) {
		w.bind("shop", "by-id", "web", "iam-"+w.profileID("shop-reader"))
		w.stands(t, "shop", "by-id", "True", "Linked")
		w.unbind("shop", "by-id")
	})
	t.Run("unless neither or both ways to name the profile are used", func(t *testing.T) {
		for _, spec := range []string{"serviceAccountName: web", "serviceAccountName: web, profileName: a, profileID: Profile-1", "profileName: a", "serviceAccountName: a/b, profileName: a"} {
			y := "apiVersion: iam.tabard.dev/v1alpha1\nkind: TrustedProfileBinding\nmetadata: {namespace: shop, name: bad}\nspec: {" + spec + "}\n"
			if out, err := w.k.TryKubectl(y, "apply", "-f", "-"); err == nil {
				t.Errorf("%s: accepted: %s", spec, out)
			}
		}
	})
	t.Run("once the service account is there, and no longer than that", func(t *testing.T) {
		w.bind("shop", "late", "late", "shop-reader")
		if m := w.stands(t, "shop", "late", "False", "ServiceAccountNotFound"); !strings.Contains(m, "kubectl create serviceaccount") {
			t.Error(m)
		}
		w.hasLinks(t, "shop-reader")
		w.k.ServiceAccount("shop", "late", nil)
		w.stands(t, "shop", "late", "True", "Linked")
		w.k.DeleteServiceAccount("shop", "late")
		w.stands(t, "shop", "late", "False", "ServiceAccountNotFound")
		w.hasLinks(t, "shop-reader")
		w.unbind("shop", "late")
	})
	t.Run("once the profile is there, and a new one of that name after it", func(t *testing.T) {
		w.bind("shop", "soon", "web", "shop-soon")
		if m := w.stands(t, "shop", "soon", "False", "ProfileNotFound"); !strings.Contains(m, "trusted-profile-create") {
			t.Error(m)
		}
		w.profile("shop-soon")
		w.stands(t, "shop", "soon", "True", "Linked")
		old := w.profileID("shop-soon")
		w.CLI("iam", "trusted-profile-delete", "shop-soon", "-f")
		w.stands(t, "shop", "soon", "False", "ProfileNotFound")
		w.profile("shop-soon")
		w.stands(t, "shop", "soon", "True", "Linked")
		if s, _ := w.get("shop", "soon"); s.Status.ProfileID == old || s.Status.ProfileID != w.profileID("shop-soon") {
			t.Errorf("the status names the profile %s", s.Status.ProfileID)
		}
		w.unbind("shop", "soon")
	})
	t.Run("and moves the link when it is changed", func(t *testing.T) {
		w.profile("backup")
		w.bind("shop", "moving", "web", "shop-reader")
		w.stands(t, "shop", "moving", "True", "Linked")
		w.bind("shop", "moving", "other", "shop-reader")
		w.until(t, "the other service account", func() bool { return slices.Equal(w.links("shop-reader"), []string{"tpb:shop/moving shop/other"}) })
		w.k.Kubectl("patch", "tpb", "-n", "shop", "moving", "--type=merge", "-p", `{"spec":{"profileName":"backup"}}`)
		w.until(t, "the other profile", func() bool { return slices.Equal(w.links("backup"), []string{"tpb:shop/moving shop/other"}) })
		w.hasLinks(t, "shop-reader")
		w.unbind("shop", "moving")
		w.hasLinks(t, "backup")
	})
	t.Run("and makes a link again that somebody deleted", func(t *testing.T) {
		w.bind("shop", "again", "web", "shop-reader")
		w.stands(t, "shop", "again", "True", "Linked")
		s, _ := w.get("shop", "again")
		w.CLI("iam", "trusted-profile-link-delete", "shop-reader", s.Status.LinkID, "-f")
		w.until(t, "the link", func() bool { return len(w.links("shop-reader")) == 1 })
		w.unbind("shop", "again")
	})
	t.Run("and leaves alone a link that a person has made", func(t *testing.T) {
		w.linkByHand("shop-reader", "shop", "web")
		w.bind("shop", "second", "web", "shop-reader")
		if m := w.stands(t, "shop", "second", "True", "LinkExists"); !strings.Contains(m, "somebody else") {
			t.Error(m)
		}
		w.unbind("shop", "second")
		w.hasLinks(t, "shop-reader", "by hand shop/web")
		var links []struct{ ID string }
		w.JSON(&links, "iam", "trusted-profile-links", "shop-reader")
		w.CLI("iam", "trusted-profile-link-delete", "shop-reader", links[0].ID, "-f")
	})
	t.Run("of two bindings for the same pair the second takes over", func(t *testing.T) {
		w.bind("shop", "one", "web", "shop-reader")
		w.stands(t, "shop", "one", "True", "Linked")
		w.bind("shop", "two", "web", "shop-reader")
		if m := w.stands(t, "shop", "two", "True", "LinkExists"); !strings.Contains(m, "shop/one") {
			t.Error(m)
		}
		w.unbind("shop", "one")
		w.stands(t, "shop", "two", "True", "Linked")
		w.hasLinks(t, "shop-reader", "tpb:shop/two shop/web")
		w.unbind("shop", "two")
	})
	t.Run("as long as the namespace's annotation allows the profile", func(t *testing.T) {
		w.bind("shop", "withdrawn", "web", "shop-reader")
		w.stands(t, "shop", "withdrawn", "True", "Linked")
		w.allow("shop", "backup")
		w.stands(t, "shop", "withdrawn", "False", "NotAllowed")
		if w.admits("shop", "web", "shop-reader") {
			t.Error("still admitted")
		}
		w.allow("shop", "shop-*")
		w.stands(t, "shop", "withdrawn", "True", "Linked")
		w.CLI("iam", "trusted-profile-update", "shop-reader", "--name", "renamed")
		w.until(t, "a profile of another name is let go", func() bool { return len(w.links("renamed")) == 0 })
		w.CLI("iam", "trusted-profile-update", "renamed", "--name", "shop-reader")
		w.stands(t, "shop", "withdrawn", "True", "Linked")
		w.unbind("shop", "withdrawn")
	})
	t.Run("and says which role the controller lacks", func(t *testing.T) {
		for _, d := range []struct{ role, service, left string }{
			{"Editor", "iam-identity", "Viewer"},
			{"Viewer", "containers-kubernetes", ""},
		} {
			w.forbidController(d.service)
			if d.left != "" {
				w.CLI("iam", "trusted-profile-policy-create", "tabard-controller", "--roles", d.left, "--service-name", d.service)
			}
			w.bind("shop", "powerless", "web", "shop-reader")
			w.until(t, "the role is named", func() bool {
				s, _ := w.get("shop", "powerless")
				c := s.Status.Conditions
				return len(c) == 1 && c[0].Status != "True" && c[0].Reason == "Forbidden" && strings.Contains(c[0].Message, "--roles "+d.role+" --service-name "+d.service)
			})
			w.CLI("iam", "trusted-profile-policy-create", "tabard-controller", "--roles", d.role, "--service-name", d.service)
			w.stands(t, "shop", "powerless", "True", "Linked")
			w.unbind("shop", "powerless")
		}
	})
	t.Run("with no more than a policy on the profile itself", func(t *testing.T) {
		w.forbidController("iam-identity")
		var p struct{ ID string }
		w.JSON(&p, "iam", "trusted-profile", "shop-reader")
		w.CLI("iam", "trusted-profile-policy-create", "tabard-controller", "--roles", "Editor", "--service-name", "iam-identity", "--resource-type", "profile", "--resource", p.ID)
		w.bind("shop", "narrow", "web", "shop-reader")
		w.stands(t, "shop", "narrow", "True", "Linked")
		w.unbind("shop", "narrow")
		w.CLI("iam", "trusted-profile-policy-create", "tabard-controller", "--roles", "Editor", "--service-name", "iam-identity")
	})
	t.Run("and goes on when the server was away", func(t *testing.T) {
		w.bind("shop", "before", "web", "shop-reader")
		w.stands(t, "shop", "before", "True", "Linked")
		w.Kill()
		w.bind("shop", "during", "other", "shop-reader")
		w.stands(t, "shop", "during", "Unknown", "TabardUnavailable")
		w.stands(t, "shop", "before", "Unknown", "TabardUnavailable")
		w.k.Kubectl("delete", "tpb", "-n", "shop", "before", "--wait=false")
		w.until(t, "the deletion waits", func() bool {
			s, ok := w.get("shop", "before")
			return ok && len(s.Status.Conditions) == 1 && strings.Contains(s.Status.Conditions[0].Message, "being deleted")
		})
		w.Launch()
		w.stands(t, "shop", "during", "True", "Linked")
		w.until(t, "the deleted one is gone", func() bool { _, ok := w.get("shop", "before"); return !ok })
		w.hasLinks(t, "shop-reader", "tpb:shop/during shop/other")
		w.unbind("shop", "during")
	})
	if out := r.log.String(); strings.Contains(out, "eyJ") {
		t.Error("a token stands in the controller's log")
	}
	r.Stop()
	t.Run("and says that the cluster is not registered", func(t *testing.T) {
		other := w.controller(t, "--cluster", "another")
		w.bind("shop", "nowhere", "web", "shop-reader")
		if m := w.stands(t, "shop", "nowhere", "False", "ClusterNotRegistered"); !strings.Contains(m, "cluster-register another") {
			t.Error(m)
		}
		w.unbind("shop", "nowhere")
		other.Stop()
	})
}

func TestWhoMayBindInANamespaceGetsNoMoreThanItAllows(t *testing.T) {
	w := newBindings(t)
	w.controller(t)
	w.profile("shop-reader", "admin", "billing-reader")
	w.namespace("shop", "shop-*", "web", "tenant")
	w.namespace("billing", "billing-*", "web")
	w.namespace("bare", "", "web")
	w.namespace("open", "*", "web")
	w.k.Kubectl("create", "rolebinding", "tenant", "-n", "shop", "--clusterrole=tabard-bindings-edit", "--serviceaccount=shop:tenant")
	tenant := func(stdin string, args ...string) (string, error) {
		return w.k.TryKubectl(stdin, append(args, "--kubeconfig", w.k.KubeconfigFor("shop", "tenant"))...)
	}
	apply := func(t *testing.T, namespace, name, account, profile string) {
		t.Helper()
		if _, err := tenant(bindingYAML(namespace, name, account, profile), "apply", "-f", "-"); err != nil {
			t.Fatal(err)
		}
	}

	t.Run("a profile that is not named, by name or by ID", func(t *testing.T) {
		apply(t, "shop", "by-name", "web", "admin")
		if m := w.stands(t, "shop", "by-name", "False", "NotAllowed"); !strings.Contains(m, "iam.tabard.dev/allowed-profiles") {
			t.Error(m)
		}
		apply(t, "shop", "by-id", "web", w.profileID("admin"))
		if m := w.stands(t, "shop", "by-id", "False", "NotAllowed"); strings.Contains(m, `"admin"`) {
			t.Errorf("the name of a profile is told to who may not bind it: %s", m)
		}
		w.hasLinks(t, "admin")
	})
	t.Run("anything, where nothing is allowed", func(t *testing.T) {
		w.bind("bare", "web", "web", "shop-reader")
		if m := w.stands(t, "bare", "web", "False", "NotAllowed"); !strings.Contains(m, "kubectl annotate namespace bare") {
			t.Error(m)
		}
		w.hasLinks(t, "shop-reader")
	})
	t.Run("the controller's own profile, where everything is allowed", func(t *testing.T) {
		w.bind("open", "web", "web", "tabard-controller")
		w.stands(t, "open", "web", "False", "NotAllowed")
		w.hasLinks(t, "tabard-controller", "by hand tabard-system/tabard-controller")
	})
	t.Run("rights over the namespace's annotation, other namespaces or the status", func(t *testing.T) {
		for _, args := range [][]string{
			{"annotate", "namespace", "shop", "--overwrite", "iam.tabard.dev/allowed-profiles=*"},
			{"patch", "tpb", "-n", "shop", "by-name", "--subresource=status", "--type=merge", "-p", `{"status":{"profileID":"Profile-1"}}`},
			{"get", "tpb", "-n", "billing"},
		} {
			if out, err := tenant("", args...); err == nil {
				t.Errorf("%v: %s", args, out)
			}
		}
		if _, err := tenant(bindingYAML("billing", "mine", "web", "billing-reader"), "apply", "-f", "-"); err == nil {
			t.Error("a binding in another namespace is admitted")
		}
	})
	t.Run("somebody else's link, by a binding that looks like his", func(t *testing.T) {
		w.bind("billing", "web", "web", "billing-reader")
		w.stands(t, "billing", "web", "True", "Linked")
		w.linkByHand("shop-reader", "shop", "web")
		victim, _ := w.get("billing", "web")
		// The status is what the controller goes by to find the link. A cluster's
		// administrator could have written this; a tenant cannot.
		apply(t, "shop", "web", "web", "shop-reader")
		w.stands(t, "shop", "web", "True", "LinkExists")
		w.k.Kubectl("patch", "tpb", "-n", "shop", "web", "--subresource=status", "--type=merge", "-p",
			fmt.Sprintf(`{"status":{"profileID":%q,"linkID":%q}}`, victim.Status.ProfileID, victim.Status.LinkID))
		if _, err := tenant("", "delete", "tpb", "-n", "shop", "web", "--timeout=90s"); err != nil {
			t.Fatal(err)
		}
		w.hasLinks(t, "billing-reader", "tpb:billing/web billing/web")
		w.hasLinks(t, "shop-reader", "by hand shop/web")
		if s, _ := w.get("billing", "web"); s.Status.LinkID != victim.Status.LinkID {
			t.Error("the link has been made anew")
		}
	})
	t.Run("a link that outlives its binding, by taking the finalizer off", func(t *testing.T) {
		w.k.ServiceAccount("shop", "sly", nil)
		apply(t, "shop", "sly", "sly", "shop-reader")
		w.stands(t, "shop", "sly", "True", "Linked")
		w.Kill() // so that the controller cannot do it in time
		if _, err := tenant("", "delete", "tpb", "-n", "shop", "sly", "--wait=false"); err != nil {
			t.Fatal(err)
		}
		if _, err := tenant("", "patch", "tpb", "-n", "shop", "sly", "--type=merge", "-p", `{"metadata":{"finalizers":null}}`); err != nil {
			t.Fatal(err)
		}
		w.until(t, "the binding is gone", func() bool { _, ok := w.get("shop", "sly"); return !ok })
		w.Launch()
		w.until(t, "the link is gone", func() bool { return slices.Equal(w.links("shop-reader"), []string{"by hand shop/web"}) })
	})
}

func TestControllersThatDieLeaveNoLinkTwiceAndNoneBehind(t *testing.T) {
	w := newBindings(t)
	w.profile("shop-reader")
	w.namespace("shop", "shop-*")
	const n = 30
	var all strings.Builder
	for i := range n {
		w.k.ServiceAccount("shop", fmt.Sprintf("a%02d", i), nil)
		all.WriteString(bindingYAML("shop", fmt.Sprintf("b%02d", i), fmt.Sprintf("a%02d", i), "shop-reader") + "---\n")
	}
	w.k.Apply(all.String())
	linked := func() []string { return w.links("shop-reader") }
	// Each one is killed once it has made some of the links.
	for _, after := range []int{1, 8, 15} {
		r := w.controller(t, "--lease-duration", "3s")
		w.until(t, "some links", func() bool { return len(linked()) >= after })
		r.Kill()
	}
	r := w.controller(t, "--lease-duration", "3s")
	want := []string{}
	for i := range n {
		w.stands(t, "shop", fmt.Sprintf("b%02d", i), "True", "Linked")
		want = append(want, fmt.Sprintf("tpb:shop/b%02d shop/a%02d", i, i))
	}
	w.hasLinks(t, "shop-reader", want...)

	r.Kill()
	w.k.Kubectl("delete", "tpb", "-n", "shop", "b00", "b01", "--wait=false")
	w.k.Kubectl("delete", "tpb", "-n", "shop", "b02", "--wait=false")
	w.k.Kubectl("patch", "tpb", "-n", "shop", "b02", "--type=merge", "-p", `{"metadata":{"finalizers":null}}`)
	w.until(t, "one is gone without the controller", func() bool { _, ok := w.get("shop", "b02"); return !ok })
	first := w.controller(t)
	w.until(t, "what was deleted meanwhile", func() bool { return slices.Equal(linked(), want[3:]) })
	if _, ok := w.get("shop", "b00"); ok {
		t.Error("a deleted binding is still there")
	}

	second := w.controller(t)
	leads := func(r *controllerRun) bool { return r.metric(t, "tabard_controller_leader 1") }
	w.until(t, "the second waits", func() bool { return second.metric(t, "tabard_controller_leader 0") })
	w.until(t, "the second is ready", func() bool {
		resp, err := http.Get("http://" + second.Metrics + "/readyz")
		if err != nil {
			return false
		}
		resp.Body.Close()
		return resp.StatusCode == http.StatusOK
	})
	if !leads(first) || leads(second) {
		t.Fatal("not exactly the first one leads")
	}
	first.Stop()
	lease := func() string {
		return w.k.Kubectl("get", "lease", "-n", "tabard-system", "tabard-controller", "-o", "jsonpath={.spec.holderIdentity}")
	}
	w.until(t, "the second leads", func() bool { return leads(second) && lease() != "" })
	w.k.ServiceAccount("shop", "heir", nil)
	w.bind("shop", "heir", "heir", "shop-reader")
	w.stands(t, "shop", "heir", "True", "Linked")
	second.Stop()
	if holder := lease(); holder != "" {
		t.Errorf("the lease is kept by %s, who has ended", holder)
	}
}

func TestALinkIsOfTheTypeThatTheClusterIsOf(t *testing.T) {
	w := newBindingsOf(t, "ROKS_SA")
	w.profile("shop-reader")
	w.namespace("shop", "*", "web")
	w.controller(t)
	w.bind("shop", "web", "web", "shop-reader")
	w.stands(t, "shop", "web", "True", "Linked")
	var links []struct {
		Type string `json:"cr_type"`
	}
	if w.JSON(&links, "iam", "trusted-profile-links", "shop-reader"); len(links) != 1 || links[0].Type != "ROKS_SA" {
		t.Errorf("the links are %+v", links)
	}
	if !w.admits("shop", "web", "shop-reader") {
		t.Error("the service account is not admitted")
	}
}

// A machine that pauses takes its controller along, which then wakes up in the
// middle of what it was about to do.
func TestAControllerThatWasPausedDoesNotUndoWhatItsSuccessorDid(t *testing.T) {
	w := newBindings(t)
	w.profile("shop-reader")
	w.namespace("shop", "shop-*")
	const n = 30
	bindAll := func() {
		var all strings.Builder
		for i := range n {
			all.WriteString(bindingYAML("shop", fmt.Sprintf("b%02d", i), fmt.Sprintf("a%02d", i), "shop-reader") + "---\n")
		}
		w.k.Apply(all.String())
	}
	want := []string{}
	for i := range n {
		w.k.ServiceAccount("shop", fmt.Sprintf("a%02d", i), nil)
		want = append(want, fmt.Sprintf("tpb:shop/b%02d shop/a%02d", i, i))
	}
	bindAll()
	first := w.controller(t, "--lease-duration", "3s")
	w.until(t, "all links", func() bool { return slices.Equal(w.links("shop-reader"), want) })

	// The first is stopped while it takes the links away again.
	w.k.Kubectl("delete", "tpb", "-n", "shop", "--all", "--wait=false")
	w.until(t, "some links are gone", func() bool { return len(w.links("shop-reader")) < n })
	if err := first.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	second := w.controller(t, "--lease-duration", "3s")
	w.until(t, "the second leads", func() bool { return second.metric(t, "tabard_controller_leader 1") })
	w.until(t, "all bindings are gone", func() bool {
		return w.k.Kubectl("get", "tpb", "-n", "shop", "-o", "name") == ""
	})
	bindAll()
	for i := range n {
		w.stands(t, "shop", fmt.Sprintf("b%02d", i), "True", "Linked")
	}
	made := w.linked()
	if err := first.cmd.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	w.until(t, "the first knows that it leads no more", func() bool { return first.metric(t, "tabard_controller_leader 0") })
	w.until(t, "it waits for its turn", func() bool {
		resp, err := http.Get("http://" + first.Metrics + "/readyz")
		if err != nil {
			return false
		}
		resp.Body.Close()
		return resp.StatusCode == http.StatusOK
	})
	if !second.metric(t, "tabard_controller_leader 1") {
		t.Error("the second leads no more")
	}
	if now := w.linked(); !slices.Equal(now, made) || len(now) != n {
		t.Errorf("the links were\n%q\nand are\n%q", made, now)
	}
}

// linked are the ids of the links to shop-reader.
func (w *bindings) linked() []string {
	w.t.Helper()
	var links []struct{ ID string }
	w.JSON(&links, "iam", "trusted-profile-links", "shop-reader")
	ids := []string{}
	for _, l := range links {
		ids = append(ids, l.ID)
	}
	slices.Sort(ids)
	return ids
}
