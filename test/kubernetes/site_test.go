// Package kubernetes plays workloads of real Kubernetes clusters against the
// built server: nothing in it imitates either side.
package kubernetes

import (
	"encoding/json"
	"maps"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	authzv1 "k8s.io/api/authorization/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"tabard.dev/tabard/test/harness"
	"tabard.dev/tabard/test/kubetest"
)

type object = map[string]any

const (
	grantCRToken = "urn:ibm:params:oauth:grant-type:cr-token"
	loginAction  = "iam-identity.computeresource-token.login"
)

// patience bounds the waits for what happens within seconds on an idle machine.
const patience = 90 * time.Second

// site is a running server as one of its accounts sees it.
type site struct {
	*harness.Server
}

// newSite starts a server and logs the command line in as its owner.
func newSite(t testing.TB, args ...string) *site {
	t.Helper()
	s := &site{harness.Start(t, append([]string{"--driver", "none"}, args...)...)}
	s.Login()
	return s
}

// account makes another account and returns the site as its owner sees it.
func (s *site) account(name string) *site {
	s.T.Helper()
	file := filepath.Join(s.T.TempDir(), "owner.json")
	s.CLI("account-create", name, "--owner-email", name+"@example.com", "--file", file)
	b, err := os.ReadFile(file)
	if err != nil {
		s.T.Fatal(err)
	}
	other := *s.Server
	if err := json.Unmarshal(b, &other.Owner); err != nil {
		s.T.Fatal(err)
	}
	other.Home = filepath.Join(s.T.TempDir(), "home")
	other.CLI("login", "-a", s.URL, "--apikey", "@"+file)
	return &site{&other}
}

// registered is a cluster as the server answers it.
type registered struct {
	ID  string `json:"id"`
	CRN string `json:"crn"`
}

// register registers a cluster with an API request.
func (s *site) register(name string, body object) registered {
	s.T.Helper()
	a := s.tryRegister(name, body)
	var r registered
	if err := json.Unmarshal(a.Body, &r); a.Status != http.StatusCreated || err != nil {
		s.T.Fatalf("register %s: %d %s", name, a.Status, a.Body)
	}
	return r
}

func (s *site) tryRegister(name string, body object) harness.Answer {
	s.T.Helper()
	body = maps.Clone(body)
	body["name"] = name
	return s.Do(http.MethodPost, "/v1/clusters", s.OwnerToken(), body)
}

// uploaded registers a cluster by its keys: the server never calls it.
func uploaded(c *kubetest.Cluster) object {
	return object{"issuer": c.Issuer, "jwks": json.RawMessage(c.JWKS())}
}

// discovered registers a cluster whose discovery document is open to anybody.
func discovered(c *kubetest.Cluster) object {
	return object{"issuer": c.Issuer, "ca": authority(c)}
}

// reached registers a cluster whose API server is called with the reviewer's
// token.
func reached(c *kubetest.Cluster, review bool) object {
	return object{
		"issuer": c.Issuer, "review": review,
		"server": object{"url": c.URL, "ca": authority(c), "token": reviewerToken},
	}
}

func authority(c *kubetest.Cluster) string {
	c.T.Helper()
	b, err := os.ReadFile(c.CAFile)
	if err != nil {
		c.T.Fatal(err)
	}
	return string(b)
}

// reviewerToken is the credential of the user "reviewer". It is not a
// service-account token, so that it outlives the keys that those are signed with.
const reviewerToken = "reviewer-of-the-test"

// withReviewer is the option that makes the reviewer; allowReviewer gives it
// its rights.
func withReviewer(o kubetest.Options) kubetest.Options {
	o.Users = append(o.Users, reviewerToken+",reviewer,reviewer")
	return o
}

// reviewerRoles are the roles of the reviewer, by the names of their bindings.
func reviewerRoles() map[string]string {
	return map[string]string{"reviewer-may-review": "system:auth-delegator", "reviewer-may-discover": "system:service-account-issuer-discovery"}
}

func allowReviewer(c *kubetest.Cluster) {
	c.T.Helper()
	for name, role := range reviewerRoles() {
		_, err := c.Client().RbacV1().ClusterRoleBindings().Create(c.T.Context(), &rbacv1.ClusterRoleBinding{
			ObjectMeta: metav1.ObjectMeta{Name: name},
			RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: role},
			Subjects:   []rbacv1.Subject{{APIGroup: rbacv1.GroupName, Kind: rbacv1.UserKind, Name: "reviewer"}},
		}, metav1.CreateOptions{})
		if err != nil {
			c.T.Fatal(err)
		}
	}
}

func forbidReviewer(c *kubetest.Cluster) {
	c.T.Helper()
	for name := range reviewerRoles() {
		if err := c.Client().RbacV1().ClusterRoleBindings().Delete(c.T.Context(), name, metav1.DeleteOptions{}); err != nil {
			c.T.Fatal(err)
		}
	}
}

// mayReview asks the API server whether the reviewer has the right to review
// tokens.
func mayReview(c *kubetest.Cluster) bool {
	c.T.Helper()
	r, err := c.Client().AuthorizationV1().SubjectAccessReviews().Create(c.T.Context(), &authzv1.SubjectAccessReview{
		Spec: authzv1.SubjectAccessReviewSpec{User: "reviewer", ResourceAttributes: &authzv1.ResourceAttributes{
			Group: "authentication.k8s.io", Resource: "tokenreviews", Verb: "create",
		}},
	}, metav1.CreateOptions{})
	if err != nil {
		c.T.Fatal(err)
	}
	return r.Status.Allowed
}

