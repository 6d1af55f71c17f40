package iampolicy_test

import (
	"context"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api/apitest"
	"tabard.dev/tabard/internal/api/iampolicy"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/identity"
)

const (
	grantee  = "IBMid-GRANTEE"
	operator = "crn:v1:bluemix:public:iam::::role:Operator"
	viewer   = "crn:v1:bluemix:public:iam::::role:Viewer"
	admin    = "crn:v1:bluemix:public:iam::::role:Administrator"
	manager  = "crn:v1:bluemix:public:iam::::serviceRole:Manager"
)

type obj = map[string]any

func start(t *testing.T) *apitest.Env {
	t.Helper()
	e := apitest.New(t)
	iampolicy.Register(e.Mux, e.Config)
	return e
}

func stage(e *apitest.Env, f func(tx *directory.Tx, d *directory.Directory)) {
	e.T.Helper()
	d := e.Config.Directory
	if err := d.Update(context.Background(), e.Owner.IAMID, func(tx *directory.Tx) error { f(tx, d); return nil }); err != nil {
		e.T.Fatal(err)
	}
}

// op and eq build the attributes of a v2 resource block.
func op(key, operator string, value any) obj {
	return obj{"key": key, "operator": operator, "value": value}
}
func eq(key, value string) obj { return op(key, "stringEquals", value) }

// v2 is a policy in the owner's account for the grantee.
func v2(e *apitest.Env, role string, resource ...obj) obj {
	return obj{
		"type":     "access",
		"subject":  obj{"attributes": []obj{eq("iam_id", grantee)}},
		"resource": obj{"attributes": append(resource, eq("accountId", e.Owner.AccountID))},
		"control":  obj{"grant": obj{"roles": []obj{{"role_id": role}}}},
	}
}

// v1 is the same in the terms of version 1; pairs are names and values.
func v1(e *apitest.Env, role string, pairs ...string) obj {
	var attrs []obj
	for i := 0; i < len(pairs); i += 2 {
		attrs = append(attrs, obj{"name": pairs[i], "value": pairs[i+1]})
	}
	attrs = append(attrs, obj{"name": "accountId", "value": e.Owner.AccountID, "operator": "stringEquals"})
	return obj{
		"type":      "access",
		"subjects":  []obj{{"attributes": []obj{{"name": "iam_id", "value": grantee}}}},
		"roles":     []obj{{"role_id": role}},
		"resources": []obj{{"attributes": attrs}},
	}
}

func post(e *apitest.Env, version int, body any) *apitest.Response {
	e.T.Helper()
	return e.Do(apitest.Request{Method: "POST", Path: fmt.Sprintf("/v%d/policies", version), Body: body})
}

func create(e *apitest.Env, version int, body any) (id, etag string) {
	e.T.Helper()
	r := post(e, version, body)
	return r.Want(201)["id"].(string), r.Header.Get("ETag")
}

func code(body obj) any    { return body["errors"].([]any)[0].(obj)["code"] }
func message(body obj) any { return body["errors"].([]any)[0].(obj)["message"] }

// dig follows keys and indexes into a body.
func dig(v any, path ...any) any {
	for _, step := range path {
		switch s := step.(type) {
		case string:
			v = v.(obj)[s]
		case int:
			v = v.([]any)[s]
		}
	}
	return v
}

// grantOn gives an identity roles on a block, directly in the directory.
func grantOn(e *apitest.Env, iamID, role string, attrs ...access.Attribute) {
	e.T.Helper()
	account := access.Attribute{Key: access.AccountID, Operator: access.StringEquals, Value: access.Text(e.Owner.AccountID)}
	p := &access.Policy{
		ID: uuid.NewString(), AccountID: e.Owner.AccountID, API: 2, Type: access.TypeAccess, State: access.Active,
		Subject:  []access.Attribute{{Key: access.IAMID, Operator: access.StringEquals, Value: access.Text(iamID)}},
		Resource: append(attrs, account), Roles: []string{role},
	}
	stage(e, func(tx *directory.Tx, d *directory.Directory) { d.Policies.Put(tx, p) })
}

func attr(key string, o access.Operator, v access.Value) access.Attribute {
	return access.Attribute{Key: key, Operator: o, Value: v}
}

func TestPolicyWrittenInOneVersionIsSeenInBoth(t *testing.T) {
	for _, version := range []int{1, 2} {
		t.Run(fmt.Sprint("v", version), func(t *testing.T) {
			e := start(t)
			body := v1(e, operator, "serviceName", "is", "vpcId", "*")
			if version == 2 {
				body = v2(e, operator, eq("serviceName", "is"), op("vpcId", "stringExists", true))
			}
			id, etag := create(e, version, body)
			one := e.Do(apitest.Request{Path: "/v1/policies/" + id})
			two := e.Do(apitest.Request{Path: "/v2/policies/" + id})
			first, second := one.Want(200), two.Want(200)
			if one.Header.Get("ETag") != etag || two.Header.Get("ETag") != etag {
				t.Errorf("tags %q, %q and %q differ", etag, one.Header.Get("ETag"), two.Header.Get("ETag"))
			}
			href := fmt.Sprintf("http://tabard.test/v%d/policies/%s", version, id)
			if first["href"] != href || second["href"] != href {
				t.Errorf("hrefs %v and %v, want %s", first["href"], second["href"], href)
			}
			for _, got := range []obj{first, second} {
				if got["state"] != "active" || got["type"] != "access" || got["created_by_id"] != e.Owner.IAMID || got["last_modified_at"] == nil {
					t.Errorf("policy %v", got)
				}
			}
			want := fmt.Sprint([]any{
				obj{"name": "serviceName", "operator": "stringEquals", "value": "is"},
				obj{"name": "vpcId", "operator": "stringEquals", "value": "*"},
				obj{"name": "accountId", "operator": "stringEquals", "value": e.Owner.AccountID},
			})
			if got := fmt.Sprint(dig(first, "resources", 0, "attributes")); got != want {
				t.Errorf("v1 resource %s, want %s", got, want)
			}
			want = fmt.Sprint([]any{eq("serviceName", "is"), op("vpcId", "stringExists", true), eq("accountId", e.Owner.AccountID)})
			if got := fmt.Sprint(dig(second, "resource", "attributes")); got != want {
				t.Errorf("v2 resource %s, want %s", got, want)
			}
			if dig(first, "roles", 0, "display_name") != "Operator" || dig(first, "subjects", 0, "attributes", 0, "value") != grantee {
				t.Errorf("v1 %v", first)
			}
			if role := dig(second, "control", "grant", "roles", 0).(obj); role["role_id"] != operator || role["actions"] != nil {
				t.Errorf("v2 role %v", role)
			}
		})
	}
}

