package accounts_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/api/apitest"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/identity"
)

// Whoever chooses the keys of an identity provider can log in as each of its
// users, the account's administrators among them.
func TestOnlyAnAdministratorChoosesWhoseKeysVouchForUsers(t *testing.T) {
	e := start(t)
	id := addProvider(e)
	path := "/v1/idps/" + id
	anyTag := map[string]string{"If-Match": "*"}
	for _, role := range []string{"Editor", "Operator"} {
		who := "IBMid-" + strings.ToUpper(role)
		e.Grant(who, "iam-identity", role)
		for _, change := range []map[string]any{
			{"jwks": keySet(t)}, {"jwks": nil}, {"audience": "mine"}, {"ca": newIssuer(t).ca},
		} {
			e.Do(apitest.Request{Method: "PUT", Path: path, As: who, Body: change, Header: anyTag}).Want(403)
		}
		e.Do(apitest.Request{Method: "PUT", Path: path, As: who, Body: map[string]any{"name": "renamed by " + role, "enabled": role == "Operator"}, Header: anyTag}).Want(200)
	}
	e.Do(apitest.Request{Method: "POST", Path: "/v1/idps", As: "IBMid-OPERATOR", Body: provider(t, "mine")}).Want(403)
	// Removed and registered again, it would have the same issuer and other keys.
	e.Do(apitest.Request{Method: "DELETE", Path: path, As: "IBMid-OPERATOR"}).Want(204)
	e.Do(apitest.Request{Method: "POST", Path: "/v1/idps", As: "IBMid-OPERATOR", Body: provider(t, "corp")}).Want(403)

	e.Grant("IBMid-ADMIN", "iam-identity", "Administrator")
	id = e.Do(apitest.Request{Method: "POST", Path: "/v1/idps", As: "IBMid-ADMIN", Body: provider(t, "corp")}).Want(201)["id"].(string)
	e.Do(apitest.Request{Method: "PUT", Path: "/v1/idps/" + id, As: "IBMid-ADMIN", Body: map[string]any{"jwks": keySet(t)}, Header: anyTag}).Want(200)
}

func TestAUserWhoHasLoggedInGetsNoFirstKeyAgain(t *testing.T) {
	e := start(t)
	e.Grant("IBMid-ADMIN", "iam-identity", "Administrator")
	id := invite(e, "ada@example.com")
	first := apitest.Request{Method: "POST", Path: users(e) + "/" + id + "/apikey", As: "IBMid-ADMIN"}
	key := e.Do(first).Want(201)["id"].(string)
	e.Usage.Login(&activity.Event{
		Action: "iam-identity.user-apikey.login", Outcome: activity.Success, AccountID: e.Owner.AccountID,
		Time: activity.Time{Time: time.Now()}, Initiator: activity.Initiator{ID: id}, Target: activity.Target{ID: "crn:v1:x:" + key},
	})
	// The administrator deletes the user's key, as he may, and asks for another.
	update(e, func(tx *directory.Tx) {
		k, _ := e.Config.Directory.APIKeys.Get(key)
		e.Config.Directory.APIKeys.Delete(tx, k)
	})
	wantError(t, e.Do(first), 409, "not_invited")
}

func TestAnInvitationIsHeldAgainstAsManyPatternsAsTheSettingsTake(t *testing.T) {
	e := start(t)
	settings(e, func(s *identity.Settings) {
		for range 2 { // as many as the settings take
			d := identity.UserDomain{Realm: "r", Restrict: true}
			for i := range 100 {
				d.Patterns = append(d.Patterns, fmt.Sprintf("%s%d@x", strings.Repeat("**a*b", 45), i))
			}
			s.UserDomains = append(s.UserDomains, d)
		}
		s.UserDomains[1].Patterns[99] = "**" // every address walks all the others first
	})
	var list []string
	for i := range 3 {
		list = append(list, fmt.Sprintf("%s%d@%s.example", strings.Repeat("ab", 30), i, strings.Repeat("ab.", 30)+"a"))
	}
	e.Do(post(users(e), inviting(list...))).Want(202)
}
