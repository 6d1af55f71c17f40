package iampolicy_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api/apitest"
	"tabard.dev/tabard/internal/directory"
)

const (
	reader = "crn:v1:bluemix:public:iam::::serviceRole:Reader"
	writer = "crn:v1:bluemix:public:iam::::serviceRole:Writer"
)

// authorization lets the service cloud-object-storage in.
func authorization(e *apitest.Env, role string, resource ...obj) obj {
	body := v2(e, role, resource...)
	body["type"] = "authorization"
	body["subject"] = obj{"attributes": []obj{eq("serviceName", "cloud-object-storage"), eq("accountId", e.Owner.AccountID)}}
	return body
}

func TestAuthorizationWrittenInEitherVersionLetsAServiceIn(t *testing.T) {
	e := start(t)
	allowed := func(account string) bool {
		return access.Decide(e.Config.Directory, access.Request{
			Subject:   "crn-crn:v1:bluemix:public:cloud-object-storage:global:a/" + account + ":f2b9::",
			AccountID: account, Action: "kms.secrets.list",
			Resource: map[string]string{"accountId": e.Owner.AccountID, "serviceName": "kms"},
		}).Allowed
	}
	inV1 := obj{
		"type":      "authorization",
		"subjects":  []obj{{"attributes": []obj{{"name": "serviceName", "value": "cloud-object-storage"}, {"name": "accountId", "value": e.Owner.AccountID}}}},
		"roles":     []obj{{"role_id": reader}},
		"resources": []obj{{"attributes": []obj{{"name": "serviceName", "value": "kms"}, {"name": "accountId", "value": e.Owner.AccountID}}}},
	}
	for version, body := range map[int]obj{1: inV1, 2: authorization(e, reader, eq("serviceName", "kms"))} {
		if allowed(e.Owner.AccountID) {
			t.Fatal("allowed before")
		}
		id, _ := create(e, version, body)
		if !allowed(e.Owner.AccountID) || allowed(e.Other.AccountID) {
			t.Errorf("v%d: allowed from here %t, from elsewhere %t", version, allowed(e.Owner.AccountID), allowed(e.Other.AccountID))
		}
		one, two := e.Do(apitest.Request{Path: "/v1/policies/" + id}).Want(200), e.Do(apitest.Request{Path: "/v2/policies/" + id}).Want(200)
		if dig(one, "subjects", 0, "attributes", 0, "value") != "cloud-object-storage" || dig(two, "subject", "attributes", 1, "value") != e.Owner.AccountID {
			t.Errorf("shown %v and %v", one, two)
		}
		post(e, version, body).Want(409)
		found := e.Do(apitest.Request{Path: "/v2/policies?type=authorization&account_id=" + e.Owner.AccountID}).Want(200)["policies"].([]any)
		if len(found) != 1 {
			t.Errorf("listed %v", found)
		}
		e.Do(apitest.Request{Method: "DELETE", Path: "/v1/policies/" + id}).Want(204)
	}
}

func TestAuthorizationOfAResourceGroupIsReadInBothVersions(t *testing.T) {
	e := start(t)
	body := authorization(e, reader, eq("serviceName", "kms"))
	body["subject"] = obj{"attributes": []obj{op("resourceGroupId", "stringExists", true), eq("accountId", e.Other.AccountID)}}
	id, etag := create(e, 2, body)
	one := e.Do(apitest.Request{Path: "/v1/policies/" + id}).Want(200)
	if dig(one, "subjects", 0, "attributes", 0, "value") != "*" {
		t.Errorf("in v1 %v", one)
	}
	changed := authorization(e, writer, eq("serviceName", "kms"))
	e.Do(apitest.Request{Method: "PUT", Path: "/v2/policies/" + id, Body: changed, Header: map[string]string{"If-Match": etag}}).Want(200)
	e.Do(apitest.Request{Method: "PUT", Path: "/v2/policies/" + id, Body: v2(e, reader, eq("serviceName", "kms")), Header: map[string]string{"If-Match": "*"}}).Want(400)
}

func TestBadAuthorizationsAreRefusedWith400(t *testing.T) {
	e := start(t)
	subject := func(attrs ...obj) obj {
		body := authorization(e, reader, eq("serviceName", "kms"))
		body["subject"] = obj{"attributes": attrs}
		return body
	}
	account := eq("accountId", e.Owner.AccountID)
	timed := authorization(e, reader, eq("serviceName", "kms"))
	timed["pattern"], timed["rule"] = allDay, cond(dayOfWeek, "dayOfWeekEquals", "1+00:00")
	for name, body := range map[string]obj{
		"no subject":          subject(),
		"no account":          subject(eq("serviceName", "is")),
		"any account":         subject(eq("serviceName", "is"), op("accountId", "stringExists", true)),
		"accounts by pattern": subject(eq("serviceName", "is"), op("accountId", "stringMatch", "*")),
		"account alone":       subject(account),
		"services by pattern": subject(op("serviceName", "stringMatch", "*"), account),
		"a person":            subject(eq("iam_id", grantee)),
		"unknown attribute":   subject(eq("serviceName", "is"), account, eq("color", "red")),
		"rule":                timed,
		"delegator":           authorization(e, "crn:v1:bluemix:public:iam::::role:AuthorizationDelegator", eq("serviceName", "kms")),
	} {
		t.Run(name, func(t *testing.T) { post(e, 2, body).Want(400) })
	}
}