func TestVersion1ShowsAPlaceholderForWhatItHasNoWordsFor(t *testing.T) {
	e := start(t)
	for name, resource := range map[string][]obj{
		"any of":             {op("serviceName", "stringEqualsAnyOf", []string{"is", "kms"})},
		"match any of":       {eq("serviceName", "is"), op("region", "stringMatchAnyOf", []string{"us-*"})},
		"absence":            {eq("serviceName", "is"), op("region", "stringExists", false)},
		"a literal asterisk": {eq("serviceName", "is"), eq("region", "*")},
	} {
		t.Run(name, func(t *testing.T) {
			id, _ := create(e, 2, v2(e, viewer, resource...))
			got := e.Do(apitest.Request{Path: "/v1/policies/" + id}).Want(200)
			if dig(got, "subjects", 0, "attributes", 0, "value") != "unsupported version" ||
				!strings.HasSuffix(dig(got, "roles", 0, "role_id").(string), "role:UnsupportedVersion") ||
				dig(got, "roles", 0, "display_name") != "Unsupported Version" ||
				len(dig(got, "resources", 0, "attributes").([]any)) != 1 ||
				got["href"] != "http://tabard.test/v2/policies/"+id {
				t.Errorf("shown %v", got)
			}
			e.Do(apitest.Request{Method: "DELETE", Path: "/v1/policies/" + id}).Want(204)
		})
	}
}

func TestWrittenPolicyGrantsAtOnceAndADeletedOneNoLonger(t *testing.T) {
	e := start(t)
	allowed := func() bool {
		return access.Decide(e.Config.Directory, access.Request{
			Subject: grantee, AccountID: e.Owner.AccountID, Action: "is.instance.instance.list",
			Resource: map[string]string{"accountId": e.Owner.AccountID, "serviceName": "is", "vpcId": "v"},
		}).Allowed
	}
	id, _ := create(e, 1, v1(e, operator, "serviceName", "is", "vpcId", "*"))
	if !allowed() {
		t.Error("not allowed by the new policy")
	}
	e.Do(apitest.Request{Method: "DELETE", Path: "/v2/policies/" + id}).Want(204)
	if allowed() {
		t.Error("still allowed by the deleted policy")
	}
}

func TestReplaceNeedsTheCurrentEntityTag(t *testing.T) {
	e := start(t)
	id, etag := create(e, 1, v1(e, operator, "serviceName", "is"))
	put := func(tag string) *apitest.Response {
		return e.Do(apitest.Request{
			Method: "PUT", Path: "/v1/policies/" + id, Body: v1(e, viewer, "serviceName", "is"), Header: map[string]string{"If-Match": tag},
		})
	}
	if got := code(e.Do(apitest.Request{Method: "PUT", Path: "/v1/policies/" + id, Body: v1(e, viewer, "serviceName", "is")}).Want(400)); got != "invalid_body" {
		t.Errorf("code %v", got)
	}
	r := put(etag)
	if got := dig(r.Want(200), "roles", 0, "role_id"); got != viewer || r.Header.Get("ETag") == etag {
		t.Errorf("role %v, tag %s", got, r.Header.Get("ETag"))
	}
	stale := put(etag).Want(412)
	if code(stale) != "policy_conflict_error" || stale["status_code"] != 412.0 || stale["trace"] == "" {
		t.Errorf("answered %v", stale)
	}
	put("*").Want(200)
	e.Do(apitest.Request{Method: "DELETE", Path: "/v1/policies/" + id, Header: map[string]string{"If-Match": etag}}).Want(412)
}

func TestOnlyOneOfManyWritersWithTheSameTagSucceeds(t *testing.T) {
	e := start(t)
	id, etag := create(e, 2, v2(e, operator, eq("serviceName", "is")))
	got := make([]int, 8)
	var wg sync.WaitGroup
	for i := range got {
		wg.Go(func() {
			got[i] = e.Do(apitest.Request{
				Method: "PUT", Path: "/v2/policies/" + id, Header: map[string]string{"If-Match": etag},
				Body: v2(e, viewer, eq("serviceName", "is"), eq("region", fmt.Sprint("r", i))),
			}).Status
		})
	}
	wg.Wait()
	slices.Sort(got)
	if want := []int{200, 412, 412, 412, 412, 412, 412, 412}; !slices.Equal(got, want) {
		t.Errorf("statuses %v, want %v", got, want)
	}
}

func TestOnlyOneOfManyEqualPoliciesIsCreated(t *testing.T) {
	e := start(t)
	got := make([]int, 8)
	var wg sync.WaitGroup
	for i := range got {
		wg.Go(func() { got[i] = post(e, 1, v1(e, operator, "serviceName", "is")).Status })
	}
	wg.Wait()
	slices.Sort(got)
	if want := []int{201, 409, 409, 409, 409, 409, 409, 409}; !slices.Equal(got, want) {
		t.Errorf("statuses %v, want %v", got, want)
	}
}

