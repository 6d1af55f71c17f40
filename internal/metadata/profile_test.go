package metadata_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/grant"
	"tabard.dev/tabard/internal/identity"
	"tabard.dev/tabard/internal/store"
	"tabard.dev/tabard/internal/vpc"
)

// check fails the test unless the event records a failure whose first failed
// check has the name.
func check(t testing.TB, e activity.Event, name string) {
	t.Helper()
	failed, ok := e.Trace.Failed()
	if e.Outcome != activity.Failure || !ok || failed.Name != name {
		t.Errorf("event %s: outcome %s, first failed check %q, want %q; trace %+v", e.Action, e.Outcome, failed.Name, name, e.Trace)
	}
}

func TestAnotherProfileCanBeNamedByIDByCRNAndByName(t *testing.T) {
	s := start(t)
	p := s.newProfile(s.Owner.AccountID, "by-rule")
	quoted, _ := json.Marshal(s.vpc.ID)
	rule := &identity.ClaimRule{
		ID: "ClaimRule-" + uuid.NewString(), ProfileID: p.ID, AccountID: p.AccountID, Type: identity.RuleCR, CRType: identity.VSI,
		Conditions: []identity.Condition{{Claim: "vpc_id", Operator: identity.Equals, Value: string(quoted)}},
	}
	s.update(func(tx *directory.Tx) {
		s.d.Profiles.Put(tx, p)
		s.d.Rules.Put(tx, rule)
	})
	bearer := s.identityToken()
	for _, selector := range []string{
		fmt.Sprintf(`{"id":%q}`, p.ID),
		fmt.Sprintf(`{"id":%q}`, "iam-"+p.ID),
		fmt.Sprintf(`{"crn":%q}`, s.crn("iam-identity", "", "profile", p.ID)),
		`{"name":"by-rule"}`,
	} {
		m := s.iam(bearer, `{"trusted_profile":`+selector+`}`).want(200)
		if c := claims(t, m["access_token"].(string)); c["iam_id"] != "iam-"+p.ID {
			t.Errorf("%s: token of %v", selector, c["iam_id"])
		}
	}
	s.iam(bearer, `{"trusted_profile":null}`).want(200)
}

func TestAProfileIsNamedInOneWayOnly(t *testing.T) {
	s := start(t)
	bearer := s.identityToken()
	id, name := s.profile.ID, s.profile.Name
	name2 := s.crn("iam-identity", "", "profile", id)
	for _, body := range []string{
		fmt.Sprintf(`{"trusted_profile":{"id":%q,"name":%q}}`, id, name),
		fmt.Sprintf(`{"trusted_profile":{"id":%q,"crn":%q}}`, id, name2),
		fmt.Sprintf(`{"trusted_profile":{"crn":%q,"name":%q}}`, name2, name),
		fmt.Sprintf(`{"trusted_profile":{"id":%q,"crn":%q,"name":%q}}`, id, name2, name),
		fmt.Sprintf(`{"trusted_profile":{"id":"Profile-x","name":%q}}`, name),
		fmt.Sprintf(`{"trusted_profile":{"id":%q},"trusted_profile":{"name":%q}}`, id, name),
	} {
		s.iam(bearer, body).wantError(400, "invalid_value", "field trusted_profile")
		check(t, s.event("is.metadata.computeresource-token.request"), "trusted-profile")
	}
	for _, body := range []string{`{"trusted_profile":{}}`, `{"trusted_profile":{"id":""}}`, `{"trusted_profile":{"id":"","name":"","crn":""}}`} {
		s.iam(bearer, body).wantError(400, "missing_field", "field trusted_profile.id")
	}
}

func TestWithoutADefaultProfileOneMustBeNamed(t *testing.T) {
	s := start(t)
	s.change(func(i *vpc.Instance) { i.DefaultProfile = nil })
	bearer := s.identityToken()
	for _, body := range []string{"", "{}", "null"} {
		s.iam(bearer, body).wantError(400, "missing_field", "field trusted_profile.id")
		check(t, s.event("is.metadata.computeresource-token.request"), "trusted-profile")
	}
	s.iam(bearer, `{"trusted_profile":{"name":"my-trusted-profile"}}`).want(200)
}

