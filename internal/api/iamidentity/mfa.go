package iamidentity

import (
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/identity"
)

// mfaNone and mfaNoPassword are the traits that ask for no second factor. The
// latter forbids logins with a password alone, and there are none here.
const (
	mfaNone       = "NONE"
	mfaNoPassword = "NONE_NO_ROPC"
	mfaTOTP       = "TOTP" // users of an identity provider of their own are exempt
)

// mfaTraits are the demands that an account can make on logins
// (reference/iam-identity.md section 4.8).
var mfaTraits = []string{mfaNone, mfaNoPassword, mfaTOTP, "TOTP4ALL", "LEVEL1", "LEVEL2", "LEVEL3"}

func (r *routes) registerMFA() {
	const path = "/v1/mfa/accounts/{account_id}"
	api.Read(r.Family, "GET "+path+"/status", "iam-identity.mfa-status.get", r.loadMFAUser, r.showMFAStatus)
	r.registerReport(path+"/report", mfaReport)
}

var mfaReport = reportKind{
	kind:    identity.ReportMFA,
	prepare: func(*api.Call, *identity.Report) error { return nil },
	compute: (*routes).computeMFAReport,
}

// enrollment is what is known of a user's second factors. This server checks
// none, so that nobody is enrolled in one, and a user complies with exactly
// those demands that ask for none.
type enrollment struct {
	EffectiveType string     `json:"effective_mfa_type"`
	IDBased       idMFA      `json:"id_based_mfa"`
	AccountBased  accountMFA `json:"account_based_mfa"`
}

type idMFA struct {
	AccountDefault string `json:"trait_account_default"`
	UserSpecific   string `json:"trait_user_specific,omitempty"`
	Effective      string `json:"trait_effective"`
	Complies       bool   `json:"complies"`
}

// accountMFA are the factors of classic infrastructure accounts, which do
// not exist here.
type accountMFA struct {
	SecurityQuestions factor `json:"security_questions"`
	TOTP              factor `json:"totp"`
	Verisign          factor `json:"verisign"`
	Complies          bool   `json:"complies"`
}

type factor struct {
	Required bool `json:"required"`
	Enrolled bool `json:"enrolled"`
}

func enrollmentOf(s *identity.Settings, u *identity.User) enrollment {
	e := enrollment{EffectiveType: "id_based_mfa", AccountBased: accountMFA{Complies: true}}
	e.IDBased = idMFA{AccountDefault: s.MFA, Effective: s.MFA}
	for _, own := range s.UserMFA {
		if own.IAMID == u.IAMID {
			e.IDBased.UserSpecific, e.IDBased.Effective = own.MFA, own.MFA
		}
	}
	switch e.IDBased.Effective {
	case mfaNone, mfaNoPassword:
		e.IDBased.Complies = true
	case mfaTOTP:
		e.IDBased.Complies = u.Issuer != ""
	}
	return e
}

type mfaStatusView struct {
	IAMID string `json:"iam_id"`
	enrollment
}

func (r *routes) loadMFAUser(c *api.Call) (*identity.User, api.Target, error) {
	target := api.Target{Resource: accountResource(c), TypeURI: "iam-identity/mfa-status"}
	if err := inOwnAccount(c); err != nil {
		return nil, target, err
	}
	id := c.R.URL.Query().Get("iam_id")
	if id == "" {
		return nil, target, api.Invalid("The parameter iam_id is required.").OnParameter("iam_id", "")
	}
	u, ok := r.Directory.Users.Get(directory.UserKey(c.Account(), id))
	if !ok {
		return nil, target, api.NotFound("user", id)
	}
	target.Name = u.Name
	return u, target, nil
}

func (r *routes) showMFAStatus(c *api.Call, u *identity.User) (api.Reply, error) {
	return api.Reply{Body: mfaStatusView{u.IAMID, enrollmentOf(r.Directory.SettingsOf(c.Account()), u)}}, nil
}

// mfaReportView is the report over all users (reference/iam-identity.md
// section 4.9).
type mfaReportView struct {
	CreatedBy string          `json:"created_by"`
	Reference string          `json:"reference"`
	Time      string          `json:"report_time"`
	AccountID string          `json:"account_id"`
	Users     []mfaReportUser `json:"users"`
}

type mfaReportUser struct {
	IAMID    string `json:"iam_id"`
	Name     string `json:"name,omitempty"`
	Username string `json:"username"`
	Email    string `json:"email,omitempty"`
	enrollment
}

func (r *routes) computeMFAReport(report *identity.Report) any {
	v := mfaReportView{
		CreatedBy: report.CreatedBy, Reference: report.ID, Time: stamp(report.To), AccountID: report.AccountID, Users: []mfaReportUser{},
	}
	settings := r.Directory.SettingsOf(report.AccountID)
	for _, u := range sorted(r.Directory.UsersByAccount.Get(report.AccountID), func(u *identity.User) string { return u.IAMID }) {
		v.Users = append(v.Users, mfaReportUser{u.IAMID, u.Name, userName(u), u.Email, enrollmentOf(settings, u)})
	}
	return v
}
