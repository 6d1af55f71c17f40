package directory

import (
	"reflect"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/identity"
)

// Owned is an object and the account that it is in. AccountID is "" for what
// belongs to the installation.
type Owned struct {
	Kind, ID, CRN, AccountID string
}

// names are the CRNs of objects that do not have their own with them.
var names = map[string]struct{ service, resourceType string }{
	"account": {"iam-identity", "account"}, "profile": {"iam-identity", "profile"}, "service-id": {"iam-identity", "serviceid"},
	"api-key": {"iam-identity", "apikey"}, "identity-provider": {"iam-identity", "idp"}, "policy": {"iam-access-management", "policy"},
	"access-group": {"iam-groups", "access-group"}, "resource-group": {"resource-controller", "resource-group"}, KindHost: {"host", "host"},
}

// Name returns the object's CRN, or its id where it has none.
func (o Owned) Name(n crn.Names) string {
	if o.CRN != "" {
		return o.CRN
	}
	if of, ok := names[o.Kind]; ok {
		return n.Of(of.service, "", o.AccountID, "", of.resourceType, o.ID).String()
	}
	return o.ID
}

// Owner finds what an id, an IAM ID or a CRN denotes, in whatever account. It is
// for the log of that account; no answer may depend on it.
func (d *Directory) Owner(id string) (Owned, bool) {
	if name, err := crn.Parse(id); err == nil {
		account := name.AccountID()
		if _, ok := d.Accounts.Get(account); !ok {
			return Owned{}, false
		}
		if name.Resource != "" {
			if o, ok := d.owner(name.Resource); ok && o.AccountID == account {
				return o, true
			}
		}
		if o, ok := d.owner(name.Instance); ok && o.AccountID == account {
			return o, true
		}
		return d.owner(account)
	}
	if o, ok := d.owner(id); ok {
		return o, true
	}
	return d.owner(crn.BareID(id))
}

func (d *Directory) owner(id string) (Owned, bool) {
	if id == "" {
		return Owned{}, false
	}
	for kind, t := range d.tables {
		if !owning[kind] {
			continue
		}
		if o, ok := t.owner(id); ok {
			return o, true
		}
	}
	return Owned{}, false
}

// owning are the kinds of objects that requests name by ids that no account
// chooses.
var owning = map[string]bool{
	"account": true, "profile": true, "service-id": true, "api-key": true, "policy": true, "access-group": true, "service-id-group": true,
	"group-rule": true, "resource-group": true, "resource-instance": true, "resource-key": true, "reclamation": true,
	"cluster": true, "cluster-group": true, "workload-issuer": true, "identity-provider": true, kindCustomRole: true, KindHost: true,
	"vpc": true, "subnet": true, "ssh-key": true, KindInstance: true, "security-group": true, KindImage: true, "floating-ip": true,
}

func (t *Table[T]) owner(id string) (Owned, bool) {
	row, ok := t.Get(id)
	if !ok {
		return Owned{}, false
	}
	v := reflect.ValueOf(row).Elem()
	o := Owned{Kind: t.kind, ID: id, AccountID: text(v, "AccountID"), CRN: text(v, "CRN")}
	if t.kind == "account" {
		o.AccountID = id
	}
	return o, true
}

func text(v reflect.Value, field string) string {
	if f := v.FieldByName(field); f.IsValid() && f.Kind() == reflect.String {
		return f.String()
	}
	return ""
}

// OwnerOf returns the account of an object that a transaction changes, or "" for
// what belongs to the installation.
func OwnerOf(c activity.Changed) string {
	obj := c.Next
	if obj == nil {
		obj = c.Old
	}
	v := reflect.Indirect(reflect.ValueOf(obj))
	if a, ok := v.Addr().Interface().(*identity.Account); ok {
		return a.ID
	}
	return text(v, "AccountID")
}

// LinkedProfile returns the profile of a link that a transaction changes.
func (d *Directory) LinkedProfile(c activity.Changed) (*identity.Profile, bool) {
	l, ok := c.Old.(*identity.Link)
	if !ok {
		return nil, false
	}
	return d.Profiles.Get(l.ProfileID)
}