func TestVersion2UpgradesAPolicyAndThereIsNoWayBack(t *testing.T) {
	e := start(t)
	id, etag := create(e, 1, v1(e, operator, "serviceName", "is"))
	r := e.Do(apitest.Request{Method: "PUT", Path: "/v2/policies/" + id, Body: v2(e, operator, eq("serviceName", "is")), Header: map[string]string{"If-Match": etag}})
	if got := r.Want(200)["href"]; got != "http://tabard.test/v2/policies/"+id {
		t.Errorf("href %v", got)
	}
	e.Do(apitest.Request{Method: "PUT", Path: "/v1/policies/" + id, Body: v1(e, viewer, "serviceName", "is"), Header: map[string]string{"If-Match": "*"}}).Want(400)
}

func TestSecondPolicyWithTheSameGrantConflicts(t *testing.T) {
	e := start(t)
	id, etag := create(e, 1, v1(e, operator, "serviceName", "is", "vpcId", "*"))
	body := post(e, 2, v2(e, operator, eq("serviceName", "is"), op("vpcId", "stringExists", true))).Want(409)
	if code(body) != "policy_conflict_error" || body["status_code"] != 409.0 {
		t.Errorf("answered %v", body)
	}
	with := dig(body, "errors", 0, "details", "conflicts_with").(obj)
	if with["etag"] != etag || with["role"] != operator || dig(with, "policy", "id") != id {
		t.Errorf("conflicts with %v", with)
	}
	other, _ := create(e, 2, v2(e, viewer, eq("serviceName", "is"), op("vpcId", "stringExists", true)))
	e.Do(apitest.Request{
		Method: "PUT", Path: "/v2/policies/" + other, Header: map[string]string{"If-Match": "*"},
		Body: v2(e, operator, eq("serviceName", "is"), op("vpcId", "stringExists", true)),
	}).Want(409)
	// A policy does not conflict with itself.
	e.Do(apitest.Request{
		Method: "PUT", Path: "/v1/policies/" + id, Header: map[string]string{"If-Match": "*"},
		Body: v1(e, operator, "serviceName", "is", "vpcId", "*"),
	}).Want(200)
}

func TestForeignCloudNamesInRolesAreReadAsOurs(t *testing.T) {
	e := start(t)
	body := post(e, 2, v2(e, "crn:v1:staging:public:iam::::role:Operator", eq("serviceName", "is"))).Want(201)
	if got := dig(body, "control", "grant", "roles", 0, "role_id"); got != operator {
		t.Errorf("role %v, want %s", got, operator)
	}
}

func TestBadPoliciesAreRefusedWith400(t *testing.T) {
	e := start(t)
	with := func(change obj) obj {
		body := v2(e, operator, eq("serviceName", "is"))
		for k, v := range change {
			body[k] = v
		}
		return body
	}
	subject := func(attrs ...obj) obj { return with(obj{"subject": obj{"attributes": attrs}}) }
	many := make([]obj, 101)
	for i := range many {
		many[i] = eq(fmt.Sprint("k", i), "v")
	}
	for name, body := range map[string]any{
		"empty":                     "",
		"no JSON":                   "type=access",
		"array":                     "[]",
		"null":                      "null",
		"two objects":               "{}{}",
		"no type":                   with(obj{"type": ""}),
		"authorization of a person": with(obj{"type": "authorization"}),
		"unknown type":              with(obj{"type": "deny"}),
		"no roles":                  with(obj{"control": obj{"grant": obj{"roles": []obj{}}}}),
		"control of wrong type":     with(obj{"control": "all"}),
		"unknown role":              v2(e, "crn:v1:bluemix:public:iam::::role:Root", eq("serviceName", "is")),
		"role that is not a CRN":    v2(e, "Operator", eq("serviceName", "is")),
		"role of another service":   v2(e, "crn:v1:bluemix:public:is::::serviceRole:ConsoleAdministrator", eq("serviceName", "kms")),
		"no subject":                with(obj{"subject": obj{}}),
		"two subjects":              subject(eq("iam_id", grantee), eq("access_group_id", "AccessGroupId-1")),
		"every subject":             subject(op("iam_id", "stringExists", true)),
		"subject pattern":           subject(op("iam_id", "stringMatch", "*")),
		"subject of another kind":   subject(eq("serviceName", "is")),
		"group named as an IAM ID":  subject(eq("iam_id", "AccessGroupId-5f0d4d3e-6a7b-4c8d-9e0f-112233445566")),
		"subject that is no IAM ID": subject(eq("iam_id", "grantee")),
		"separator in the subject":  subject(eq("iam_id", "IBMid-A\x00is")),
		"separator in the service":  v2(e, operator, eq("serviceName", "is\x00")),
		"separator in a list":       v2(e, operator, op("serviceName", "stringEqualsAnyOf", []string{"is\x00"})),
		"only the account":          v2(e, operator),
		"no account":                with(obj{"resource": obj{"attributes": []obj{eq("serviceName", "is")}}}),
		"any account":               with(obj{"resource": obj{"attributes": []obj{eq("serviceName", "is"), op("accountId", "stringExists", true)}}}),
		"pattern of accounts":       with(obj{"resource": obj{"attributes": []obj{eq("serviceName", "is"), op("accountId", "stringMatch", "*")}}}),
		"two accounts":              v2(e, operator, eq("serviceName", "is"), eq("accountId", e.Owner.AccountID)),
		"service and group":         v2(e, operator, eq("serviceName", "is"), eq("service_group_id", "IAM")),
		"unknown service type":      v2(e, operator, eq("serviceType", "any")),
		"attribute without key":     v2(e, operator, eq("serviceName", "is"), eq("", "x")),
		"attribute in v1 terms":     v2(e, operator, eq("serviceName", "is"), obj{"name": "region", "value": "us-south"}),
		"unknown operator":          v2(e, operator, op("serviceName", "stringNotEquals", "is")),
		"no operator":               v2(e, operator, obj{"key": "serviceName", "value": "is"}),
		"empty value":               v2(e, operator, eq("serviceName", "")),
		"no value":                  v2(e, operator, obj{"key": "serviceName", "operator": "stringEquals"}),
		"null value":                v2(e, operator, op("serviceName", "stringEquals", nil)),
		"number as value":           v2(e, operator, op("serviceName", "stringEquals", 1)),
		"long value":                v2(e, operator, eq("serviceName", strings.Repeat("x", 1001))),
		"boolean for equals":        v2(e, operator, op("serviceName", "stringEquals", true)),
		"text for exists":           v2(e, operator, eq("serviceName", "is"), op("region", "stringExists", "true")),
		"empty list":                v2(e, operator, op("serviceName", "stringEqualsAnyOf", []string{})),
		"long list":                 v2(e, operator, op("serviceName", "stringEqualsAnyOf", strings.Split("a,b,c,d,e,f,g,h,i,j,k", ","))),
		"many attributes":           v2(e, operator, append(many, eq("serviceName", "is"))...),
		"tag with exists":           with(obj{"resource": obj{"attributes": []obj{eq("serviceName", "is"), eq("accountId", e.Owner.AccountID)}, "tags": []obj{op("env", "stringExists", true)}}}),
		"long description":          with(obj{"description": strings.Repeat("x", 1001)}),
		"description with controls": with(obj{"description": "a\x07b"}),
	} {
		t.Run(name, func(t *testing.T) {
			if got := code(post(e, 2, body).Want(400)); got != "invalid_body" {
				t.Errorf("code %v", got)
			}
		})
	}
	for name, body := range map[string]any{
		"no resources":   obj{"type": "access", "subjects": []obj{{"attributes": []obj{{"name": "iam_id", "value": grantee}}}}, "roles": []obj{{"role_id": viewer}}},
		"v2 terms":       v2(e, operator, eq("serviceName", "is")),
		"v2 operator":    obj{"type": "access", "subjects": []obj{{}}, "resources": []obj{{"attributes": []obj{{"name": "region", "value": "x", "operator": "stringExists"}}}}},
		"any account":    v1(&apitest.Env{}, operator, "serviceName", "is"),
		"boolean value":  `{"type":"access","subjects":[{"attributes":[{"name":"iam_id","value":true}]}]}`,
		"two resources":  `{"type":"access","subjects":[{}],"resources":[{},{}]}`,
		"subject is any": `{"type":"access","subjects":[{"attributes":[{"name":"iam_id","value":"*"}]}],"resources":[{}]}`,
	} {
		t.Run("v1 "+name, func(t *testing.T) {
			post(e, 1, body).Want(400)
		})
	}
	if n := e.Config.Directory.PoliciesOfSubject.Len(directory.Key(e.Owner.AccountID, grantee)); n != 0 {
		t.Errorf("%d of the bad policies were stored", n)
	}
}