func TestAProfileWithoutALinkIsNotLinked(t *testing.T) {
	s := start(t)
	bearer := s.identityToken()
	s.iam(bearer, "").want(200)
	s.update(func(tx *directory.Tx) { s.d.Links.Delete(tx, s.link) })
	s.iam(bearer, "").wantError(400, "profile_not_linked", "field trusted_profile.id")
	for _, action := range []string{"is.metadata.computeresource-token.request", "iam-identity.computeresource-token.login"} {
		check(t, s.event(action), grant.CheckLink)
	}
	// A link to something else does not help.
	foreign := strings.Replace(s.instance.CRN, s.instance.ID, "0737_"+uuid.NewString(), 1)
	s.update(func(tx *directory.Tx) { s.d.Links.Put(tx, s.newLink(s.profile, foreign, false)) })
	s.iam(bearer, "").wantError(400, "profile_not_linked", "field trusted_profile.id")
}

func TestAProfileThatDoesNotExistHereIsNotFound(t *testing.T) {
	s := start(t)
	bearer := s.identityToken()
	foreign := s.newProfile(s.Other.AccountID, "foreign")
	linked := s.newLink(foreign, s.instance.CRN, false) // not cross-account
	s.update(func(tx *directory.Tx) {
		s.d.Profiles.Put(tx, foreign)
		s.d.Links.Put(tx, linked)
	})
	foreignCRN := "crn:v1:bluemix:public:iam-identity::a/" + s.Other.AccountID + "::profile:" + foreign.ID
	// The answers about a foreign profile and about none at all are alike.
	unknown := "Profile-" + uuid.NewString()
	for _, c := range []struct{ selector, foreign, unknown string }{
		{"id", foreign.ID, unknown},
		{"name", "foreign", "no-such"},
		{"crn", foreignCRN, strings.Replace(foreignCRN, foreign.ID, unknown, 1)},
		{"crn", s.crn("iam-identity", "", "profile", foreign.ID), s.crn("iam-identity", "", "serviceid", unknown)},
		{"crn", "crn:v1:garbage", "not a crn at all"},
		{"id", "../../etc/passwd", "' OR 1=1"},
	} {
		var said []string
		for _, value := range []string{c.foreign, c.unknown} {
			item := s.iam(bearer, fmt.Sprintf(`{"trusted_profile":{%q:%q}}`, c.selector, value)).wantError(400, "not_found", "field trusted_profile."+c.selector)
			said = append(said, strings.ReplaceAll(item["message"].(string), value, "X"))
			check(t, s.event("iam-identity.computeresource-token.login"), grant.CheckProfile)
		}
		if said[0] != said[1] {
			t.Errorf("a foreign profile can be told from none: %q and %q", said[0], said[1])
		}
	}
	linked.CrossAccount = true
	s.update(func(tx *directory.Tx) { s.d.Links.Put(tx, linked) })
	m := s.iam(bearer, fmt.Sprintf(`{"trusted_profile":{"id":%q}}`, foreign.ID)).want(200)
	if c := claims(t, m["access_token"].(string)); c["account"].(map[string]any)["bss"] != s.Other.AccountID {
		t.Errorf("token in account %v", c["account"])
	}
}

func TestADeletedDefaultProfileIsNotFound(t *testing.T) {
	s := start(t)
	bearer := s.identityToken()
	s.update(func(tx *directory.Tx) {
		s.d.Links.Delete(tx, s.link)
		s.d.Profiles.Delete(tx, s.profile)
	})
	s.iam(bearer, "").wantError(400, "not_found", "field trusted_profile.id")
}

