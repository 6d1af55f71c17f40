// Package iamidentity is the IAM Identity API v1: trusted profiles with their
// claim rules, links and identities, service IDs and their groups, API keys, the
// account's settings, limits and reports, and preferences
// (reference/iam-identity.md section 4). It decodes, checks and encodes. Which
// compute resource may put on a profile is decided by package trust, and who
// gets a token for it by package grant.
package iamidentity

import (
	"net/http"
	"strings"
	"time"

	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/grant"
	"tabard.dev/tabard/internal/token"
)

// service is the name of this service in CRNs and policies.
const service = "iam-identity"

// Bounds on texts, in characters. The reference gives none; these leave room
// for every published client.
const (
	maxName        = 250
	maxDescription = 1000
	maxEmail       = 254
)

// routes are the handlers of the family.
type routes struct {
	*api.Family
	sealer *token.Sealer
}

// Register adds the routes. The sealer hashes API keys, and encrypts the values
// of those that are to be stored.
func Register(mux *http.ServeMux, cfg *api.Config, sealer *token.Sealer) {
	r := &routes{
		Family: &api.Family{Config: cfg, Mux: mux, Service: "IAM Identity Service", Shape: shape},
		sealer: sealer,
	}
	r.registerProfiles()
	r.registerRules()
	r.registerLinks()
	r.registerIdentities()
	r.registerServiceIDs()
	r.registerServiceIDGroups()
	r.registerAPIKeys()
	r.registerLimits()
	r.registerTemplates()
	r.registerSettings()
	r.registerReports()
	r.registerMFA()
	r.registerPreferences()
}

// collection returns the patterns of a collection: published clients ask for
// it with and without a trailing slash (reference/iam-identity.md section 4.1).
func collection(method, path string) []string {
	return []string{method + " " + path, method + " " + path + "/{$}"}
}

// failure is the error body (reference/iam-identity.md section 4.1). Its list
// is never empty, because a published client does not survive that.
type failure struct {
	Trace      string         `json:"trace"`
	Errors     []failureEntry `json:"errors"`
	StatusCode int            `json:"status_code"`
}

type failureEntry struct {
	Code        string `json:"code"`
	MessageCode string `json:"message_code"`
	Message     string `json:"message"`
	Details     string `json:"details,omitempty"`
}

// messageCodes are the codes that public text shows for these situations
// (reference/iam-identity.md section 1.6), and for the kinds of fault that it
// shows none for, ones of ours that repeat the status.
var messageCodes = map[fault.Kind]string{
	fault.Internal:        "BXNIM0500E",
	fault.Invalid:         "BXNIM0109E",
	fault.Unauthenticated: "BXNIM0308E",
	fault.Denied:          "BXNIM0513E",
	fault.NotFound:        "BXNIM0102E",
	fault.Conflict:        "BXNIM0409E",
	fault.Stale:           "BXNIM0409E",
	fault.TooLarge:        "BXNIM0413E",
	fault.Unsupported:     "BXNIM0109E",
	fault.Limited:         "BXNIM0429E",
	fault.Unavailable:     "BXNIM0503E",
}

func shape(c *api.Call, f *fault.Error) (int, any) {
	status := grant.StatusOf(f.Kind)
	entry := failureEntry{Code: f.Code, MessageCode: messageCodes[f.Kind], Message: f.Message, Details: f.Detail}
	if f.Kind == fault.Unauthenticated {
		entry.Code = "invalid_access_token"
		if f.Code != "token_missing" {
			entry.MessageCode = grant.CodeInvalidToken
		}
	}
	return status, failure{
		Trace:      api.TransactionID(c.R.Context()),
		Errors:     []failureEntry{entry},
		StatusCode: status,
	}
}

// stamp formats a time as this API does: to the minute
// (reference/iam-identity.md section 4.1).
func stamp(t time.Time) string { return t.UTC().Format("2006-01-02T15:04+0000") }

// checkAccount demands that an account is the caller's. An account that does
// not exist and one that is somebody else's are refused in the same words.
func checkAccount(c *api.Call, id string) error {
	switch {
	case id == "":
		return api.Invalid("account_id is required.").On("account_id")
	case !crn.ValidAccountID(id):
		return api.Invalid("account_id must be 32 lower-case hexadecimal digits.").On("account_id")
	case id != c.Account():
		return fault.New(fault.Denied, "not_authorized", "%s is not authorized in account %s.", c.Caller.IAMID, id)
	}
	return nil
}

func checkName(field, s string) error {
	if strings.TrimSpace(s) == "" {
		return api.Invalid("%s is required and must not be empty.", field).On(field)
	}
	return checkText(field, s, maxName)
}

func checkText(field, s string, limit int) error {
	if !api.Printable(s, limit) {
		return api.Invalid("%s must have at most %d characters and no control characters.", field, limit).On(field)
	}
	return nil
}

// checkOptional checks the fields of a partial update: an absent one keeps its
// value (reference/iam-identity.md section 4.1).
func checkOptional(name, description *string) error {
	if name != nil {
		if err := checkName("name", *name); err != nil {
			return err
		}
	}
	if description != nil {
		return checkText("description", *description, maxDescription)
	}
	return nil
}

// set changes a value unless the client left it out.
func set[T any](into, from *T) {
	if from != nil {
		*into = *from
	}
}

// listed adds a list to an event's data when it has any entries.
func listed(data map[string]any, name string, ids []string) {
	if len(ids) > 0 {
		data[name] = ids
	}
}
