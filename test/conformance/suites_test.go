package conformance

import (
	"net/http"
	"testing"

	"github.com/google/uuid"

	"tabard.dev/tabard/test/harness"
)

// suite is one of the module's packages (reference/iam-identity.md section 7).
type suite struct {
	name     string
	title    string // of the service
	env      string // file beside the package that the suite reads its settings from
	prefixes []string
	required int // specs that have to pass

	// settings are what the suite reads beside the service's URL and
	// credentials, under the first prefix.
	settings func(*installation) map[string]string

	// retake, where set, decides specs that no run can pass because they
	// build on excluded ones.
	retake *retake
}

// retake is a second, shorter run on a server of its own, in which the proxy
// stands in for what is excluded.
type retake struct {
	focus   string   // ginkgo's pattern for the specs to run
	specs   []string // whose outcome counts
	note    string   // what a reader of the table has to know
	standIn func(next http.Handler) http.Handler
}

var suites = []suite{
	{
		name: "iamidentityv1", title: "IAM Identity", env: "iam_identity.env", prefixes: []string{"IAM_IDENTITY"}, required: 79,
		settings: func(in *installation) map[string]string {
			return map[string]string{
				"ACCOUNT_ID": in.account, "IAM_ID": in.iamID,
				"ENTERPRISE_ACCOUNT_ID": in.account, "ENTERPRISE_SUBACCOUNT_ID": in.otherAccount,
			}
		},
	},
	{
		name: "iampolicymanagementv1", title: "IAM Policy Management", env: "iam_policy_management.env", prefixes: []string{"IAM_POLICY_MANAGEMENT"}, required: 18,
		settings: func(in *installation) map[string]string {
			return map[string]string{"TEST_ACCOUNT_ID": in.account, "TEST_TARGET_ACCOUNT_ID": in.otherAccount}
		},
	},
	{
		name: "iamaccessgroupsv2", title: "IAM Access Groups", env: "iam_access_groups_v2.env", prefixes: []string{"IAM_ACCESS_GROUPS"}, required: 21,
		settings: func(in *installation) map[string]string {
			return map[string]string{
				"TEST_ACCOUNT_ID": in.account, "TEST_ACCOUNT_GROUP_ID": uuid.NewString(),
				"TEST_POLICY_TEMPLATE_ID": "policyTemplate-" + uuid.NewString(),
			}
		},
	},
	{
		name: "resourcecontrollerv2", title: "Resource Controller", env: "resource_controller.env", prefixes: []string{"RESOURCE_CONTROLLER"}, required: 35,
		settings: func(in *installation) map[string]string {
			return map[string]string{
				"ACCOUNT_ID": in.account, "RESOURCE_GROUP": in.resourceGroup(),
				"PLAN_ID": in.plan(false), "RECLAMATION_PLAN_ID": in.plan(true),
				// Cloud Foundry's, in the names of aliases and bindings only.
				"ORGANIZATION_GUID": uuid.NewString(), "SPACE_GUID": uuid.NewString(), "APPLICATION_GUID": uuid.NewString(),
			}
		},
		// Both specs are about two keys of one instance: its own, and one that
		// an excluded spec makes for an alias of it.
		retake: &retake{
			focus: `load the configuration|ResourceControllerV2 service instances| (00|06|18|24|34|35) - `,
			specs: []string{
				"Resource Controller - Integration Tests Delete All Resources 34 - Delete Resource Keys",
				"Resource Controller - Integration Tests Delete All Resources 35 - Verify Resource Keys Were Deleted",
			},
			note:    "Specs 34 and 35 delete a key of an alias among others: there the runner stands in for the alias, and the server has the keys.",
			standIn: withAliases,
		},
	},
	{
		name: "resourcemanagerv2", title: "Resource Manager", env: "resource_manager.env", prefixes: []string{"RESOURCE_MANAGER", "ALT_RESOURCE_MANAGER"}, required: 9,
		settings: func(in *installation) map[string]string {
			return map[string]string{"QUOTA_ID": in.quota(), "USER_ACCOUNT_ID": in.account}
		},
	},
}

// installation is a server as a suite sees it.
type installation struct {
	t      testing.TB
	server *harness.Server
	proxy  *proxy // before it

	account, iamID, apiKey string
	otherAccount           string
}

// install starts a server behind a proxy that records into rec.
func install(t testing.TB, rec *recorder, standIn func(http.Handler) http.Handler) *installation {
	t.Helper()
	proxy := newProxy(t, rec, standIn)
	// The server's links in answers lead through the proxy too.
	s := harness.Start(t, "--driver", "none", "--url", proxy.url)
	proxy.to(s.URL)
	s.Login()
	return &installation{
		t: t, server: s, proxy: proxy,
		account: s.Owner.AccountID, iamID: s.Owner.IAMID, apiKey: s.Owner.APIKey,
		otherAccount: otherAccount(t, s),
	}
}

// otherAccount makes a second account: that which templates are assigned to.
func otherAccount(t testing.TB, s *harness.Server) string {
	t.Helper()
	a := s.Do(http.MethodPost, "/v1/accounts", s.OwnerToken(), map[string]any{
		"name": "Other", "owner": map[string]string{"email": "owner@other.example"},
	})
	id := a.Field("metadata", "guid")
	if a.Status != http.StatusCreated || id == "" {
		t.Fatalf("make a second account: %d %s", a.Status, a.Body)
	}
	return id
}

func (in *installation) resourceGroup() string {
	in.t.Helper()
	var groups []struct {
		ID      string `json:"id"`
		Default bool   `json:"default"`
	}
	in.server.JSON(&groups, "resource", "groups")
	for _, g := range groups {
		if g.Default {
			return g.ID
		}
	}
	in.t.Fatalf("no default resource group in %v", groups)
	return ""
}

// plan is a plan whose instances are reclaimed when they are deleted, or one
// whose instances just go.
func (in *installation) plan(reclaimed bool) string {
	in.t.Helper()
	var plans []struct {
		ID          string `json:"id"`
		Reclamation bool   `json:"reclamation"`
	}
	in.server.JSON(&plans, "resource", "plans")
	for _, p := range plans {
		if p.Reclamation == reclaimed {
			return p.ID
		}
	}
	in.t.Fatalf("no plan with reclamation %v in %v", reclaimed, plans)
	return ""
}

func (in *installation) quota() string {
	in.t.Helper()
	a := in.server.Do(http.MethodGet, "/v2/quota_definitions", in.server.OwnerToken(), nil)
	id := a.Field("resources", "0", "_id")
	if id == "" {
		id = a.Field("resources", "0", "id")
	}
	if id == "" {
		in.t.Fatalf("no quota definition: %d %s", a.Status, a.Body)
	}
	return id
}
