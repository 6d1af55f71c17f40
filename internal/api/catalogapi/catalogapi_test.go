package catalogapi_test

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/api/apitest"
	"tabard.dev/tabard/internal/api/catalogapi"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/resource"
)

const nobody = "IBMid-NOBODY"

func start(t *testing.T) *apitest.Env {
	e := apitest.New(t)
	catalogapi.Register(e.Mux, e.Config)
	return e
}

func update(e *apitest.Env, f func(tx *directory.Tx)) {
	e.T.Helper()
	if err := e.Config.Directory.Update(context.Background(), e.Owner.IAMID, func(tx *directory.Tx) error { f(tx); return nil }); err != nil {
		e.T.Fatal(err)
	}
}

func wantError(t *testing.T, r *apitest.Response, status int, code string) string {
	t.Helper()
	entries, _ := r.Want(status)["errors"].([]any)
	if len(entries) != 1 || entries[0].(map[string]any)["code"] != code {
		t.Fatalf("error %s, want code %s", r.Raw, code)
	}
	return entries[0].(map[string]any)["message"].(string)
}

// library is a service with a bit of everything.
func library() map[string]any {
	return map[string]any{
		"name": "library", "display_name": "Library", "kind": "service", "description": "Books and who has them.",
		"actions": []any{
			map[string]any{"id": "library.book.read", "display_name": "Read a book"},
			map[string]any{"id": "library.book.write"}, map[string]any{"id": "library.book.burn"},
		},
		"attributes":    []any{map[string]any{"name": "shelf", "display_name": "Shelf"}},
		"roles":         map[string]any{"Administrator": map[string]any{"actions": []string{"library.book.burn"}}},
		"service_roles": map[string]any{"Reader": map[string]any{"actions": []string{"library.book.read"}}, "Book Writer": map[string]any{"extends": []string{"Reader"}, "actions": []string{"library.book.write"}}},
		"plans":         []any{map[string]any{"id": "0a9d7a26-0d39-4a53-8a8d-0d5a7a0d0a01", "name": "free", "reclamation": true}},
	}
}

func with(m map[string]any, key string, value any) map[string]any {
	m = maps.Clone(m)
	m[key] = value
	return m
}

func post(body any) apitest.Request {
	return apitest.Request{Method: "POST", Path: "/v1/services", Body: body}
}

func put(body any) apitest.Request {
	return apitest.Request{Method: "PUT", Path: "/v1/services/library", Body: body, Header: map[string]string{"If-Match": "*"}}
}

func names(m map[string]any, custom bool) []string {
	out := []string{}
	for _, s := range m["services"].([]any) {
		if s := s.(map[string]any); s["custom"] == custom {
			out = append(out, s["name"].(string))
		}
	}
	return out
}

// policy gives nobody a role on the library.
func policy(e *apitest.Env, role string, more ...access.Attribute) *access.Policy {
	e.T.Helper()
	p := &access.Policy{
		ID: uuid.NewString(), AccountID: e.Owner.AccountID, API: 1, Type: access.TypeAccess, State: access.Active,
		Subject: []access.Attribute{{Key: access.IAMID, Operator: access.StringEquals, Value: access.Text(nobody)}},
		Resource: append([]access.Attribute{
			{Key: access.ServiceName, Operator: access.StringEquals, Value: access.Text("library")},
			{Key: access.AccountID, Operator: access.StringEquals, Value: access.Text(e.Owner.AccountID)},
		}, more...),
		Roles: []string{role},
	}
	update(e, func(tx *directory.Tx) { e.Config.Directory.Policies.Put(tx, p) })
	return p
}

