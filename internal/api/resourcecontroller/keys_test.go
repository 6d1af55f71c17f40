package resourcecontroller_test

import (
	"encoding/json"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api/apitest"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/identity"
)

func newKey(e *apitest.Env, instance map[string]any, name, role string) map[string]any {
	e.T.Helper()
	return createKey(e, e.Owner.IAMID, instance, name, role).Want(201)
}

func createKey(e *apitest.Env, as string, instance map[string]any, name, role string) *apitest.Response {
	e.T.Helper()
	body := map[string]any{"name": name, "source": instance["guid"], "role": role}
	if role == "" {
		delete(body, "role")
	}
	return e.Do(apitest.Request{Method: "POST", Path: "/v2/resource_keys", Body: body, As: as})
}

func creds(m map[string]any) map[string]any { return m["credentials"].(map[string]any) }

// holder returns the IAM ID of the service ID behind a key.
func holder(m map[string]any) string {
	c := creds(m)["iam_serviceid_crn"].(string)
	return crn.IAMID(c[strings.LastIndexByte(c, ':')+1:])
}

// may asks whether an identity may do something in an instance.
func may(e *apitest.Env, iamID, action string, instance map[string]any) bool {
	return access.Decide(e.Config.Directory, access.Request{
		Subject: iamID, AccountID: e.Owner.AccountID, Action: action, Time: time.Now(),
		Resource: map[string]string{
			access.AccountID: e.Owner.AccountID, access.ServiceName: instance["resource_id"].(string),
			access.ServiceInstance: instance["guid"].(string), access.ResourceType: "bucket", access.Resource: "b1",
		},
	}).Allowed
}

func TestAKeyGivesItsRoleOnItsInstanceUntilItIsDeleted(t *testing.T) {
	e := start(t)
	store, other := newInstance(e, "cloud-object-storage", "store"), newInstance(e, "cloud-object-storage", "other")
	k := newKey(e, store, "backup", "Writer")
	if want := strings.TrimSuffix(store["crn"].(string), "::") + ":resource-key:" + k["guid"].(string); k["crn"] != want || k["id"] != want {
		t.Errorf("crn %v, want %s", k["crn"], want)
	}
	for field, want := range map[string]any{
		"name": "backup", "state": "active", "account_id": e.Owner.AccountID, "resource_group_id": store["resource_group_id"],
		"source_crn": store["crn"], "resource_id": "cloud-object-storage", "iam_compatible": true, "onetime_credentials": false,
		"resource_instance_url": store["url"], "deleted_at": nil, "created_by": e.Owner.IAMID,
	} {
		if k[field] != want {
			t.Errorf("%s is %v, want %v", field, k[field], want)
		}
	}
	c := creds(k)
	if c["iam_role_crn"] != access.ServiceRoleCRN("", "Writer") || c["iam_apikey_name"] != "backup" || c["iam_apikey_description"] == "" || c["apikey"] == "" {
		t.Errorf("credentials %v", c)
	}

	d, iamID := e.Config.Directory, holder(k)
	apiKey, ok := d.APIKeysByHash.One(e.Sealer.Hash(c["apikey"].(string)))
	if !ok || apiKey.IAMID != iamID || apiKey.AccountID != e.Owner.AccountID || apiKey.ID != c["iam_apikey_id"] {
		t.Fatalf("the API key is of %+v", apiKey)
	}
	if !may(e, iamID, "cloud-object-storage.object.put", store) || may(e, iamID, "cloud-object-storage.bucket.put_firewall", store) {
		t.Error("the service ID does not have the role on the instance")
	}
	if may(e, iamID, "cloud-object-storage.object.put", other) {
		t.Error("the service ID has the role on another instance")
	}

	path := k["url"].(string)
	if again := creds(e.Do(get(path)).Want(200)); again["apikey"] != c["apikey"] {
		t.Error("the API key is not shown again")
	}
	if m := e.Do(get("/v2/resource_keys/" + url.PathEscape(k["crn"].(string)))).Want(200); m["guid"] != k["guid"] {
		t.Errorf("by CRN: %v", m)
	}
	if m := e.Do(apitest.Request{Method: "PATCH", Path: path, Body: `{"name":"restore"}`}).Want(200); m["name"] != "restore" || creds(m)["apikey"] != c["apikey"] {
		t.Errorf("renamed to %v", m)
	}

	e.Do(del(path)).Want(204)
	gone := e.Do(get(path)).Want(200)
	if gone["state"] != "removed" || gone["credentials"] != nil || gone["deleted_by"] != e.Owner.IAMID {
		t.Errorf("removed key %v", gone)
	}
	if _, ok := d.APIKeys.Get(apiKey.ID); ok {
		t.Error("the API key is still there")
	}
	if _, ok := d.ServiceIDs.Get(crn.Identifier(iamID)); ok {
		t.Error("the service ID is still there")
	}
	if n := len(d.PoliciesOfSubject.Get(directory.Key(e.Owner.AccountID, iamID))); n != 0 {
		t.Errorf("%d policies are still there", n)
	}
	wantError(t, e.Do(del(path)), 410, "gone")
	wantError(t, e.Do(apitest.Request{Method: "PATCH", Path: path, Body: `{"name":"x"}`}), 410, "gone")

	for n, action := range []string{"delete", "delete", "update", "read", "read", "read", "create"} {
		ev := e.Events(8)[n+1]
		if ev.Action != "cloud-object-storage.key."+action || ev.Target.ID != k["crn"] {
			t.Errorf("event %s on %s, want %s", ev.Action, ev.Target.ID, action)
		}
		if raw, _ := json.Marshal(ev); strings.Contains(string(raw), c["apikey"].(string)) {
			t.Errorf("event %s holds the API key", ev.Action)
		}
	}
}

