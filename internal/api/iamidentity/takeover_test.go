package iamidentity_test

import (
	"fmt"
	"testing"

	"tabard.dev/tabard/internal/api/apitest"
)

// An invitation holds each address against each pattern of the account.
func TestThePatternsOfAllRealmsTogetherAreBounded(t *testing.T) {
	e := start(t)
	path := "/v1/accounts/" + e.Owner.AccountID + "/settings/identity"
	realm := func(n, patterns int) map[string]any {
		list := []string{}
		for i := range patterns {
			list = append(list, fmt.Sprintf("*@%d.example", i))
		}
		return map[string]any{"realm_id": fmt.Sprintf("realm-%d", n), "restrict_invitation": true, "invitation_email_allow_patterns": list}
	}
	put := func(realms ...any) *apitest.Response {
		return e.Do(apitest.Request{Method: "PUT", Path: path, Body: map[string]any{"restrict_user_domains": realms}, Header: map[string]string{"If-Match": "*"}})
	}
	put(realm(1, 100)).Want(200)
	put(realm(2, 100)).Want(200)
	put(realm(3, 1)).Want(400)
	put(map[string]any{"realm_id": "realm-1"}).Want(200)
	put(realm(3, 1)).Want(200)
}