func TestAServiceIsRegisteredAndPoliciesKnowItAtOnce(t *testing.T) {
	e := start(t)
	r := e.Do(post(library()))
	m := r.Want(201)
	for field, want := range map[string]any{
		"name": "library", "kind": "service", "custom": true, "account_id": e.Owner.AccountID,
		"crn": "crn:v1:bluemix:public:iam-access-management::a/" + e.Owner.AccountID + "::service:library",
	} {
		if m[field] != want {
			t.Errorf("%s = %v, want %v", field, m[field], want)
		}
	}
	got := e.Do(apitest.Request{Path: "/v1/services/library"})
	got.Want(200)
	if string(got.Raw) != string(r.Raw) || got.Header.Get("ETag") != m["entity_tag"] {
		t.Errorf("made as %s, shown as %s", r.Raw, got.Raw)
	}
	role := access.ServiceRoleCRN("library", "Book Writer")
	policy(e, role, access.Attribute{Key: "shelf", Operator: access.StringEquals, Value: access.Text("a")})
	ask := func(account, action, shelf string) bool {
		return access.Decide(e.Config.Directory, access.Request{
			Subject: nobody, AccountID: account, Action: action,
			Resource: map[string]string{access.AccountID: account, access.ServiceName: "library", "shelf": shelf}, Time: time.Now(),
		}).Allowed
	}
	mine := e.Owner.AccountID
	if !ask(mine, "library.book.read", "a") || !ask(mine, "library.book.write", "a") || ask(mine, "library.book.burn", "a") || ask(mine, "library.book.read", "b") {
		t.Error("the role does not allow what it has, or more")
	}
	if _, ok := e.Config.Directory.Catalog(mine).Role(role); !ok {
		t.Error("the account does not know the role")
	}
	if last := e.Events(1)[0]; last.Action != "iam-access-management.service.create" || last.Outcome != activity.Success || last.Target.Name != "library" {
		t.Errorf("event %+v", last)
	}
}

func TestAServiceIsKnownInItsAccountAlone(t *testing.T) {
	e := start(t)
	e.Do(post(library())).Want(201)
	if got := names(e.Do(apitest.Request{Path: "/v1/services", As: e.Other.IAMID}).Want(200), true); len(got) != 0 {
		t.Errorf("another account sees %v", got)
	}
	for _, name := range []string{"library", "absent"} {
		for _, r := range []apitest.Request{
			{Path: "/v1/services/" + name},
			{Method: "PUT", Path: "/v1/services/" + name, Body: library(), Header: map[string]string{"If-Match": "*"}},
			{Method: "DELETE", Path: "/v1/services/" + name},
		} {
			r.As = e.Other.IAMID
			wantError(t, e.Do(r), 404, "not_found")
		}
	}
	theirs := post(with(library(), "description", "theirs"))
	theirs.As = e.Other.IAMID
	e.Do(theirs).Want(201)
	if m := e.Do(apitest.Request{Path: "/v1/services/library"}).Want(200); m["description"] == "theirs" {
		t.Error("another account's service of the same name is shown")
	}
	e.Do(apitest.Request{Method: "DELETE", Path: "/v1/services/library", As: e.Other.IAMID}).Want(204)
	e.Do(apitest.Request{Path: "/v1/services/library"}).Want(200)
}

func TestTheListHasBuiltInAndOwnServices(t *testing.T) {
	e := start(t)
	e.Do(post(library())).Want(201)
	m := e.Do(apitest.Request{Path: "/v1/services"}).Want(200)
	if got := names(m, true); !slices.Equal(got, []string{"library"}) {
		t.Errorf("own services %v", got)
	}
	if got := names(m, false); !slices.Contains(got, "kms") || !slices.Contains(got, "iam-identity") || !slices.IsSorted(got) {
		t.Errorf("built-in services %v", got)
	}
	kms := e.Do(apitest.Request{Path: "/v1/services/kms"}).Want(200)
	if kms["custom"] != false || kms["entity_tag"] != nil || len(kms["actions"].([]any)) == 0 {
		t.Errorf("kms %v", kms)
	}
	e.Do(apitest.Request{Path: "/v1/services/is.vpc"}).Want(404)
}

func TestTheCatalogNeedsItsActions(t *testing.T) {
	e := start(t)
	e.Do(post(library())).Want(201)
	const viewer = "IBMid-VIEWER0001"
	e.Grant(viewer, "iam-access-management", "Editor")
	if m := e.Do(apitest.Request{Path: "/v1/services", As: nobody}).Want(200); len(m["services"].([]any)) != 0 {
		t.Errorf("somebody without rights lists %v", m)
	}
	wantError(t, e.Do(apitest.Request{Path: "/v1/services/library", As: nobody}), 403, "not_authorized")
	e.Do(apitest.Request{Path: "/v1/services/library", As: viewer}).Want(200)
	for _, as := range []string{nobody, viewer} {
		for _, r := range []apitest.Request{post(library()), put(library()), {Method: "DELETE", Path: "/v1/services/library"}} {
			r.As = as
			wantError(t, e.Do(r), 403, "not_authorized")
			r.Anonymous = true
			e.Do(r).Want(401)
		}
	}
}