func TestAsteriskAsAccountIsNotEveryAccount(t *testing.T) {
	e := start(t)
	body := v1(e, operator, "serviceName", "is")
	body["resources"] = []obj{{"attributes": []obj{{"name": "serviceName", "value": "is"}, {"name": "accountId", "value": "*"}}}}
	post(e, 1, body).Want(400)
}

func TestSubjectMustExistInTheAccountWhereTheServerCanTell(t *testing.T) {
	e := start(t)
	mine, theirs := uuid.NewString(), uuid.NewString()
	stage(e, func(tx *directory.Tx, d *directory.Directory) {
		for id, account := range map[string]string{mine: e.Owner.AccountID, theirs: e.Other.AccountID} {
			d.Profiles.Put(tx, &identity.Profile{ID: "Profile-" + id, AccountID: account, Name: "p"})
			d.ServiceIDs.Put(tx, &identity.ServiceID{ID: "ServiceId-" + id, AccountID: account, Name: "s"})
			d.Groups.Put(tx, &access.Group{ID: "AccessGroupId-" + id, AccountID: account, Name: "g"})
		}
	})
	for _, kind := range []struct{ key, prefix string }{
		{"iam_id", "iam-Profile-"}, {"iam_id", "iam-ServiceId-"}, {"access_group_id", "AccessGroupId-"},
	} {
		body := func(id string) obj {
			b := v2(e, operator, eq("serviceName", "is"))
			b["subject"] = obj{"attributes": []obj{eq(kind.key, kind.prefix+id)}}
			return b
		}
		post(e, 2, body(mine)).Want(201)
		for _, id := range []string{theirs, uuid.NewString()} {
			if got := message(post(e, 2, body(id)).Want(400)).(string); !strings.Contains(got, "does not exist in the account") {
				t.Errorf("message %q", got)
			}
		}
	}
}

func TestPoliciesOfALockedServiceIDStayAsTheyAre(t *testing.T) {
	e := start(t)
	s := identity.ServiceID{ID: "ServiceId-" + uuid.NewString(), AccountID: e.Owner.AccountID, Name: "s"}
	stage(e, func(tx *directory.Tx, d *directory.Directory) { d.ServiceIDs.Put(tx, &s) })
	body := v2(e, operator, eq("serviceName", "is"))
	body["subject"] = obj{"attributes": []obj{eq("iam_id", "iam-"+s.ID)}}
	id, _ := create(e, 2, body)
	locked := s
	locked.Locked = true
	stage(e, func(tx *directory.Tx, d *directory.Directory) { d.ServiceIDs.Put(tx, &locked) })
	e.Do(apitest.Request{Method: "DELETE", Path: "/v2/policies/" + id}).Want(409)
	e.Do(apitest.Request{Method: "PUT", Path: "/v2/policies/" + id, Body: v2(e, operator, eq("serviceName", "is")), Header: map[string]string{"If-Match": "*"}}).Want(409)
	body["control"] = obj{"grant": obj{"roles": []obj{{"role_id": viewer}}}}
	post(e, 2, body).Want(409)
}