func TestTheIAMTokenSaysWhatPutTheProfileOn(t *testing.T) {
	s := start(t)
	c := claims(t, s.iam(s.identityToken(), "").want(200)["access_token"].(string))
	for name, want := range map[string]any{
		"iam_id": "iam-" + s.profile.ID, "id": "iam-" + s.profile.ID, "realmid": "iam", "identifier": s.profile.ID, "sub": s.profile.ID,
		"sub_type": "Profile", "name": s.profile.Name, "grant_type": grant.TypeCRToken, "client_id": "default", "scope": "ibm openid",
	} {
		if c[name] != want {
			t.Errorf("claim %s is %v, want %v", name, c[name], want)
		}
	}
	authn := c["authn"].(map[string]any)
	if authn["sub"] != s.instance.CRN || authn["iam_id"] != "crn-"+s.instance.CRN || authn["sub_type"] != "ComputeResource" || authn["name"] != s.instance.Name {
		t.Errorf("authn %v", authn)
	}
}

func TestAnIdentityTokenIsRecordedBeforeItLeaves(t *testing.T) {
	s := start(t)
	a := s.ask(ask{method: put, path: newBase + "/token?" + version, body: `{"expires_in":600}`, header: http.Header{
		"Metadata-Flavor": {"ibm"}, "Transaction-Id": {"my-own.id:1"}, "User-Agent": {"curl/8"},
	}})
	m := a.want(200)
	if a.header.Get("Transaction-Id") != "my-own.id:1" {
		t.Errorf("transaction id %q", a.header.Get("Transaction-Id"))
	}
	e := s.event("is.metadata.jwt-token.create")
	if e.Outcome != activity.Success || e.Reason.Code != 200 || e.CorrelationID != "my-own.id:1" || e.AccountID != s.Owner.AccountID {
		t.Errorf("event %+v", e)
	}
	if e.Initiator.AuthnID != "crn-"+s.instance.CRN || e.Initiator.AuthnName != "my-instance" || e.Initiator.Credential.Type != "compute-resource" ||
		e.Initiator.Host.Agent != "curl/8" || e.Initiator.Host.Address != "192.0.2.1" {
		t.Errorf("initiator %+v", e.Initiator)
	}
	if e.Target.ID != s.instance.CRN || e.Target.TypeURI != "is.instance/instance" {
		t.Errorf("target %+v", e.Target)
	}
	var data struct {
		JTI       string
		ExpiresIn int `json:"expires_in"`
	}
	if err := json.Unmarshal(e.ResponseData, &data); err != nil {
		t.Fatal(err)
	}
	if data.JTI != claims(t, m["access_token"].(string))["jti"] || data.ExpiresIn != 600 {
		t.Errorf("response data %s", e.ResponseData)
	}
}

func TestAnIAMTokenGivesTwoEventsThatLineUp(t *testing.T) {
	s := start(t)
	const request, login = "is.metadata.computeresource-token.request", "iam-identity.computeresource-token.login"
	bearer := s.identityToken()
	good := s.iam(bearer, "")
	good.want(200)
	bad := s.iam(bearer, `{"trusted_profile":{"name":"no-such"}}`)
	bad.want(400)
	for n, want := range []struct {
		a       *answer
		outcome string
	}{{bad, activity.Failure}, {good, activity.Success}} { // newest first
		id := want.a.header.Get("Transaction-Id")
		r, l := s.events(request)[n], s.events(login)[n]
		if r.CorrelationID != id || l.CorrelationID != id {
			t.Errorf("transaction %s, events have %s and %s", id, r.CorrelationID, l.CorrelationID)
		}
		if r.Outcome != want.outcome || l.Outcome != want.outcome || r.AccountID != s.Owner.AccountID || l.AccountID != s.Owner.AccountID {
			t.Errorf("outcomes %s and %s, want %s", r.Outcome, l.Outcome, want.outcome)
		}
		for _, e := range []activity.Event{r, l} {
			if e.Initiator.AuthnID != "crn-"+s.instance.CRN || e.Initiator.AuthnName != s.instance.Name {
				t.Errorf("%s: initiator %+v", e.Action, e.Initiator)
			}
			if len(e.Trace) == 0 {
				t.Errorf("%s: no trace", e.Action)
			}
		}
	}
	l := s.events(login)[1]
	if l.Initiator.ID != "iam-"+s.profile.ID || l.Initiator.Name != s.profile.Name || l.Initiator.TypeURI != activity.ProfileType {
		t.Errorf("initiator %+v, want the profile", l.Initiator)
	}
	if l.Target.ID != s.crn("iam-identity", "", "profile", s.profile.ID) {
		t.Errorf("target %+v", l.Target)
	}
}