func TestAKeyWithoutARoleGivesNothing(t *testing.T) {
	e := start(t)
	store := newInstance(e, "cloud-object-storage", "store")
	k := newKey(e, store, "k", "")
	if _, ok := creds(k)["iam_role_crn"]; ok || creds(k)["apikey"] == "" {
		t.Errorf("credentials %v", creds(k))
	}
	if n := len(e.Config.Directory.PoliciesOfSubject.Get(directory.Key(e.Owner.AccountID, holder(k)))); n != 0 {
		t.Errorf("%d policies", n)
	}
	e.Do(del(k["url"].(string))).Want(204)
}

func TestARoleIsNamedInAnyForm(t *testing.T) {
	e := start(t)
	store := newInstance(e, "cloud-object-storage", "store")
	stage(e, func(d *directory.Directory, tx *directory.Tx) {
		d.CustomRoles.Put(tx, &access.CustomRole{
			ID: uuid.NewString(), AccountID: e.Owner.AccountID, Name: "Listing", DisplayName: "Only lists", Service: "cloud-object-storage",
			Actions: []string{"cloud-object-storage.account.get_account_buckets"},
		})
	})
	custom := "crn:v1:bluemix:public:iam-access-management::a/" + e.Owner.AccountID + "::customRole:Listing"
	for asked, want := range map[string]string{
		"Reader":        access.ServiceRoleCRN("", "Reader"),
		"Viewer":        access.PlatformRoleCRN("Viewer"),
		"Object Writer": access.ServiceRoleCRN("cloud-object-storage", "Object Writer"),
		"ObjectWriter":  access.ServiceRoleCRN("cloud-object-storage", "Object Writer"),
		"Listing":       custom,
		custom:          custom,
		"Only lists":    custom,
		"crn:v1:staging:public:iam::::serviceRole:Manager": access.ServiceRoleCRN("", "Manager"),
	} {
		if got := creds(newKey(e, store, "k", asked))["iam_role_crn"]; got != want {
			t.Errorf("role %q became %v, want %s", asked, got, want)
		}
	}
	for _, bad := range []string{"Emperor", "reader ", "crn:", access.ServiceRoleCRN("kms", "KeyPurge"), strings.Repeat("x", 5000)} {
		wantError(t, createKey(e, e.Owner.IAMID, store, "k", bad), 400, "invalid_body")
	}
}