func TestASubjectHasAtMost1000Policies(t *testing.T) {
	e := start(t)
	stage(e, func(tx *directory.Tx, d *directory.Directory) {
		for i := range access.MaxPoliciesPerSubject {
			d.Policies.Put(tx, &access.Policy{
				ID: uuid.NewString(), AccountID: e.Owner.AccountID, API: 1, Type: access.TypeAccess, State: access.Active,
				Subject: []access.Attribute{attr(access.IAMID, access.StringEquals, access.Text(grantee))},
				Resource: []access.Attribute{
					attr(access.ServiceName, access.StringEquals, access.Text("is")),
					attr("vpcId", access.StringEquals, access.Text(fmt.Sprint(i))),
					attr(access.AccountID, access.StringEquals, access.Text(e.Owner.AccountID)),
				},
				Roles: []string{viewer},
			})
		}
	})
	if got := code(post(e, 1, v1(e, viewer, "serviceName", "kms")).Want(409)); got != "request_not_processed" {
		t.Errorf("code %v", got)
	}
}

func TestNobodyGrantsMoreThanHeAdministers(t *testing.T) {
	e := start(t)
	absent := false
	holders := map[string][]access.Attribute{
		"admin of is":            {attr("serviceName", access.StringEquals, access.Text("is"))},
		"admin of is.instance":   {attr("serviceName", access.StringEquals, access.Text("is.instance"))},
		"admin of one vpc":       {attr("serviceName", access.StringEquals, access.Text("is")), attr("vpcId", access.StringEquals, access.Text("v-1"))},
		"admin of us regions":    {attr("serviceName", access.StringEquals, access.Text("is")), attr("region", access.StringMatch, access.Text("us-*"))},
		"admin outside regions":  {attr("serviceName", access.StringEquals, access.Text("is")), attr("region", access.StringExists, access.Value{Exists: &absent})},
		"admin of a group":       {attr("resourceGroupId", access.StringEquals, access.Text("rg-1"))},
		"admin of all services":  {attr("serviceType", access.StringEquals, access.Text("service"))},
		"admin of the platform":  {attr("serviceType", access.StringEquals, access.Text("platform_service"))},
		"admin of IAM":           {attr("service_group_id", access.StringEquals, access.Text("IAM"))},
		"admin of iam-groups":    {attr("serviceName", access.StringEquals, access.Text("iam-groups"))},
		"admin of tagged things": {attr("serviceName", access.StringEquals, access.Text("is"))},
	}
	id := func(name string) string { return "IBMid-" + strings.ReplaceAll(name, " ", "") }
	for name, block := range holders {
		if name != "admin of tagged things" {
			grantOn(e, id(name), admin, block...)
		}
	}
	stage(e, func(tx *directory.Tx, d *directory.Directory) {
		d.Policies.Put(tx, &access.Policy{
			ID: uuid.NewString(), AccountID: e.Owner.AccountID, API: 1, Type: access.TypeAccess, State: access.Active,
			Subject: []access.Attribute{attr(access.IAMID, access.StringEquals, access.Text(id("admin of tagged things")))},
			Resource: append(holders["admin of tagged things"],
				attr(access.AccountID, access.StringEquals, access.Text(e.Owner.AccountID))),
			Tags:  []access.Attribute{attr("env", access.StringEquals, access.Text("test"))},
			Roles: []string{admin},
		})
	})
	e.Grant(id("operator of is"), "is", "Operator")
	e.Grant(id("editor of is"), "is", "Editor", "Manager")

	blocks := map[string][]obj{
		"is":                      {eq("serviceName", "is")},
		"is.instance":             {eq("serviceName", "is.instance")},
		"vpc v-1":                 {eq("serviceName", "is"), eq("vpcId", "v-1")},
		"vpc v-2":                 {eq("serviceName", "is"), eq("vpcId", "v-2")},
		"any vpc":                 {eq("serviceName", "is"), op("vpcId", "stringExists", true)},
		"vpc by pattern":          {eq("serviceName", "is"), op("vpcId", "stringMatch", "v-1*")},
		"vpc by list":             {eq("serviceName", "is"), op("vpcId", "stringEqualsAnyOf", []string{"v-1", "v-2"})},
		"region us-south":         {eq("serviceName", "is"), eq("region", "us-south")},
		"region by pattern":       {eq("serviceName", "is"), op("region", "stringMatch", "us-*")},
		"no region":               {eq("serviceName", "is"), op("region", "stringExists", false)},
		"kms":                     {eq("serviceName", "kms")},
		"kms posing as platform":  {eq("serviceName", "kms"), eq("serviceType", "platform_service")},
		"iam-identity":            {eq("serviceName", "iam-identity")},
		"iam-identity as service": {eq("serviceName", "iam-identity"), eq("serviceType", "service")},
		"services by pattern":     {op("serviceName", "stringMatch", "i*")},
		"services by list":        {op("serviceName", "stringEqualsAnyOf", []string{"is"})},
		"any service":             {op("serviceName", "stringExists", true)},
		"all services":            {eq("serviceType", "service")},
		"the platform":            {eq("serviceType", "platform_service")},
		"both types":              {op("serviceType", "stringExists", true)},
		"types by list":           {op("serviceType", "stringEqualsAnyOf", []string{"service"})},
		"IAM":                     {eq("service_group_id", "IAM")},
		"unknown group":           {eq("service_group_id", "other")},
		"resource group":          {eq("resourceGroupId", "rg-1")},
		"other resource group":    {eq("resourceGroupId", "rg-2")},
		"any resource group":      {op("resourceGroupId", "stringExists", true)},
		"group object":            {eq("resourceType", "resource-group"), eq("resource", "rg-1")},
		"is in the group":         {eq("serviceName", "is"), eq("resourceGroupId", "rg-1")},
		"services in the group":   {eq("serviceType", "service"), eq("resourceGroupId", "rg-1")},
	}
	// What each may write; everything else must be refused.
	ofIs := []string{"is", "is.instance", "vpc v-1", "vpc v-2", "any vpc", "vpc by pattern", "vpc by list",
		"region us-south", "region by pattern", "no region", "is in the group"}
	may := map[string][]string{
		"admin of is":            ofIs,
		"admin of is.instance":   {"is.instance"},
		"admin of one vpc":       {"vpc v-1"},
		"admin of us regions":    {"region us-south"},
		"admin outside regions":  {"no region"},
		"admin of a group":       {"resource group", "is in the group", "services in the group"},
		"admin of all services":  append([]string{"kms", "kms posing as platform", "all services", "services in the group"}, ofIs...),
		"admin of the platform":  {"iam-identity", "iam-identity as service", "the platform", "IAM"},
		"admin of IAM":           {"iam-identity", "iam-identity as service", "IAM"},
		"admin of iam-groups":    {},
		"admin of tagged things": {},
		"operator of is":         {},
		"editor of is":           {},
		"stranger":               {},
	}
	for who, allowed := range may {
		for what, block := range blocks {
			t.Run(who+" grants on "+what, func(t *testing.T) {
				r := e.Do(apitest.Request{Method: "POST", Path: "/v2/policies", Body: v2(e, admin, block...), As: id(who)})
				if !slices.Contains(allowed, what) {
					if got := code(r.Want(403)); got != "insufficent_permissions" {
						t.Errorf("code %v", got)
					}
					return
				}
				made := r.Want(201)["id"].(string)
				e.Do(apitest.Request{Method: "DELETE", Path: "/v2/policies/" + made, As: id(who)}).Want(204)
			})
		}
	}
	for what, block := range blocks {
		t.Run("the owner grants on "+what, func(t *testing.T) {
			post(e, 2, v2(e, admin, block...)).Want(201)
		})
	}
}