func TestARefusedBearerIsRecordedOnBothSides(t *testing.T) {
	s := start(t)
	a := s.iam("a.b.c", "")
	a.want(401)
	for _, action := range []string{"is.metadata.computeresource-token.request", "iam-identity.computeresource-token.login"} {
		e := s.event(action)
		check(t, e, "token-form")
		if e.Reason.Code != 401 {
			t.Errorf("%s says status %d, the caller got 401", action, e.Reason.Code)
		}
		if e.CorrelationID != a.header.Get("Transaction-Id") || e.AccountID != s.Owner.AccountID {
			t.Errorf("event %+v", e)
		}
	}
}

func TestNoTokenStandsInAnyEvent(t *testing.T) {
	s := start(t)
	m := s.ask(ask{method: put, path: newBase + "/token?" + version, header: flavor, body: `{"nonce":"secret-nonce"}`}).want(200)
	bearer := m["access_token"].(string)
	access := s.iam(bearer, "").want(200)["access_token"].(string)
	s.iam(access, "").want(401)
	s.iam(bearer+"x", "").want(401)
	s.iam(bearer, `{"trusted_profile":{"name":"no-such"}}`).want(400)
	secrets := []string{strings.Split(bearer, ".")[2], strings.Split(access, ".")[2], bearer[:60], access[:60]}
	stored, err := s.Store.Events(t.Context(), store.Query{AccountID: s.Owner.AccountID, Limit: 100})
	if err != nil {
		t.Fatal(err)
	}
	if len(stored) < 8 {
		t.Fatalf("%d events", len(stored))
	}
	for _, e := range stored {
		for _, secret := range secrets {
			if strings.Contains(string(e.Doc), secret) {
				t.Errorf("a token stands in the event %s", e.Doc)
			}
		}
	}
}

// full is a journal that takes nothing.
type full struct{}

func (full) Record(context.Context, ...*activity.Event) error {
	e := fault.New(fault.Unavailable, "service_unavailable", "The log is full.").Because(errors.New("disk at /dev/sda1"))
	e.RetryAfter = 1e9
	return e
}

func TestWithoutADurableRecordNoTokenLeaves(t *testing.T) {
	s := start(t)
	bearer := s.identityToken()
	s.wire(full{})
	for name, a := range map[string]ask{
		"identity token":         {method: put, path: newBase + "/token?" + version, header: flavor},
		"IAM token":              {method: http.MethodPost, path: newBase + "/iam_tokens?" + version, bearer: bearer},
		"refused identity token": {method: put, path: newBase + "/token?" + version},
		"refused IAM token":      {method: http.MethodPost, path: newBase + "/iam_tokens?" + version, bearer: "x"},
		"no bearer":              {method: http.MethodPost, path: newBase + "/iam_tokens?" + version},
	} {
		got := s.ask(a)
		got.wantError(503, "service_unavailable", "")
		if got.header.Get("Retry-After") != "1" {
			t.Errorf("%s: Retry-After %q", name, got.header.Get("Retry-After"))
		}
		if strings.Contains(got.raw, "eyJ") || strings.Contains(got.raw, "sda1") {
			t.Errorf("%s: the answer says too much: %s", name, got.raw)
		}
	}
}
