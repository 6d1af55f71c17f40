package accessuse_test

import (
	"context"
	"fmt"
	"net/url"
	"strings"
	"testing"
	"time"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api/accessuse"
	"tabard.dev/tabard/internal/api/apitest"
	"tabard.dev/tabard/internal/api/iamidentity"
	"tabard.dev/tabard/internal/api/iampolicy"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/usage"
)

// env is an installation with a profile.
type env struct {
	*apitest.Env
	profile string // its IAM ID
}

func newEnv(t *testing.T) *env {
	t.Helper()
	e := apitest.New(t)
	accessuse.Register(e.Mux, e.Config)
	iampolicy.Register(e.Mux, e.Config)
	iamidentity.Register(e.Mux, e.Config, e.Sealer)
	made := e.Do(apitest.Request{Method: "POST", Path: "/v1/profiles", Body: map[string]any{"name": "shop", "account_id": e.Owner.AccountID}}).Want(201)
	return &env{e, made["iam_id"].(string)}
}

func (e *env) uses(query string) []map[string]any {
	e.T.Helper()
	return objects(e.Do(apitest.Request{Path: "/v1/access_use?" + query}).Want(200)["uses"])
}

func objects(v any) []map[string]any {
	var out []map[string]any
	for _, item := range v.([]any) {
		out = append(out, item.(map[string]any))
	}
	return out
}

func (e *env) advice(query string) map[string]any {
	e.T.Helper()
	return e.Do(apitest.Request{Path: "/v1/access_recommendation?iam_id=" + e.profile + query}).Want(200)
}

// policyOf returns the id of the profile's one policy.
func (e *env) policyOf(iamID string) string {
	e.T.Helper()
	all := e.Config.Directory.PoliciesOfSubject.Get(directory.Key(e.Owner.AccountID, iamID))
	if len(all) != 1 {
		e.T.Fatalf("%d policies", len(all))
	}
	return all[0].ID
}

func TestUseIsShownByWhomThroughWhatAndHowOften(t *testing.T) {
	e := newEnv(t)
	e.Grant(e.profile, "iam-identity", "Viewer")
	for range 3 {
		e.Do(apitest.Request{Path: "/v1/profiles?account_id=" + e.Owner.AccountID, As: e.profile}).Want(200)
	}
	uses := e.uses("iam_id=" + e.profile)
	if len(uses) != 1 {
		t.Fatalf("%v", uses)
	}
	u := uses[0]
	if u["policy_id"] != e.policyOf(e.profile) || u["policy_state"] != "active" || u["service_name"] != "iam-identity" || u["action"] != "iam-identity.profile.get" ||
		u["count"] != 3.0 || u["days"] != 1.0 || u["last_at"] == "" {
		t.Errorf("%v", u)
	}
	// The owner's own use is there as well, and each filter finds what it names.
	all := len(e.uses(""))
	if all < 3 {
		t.Errorf("%d records in all", all)
	}
	for query, want := range map[string]int{
		"policy_id=" + e.policyOf(e.profile): 1, "policy_id=" + e.policyOf(e.profile) + "&action=x": 0, "action=iam-identity.profile.get&iam_id=" + e.profile: 1,
		"action=iam-identity.profile.create": 1, "iam_id=iam-Profile-nobody": 0,
	} {
		if got := e.uses(query); len(got) != want {
			t.Errorf("%s: %v", query, got)
		}
	}
	// Page by page, the same.
	path, seen := "/v1/access_use?limit=1", 0
	for range 20 {
		page := e.Do(apitest.Request{Path: path}).Want(200)
		seen += len(objects(page["uses"]))
		next, ok := page["next"].(map[string]any)
		if !ok {
			break
		}
		path = "/v1/access_use?start=" + url.QueryEscape(next["start"].(string))
	}
	if seen < all {
		t.Errorf("%d on the pages, %d in one", seen, all)
	}
	// last_permit_at of the policy tells the same.
	p := e.Do(apitest.Request{Path: "/v2/policies/" + e.policyOf(e.profile) + "?format=include_last_permit"}).Want(200)
	if p["last_permit_frequency"] != 3.0 {
		t.Errorf("%v", p)
	}
}

