package catalogapi_test

import (
	"testing"
	"time"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api/apitest"
)

// Whoever describes a service is not thereby one who gives access to it.
func TestWhoGrantsNothingOnAServiceGivesItsRolesNoMoreActions(t *testing.T) {
	e := start(t)
	e.Do(post(library())).Want(201)
	e.Grant(nobody, "iam-access-management", "Administrator")
	policy(e, access.ServiceRoleCRN("", "Reader"))
	burns := func() bool {
		return access.Decide(e.Config.Directory, access.Request{
			Subject: nobody, AccountID: e.Owner.AccountID, Action: "library.book.burn", Time: time.Now(),
			Resource: map[string]string{access.AccountID: e.Owner.AccountID, access.ServiceName: "library"},
		}).Allowed
	}
	wider := with(library(), "service_roles", map[string]any{
		"Reader":      map[string]any{"actions": []string{"library.book.read", "library.book.burn"}},
		"Book Writer": map[string]any{"extends": []string{"Reader"}, "actions": []string{"library.book.write"}},
	})
	as := func(r apitest.Request, who string) apitest.Request { r.As = who; return r }
	wantError(t, e.Do(as(put(wider), nobody)), 403, "not_authorized")
	if burns() {
		t.Error("he has given himself what he could not be given by him")
	}
	e.Do(as(put(with(library(), "description", "Books.")), nobody)).Want(200)
	e.Do(put(wider)).Want(200)
	if !burns() {
		t.Error("the owner's change does not count")
	}
}