func TestAKeyGivesNoMoreThanItsMakerHas(t *testing.T) {
	e := start(t)
	store := newInstance(e, "cloud-object-storage", "store")
	e.Grant("IBMid-OPERATOR", "cloud-object-storage", "Operator", "Reader")
	createKey(e, "IBMid-OPERATOR", store, "k", "Reader").Want(201)
	createKey(e, "IBMid-OPERATOR", store, "k", "Operator").Want(201)
	createKey(e, "IBMid-OPERATOR", store, "k", "").Want(201)
	for _, role := range []string{"Writer", "Manager", "Editor", "Administrator", "Object Writer"} {
		if m := wantError(t, createKey(e, "IBMid-OPERATOR", store, "k", role), 403, "not_authorized"); !strings.Contains(m, "himself") {
			t.Errorf("%s: message %q does not say why", role, m)
		}
	}

	// Whoever may grant access could write the policy of the key himself.
	e.Grant("IBMid-ADMIN", "cloud-object-storage", "Administrator")
	createKey(e, "IBMid-ADMIN", store, "k", "Manager").Want(201)

	rights := func(id string, attributes ...string) {
		grant(e, id, "Operator", access.ServiceName, "cloud-object-storage", access.ServiceInstance, store["guid"].(string))
		stage(e, func(d *directory.Directory, tx *directory.Tx) {
			p := manager(e, id)
			for n := 0; n < len(attributes); n += 2 {
				p.Resource = append(p.Resource, access.Attribute{Key: attributes[n], Operator: access.StringEquals, Value: access.Text(attributes[n+1])})
			}
			d.Policies.Put(tx, p)
		})
	}
	rights("IBMid-ONE", access.ServiceInstance, store["guid"].(string))
	createKey(e, "IBMid-ONE", store, "k", "Manager").Want(201)
	rights("IBMid-GROUP", access.ResourceGroupID, store["resource_group_id"].(string))
	createKey(e, "IBMid-GROUP", store, "k", "Manager").Want(201)
	rights("IBMid-ELSEWHERE", access.ServiceInstance, uuid.NewString())
	wantError(t, createKey(e, "IBMid-ELSEWHERE", store, "k", "Manager"), 403, "not_authorized")
	rights("IBMid-BUCKET", access.ResourceType, "bucket", access.Resource, "b1")
	wantError(t, createKey(e, "IBMid-BUCKET", store, "k", "Manager"), 403, "not_authorized")
	wantError(t, createKey(e, nobody, store, "k", ""), 403, "not_authorized")
}

// manager is a policy with the role Manager on Cloud Object Storage.
func manager(e *apitest.Env, iamID string) *access.Policy {
	equals := func(key, value string) access.Attribute {
		return access.Attribute{Key: key, Operator: access.StringEquals, Value: access.Text(value)}
	}
	return &access.Policy{
		ID: uuid.NewString(), AccountID: e.Owner.AccountID, API: 2, Type: access.TypeAccess, State: access.Active,
		Subject:  []access.Attribute{equals(access.IAMID, iamID)},
		Resource: []access.Attribute{equals(access.AccountID, e.Owner.AccountID), equals(access.ServiceName, "cloud-object-storage")},
		Roles:    []string{access.ServiceRoleCRN("", "Manager")},
	}
}

func TestRightsUnderConditionsDoNotGoIntoAKey(t *testing.T) {
	e := start(t)
	store := newInstance(e, "cloud-object-storage", "store")
	absent := false
	for id, condition := range map[string]func(*access.Policy){
		"IBMid-HOURS": func(p *access.Policy) {
			if err := json.Unmarshal([]byte(`{"key":"{{environment.attributes.current_date_time}}","operator":"dateTimeGreaterThan","value":"2020-01-01T00:00:00+00:00"}`), &p.Rule); err != nil {
				t.Fatal(err)
			}
		},
		"IBMid-ABSENT": func(p *access.Policy) {
			p.Resource = append(p.Resource, access.Attribute{Key: access.ResourceType, Operator: access.StringExists, Value: access.Value{Exists: &absent}})
		},
	} {
		e.Grant(id, "cloud-object-storage", "Operator")
		p := manager(e, id)
		condition(p)
		stage(e, func(d *directory.Directory, tx *directory.Tx) { d.Policies.Put(tx, p) })
		if m := wantError(t, createKey(e, id, store, "k", "Manager"), 403, "not_authorized"); !strings.Contains(m, "conditions") {
			t.Errorf("%s: message %q does not name the conditions", id, m)
		}
	}
}

