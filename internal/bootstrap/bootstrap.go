// Package bootstrap makes an account with the objects that it begins with: its
// owner with full access, the owner's API key and the default resource group.
// The first account is made when an installation starts for the first time,
// every other one by the installation's operator.
package bootstrap

import (
	"cmp"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"strings"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/identity"
	"tabard.dev/tabard/internal/resource"
)

// Owner is what whoever makes an account is told, as it stands in owner.json.
// Name is the account's. Person and Email are about its owner and are not
// repeated; without them he is called like the account and has a made-up
// address.
type Owner struct {
	Name      string `json:"name"`
	AccountID string `json:"account_id"`
	IAMID     string `json:"iam_id"`
	APIKey    string `json:"apikey"`
	URL       string `json:"url"`

	Person string `json:"-"`
	Email  string `json:"-"`
}

// NewOwner invents an account and its owner's API key.
func NewOwner(name, url string) Owner {
	return Owner{Name: name, URL: url, AccountID: NewAccountID(), IAMID: NewUserID(), APIKey: NewAPIKey()}
}

// NewUserID returns an IAM ID for a user: the realm and 10 random hexadecimal
// digits.
func NewUserID() string { return "IBMid-" + strings.ToUpper(NewAccountID()[:10]) }

// NewAccountID returns 32 random hexadecimal digits.
func NewAccountID() string {
	b := make([]byte, 16)
	rand.Read(b) // never fails, see crypto/rand
	return hex.EncodeToString(b)
}

// NewAPIKey returns a URL-safe secret of 264 random bits, in 44 characters.
func NewAPIKey() string {
	b := make([]byte, 33)
	rand.Read(b) // never fails, see crypto/rand
	return base64.RawURLEncoding.EncodeToString(b)
}

// Origin says who makes an account and in which request. The zero Origin is the
// installation's first start, which counts as the owner's own doing.
type Origin struct {
	Initiator   activity.Initiator
	Transaction string
}

// Account stages the account of the first start.
func Account(tx *directory.Tx, d *directory.Directory, names crn.Names, o Owner, keyHash string) {
	tx.By = o.IAMID
	NewAccount(tx, d, names, o, keyHash, Origin{})
}

// NewAccount stages an account with its owner, and the event of it in the new
// account's own log.
func NewAccount(tx *directory.Tx, d *directory.Directory, names crn.Names, o Owner, keyHash string, from Origin) {
	person := cmp.Or(o.Person, o.Name)
	d.Accounts.Put(tx, &identity.Account{ID: o.AccountID, Name: o.Name, OwnerID: o.IAMID})
	d.Users.Put(tx, &identity.User{
		IAMID: o.IAMID, AccountID: o.AccountID, Name: person,
		Email: cmp.Or(o.Email, "owner@"+o.AccountID[:8]+".tabard.internal"),
	})
	d.APIKeys.Put(tx, &identity.APIKey{
		ID: "ApiKey-" + uuid.NewString(), AccountID: o.AccountID, IAMID: o.IAMID, Name: "owner",
		Description: "Made with the account; replace it and delete it.", Hash: keyHash,
	})
	d.ResourceGroups.Put(tx, &resource.Group{ID: NewAccountID(), AccountID: o.AccountID, Name: "Default", Default: true})
	for _, p := range ownerPolicies(d.Builtin(), o) {
		d.Policies.Put(tx, p)
	}
	if from.Initiator.ID == "" {
		from.Initiator = activity.Initiator{ID: o.IAMID, Name: person, TypeURI: activity.UserType}
	}
	if from.Transaction == "" {
		from.Transaction = strings.ReplaceAll(uuid.NewString(), "-", "")
	}
	tx.Record(&activity.Event{
		ID: uuid.NewString(), Time: activity.Time{Time: tx.Now}, Action: "iam-identity.account.create",
		Outcome: activity.Success, Severity: activity.Critical, AccountID: o.AccountID,
		Message:       fmt.Sprintf("IAM Identity Service: create account %s", o.Name),
		CorrelationID: from.Transaction,
		LogSourceCRN:  names.Of("iam-identity", "global", o.AccountID, "", "", "").String(),
		Initiator:     from.Initiator,
		Target: activity.Target{
			ID:   names.Of("iam-identity", "", o.AccountID, "", "account", o.AccountID).String(),
			Name: o.Name, TypeURI: "iam-identity/account",
		},
		Observer: activity.Observer{Name: "ActivityTracker"},
		Reason:   activity.Reason{Code: 201, Type: "Created"},
	})
}

// ownerPolicies give the owner everything, in the same policies that anybody
// else would need: there is no way around Decide.
func ownerPolicies(c *access.Catalog, o Owner) []*access.Policy {
	common := []string{
		access.PlatformRoleCRN("Administrator"), access.ServiceRoleCRN("", "Manager"), access.ServiceRoleCRN("", access.DecisionPoint),
	}
	policies := []*access.Policy{
		ownerPolicy(o, access.ServiceType, access.KindService, common...),
		ownerPolicy(o, access.ServiceType, access.KindPlatform, common...),
	}
	for _, s := range c.Services() {
		_, own := c.RolesOf(s.Name)
		var special []string
		for _, r := range own {
			if r.Service == s.Name {
				special = append(special, r.CRN)
			}
		}
		if len(special) > 0 {
			policies = append(policies, ownerPolicy(o, access.ServiceName, s.Name, special...))
		}
	}
	return policies
}

func ownerPolicy(o Owner, key, value string, roles ...string) *access.Policy {
	return &access.Policy{
		ID: uuid.NewString(), AccountID: o.AccountID, API: 1, Type: access.TypeAccess, State: access.Active,
		Description: "The account owner's access.",
		Subject:     []access.Attribute{{Key: access.IAMID, Operator: access.StringEquals, Value: access.Text(o.IAMID)}},
		Resource: []access.Attribute{
			{Key: key, Operator: access.StringEquals, Value: access.Text(value)},
			{Key: access.AccountID, Operator: access.StringEquals, Value: access.Text(o.AccountID)},
		},
		Roles: roles,
	}
}