func TestADefinitionThatDoesNotHoldIsRefused(t *testing.T) {
	e := start(t)
	for name, body := range map[string]any{
		"nothing": "", "null": "null", "a list": "[]", "no object": `"x"`, "half": "{", "empty": "{}",
		"an unknown field":           with(library(), "rolls", map[string]any{}),
		"an unknown field in a role": with(library(), "roles", map[string]any{"Viewer": map[string]any{"action": []string{}}}),
		"a wrong type":               with(library(), "actions", "library.book.read"),
		"a name in capitals":         with(library(), "name", "Library"),
		"a name with a slash":        with(library(), "name", "a/b"),
		"a reserved name":            with(library(), "name", "iam"),
		"no actions":                 with(library(), "actions", []any{}),
		"another service's action":   with(library(), "actions", []any{map[string]any{"id": "kms.secrets.read"}}),
		"another kind":               with(library(), "kind", "thing"),
		"no kind":                    with(library(), "kind", ""),
		"an unknown action":          with(library(), "service_roles", map[string]any{"Reader": map[string]any{"actions": []string{"library.book.eat"}}}),
		"a circle":                   with(library(), "service_roles", map[string]any{"A": map[string]any{"extends": []string{"B"}}, "B": map[string]any{"extends": []string{"A"}}}),
		"a missing base":             with(library(), "service_roles", map[string]any{"A": map[string]any{"extends": []string{"B"}}}),
		"a built-in plan":            with(library(), "plans", []any{map[string]any{"id": "8d35c7b2-ef60-4a19-97d8-41fb6a0e2c95", "name": "x"}}),
		"a control character":        with(library(), "description", "a\x00b"),
		"the decision point":         with(library(), "service_roles", map[string]any{"Decision Point": map[string]any{"actions": []string{"library.book.read"}}}),
	} {
		if r := e.Do(post(body)); r.Status != 400 {
			t.Errorf("%s: status %d: %s", name, r.Status, r.Raw)
		}
	}
	wantError(t, e.Do(post(with(library(), "name", "kms"))), 409, "conflict")
	e.Do(post(`{"description":"` + strings.Repeat("x", 10<<20) + `"}`)).Want(413)
	e.Do(post(library())).Want(201)
	wantError(t, e.Do(post(library())), 409, "conflict")
	for name, body := range map[string]any{"null": "null", "a list": "[]", "an unknown field": with(library(), "custom", true)} {
		if r := e.Do(put(body)); r.Status != 400 {
			t.Errorf("PUT of %s: status %d: %s", name, r.Status, r.Raw)
		}
	}
}

func TestRolesThatBranchWithoutEndAreRefusedQuickly(t *testing.T) {
	e := start(t)
	roles := map[string]any{"R0": map[string]any{"actions": []string{"library.book.read"}}}
	for i := 1; i < 50; i++ {
		base := fmt.Sprint("R", i-1)
		roles[fmt.Sprint("R", i)] = map[string]any{"extends": []string{base, base}}
	}
	begun := time.Now()
	e.Do(post(with(library(), "service_roles", roles))).Want(400)
	roles["R0"] = map[string]any{"extends": []string{"R49"}}
	e.Do(post(with(library(), "service_roles", roles))).Want(400)
	if took := time.Since(begun); took > 5*time.Second {
		t.Errorf("refused after %v", took)
	}
}

func TestTwoServicesOfAnAccountDoNotShareAPlan(t *testing.T) {
	e := start(t)
	e.Do(post(library())).Want(201)
	raw, err := json.Marshal(library())
	if err != nil {
		t.Fatal(err)
	}
	archive := strings.ReplaceAll(string(raw), "library", "archive")
	e.Do(post(archive)).Want(400)
	e.Do(post(strings.ReplaceAll(archive, "0d0a01", "0d0a02"))).Want(201)
}

func TestAServiceIsChangedByWhoeverSawItLast(t *testing.T) {
	e := start(t)
	tag := e.Do(post(library())).Want(201)["entity_tag"].(string)
	r := put(with(library(), "description", "new"))
	r.Header = nil
	e.Do(r).Want(400)
	r.Header = map[string]string{"If-Match": tag}
	if m := e.Do(r).Want(200); m["description"] != "new" || m["entity_tag"] == tag {
		t.Errorf("changed to %v", m)
	}
	wantError(t, e.Do(r), 409, "conflict")
	wantError(t, e.Do(put(with(library(), "name", "archive"))), 400, "invalid_body")
	wantError(t, e.Do(put(with(library(), "kind", "platform_service"))), 400, "invalid_body")
	wantError(t, e.Do(apitest.Request{Method: "PUT", Path: "/v1/services/kms", Body: library(), Header: map[string]string{"If-Match": "*"}}), 409, "builtin_service")
	wantError(t, e.Do(apitest.Request{Method: "DELETE", Path: "/v1/services/kms"}), 409, "builtin_service")
	wantError(t, e.Do(apitest.Request{Method: "DELETE", Path: "/v1/services/library", Header: map[string]string{"If-Match": tag}}), 409, "conflict")
	e.Do(apitest.Request{Method: "DELETE", Path: "/v1/services/library"}).Want(204)
	e.Do(apitest.Request{Method: "DELETE", Path: "/v1/services/library"}).Want(404)
}