func TestCredentialsAreShownToWhoMayHaveThem(t *testing.T) {
	e := start(t)
	store := newInstance(e, "cloud-object-storage", "store")
	e.Grant("IBMid-MAKER", "cloud-object-storage", "Operator", "Writer")
	e.Grant("IBMid-PEER", "cloud-object-storage", "Operator", "Writer")
	e.Grant("IBMid-VIEWER", "cloud-object-storage", "Viewer")
	e.Grant("IBMid-ADMIN", "cloud-object-storage", "Administrator")
	k := createKey(e, "IBMid-MAKER", store, "k", "Writer").Want(201)
	for who, seen := range map[string]bool{"IBMid-MAKER": true, "IBMid-ADMIN": true, e.Owner.IAMID: true, "IBMid-PEER": false, "IBMid-VIEWER": false} {
		one := e.Do(apitest.Request{Path: k["url"].(string), As: who}).Want(200)
		list := e.Do(apitest.Request{Path: "/v2/resource_keys", As: who}).Want(200)
		of := e.Do(apitest.Request{Path: store["resource_keys_url"].(string), As: who}).Want(200)
		for _, m := range []map[string]any{one, list["resources"].([]any)[0].(map[string]any), of["resources"].([]any)[0].(map[string]any)} {
			c := creds(m)
			if seen && (c["apikey"] != creds(k)["apikey"] || c["REDACTED"] != nil) {
				t.Errorf("%s does not see the API key: %v", who, c)
			}
			if !seen && (c["REDACTED"] != "REDACTED" || len(c) != 1) {
				t.Errorf("%s sees %v", who, c)
			}
		}
	}
	wantError(t, e.Do(apitest.Request{Path: k["url"].(string), As: nobody}), 403, "not_authorized")

	// With more than the role in the service ID's hands, its API key is worth
	// more than the instance's credentials.
	extra := manager(e, holder(k))
	stage(e, func(d *directory.Directory, tx *directory.Tx) { d.Policies.Put(tx, extra) })
	for who, seen := range map[string]bool{"IBMid-MAKER": true, e.Owner.IAMID: true, "IBMid-ADMIN": false} {
		c := creds(e.Do(apitest.Request{Path: k["url"].(string), As: who}).Want(200))
		if (c["apikey"] != nil) != seen {
			t.Errorf("%s sees %v", who, c)
		}
	}

	// Who has lost the rights does not see them in the key either.
	stage(e, func(d *directory.Directory, tx *directory.Tx) {
		for _, p := range d.PoliciesOfSubject.Get(directory.Key(e.Owner.AccountID, "IBMid-MAKER")) {
			d.Policies.Delete(tx, p)
		}
	})
	e.Grant("IBMid-MAKER", "cloud-object-storage", "Operator")
	if c := creds(e.Do(apitest.Request{Path: k["url"].(string), As: "IBMid-MAKER"}).Want(200)); c["REDACTED"] != "REDACTED" {
		t.Error("the maker without rights sees the credentials")
	}
}

func TestAnInstanceIsNotDeletedWithItsKeysUnasked(t *testing.T) {
	e := start(t)
	db := newDatabase(e, "db", false)
	path := db["url"].(string)
	k := newKey(e, db, "k", "Viewer")
	newKey(e, db, "k2", "")
	wantError(t, e.Do(del(path)), 400, "has_keys")
	wantError(t, e.Do(del(path+"?recursive=false")), 400, "has_keys")
	wantError(t, e.Do(del(path+"?recursive=maybe")), 400, "invalid_parameter")
	e.Do(get(path)).Want(200)
	e.Do(del(path + "?recursive=true")).Want(204)
	if m := e.Do(get(k["url"].(string))).Want(200); m["state"] != "removed" {
		t.Errorf("key %v", m)
	}
	if n := e.Config.Directory.ServiceIDsByAccount.Len(e.Owner.AccountID); n != 0 {
		t.Errorf("%d service IDs left", n)
	}
	wantNames(t, e.Do(get("/v2/resource_keys")).Want(200))
}

