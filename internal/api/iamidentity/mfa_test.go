package iamidentity_test

import (
	"context"
	"net/http"
	"reflect"
	"strings"
	"testing"
	"time"

	"tabard.dev/tabard/internal/api/apitest"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/identity"
)

const mfaReports = "/v1/mfa/accounts/ACCOUNT/report"

func (e env) mfaStatus(iamID string) *apitest.Response {
	return e.Do(apitest.Request{Path: e.inAccount("/v1/mfa/accounts/ACCOUNT/status?iam_id=") + iamID})
}

func TestNobodyIsSaidToHaveASecondFactor(t *testing.T) {
	e := start(t)
	e.user("IBMid-ANN", "ann@example.com")
	d := e.Config.Directory
	must(t, d.Update(context.Background(), e.Owner.IAMID, func(tx *directory.Tx) error {
		d.Users.Put(tx, &identity.User{IAMID: "IBMid-FED", AccountID: e.Owner.AccountID, Name: "Fed", Issuer: "https://idp.example.com", Subject: "fed"})
		return nil
	}))
	none := object{"required": false, "enrolled": false}
	for _, c := range []struct {
		account, own, user string
		complies           bool
	}{
		{"NONE", "", "IBMid-ANN", true},
		{"NONE_NO_ROPC", "", "IBMid-ANN", true},
		{"TOTP", "", "IBMid-ANN", false},
		{"TOTP", "", "IBMid-FED", true},
		{"TOTP4ALL", "", "IBMid-FED", false},
		{"LEVEL1", "", "IBMid-ANN", false},
		{"LEVEL3", "NONE", "IBMid-ANN", true},
		{"NONE", "LEVEL2", "IBMid-ANN", false},
	} {
		users := []object{}
		if c.own != "" {
			users = append(users, object{"iam_id": c.user, "mfa": c.own})
		}
		e.put(e.settingsPath(), "*", object{"mfa": c.account, "user_mfa": users}).Want(http.StatusOK)
		idBased := object{"trait_account_default": c.account, "trait_effective": c.account, "complies": c.complies}
		if c.own != "" {
			idBased["trait_user_specific"], idBased["trait_effective"] = c.own, c.own
		}
		want := object{
			"iam_id": c.user, "effective_mfa_type": "id_based_mfa", "id_based_mfa": idBased,
			"account_based_mfa": object{"security_questions": none, "totp": none, "verisign": none, "complies": true},
		}
		if got := e.mfaStatus(c.user).Want(http.StatusOK); !reflect.DeepEqual(got, want) {
			t.Errorf("%+v: %v, want %v", c, got, want)
		}
		path := e.report(mfaReports)
		e.later(3 * time.Second)
		found := false
		users2, _ := e.get(path)["users"].([]any)
		for _, u := range users2 {
			o, _ := u.(object)
			found = found || o["iam_id"] == c.user && reflect.DeepEqual(o["id_based_mfa"], any(idBased)) && o["username"] != nil && o["account_based_mfa"] != nil
		}
		if !found || len(users2) != 3 {
			t.Errorf("%+v: report with %v", c, users2)
		}
		e.later(0)
	}
}

func TestTheMFAStatusIsOfAUserOfTheAccount(t *testing.T) {
	e := start(t)
	p := e.profile("p")
	for _, id := range []string{e.Other.IAMID, "IBMid-NOBODY", text(p, "iam_id"), "x", "%00", e.Other.AccountID + "%2f" + e.Other.IAMID} {
		e.mfaStatus(id).Want(http.StatusNotFound)
	}
	e.mfaStatus("").Want(http.StatusBadRequest)
}

func TestAnMFAReportNamesItsAccountAndTime(t *testing.T) {
	e := start(t)
	path := e.report(mfaReports + "?type=mfa_status")
	e.Do(apitest.Request{Path: path}).Want(http.StatusNoContent)
	e.later(3 * time.Second)
	got := e.get(path)
	if got["account_id"] != e.Owner.AccountID || got["created_by"] != e.Owner.IAMID || !strings.HasSuffix(path, text(got, "reference")) || text(got, "report_time") == "" {
		t.Error(got)
	}
	e.Do(apitest.Request{Path: e.inAccount(mfaReports) + "/1234567890"}).Want(http.StatusNotFound)
}