func TestWhatWasNeverUsedIsShown(t *testing.T) {
	e := newEnv(t)
	e.Grant(e.profile, "iam-identity", "Viewer")
	e.Do(apitest.Request{Path: "/v1/profiles?account_id=" + e.Owner.AccountID, As: e.profile}).Want(200)
	found := map[string]bool{}
	for _, u := range e.uses("unused=true&limit=1000&iam_id=" + e.profile) {
		found[u["action"].(string)] = true
		if u["count"] != 0.0 {
			t.Errorf("%v", u)
		}
	}
	if !found["iam-identity.serviceid.get"] || found["iam-identity.profile.get"] {
		t.Errorf("%v", found)
	}
	e.Do(apitest.Request{Path: "/v1/access_use?unused=true"}).Want(400)
}

// A poll that finds nothing is use: when there is something again, it must see
// it.
func TestAListThatIsEmptyIsUse(t *testing.T) {
	e := newEnv(t)
	e.Grant(e.profile, "iam-identity", "Viewer")
	e.Do(apitest.Request{Path: "/v1/serviceids?account_id=" + e.Owner.AccountID, As: e.profile}).Want(200)
	u := e.uses("iam_id=" + e.profile)
	if len(u) != 1 || u[0]["action"] != "iam-identity.serviceid.get" || u[0]["count"] != 1.0 {
		t.Fatalf("%v", u)
	}
	if n, _ := e.Usage.Of(e.policyOf(e.profile)); n != 0 {
		t.Errorf("it counts as %d permits", n)
	}
}

func TestARecommendationCanBeAppliedAndTheUseGoesOn(t *testing.T) {
	e := newEnv(t)
	e.Grant(e.profile, "iam-identity", "Administrator")
	work := func() {
		t.Helper()
		e.Do(apitest.Request{Path: "/v1/profiles?account_id=" + e.Owner.AccountID, As: e.profile}).Want(200)
		e.Do(apitest.Request{Path: "/v1/profiles/" + strings.TrimPrefix(e.profile, "iam-"), As: e.profile}).Want(200)
	}
	work()
	r := e.advice("")
	a := objects(r["policies"])[0]
	if a["verdict"] != access.Undecided || r["window_days"] != 90.0 {
		t.Errorf("a policy that is new: %v", a)
	}
	for _, custom := range []string{"", "&custom_role=true"} {
		changes := objects(e.advice(custom)["changes"])
		for _, c := range changes {
			switch c["change"] {
			case "create_role":
				e.Do(apitest.Request{Method: "POST", Path: "/v2/roles", Body: c["role"]}).Want(201)
			case "replace_policy":
				e.Do(apitest.Request{Method: "PUT", Path: "/v2/policies/" + c["policy_id"].(string), Body: c["policy"], Header: map[string]string{"If-Match": "*"}}).Want(200)
			default:
				t.Fatalf("%v", c)
			}
		}
		if len(changes) == 0 {
			t.Fatalf("%q: no changes", custom)
		}
		work()
		e.Do(apitest.Request{Method: "POST", Path: "/v1/serviceids", As: e.profile, Body: map[string]any{"name": "new" + custom, "account_id": e.Owner.AccountID}}).Want(403)
	}
	if again := objects(e.advice("&custom_role=true")["changes"]); len(again) != 0 {
		t.Errorf("there is still something to do: %v", again)
	}
}