func TestALockedIdentityHoldsItsKey(t *testing.T) {
	e := start(t)
	db := newDatabase(e, "db", false)
	k := newKey(e, db, "k", "")
	d := e.Config.Directory
	lock := func(locked bool) {
		stage(e, func(_ *directory.Directory, tx *directory.Tx) {
			s, _ := d.ServiceIDs.Get(crn.Identifier(holder(k)))
			changed := *s
			changed.Locked = locked
			d.ServiceIDs.Put(tx, &changed)
		})
	}
	lock(true)
	wantError(t, e.Do(del(k["url"].(string))), 422, "locked")
	wantError(t, e.Do(del(db["url"].(string)+"?recursive=true")), 422, "locked")
	lock(false)
	stage(e, func(_ *directory.Directory, tx *directory.Tx) {
		a, _ := d.APIKeys.Get(creds(k)["iam_apikey_id"].(string))
		changed := *a
		changed.Locked = true
		d.APIKeys.Put(tx, &changed)
	})
	wantError(t, e.Do(del(k["url"].(string))), 422, "locked")
	if m := e.Do(get(k["url"].(string))).Want(200); m["state"] != "active" {
		t.Errorf("key %v", m)
	}
}

func TestAKeyWhoseIdentityIsGoneIsDeletedAllTheSame(t *testing.T) {
	e := start(t)
	k := newKey(e, newDatabase(e, "db", false), "k", "Viewer")
	d := e.Config.Directory
	stage(e, func(_ *directory.Directory, tx *directory.Tx) {
		s, _ := d.ServiceIDs.Get(crn.Identifier(holder(k)))
		d.ServiceIDs.Delete(tx, s)
		a, _ := d.APIKeys.Get(creds(k)["iam_apikey_id"].(string))
		d.APIKeys.Delete(tx, a)
		d.ForgetSubject(tx, e.Owner.AccountID, holder(k))
	})
	if c := creds(e.Do(get(k["url"].(string))).Want(200)); c["apikey"] != nil {
		t.Errorf("credentials %v", c)
	}
	e.Do(del(k["url"].(string))).Want(204)
}

func TestKeysWhoseIdentitiesShareAnAccessGroupGoOneByOne(t *testing.T) {
	e := start(t)
	db := newDatabase(e, "db", false)
	one, two := newKey(e, db, "one", ""), newKey(e, db, "two", "")
	stage(e, func(d *directory.Directory, tx *directory.Tx) {
		d.Groups.Put(tx, &access.Group{ID: "AccessGroupId-1", AccountID: e.Owner.AccountID, Name: "g", Members: []access.Member{
			{IAMID: holder(one), Type: "service"}, {IAMID: holder(two), Type: "service"},
		}})
	})
	wantError(t, e.Do(del(db["url"].(string)+"?recursive=true")), 409, "conflict")
	e.Do(del(one["url"].(string))).Want(204)
	e.Do(del(db["url"].(string) + "?recursive=true")).Want(204)
	if g, _ := e.Config.Directory.Groups.Get("AccessGroupId-1"); len(g.Members) != 0 {
		t.Errorf("members left: %v", g.Members)
	}
}