func TestAsteriskOfVersion1IsNoWayToAWiderGrant(t *testing.T) {
	e := start(t)
	grantOn(e, "IBMid-A", admin, attr("serviceName", access.StringEquals, access.Text("is")), attr("vpcId", access.StringEquals, access.Text("*")))
	grantOn(e, "IBMid-A", admin, attr("serviceName", access.StringEquals, access.Text("*")))
	for _, pairs := range [][]string{
		{"serviceName", "*"}, {"serviceName", "is", "vpcId", "*"}, {"serviceName", "is"}, {"serviceType", "*"}, {"resourceGroupId", "*"},
	} {
		e.Do(apitest.Request{Method: "POST", Path: "/v1/policies", Body: v1(e, admin, pairs...), As: "IBMid-A"}).Want(403)
	}
}

func TestTagsDoNotMakeAPolicyWritable(t *testing.T) {
	e := start(t)
	e.Grant("IBMid-A", "kms", "Administrator")
	body := v2(e, admin, eq("serviceName", "is"))
	body["resource"].(obj)["tags"] = []obj{eq("env", "test")}
	e.Do(apitest.Request{Method: "POST", Path: "/v2/policies", Body: body, As: "IBMid-A"}).Want(403)
	got := post(e, 2, body).Want(201)
	if dig(got, "resource", "tags", 0, "key") != "env" {
		t.Errorf("created %v", got)
	}
	one := e.Do(apitest.Request{Path: "/v1/policies/" + got["id"].(string)}).Want(200)
	if dig(one, "resources", 0, "tags", 0, "name") != "env" {
		t.Errorf("in v1 %v", one)
	}
}

func TestReplaceNeedsTheRightOnTheOldAndOnTheNewResource(t *testing.T) {
	e := start(t)
	e.Grant("IBMid-A", "is", "Administrator")
	onIs, _ := create(e, 2, v2(e, viewer, eq("serviceName", "is")))
	onKMS, _ := create(e, 2, v2(e, viewer, eq("serviceName", "kms")))
	put := func(id string, resource ...obj) *apitest.Response {
		return e.Do(apitest.Request{
			Method: "PUT", Path: "/v2/policies/" + id, Body: v2(e, admin, resource...), As: "IBMid-A", Header: map[string]string{"If-Match": "*"},
		})
	}
	put(onIs, eq("serviceName", "kms")).Want(403)
	put(onIs, eq("serviceType", "service")).Want(403)
	put(onIs, op("serviceName", "stringExists", true)).Want(403)
	put(onKMS, eq("serviceName", "is"), eq("vpcId", "v")).Want(403)
	put(onKMS, eq("serviceName", "kms")).Want(403)
	e.Do(apitest.Request{Method: "DELETE", Path: "/v2/policies/" + onKMS, As: "IBMid-A"}).Want(403)
	foreign := v2(e, admin, eq("serviceName", "is"))
	foreign["resource"] = obj{"attributes": []obj{eq("serviceName", "is"), eq("accountId", e.Other.AccountID)}}
	e.Do(apitest.Request{Method: "PUT", Path: "/v2/policies/" + onIs, Body: foreign, As: "IBMid-A", Header: map[string]string{"If-Match": "*"}}).Want(403)
	if got := e.Do(apitest.Request{Path: "/v2/policies/" + onIs}).Want(200); dig(got, "control", "grant", "roles", 0, "role_id") != viewer {
		t.Errorf("a refused replacement changed the policy: %v", got)
	}
	put(onIs, eq("serviceName", "is"), eq("vpcId", "v")).Want(200)
}

func TestOtherAccountsAreOutOfReach(t *testing.T) {
	e := start(t)
	id, etag := create(e, 2, v2(e, operator, eq("serviceName", "is")))
	for _, r := range []apitest.Request{
		{Path: "/v1/policies/" + id},
		{Path: "/v2/policies/" + id},
		{Method: "PUT", Path: "/v2/policies/" + id, Body: v2(e, admin, eq("serviceName", "is")), Header: map[string]string{"If-Match": etag}},
		{Method: "DELETE", Path: "/v1/policies/" + id},
		{Method: "DELETE", Path: "/v2/policies/" + id},
	} {
		r.As = e.Other.IAMID
		if body := e.Do(r).Want(404); code(body) != "policy_not_found" {
			t.Errorf("%s %s: %v", r.Method, r.Path, body)
		}
	}
	// A policy about somebody else's account, and one about an account that
	// does not exist, are refused alike.
	for _, account := range []string{e.Owner.AccountID, strings.Repeat("0", 32)} {
		body := v2(e, admin, eq("serviceName", "is"))
		body["resource"] = obj{"attributes": []obj{eq("serviceName", "is"), eq("accountId", account)}}
		got := e.Do(apitest.Request{Method: "POST", Path: "/v2/policies", Body: body, As: e.Other.IAMID}).Want(403)
		if code(got) != "insufficent_permissions" {
			t.Errorf("answered %v", got)
		}
		list := e.Do(apitest.Request{Path: "/v2/policies?account_id=" + account, As: e.Other.IAMID}).Want(200)
		if len(list["policies"].([]any)) != 0 {
			t.Errorf("listed %v", list)
		}
	}
}