// resources creates two resources and a profile for each name that may see one
// of them, "store".
func (s *site) resources(profiles ...string) {
	s.T.Helper()
	s.CLI("resource", "service-instance-create", "store", "cloud-object-storage", "standard", "us-south")
	s.CLI("resource", "service-instance-create", "keys", "kms", "tiered-pricing", "us-south")
	for _, p := range profiles {
		s.CLI("iam", "trusted-profile-create", p)
		s.CLI("iam", "trusted-profile-policy-create", p, "--roles", "Viewer", "--service-name", "cloud-object-storage")
	}
}

// link links a profile to a service account of a cluster.
func (s *site) link(profile string, c registered, ns, sa string) {
	s.T.Helper()
	s.CLI("iam", "trusted-profile-link-create", profile, "--name", ns+"-"+sa, "--cr-type", "IKS_SA",
		"--link-crn", c.CRN, "--link-namespace", ns, "--link-name", sa)
}

// ruled creates a profile with one rule. Conditions are claim and value in
// turns; all must be equal.
func (s *site) ruled(profile string, conditions ...string) {
	s.T.Helper()
	s.CLI("iam", "trusted-profile-create", profile)
	args := []string{"iam", "trusted-profile-rule-create", profile, "--name", "rule", "--type", "Profile-CR", "--cr-type", "IKS_SA"}
	for i := 0; i+1 < len(conditions); i += 2 {
		args = append(args, "--conditions", "claim:"+conditions[i]+",operator:EQUALS,value:"+conditions[i+1])
	}
	s.CLI(args...)
}

// exchange exchanges a token as a workload does.
func (s *site) exchange(token, profile string, header ...string) harness.Answer {
	s.T.Helper()
	return s.Do(http.MethodPost, "/identity/token", "",
		url.Values{"grant_type": {grantCRToken}, "cr_token": {token}, "profile_name": {profile}}, header...)
}

// admitted fails the test unless the exchange succeeds, and returns the token.
func (s *site) admitted(t testing.TB, token, profile string) string {
	t.Helper()
	a := s.exchange(token, profile)
	if a.Status != http.StatusOK {
		t.Fatalf("profile %s: %d %s", profile, a.Status, a.Body)
	}
	return a.Field("access_token")
}

// refused fails the test unless the exchange is refused with the code, and the
// account's activity log explains that it was this check that failed.
func (s *site) refused(t testing.TB, token, profile, code, check string) harness.Answer {
	t.Helper()
	id := "txn-" + uuid.NewString()
	a := s.exchange(token, profile, "Transaction-Id", id)
	if a.Status != http.StatusBadRequest || a.Field("errorCode") != code {
		t.Fatalf("profile %s: %d %s, want 400 %s", profile, a.Status, a.Body, code)
	}
	s.explains(t, id, check)
	return a
}

// explains fails the test unless the account's log says which check of a
// refused request failed, without showing a token. Where no link and no rule
// matches, both failed.
func (s *site) explains(t testing.TB, transaction, check string) {
	t.Helper()
	var x struct{ Events []harness.Event }
	s.JSON(&x, "activity", "explain", transaction)
	failed, found := []string{}, false
	for _, e := range x.Events {
		if e.Action != loginAction || e.Outcome != "failure" {
			continue
		}
		found = true
		for _, c := range e.Trace {
			if c.Outcome == "fail" {
				failed = append(failed, c.Check)
				if c.Hint == "" {
					t.Errorf("the failed check %s has no hint", c.Check)
				}
			}
		}
	}
	if !found {
		t.Fatalf("no failed login %s in the log", transaction)
	}
	if !slices.Contains(failed, check) {
		t.Errorf("the failed checks are %v, want %s", failed, check)
	}
	if raw, _ := json.Marshal(x); strings.Contains(string(raw), "eyJ") {
		t.Errorf("a token stands in the explanation: %s", raw)
	}
}

// exchangeByID exchanges a token for a profile of any account.
func exchangeByID(s *site, token, profileID string) harness.Answer {
	s.T.Helper()
	return s.Do(http.MethodPost, "/identity/token", "",
		url.Values{"grant_type": {grantCRToken}, "cr_token": {token}, "profile_id": {profileID}})
}

// names are the names of the resources that a token sees.
func (s *site) names(t testing.TB, token string) []string {
	t.Helper()
	a := s.Do(http.MethodGet, "/v2/resource_instances", token, nil)
	var list struct{ Resources []struct{ Name string } }
	if err := json.Unmarshal(a.Body, &list); a.Status != http.StatusOK || err != nil {
		t.Fatalf("%d %s", a.Status, a.Body)
	}
	names := []string{}
	for _, r := range list.Resources {
		names = append(names, r.Name)
	}
	slices.Sort(names)
	return names
}

// accountOf is the account of an access token.
func accountOf(t testing.TB, token string) string {
	t.Helper()
	account, _ := kubetest.Claims(t, token)["account"].(object)
	bss, _ := account["bss"].(string)
	return bss
}

// eventually waits for something that becomes true by itself.
func eventually(t testing.TB, what string, done func() bool) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for !done() {
		if time.Now().After(deadline) {
			t.Fatalf("not within %s: %s", patience, what)
		}
		time.Sleep(200 * time.Millisecond)
	}
}

// eventuallyRefused waits until a token that was good is refused.
func (s *site) eventuallyRefused(t testing.TB, token, profile, code, check string) {
	t.Helper()
	eventually(t, "the token is refused", func() bool {
		a := s.exchange(token, profile)
		if a.Status != http.StatusOK && a.Status != http.StatusBadRequest {
			t.Fatalf("%d %s", a.Status, a.Body)
		}
		return a.Status == http.StatusBadRequest
	})
	s.refused(t, token, profile, code, check)
}