func TestAKeyForANamedServiceIDLeavesIt(t *testing.T) {
	e := start(t)
	db := newDatabase(e, "db", false)
	d := e.Config.Directory
	stage(e, func(_ *directory.Directory, tx *directory.Tx) {
		d.ServiceIDs.Put(tx, &identity.ServiceID{ID: "ServiceId-mine", AccountID: e.Owner.AccountID, Name: "mine"})
		d.ServiceIDs.Put(tx, &identity.ServiceID{ID: "ServiceId-theirs", AccountID: e.Other.AccountID, Name: "theirs"})
	})
	name := func(account, id string) string {
		return "crn:v1:bluemix:public:iam-identity::a/" + account + "::serviceid:" + id
	}
	create := func(as, serviceID string) *apitest.Response {
		return e.Do(apitest.Request{Method: "POST", Path: "/v2/resource_keys", As: as, Body: map[string]any{
			"name": "k", "source": db["crn"], "role": "Viewer", "parameters": map[string]any{"serviceid_crn": serviceID},
		}})
	}
	for _, bad := range []string{
		name(e.Other.AccountID, "ServiceId-theirs"), name(e.Owner.AccountID, "ServiceId-theirs"), name(e.Other.AccountID, "ServiceId-mine"),
		name(e.Owner.AccountID, "ServiceId-none"), strings.Replace(name(e.Owner.AccountID, "ServiceId-mine"), "serviceid", "profile", 1),
	} {
		wantError(t, create(e.Owner.IAMID, bad), 404, "not_found")
	}
	wantError(t, create(e.Owner.IAMID, "ServiceId-mine"), 400, "invalid_body")
	e.Grant("IBMid-OPERATOR", postgres, "Operator")
	wantError(t, create("IBMid-OPERATOR", name(e.Owner.AccountID, "ServiceId-mine")), 403, "not_authorized")

	k := create(e.Owner.IAMID, name(e.Owner.AccountID, "ServiceId-mine")).Want(201)
	create(e.Owner.IAMID, name(e.Owner.AccountID, "ServiceId-mine")).Want(201)
	if holder(k) != "iam-ServiceId-mine" || !may(e, holder(k), postgres+".backup.read", db) {
		t.Errorf("credentials %v", creds(k))
	}
	e.Grant("IBMid-ADMIN", postgres, "Administrator")
	if c := creds(e.Do(apitest.Request{Path: k["url"].(string), As: "IBMid-ADMIN"}).Want(200)); c["REDACTED"] != "REDACTED" {
		t.Errorf("an administrator of the instance sees a key of the named service ID: %v", c)
	}
	e.Do(del(k["url"].(string))).Want(204)
	if _, ok := d.ServiceIDs.Get("ServiceId-mine"); !ok {
		t.Error("the service ID is gone")
	}
	key := directory.Key(e.Owner.AccountID, "iam-ServiceId-mine")
	if keys, policies := d.APIKeysByIdentity.Len(key), len(d.PoliciesOfSubject.Get(key)); keys != 1 || policies != 1 {
		t.Errorf("%d API keys and %d policies left, want those of the other resource key", keys, policies)
	}
	e.Do(del(db["url"].(string) + "?recursive=true")).Want(204)
	if _, ok := d.ServiceIDs.Get("ServiceId-mine"); !ok {
		t.Error("the service ID is gone")
	}
}

func TestAnAccountsRestrictionsHoldForKeysToo(t *testing.T) {
	e := start(t)
	db := newDatabase(e, "db", false)
	e.Grant("IBMid-OPERATOR", postgres, "Operator")
	createKey(e, "IBMid-OPERATOR", db, "k", "").Want(201)
	stage(e, func(d *directory.Directory, tx *directory.Tx) {
		s := identity.DefaultSettings(e.Owner.AccountID)
		s.RestrictCreateServiceID = identity.Restricted
		d.Settings.Put(tx, s)
	})
	wantError(t, createKey(e, "IBMid-OPERATOR", db, "k", ""), 403, "not_authorized")
	createKey(e, e.Owner.IAMID, db, "k", "").Want(201)
}