func TestPoliciesOfGroupsAreTold(t *testing.T) {
	e := newEnv(t)
	d := e.Config.Directory
	if err := d.Update(context.Background(), "test", func(tx *directory.Tx) error {
		d.Groups.Put(tx, &access.Group{ID: "AccessGroupId-1", AccountID: e.Owner.AccountID, Name: "viewers", Members: []access.Member{{IAMID: e.profile}}})
		d.Policies.Put(tx, &access.Policy{
			ID: "of-the-group", AccountID: e.Owner.AccountID, API: 2, Type: access.TypeAccess, State: access.Active,
			Subject:  []access.Attribute{{Key: access.AccessGroupID, Operator: access.StringEquals, Value: access.Text("AccessGroupId-1")}},
			Resource: []access.Attribute{{Key: access.ServiceName, Operator: access.StringEquals, Value: access.Text("iam-identity")}, {Key: access.AccountID, Operator: access.StringEquals, Value: access.Text(e.Owner.AccountID)}},
			Roles:    []string{access.PlatformRoleCRN("Viewer")},
		})
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	e.Do(apitest.Request{Path: "/v1/profiles?account_id=" + e.Owner.AccountID, As: e.profile}).Want(200)
	r := e.advice("")
	groups := objects(r["group_policies"])
	if len(groups) != 1 || groups[0]["access_group_id"] != "AccessGroupId-1" || groups[0]["verdict"] != nil || len(groups[0]["used"].([]any)) != 1 || len(r["changes"].([]any)) != 0 {
		t.Errorf("%v", r)
	}
}

func TestUseAndAdviceNeedTheRightToInsights(t *testing.T) {
	e := newEnv(t)
	e.Grant("iam-ServiceId-viewer", "iam-access-management", "Viewer")
	e.Grant("iam-ServiceId-editor", "iam-access-management", "Editor")
	e.Grant(e.profile, "iam-identity", "Administrator")
	for _, path := range []string{"/v1/access_use", "/v1/access_use?iam_id=" + e.profile, "/v1/access_recommendation?iam_id=" + e.profile} {
		e.Do(apitest.Request{Path: path, As: "iam-ServiceId-viewer"}).Want(403)
		e.Do(apitest.Request{Path: path, As: e.profile}).Want(403)
		e.Do(apitest.Request{Path: path, Anonymous: true}).Want(401)
		e.Do(apitest.Request{Path: path, As: "iam-ServiceId-editor"}).Want(200)
	}
}

// Whoever is asked about in another account is not there, and neither is his
// use, also not behind a start value of one's own making.
func TestAnotherAccountSeesNothing(t *testing.T) {
	e := newEnv(t)
	e.Grant(e.profile, "iam-identity", "Viewer")
	e.Do(apitest.Request{Path: "/v1/profiles?account_id=" + e.Owner.AccountID, As: e.profile}).Want(200)
	page := e.Do(apitest.Request{Path: "/v1/access_use?limit=1"}).Want(200)
	start := page["next"].(map[string]any)["start"].(string)
	for _, path := range []string{
		"/v1/access_use", "/v1/access_use?iam_id=" + e.profile, "/v1/access_use?policy_id=" + e.policyOf(e.profile), "/v1/access_use?unused=true&iam_id=" + e.profile,
		"/v1/access_use?start=" + url.QueryEscape(start),
	} {
		for _, u := range objects(e.Do(apitest.Request{Path: path, As: e.Other.IAMID}).Want(200)["uses"]) {
			if u["iam_id"] != e.Other.IAMID {
				t.Errorf("%s shows %v", path, u)
			}
		}
	}
	for _, id := range []string{e.profile, e.Owner.IAMID, "iam-Profile-nobody", "crn-crn:v1:x", "nonsense"} {
		e.Do(apitest.Request{Path: "/v1/access_recommendation?iam_id=" + id, As: e.Other.IAMID}).Want(404)
	}
}

func TestParametersOfInsightsAreHeldToTheirForm(t *testing.T) {
	e := newEnv(t)
	for _, query := range []string{
		"access_use?limit=0", "access_use?limit=1001", "access_use?start=x", "access_use?unused=perhaps&iam_id=" + e.profile,
		"access_recommendation", "access_recommendation?window_days=0&iam_id=" + e.profile, "access_recommendation?window_days=449&iam_id=" + e.profile,
		"access_recommendation?custom_role=2&iam_id=" + e.profile,
	} {
		e.Do(apitest.Request{Path: "/v1/" + query}).Want(400)
	}
	e.Do(apitest.Request{Path: "/v1/access_recommendation?iam_id=" + strings.Repeat("a", 5000)}).Want(404)
}

func TestWhatFoundNoRoomIsTold(t *testing.T) {
	e := newEnv(t)
	e.Grant(e.profile, "iam-identity", "Administrator")
	p := &access.Policy{ID: "p", AccountID: e.Owner.AccountID}
	for i := range usage.MaxUsesPerSubject + 7 {
		e.Usage.Use(access.Request{Subject: e.profile, Action: "iam.policy.read", Time: time.Now(), Resource: map[string]string{access.ServiceName: fmt.Sprint("s", i)}}, p, usage.Once)
	}
	page := e.Do(apitest.Request{Path: "/v1/access_use?limit=1&iam_id=" + e.profile}).Want(200)
	if m := objects(page["missed"]); len(m) != 1 || m[0]["count"] != 7.0 {
		t.Errorf("%v", page["missed"])
	}
	r := e.advice("")
	if r["missed"] != 7.0 || objects(r["policies"])[0]["verdict"] != access.Undecided {
		t.Errorf("%v", r)
	}
}