func TestListShowsOnlyWhatTheCallerMayRead(t *testing.T) {
	e := start(t)
	create(e, 2, v2(e, viewer, eq("serviceName", "is")))
	create(e, 2, v2(e, viewer, eq("serviceName", "kms")))
	create(e, 2, v2(e, viewer, eq("resourceGroupId", "rg-1")))
	create(e, 2, v2(e, viewer, op("serviceName", "stringMatch", "i*")))
	e.Grant("IBMid-A", "is", "Viewer")
	list := func(who string) []any {
		return e.Do(apitest.Request{Path: "/v2/policies?account_id=" + e.Owner.AccountID + "&iam_id=" + grantee, As: who}).Want(200)["policies"].([]any)
	}
	if got := len(list(e.Owner.IAMID)); got != 4 {
		t.Errorf("the owner sees %d policies, want 4", got)
	}
	got := list("IBMid-A")
	if len(got) != 1 || dig(got, 0, "resource", "attributes", 0, "value") != "is" {
		t.Errorf("a viewer of is sees %v", got)
	}
	if got := list("IBMid-STRANGER"); got == nil || len(got) != 0 {
		t.Errorf("a stranger sees %v", got)
	}
	other, _ := create(e, 2, v2(e, operator, eq("serviceName", "kms")))
	e.Do(apitest.Request{Path: "/v2/policies/" + other, As: "IBMid-A"}).Want(403)
	e.Do(apitest.Request{Path: "/v2/policies/" + other, Anonymous: true}).Want(401)
}

func TestListIsFiltered(t *testing.T) {
	e := start(t)
	group := "AccessGroupId-" + uuid.NewString()
	stage(e, func(tx *directory.Tx, d *directory.Directory) {
		d.Groups.Put(tx, &access.Group{ID: group, AccountID: e.Owner.AccountID, Name: "g"})
	})
	create(e, 1, v1(e, viewer, "serviceName", "is"))
	create(e, 2, v2(e, viewer, eq("serviceType", "platform_service")))
	create(e, 2, v2(e, viewer, eq("service_group_id", "IAM")))
	tagged := v2(e, viewer, eq("serviceName", "kms"))
	tagged["subject"] = obj{"attributes": []obj{eq("access_group_id", group)}}
	tagged["resource"].(obj)["tags"] = []obj{eq("env", "test")}
	create(e, 2, tagged)
	for query, want := range map[string]int{
		"iam_id=" + grantee:                                    3,
		"iam_id=" + grantee + "&service_name=":                 3,
		"access_group_id=" + group:                             1,
		"iam_id=" + grantee + "&service_name=is":               1,
		"iam_id=" + grantee + "&service_type=service":          1,
		"iam_id=" + grantee + "&service_type=platform_service": 1,
		"iam_id=" + grantee + "&service_group_id=IAM":          1,
		"iam_id=" + grantee + "&type=access":                   3,
		"iam_id=" + grantee + "&type=authorization":            0,
		"iam_id=" + grantee + "&state=active":                  3,
		"iam_id=" + grantee + "&state=deleted":                 0,
		"tag_name=env&tag_value=test":                          1,
		"tag_name=env&tag_value=prod":                          0,
		"iam_id=IBMid-NOBODY":                                  0,
	} {
		for _, version := range []string{"/v1", "/v2"} {
			list := e.Do(apitest.Request{Path: version + "/policies?account_id=" + e.Owner.AccountID + "&" + query}).Want(200)
			if got := len(list["policies"].([]any)); got != want {
				t.Errorf("%s %s found %d, want %d", version, query, got, want)
			}
		}
	}
	if got := code(e.Do(apitest.Request{Path: "/v2/policies"}).Want(400)); got != "missing_required_query_parameter" {
		t.Errorf("code %v", got)
	}
	for _, query := range []string{"type=x", "state=x", "service_type=x", "sort=x", "format=x", "limit=0", "limit=x", "start=x", "start=bm8"} {
		e.Do(apitest.Request{Path: "/v2/policies?account_id=" + e.Owner.AccountID + "&" + query}).Want(400)
	}
}

func TestPagesCoverTheListOnceInEitherOrder(t *testing.T) {
	e := start(t)
	for i := range 7 {
		create(e, 1, v1(e, viewer, "serviceName", "is", "vpcId", fmt.Sprint(i)))
	}
	base := "/v1/policies?account_id=" + e.Owner.AccountID + "&iam_id=" + grantee
	whole := e.Do(apitest.Request{Path: base}).Want(200)
	if got := len(whole["policies"].([]any)); got != 7 || whole["next"] != nil {
		t.Errorf("without a limit there are %d policies and next %v", got, whole["next"])
	}
	for _, sort := range []string{"created_at", "-created_at", "id", "-last_modified_at", "state"} {
		seen := map[any]bool{}
		var order []string
		path, pages := base+"&limit=3&sort="+sort, 0
		for path != "" {
			page := e.Do(apitest.Request{Path: path}).Want(200)
			for _, p := range page["policies"].([]any) {
				seen[dig(p, "id")] = true
				order = append(order, dig(p, "resources", 0, "attributes", 1, "value").(string))
			}
			path = ""
			if next, ok := page["next"].(obj); ok {
				u, err := url.Parse(next["href"].(string))
				if err != nil || u.Query().Get("start") != next["start"] {
					t.Fatalf("next is %v", next)
				}
				path = u.RequestURI()
			}
			if pages++; pages > 5 {
				t.Fatal("the list does not end")
			}
		}
		if len(seen) != 7 || len(order) != 7 || pages != 3 {
			t.Errorf("sorted by %s: %d different policies of %d on %d pages", sort, len(seen), len(order), pages)
		}
		if got, want := strings.Join(order, ""), map[string]string{"created_at": "0123456", "-created_at": "6543210"}[sort]; want != "" && got != want {
			t.Errorf("sorted by %s: %s, want %s", sort, got, want)
		}
	}
}