func TestKeysAreListedFilteredAndPaged(t *testing.T) {
	e := start(t)
	db, store := newDatabase(e, "db", false), newInstance(e, "cloud-object-storage", "store")
	for n := range 5 {
		newKey(e, db, fmt.Sprintf("k%d", n), "")
	}
	s := newKey(e, store, "s", "")
	for query, want := range map[string][]string{
		"":                                    {"k0", "k1", "k2", "k3", "k4", "s"},
		"name=k3":                             {"k3"},
		"guid=" + s["guid"].(string):          {"s"},
		"resource_id=cloud-object-storage":    {"s"},
		"resource_id=kms":                     {},
		"resource_group_id=x":                 {},
		"updated_from=2100-01-01T00:00:00Z":   {},
		"updated_to=2000-01-01T00:00:00.000Z": {},
	} {
		wantNames(t, e.Do(get("/v2/resource_keys?"+query)).Want(200), want...)
	}
	for _, query := range []string{"limit=0", "limit=101", "updated_to=now", "start=%21"} {
		wantError(t, e.Do(get("/v2/resource_keys?"+query)), 400, "invalid_parameter")
	}
	wantNames(t, e.Do(get(store["resource_keys_url"].(string))).Want(200), "s")

	for _, first := range []string{"/v2/resource_keys?limit=2&resource_id=" + postgres, db["resource_keys_url"].(string) + "?limit=2"} {
		var seen []string
		pages := 0
		for path := first; path != ""; pages++ {
			m := e.Do(get(path)).Want(200)
			seen = append(seen, names(m)...)
			path, _ = m["next_url"].(string)
		}
		if want := []string{"k0", "k1", "k2", "k3", "k4"}; !slices.Equal(seen, want) || pages != 3 {
			t.Errorf("%s: %v on %d pages", first, seen, pages)
		}
	}

	e.Grant("IBMid-VIEWER", "cloud-object-storage", "Viewer")
	wantNames(t, e.Do(apitest.Request{Path: "/v2/resource_keys", As: "IBMid-VIEWER"}).Want(200), "s")
	wantNames(t, e.Do(apitest.Request{Path: "/v2/resource_keys", As: nobody}).Want(200))
	wantNames(t, e.Do(apitest.Request{Path: "/v2/resource_keys", As: e.Other.IAMID}).Want(200))
}

func TestAnotherAccountsKeyDoesNotExist(t *testing.T) {
	e := start(t)
	theirs := newForeignInstance(e, "theirs")
	k := createKey(e, e.Other.IAMID, theirs, "k", "Reader").Want(201)
	mine := newKey(e, newInstance(e, "kms", "mine"), "m", "")
	swap := strings.Replace(k["crn"].(string), e.Other.AccountID, e.Owner.AccountID, 1)
	for _, id := range []string{k["guid"].(string), k["crn"].(string), swap, strings.Replace(mine["crn"].(string), ":kms:", ":is:", 1), "x", "crn:", "..%2f"} {
		path := "/v2/resource_keys/" + url.PathEscape(id)
		wantError(t, e.Do(get(path)), 404, "not_found")
		wantError(t, e.Do(apitest.Request{Method: "PATCH", Path: path, Body: `{"name":"x"}`}), 404, "not_found")
		wantError(t, e.Do(del(path)), 404, "not_found")
	}
	for _, source := range []any{theirs["guid"], theirs["crn"], "", "x"} {
		wantError(t, createKey(e, e.Owner.IAMID, map[string]any{"guid": source}, "k", ""), 404, "not_found")
	}
	wantError(t, e.Do(get(theirs["resource_keys_url"].(string))), 404, "not_found")
	wantError(t, e.Do(post(theirs["url"].(string)+"/lock", "")), 404, "not_found")
	wantNames(t, e.Do(get("/v2/resource_keys?guid="+k["guid"].(string))).Want(200))
	if m := e.Do(apitest.Request{Path: k["url"].(string), As: e.Other.IAMID}).Want(200); creds(m)["apikey"] != creds(k)["apikey"] {
		t.Errorf("its owner sees %v", m)
	}
}