func TestOfManyWriersOfOneServiceOneWins(t *testing.T) {
	e := start(t)
	tag := e.Do(post(library())).Want(201)["entity_tag"].(string)
	status := make([]int, 6)
	var wg sync.WaitGroup
	for i := range status {
		wg.Go(func() {
			r := put(with(library(), "description", fmt.Sprint("writer ", i)))
			r.Header = map[string]string{"If-Match": tag}
			status[i] = e.Do(r).Status
		})
	}
	wg.Wait()
	slices.Sort(status)
	if want := []int{200, 409, 409, 409, 409, 409}; !slices.Equal(status, want) {
		t.Errorf("answers %v, want %v", status, want)
	}
}

func TestAServiceInUseIsNotRemoved(t *testing.T) {
	e := start(t)
	e.Do(post(library())).Want(201)
	d := e.Config.Directory
	remove := apitest.Request{Method: "DELETE", Path: "/v1/services/library"}
	p := policy(e, access.PlatformRoleCRN("Viewer"))
	role := &access.CustomRole{ID: uuid.NewString(), AccountID: e.Owner.AccountID, Name: "Burner", DisplayName: "Burner", Service: "library", Actions: []string{"library.book.burn"}}
	instance := &resource.Instance{GUID: uuid.NewString(), AccountID: e.Owner.AccountID, Service: "library", State: resource.StateReclamation}
	update(e, func(tx *directory.Tx) {
		d.CustomRoles.Put(tx, role)
		d.Resources.Put(tx, instance)
	})
	msg := wantError(t, e.Do(remove), 409, "in_use")
	for _, want := range []string{p.ID, "Burner", instance.GUID} {
		if !strings.Contains(msg, want) {
			t.Errorf("%q does not name %s", msg, want)
		}
	}
	gone := *instance
	gone.State = resource.StateRemoved
	deleted := *p
	deleted.State = access.Deleted
	update(e, func(tx *directory.Tx) {
		d.CustomRoles.Delete(tx, role)
		d.Resources.Put(tx, &gone)
		d.Policies.Put(tx, &deleted)
	})
	e.Do(remove).Want(204)
}

func TestAnUpdateKeepsWhatIsInUse(t *testing.T) {
	e := start(t)
	e.Do(post(library())).Want(201)
	d := e.Config.Directory
	own := policy(e, access.ServiceRoleCRN("library", "Book Writer"), access.Attribute{Key: "shelf", Operator: access.StringEquals, Value: access.Text("a")})
	common := policy(e, access.ServiceRoleCRN("library", "Reader"))
	update(e, func(tx *directory.Tx) {
		d.CustomRoles.Put(tx, &access.CustomRole{ID: uuid.NewString(), AccountID: e.Owner.AccountID, Name: "Burner", DisplayName: "Burner", Service: "library", Actions: []string{"library.book.burn"}})
		d.Resources.Put(tx, &resource.Instance{GUID: uuid.NewString(), AccountID: e.Owner.AccountID, Service: "library", PlanID: "0a9d7a26-0d39-4a53-8a8d-0d5a7a0d0a01"})
	})
	bare := map[string]any{
		"kind": "service", "actions": []any{map[string]any{"id": "library.book.read"}},
		"service_roles": map[string]any{"Looker": map[string]any{"actions": []string{"library.book.read"}}},
	}
	msg := wantError(t, e.Do(put(bare)), 409, "in_use")
	for _, want := range []string{"action library.book.burn (custom role Burner)", "role Book Writer (policy " + own.ID, "role Reader (policy " + common.ID, "attribute shelf", "plan 0a9d7a26"} {
		if !strings.Contains(msg, want) {
			t.Errorf("%q does not name %s", msg, want)
		}
	}
	more := library()
	more["actions"] = append(more["actions"].([]any), map[string]any{"id": "library.shelf.move"})
	e.Do(put(more)).Want(200)
	// What nobody uses may go.
	less := with(library(), "actions", []any{map[string]any{"id": "library.book.read"}, map[string]any{"id": "library.book.burn"}, map[string]any{"id": "library.book.write"}})
	e.Do(put(less)).Want(200)
}