func TestNobodyLetsAServiceDoWhatHeMayNotDoHimself(t *testing.T) {
	e := start(t)
	// Administers kms, and reads it.
	e.Grant("IBMid-A", "kms", "Administrator", "Reader")
	as := func(who, role string, resource ...obj) *apitest.Response {
		return e.Do(apitest.Request{Method: "POST", Path: "/v2/policies", Body: authorization(e, role, resource...), As: who})
	}
	as("IBMid-A", reader, eq("serviceName", "kms")).Want(201)
	as("IBMid-A", viewer, eq("serviceName", "kms"), eq("serviceInstance", "i")).Want(201)
	for _, role := range []string{writer, manager, "crn:v1:bluemix:public:kms::::serviceRole:KeyPurge"} {
		if got := message(as("IBMid-A", role, eq("serviceName", "kms")).Want(403)).(string); !strings.Contains(got, "needs the roles himself") {
			t.Errorf("message %q", got)
		}
	}
	as("IBMid-A", reader, eq("serviceName", "is")).Want(403)
	as("IBMid-A", reader, eq("serviceType", "service")).Want(403)
	// Reading without administering does not do, nor administering a part.
	e.Grant("IBMid-B", "kms", "Reader", "Writer")
	as("IBMid-B", reader, eq("serviceName", "kms")).Want(403)
	grantOn(e, "IBMid-C", admin, attr("serviceName", access.StringEquals, access.Text("kms")))
	grantOn(e, "IBMid-C", reader, attr("serviceName", access.StringEquals, access.Text("kms")), attr("region", access.StringEquals, access.Text("eu-de")))
	as("IBMid-C", reader, eq("serviceName", "kms")).Want(403)
	id := as("IBMid-C", reader, eq("serviceName", "kms"), eq("region", "eu-de")).Want(201)["id"].(string)
	e.Do(apitest.Request{
		Method: "PUT", Path: "/v2/policies/" + id, Body: authorization(e, writer, eq("serviceName", "kms"), eq("region", "eu-de")),
		As: "IBMid-C", Header: map[string]string{"If-Match": "*"},
	}).Want(403)
	e.Do(apitest.Request{Method: "DELETE", Path: "/v2/policies/" + id, As: "IBMid-C"}).Want(204)
	e.Do(apitest.Request{Method: "PATCH", Path: "/v1/policies/" + id, Body: obj{"state": "active"}, As: "IBMid-C", Header: map[string]string{"If-Match": "*"}}).Want(200)
	// Roles held through an access group count.
	group := "AccessGroupId-" + uuid.NewString()
	stage(e, func(tx *directory.Tx, d *directory.Directory) {
		d.Groups.Put(tx, &access.Group{ID: group, AccountID: e.Owner.AccountID, Name: "g", Members: []access.Member{{IAMID: "IBMid-D", Type: "user"}}})
	})
	e.Grant("IBMid-D", "kms", "Administrator")
	body := v2(e, writer, eq("serviceName", "kms"))
	body["subject"] = obj{"attributes": []obj{eq("access_group_id", group)}}
	post(e, 2, body).Want(201)
	as("IBMid-D", writer, eq("serviceName", "kms"), eq("serviceInstance", "d")).Want(201)
	as("IBMid-D", manager, eq("serviceName", "kms"), eq("serviceInstance", "d")).Want(403)
}

func TestOwnerCanWriteEveryAuthorization(t *testing.T) {
	e := start(t)
	for _, s := range e.Config.Directory.Builtin().Services() {
		for i, r := range s.Roles {
			body := authorization(e, r.CRN, eq("serviceName", s.Name), eq("serviceInstance", fmt.Sprint(i)))
			if got := post(e, 2, body); got.Status != 201 {
				t.Errorf("%s on %s: %d %s", r.CRN, s.Name, got.Status, got.Raw)
			}
		}
	}
	for _, role := range []string{viewer, admin, reader, writer, manager} {
		for _, block := range []obj{eq("serviceType", "service"), eq("serviceType", "platform_service"), eq("service_group_id", "IAM"), eq("resourceGroupId", "rg-1"), eq("serviceName", "nobody-knows-it")} {
			if got := post(e, 2, authorization(e, role, block)); got.Status != 201 {
				t.Errorf("%s on %v: %d %s", role, block, got.Status, got.Raw)
			}
		}
	}
}