func TestChangingAKeyNeedsItsActions(t *testing.T) {
	e := start(t)
	k := newKey(e, newInstance(e, "kms", "k"), "k", "")
	e.Grant("IBMid-VIEWER", "kms", "Viewer")
	for _, r := range []apitest.Request{del(k["url"].(string)), {Method: "PATCH", Path: k["url"].(string), Body: `{"name":"x"}`}} {
		for _, r.As = range []string{nobody, "IBMid-VIEWER"} {
			wantError(t, e.Do(r), 403, "not_authorized")
		}
	}
	e.Grant("IBMid-OPERATOR", "kms", "Operator")
	e.Do(apitest.Request{Method: "PATCH", Path: k["url"].(string), Body: `{"name":"x"}`, As: "IBMid-OPERATOR"}).Want(200)
	e.Do(apitest.Request{Method: "DELETE", Path: k["url"].(string), As: "IBMid-OPERATOR"}).Want(204)
}

func TestBadKeyBodiesAreRefused(t *testing.T) {
	e := start(t)
	guid := newInstance(e, "kms", "k")["guid"].(string)
	big := strings.Repeat("x", 17<<10)
	for _, body := range []string{
		``, `[]`, `null`, `{}`, `{"name":""}`, `{"name":"a\u0000","source":"` + guid + `"}`, `{"name":"` + strings.Repeat("x", 181) + `","source":"` + guid + `"}`,
		`{"name":"k","source":1}`, `{"name":"k","source":"` + guid + `","parameters":[]}`, `{"name":"k","source":"` + guid + `","parameters":{"a":"` + big + `"}}`,
		`{"name":"k","source":"` + guid + `","parameters":{"serviceid_crn":1}}`, `{"name":"k","source":"` + guid + `","role":["Reader"]}`,
	} {
		if r := e.Do(post("/v2/resource_keys", body)); r.Status != 400 {
			t.Errorf("POST %.60s: status %d, want 400", body, r.Status)
		}
	}
	path := newKey(e, map[string]any{"guid": guid}, "k", "")["url"].(string)
	for _, body := range []string{`{}`, `{"name":""}`, `{"name":null}`, `{"name":1}`, ``} {
		if r := e.Do(apitest.Request{Method: "PATCH", Path: path, Body: body}); r.Status != 400 {
			t.Errorf("PATCH %s: status %d, want 400", body, r.Status)
		}
	}
	huge := `{"name":"k","source":"` + guid + `","parameters":{"a":"` + strings.Repeat("x", 10<<20) + `"}}`
	for _, r := range []apitest.Request{post("/v2/resource_keys", huge), post("/v2/resource_instances", huge)} {
		wantError(t, e.Do(r), 413, "request_too_large")
		r.Anonymous = true
		wantError(t, e.Do(r), 401, "token_missing")
	}
}

func TestOfManyWhoDeleteAKeyOneDoes(t *testing.T) {
	e := start(t)
	path := newKey(e, newInstance(e, "kms", "k"), "k", "Reader")["url"].(string)
	var wg sync.WaitGroup
	statuses := make([]int, 6)
	for n := range statuses {
		wg.Go(func() { statuses[n] = e.Do(del(path)).Status })
	}
	wg.Wait()
	slices.Sort(statuses)
	if want := []int{204, 410, 410, 410, 410, 410}; !slices.Equal(statuses, want) {
		t.Errorf("statuses %v, want %v", statuses, want)
	}
}

func TestAnInstanceHasABoundedNumberOfKeys(t *testing.T) {
	e := start(t)
	db := newDatabase(e, "db", false)
	for range 200 {
		newKey(e, db, "k", "")
	}
	wantError(t, createKey(e, e.Owner.IAMID, db, "k", ""), 409, "limit_exceeded")
	e.Do(del(db["url"].(string) + "?recursive=true")).Want(204)
}

func TestAStaleEntityTagStopsAKeyChange(t *testing.T) {
	e := start(t)
	path := newKey(e, newInstance(e, "kms", "k"), "k", "")["url"].(string)
	old := map[string]string{"If-Match": e.Do(get(path)).Header.Get("ETag")}
	e.Do(apitest.Request{Method: "PATCH", Path: path, Body: `{"name":"x"}`, Header: old}).Want(200)
	wantError(t, e.Do(apitest.Request{Method: "PATCH", Path: path, Body: `{"name":"y"}`, Header: old}), 409, "conflict")
	wantError(t, e.Do(apitest.Request{Method: "DELETE", Path: path, Header: old}), 409, "conflict")
}