func TestDisplayFormatTellsWhatTheRolesAllow(t *testing.T) {
	e := start(t)
	id, _ := create(e, 2, v2(e, operator, eq("serviceName", "is")))
	for _, path := range []string{"/v2/policies/" + id + "?format=display", "/v2/policies?account_id=" + e.Owner.AccountID + "&iam_id=" + grantee + "&format=display"} {
		body := e.Do(apitest.Request{Path: path}).Want(200)
		if list, ok := body["policies"]; ok {
			body = list.([]any)[0].(obj)
		}
		role := dig(body, "control", "grant", "roles", 0).(obj)
		if role["display_name"] != "Operator" || role["description"] == "" {
			t.Errorf("role %v", role)
		}
		if !slices.ContainsFunc(role["actions"].([]any), func(a any) bool { return dig(a, "id") == "is.instance.instance.operate" }) {
			t.Errorf("actions %v", role["actions"])
		}
	}
}

func TestRolesListHasTheRolesOfTheService(t *testing.T) {
	e := start(t)
	names := func(list any) string {
		var out []string
		for _, r := range list.([]any) {
			out = append(out, dig(r, "display_name").(string))
		}
		return strings.Join(out, ",")
	}
	const system = "Viewer,Operator,Editor,Administrator"
	for query, service := range map[string]string{
		"service_name=alliamserviceroles":                 "Reader,Writer,Manager,Decision Point",
		"service_name=nobody-knows-it":                    "Reader,Writer,Manager,Decision Point",
		"service_name=is":                                 "Console Administrator,IP Spoofing Operator,Manager,Reader,Writer,Decision Point",
		"service_name=resource-controller":                "Decision Point",
		"account_id=" + e.Owner.AccountID:                 "Reader,Writer,Manager,Decision Point",
		"service_name=kms&policy_type=access&account_id=": "KeyPurge,KmipAdapterManager,Manager,Reader,ReaderPlus,Writer,Decision Point",
	} {
		// A caller needs no rights for it.
		got := e.Do(apitest.Request{Path: "/v2/roles?" + query, As: "IBMid-STRANGER"}).Want(200)
		if names(got["system_roles"]) != system || names(got["service_roles"]) != service || len(got["custom_roles"].([]any)) != 0 {
			t.Errorf("%s: %s; %s; %v", query, names(got["system_roles"]), names(got["service_roles"]), got["custom_roles"])
		}
		for _, r := range append(got["system_roles"].([]any), got["service_roles"].([]any)...) {
			if dig(r, "crn") == "" || dig(r, "description") == "" || dig(r, "actions") == nil {
				t.Errorf("role %v", r)
			}
		}
	}
	is := e.Do(apitest.Request{Path: "/v2/roles?service_name=is"}).Want(200)
	if !slices.Contains(dig(is, "system_roles", 0, "actions").([]any), any("is.instance.instance.list")) {
		t.Error("Viewer of is does not list instances")
	}
	e.Do(apitest.Request{Path: "/v2/roles?service_name=is&service_group_id=IAM"}).Want(400)
	e.Do(apitest.Request{Path: "/v2/roles", Anonymous: true}).Want(401)
}

func TestEveryListedRoleCanBeGranted(t *testing.T) {
	e := start(t)
	for _, s := range e.Config.Directory.Builtin().Services() {
		roles := e.Do(apitest.Request{Path: "/v2/roles?service_name=" + s.Name}).Want(200)
		for _, r := range append(roles["system_roles"].([]any), roles["service_roles"].([]any)...) {
			post(e, 1, v1(e, dig(r, "crn").(string), "serviceName", s.Name)).Want(201)
		}
	}
	post(e, 1, v1(e, manager, "serviceName", "nobody-knows-it")).Want(201)
}

func TestChangesAreRecordedWithTheirValues(t *testing.T) {
	e := start(t)
	id, etag := create(e, 1, v1(e, operator, "serviceName", "is"))
	e.Do(apitest.Request{Method: "PUT", Path: "/v1/policies/" + id, Body: v1(e, viewer, "serviceName", "is"), Header: map[string]string{"If-Match": etag}}).Want(200)
	e.Do(apitest.Request{Method: "DELETE", Path: "/v1/policies/" + id, As: "IBMid-STRANGER"}).Want(403)
	e.Do(apitest.Request{Method: "DELETE", Path: "/v1/policies/" + id}).Want(204)
	events := e.Events(4)
	for i, want := range []struct{ action, outcome, severity string }{
		{"iam-am.policy.delete", "success", "critical"},
		{"iam-am.policy.delete", "failure", "critical"},
		{"iam-am.policy.update", "success", "warning"},
		{"iam-am.policy.create", "success", "warning"},
	} {
		got := events[i]
		if got.Action != want.action || got.Outcome != want.outcome || got.Severity != want.severity ||
			got.Target.TypeURI != "iam-am/policy" || !strings.HasSuffix(got.Target.ID, "::policy:"+id) {
			t.Errorf("event %d is %s %s %s %v, want %v", i, got.Action, got.Outcome, got.Severity, got.Target, want)
		}
		if want.outcome == "success" && (!strings.Contains(string(got.ResponseData), grantee) || !strings.Contains(string(got.ResponseData), `"roles"`)) {
			t.Errorf("event %d tells %s", i, got.ResponseData)
		}
	}
	if data := string(events[2].ResponseData); !strings.Contains(data, "role:Viewer") || !strings.Contains(data, "role:Operator") {
		t.Errorf("the replacement tells %s", data)
	}
	if len(events[1].Trace) == 0 {
		t.Error("the refusal has no trace")
	}
}
