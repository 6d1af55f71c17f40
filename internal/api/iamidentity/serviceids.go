package iamidentity

import (
	"net/http"
	"slices"
	"strings"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/identity"
)

// Actions and events of service IDs.
const (
	serviceIDGet    = "iam-identity.serviceid.get"
	serviceIDUpdate = "iam-identity.serviceid.update"

	serviceIDUpdated = "iam-identity.account-serviceid.update"
)

// showGroupID is the parameter that lets an answer tell the group.
const showGroupID = "show_group_id"

// maxInstances bounds unique_instance_crns; the bound is ours.
const maxInstances = 100

func (r *routes) registerServiceIDs() {
	for _, p := range collection("POST", "/v1/serviceids") {
		api.Change(r.Family, p, "iam-identity.serviceid.create", "iam-identity.account-serviceid.create", r.newServiceID, r.createServiceID)
	}
	for _, p := range collection("GET", "/v1/serviceids") {
		api.List(r.Family, p, serviceIDGet, r.listServiceIDs)
	}
	const path = "/v1/serviceids/{serviceid}"
	api.Read(r.Family, "GET "+path, serviceIDGet, r.loadServiceID, r.showServiceID)
	api.Change(r.Family, "PUT "+path, serviceIDUpdate, serviceIDUpdated, r.changedServiceID, r.updateServiceID)
	api.Change(r.Family, "DELETE "+path, "iam-identity.serviceid.delete", "iam-identity.account-serviceid.delete", loading[api.None](r.loadServiceID), r.deleteServiceID)
	api.Change(r.Family, "POST "+path+"/lock", serviceIDUpdate, serviceIDUpdated, loading[api.None](r.loadServiceID), r.lockServiceID(true))
	api.Change(r.Family, "DELETE "+path+"/lock", serviceIDUpdate, serviceIDUpdated, loading[api.None](r.loadServiceID), r.lockServiceID(false))
}

// serviceIDBody is the body of create and update (reference/iam-identity.md
// section 4.6).
type serviceIDBody struct {
	AccountID   string    `json:"account_id"`
	GroupID     string    `json:"group_id"`
	Name        *string   `json:"name"`
	Description *string   `json:"description"`
	Instances   *[]string `json:"unique_instance_crns"`
	APIKey      *keyBody  `json:"apikey"`
}

func (b *serviceIDBody) check() error {
	if err := checkOptional(b.Name, b.Description); err != nil {
		return err
	}
	if b.Instances == nil {
		return nil
	}
	if len(*b.Instances) > maxInstances {
		return api.Invalid("unique_instance_crns must have at most %d entries.", maxInstances).On("unique_instance_crns")
	}
	for _, s := range *b.Instances {
		if _, err := crn.Parse(s); err != nil {
			return api.Invalid("unique_instance_crns has an entry that is %v.", err).On("unique_instance_crns")
		}
	}
	return nil
}

func (b *serviceIDBody) apply(s *identity.ServiceID) {
	set(&s.Name, b.Name)
	set(&s.Description, b.Description)
	set(&s.Instances, b.Instances)
}

type serviceIDView struct {
	ID          string   `json:"id"`
	IAMID       string   `json:"iam_id"`
	EntityTag   string   `json:"entity_tag"`
	CRN         string   `json:"crn"`
	Locked      bool     `json:"locked"`
	CreatedAt   string   `json:"created_at"`
	ModifiedAt  string   `json:"modified_at"`
	AccountID   string   `json:"account_id"`
	GroupID     string   `json:"group_id,omitempty"` // with show_group_id only
	Name        string   `json:"name"`
	Description string   `json:"description,omitempty"`
	Instances   []string `json:"unique_instance_crns,omitempty"`
	APIKey      *keyView `json:"apikey,omitempty"` // with its value, on create only
	extras
}

func (r *routes) serviceIDView(s *identity.ServiceID, showGroup bool) serviceIDView {
	v := serviceIDView{
		ID: s.ID, IAMID: crn.IAMID(s.ID), EntityTag: s.Tag(s.ID), CRN: r.serviceIDCRN(s), Locked: s.Locked,
		CreatedAt: stamp(s.CreatedAt), ModifiedAt: stamp(s.ModifiedAt), AccountID: s.AccountID,
		Name: s.Name, Description: s.Description, Instances: s.Instances,
	}
	if showGroup {
		v.GroupID = s.GroupID
	}
	return v
}

func (r *routes) serviceIDCRN(s *identity.ServiceID) string {
	return r.Names.Of(service, "", s.AccountID, "", "serviceid", s.ID).String()
}

func serviceIDResource(c *api.Call, id string) map[string]string {
	return c.InAccount(service, access.ResourceType, "serviceid", access.Resource, id)
}

func (r *routes) serviceIDTarget(c *api.Call, s *identity.ServiceID) api.Target {
	return api.Target{Resource: serviceIDResource(c, s.ID), CRN: r.serviceIDCRN(s), Name: s.Name, TypeURI: "iam-identity/account-serviceid"}
}

func (r *routes) loadServiceID(c *api.Call) (*identity.ServiceID, api.Target, error) {
	id := c.R.PathValue("serviceid")
	s, ok := r.Directory.ServiceIDs.Get(id)
	if !ok || s.AccountID != c.Account() {
		return nil, api.Target{TypeURI: "iam-identity/account-serviceid"}, api.NotFound("service ID", id)
	}
	return s, r.serviceIDTarget(c, s), nil
}

func (r *routes) showServiceID(c *api.Call, s *identity.ServiceID) (api.Reply, error) {
	showGroup, err := flag(c, showGroupID)
	if err != nil {
		return api.Reply{}, err
	}
	v := r.serviceIDView(s, showGroup)
	v.extras, err = r.extras(c, v.CRN, directory.UserKey(c.Account(), v.IAMID), &s.Meta)
	return api.Reply{Body: v, ETag: v.EntityTag}, err
}

func (r *routes) newServiceID(c *api.Call, b *serviceIDBody) (*identity.ServiceID, api.Target, error) {
	target := api.Target{Resource: serviceIDResource(c, ""), TypeURI: "iam-identity/account-serviceid"}
	// Unless the account opens it to its users, this needs the action: so it is
	// where nothing is set, too.
	target.Owner = r.openTo(c, r.Directory.SettingsOf(c.Account()).RestrictCreateServiceID == identity.NotRestricted)
	if b.Name == nil {
		b.Name = new(string)
	}
	if err := b.check(); err != nil {
		return nil, target, err
	}
	target.Name = *b.Name
	if b.APIKey != nil {
		err := b.APIKey.check(r.Now())
		if err == nil {
			err = b.APIKey.checkHolder(keysOfServiceIDs)
		}
		if err != nil {
			return nil, target, err
		}
	}
	if _, err := flag(c, showGroupID); err != nil {
		return nil, target, err
	}
	if err := checkAccount(c, b.AccountID); err != nil {
		return nil, target, err
	}
	if b.GroupID != "" {
		if g, ok := r.Directory.ServiceIDGroups.Get(b.GroupID); !ok || g.AccountID != c.Account() {
			return nil, target, api.NotFound("service ID group", b.GroupID)
		}
	}
	s := &identity.ServiceID{ID: crn.ServiceIDPrefix + uuid.NewString(), AccountID: b.AccountID, GroupID: b.GroupID, Locked: headerTrue(c, "Entity-Lock")}
	b.apply(s)
	return s, target, nil
}

// createServiceID makes a service ID and, when asked to, its first API key,
// for which the caller needs the right to create keys as well.
func (r *routes) createServiceID(c *api.Call, tx *directory.Tx, b *serviceIDBody, s *identity.ServiceID) (api.Reply, api.Target, error) {
	target := r.serviceIDTarget(c, s)
	n := r.Directory.ServiceIDsByAccount.Len(s.AccountID)
	if n >= maxServiceIDs {
		return api.Reply{}, target, atLimit("The account has %d service IDs, which is the limit.", n)
	}
	data := map[string]any{"serviceid": s.ID, "iam_id": crn.IAMID(s.ID), "lock": s.Locked, "group_id": s.GroupID}
	nearLimit(data, n+1, maxServiceIDs)
	showGroup, err := flag(c, showGroupID)
	if err != nil {
		return api.Reply{}, target, err
	}
	r.Directory.ServiceIDs.Put(tx, s)
	body := r.serviceIDView(s, showGroup)
	if b.APIKey != nil {
		if err := c.Authorize(keysOfServiceIDs.create, target.Resource); err != nil {
			return api.Reply{}, target, err
		}
		key := b.APIKey.key(s.AccountID, crn.IAMID(s.ID))
		secret, err := r.putNewKey(tx, key, b.APIKey)
		if err != nil {
			return api.Reply{}, target, err
		}
		v := r.keyView(key)
		v.APIKey = secret
		body.APIKey = &v
		data["apikey_id"] = key.ID
	}
	return api.Reply{Status: http.StatusCreated, Body: body, ETag: s.Tag(s.ID), ResponseData: data}, target, nil
}

// listServiceIDs shows the service IDs of one group or, without a group_id, of
// all of them and of none: nobody overlooks an identity because of its group.
func (r *routes) listServiceIDs(c *api.Call, may func(map[string]string) bool) (api.Reply, error) {
	v, err := parseView(c, true, "name", "description", "created_at", "modified_at")
	if err != nil {
		return api.Reply{}, err
	}
	showGroup, err := readFlag(showGroupID, v.query.Get(showGroupID))
	if err != nil {
		return api.Reply{}, err
	}
	group := v.query.Get("group_id")
	seen := slices.DeleteFunc(r.Directory.ServiceIDsByAccount.Get(c.Account()), func(s *identity.ServiceID) bool {
		return group != "" && s.GroupID != group || !v.admits(s.ID, crn.IAMID(s.ID), s.Name, s.Description, &s.Meta) || !may(serviceIDResource(c, s.ID))
	})
	key := func(s *identity.ServiceID) string { return v.sortKey(s.ID, s.Name, s.Description, &s.Meta) }
	return list(c, v, "/v1/serviceids", "serviceids", seen, key, func(s *identity.ServiceID) (serviceIDView, error) {
		one := r.serviceIDView(s, showGroup)
		if !v.history {
			return one, nil
		}
		var err error
		one.History, err = r.history(c, one.CRN, &s.Meta)
		return one, err
	})
}

func (r *routes) changedServiceID(c *api.Call, b *serviceIDBody) (*identity.ServiceID, api.Target, error) {
	if err := b.check(); err != nil {
		return nil, api.Target{TypeURI: "iam-identity/account-serviceid"}, err
	}
	return r.loadServiceID(c)
}

func (r *routes) updateServiceID(c *api.Call, tx *directory.Tx, b *serviceIDBody, old *identity.ServiceID) (api.Reply, api.Target, error) {
	target := r.serviceIDTarget(c, old)
	if err := c.IfMatch(&old.Meta, old.ID, true); err != nil {
		return api.Reply{}, target, err
	}
	if old.Locked {
		return api.Reply{}, target, locked("service ID", old.ID)
	}
	showGroup, err := flag(c, showGroupID)
	if err != nil {
		return api.Reply{}, target, err
	}
	s := *old
	b.apply(&s)
	r.Directory.ServiceIDs.Put(tx, &s)
	return api.Reply{
		Body: r.serviceIDView(&s, showGroup), ETag: s.Tag(s.ID),
		ResponseData: map[string]any{"instance_name": s.Name, "prev_instance_name": old.Name, "description": s.Description, "unique_instance_crns": s.Instances},
	}, r.serviceIDTarget(c, &s), nil
}

// deleteServiceID removes a service ID with its API keys and all that it was
// given. Tokens end with it. A locked key holds it, because the lock is there
// to keep the key.
func (r *routes) deleteServiceID(c *api.Call, tx *directory.Tx, _ *api.None, s *identity.ServiceID) (api.Reply, api.Target, error) {
	target := r.serviceIDTarget(c, s)
	if s.Locked {
		return api.Reply{}, target, locked("service ID", s.ID)
	}
	d := r.Directory
	iamID := crn.IAMID(s.ID)
	var keys []string
	for _, k := range d.APIKeysByIdentity.Get(directory.Key(s.AccountID, iamID)) {
		if k.Locked {
			return api.Reply{}, target, locked("API key", k.ID)
		}
		d.APIKeys.Delete(tx, k)
		keys = append(keys, k.ID)
	}
	slices.Sort(keys)
	d.ServiceIDs.Delete(tx, s)
	policies, groups := d.ForgetSubject(tx, s.AccountID, iamID)
	data := map[string]any{"serviceid": s.ID}
	listed(data, "deleted_apikeys", keys)
	listed(data, "deleted_policies", policies)
	listed(data, "left_access_groups", groups)
	return api.Reply{Status: http.StatusNoContent, ResponseData: data}, target, nil
}

func (r *routes) lockServiceID(lock bool) func(*api.Call, *directory.Tx, *api.None, *identity.ServiceID) (api.Reply, api.Target, error) {
	return func(c *api.Call, tx *directory.Tx, _ *api.None, old *identity.ServiceID) (api.Reply, api.Target, error) {
		target := r.serviceIDTarget(c, old)
		if old.Locked == lock {
			return api.Reply{}, target, already("service ID", old.ID, "locked", lock)
		}
		s := *old
		s.Locked = lock
		r.Directory.ServiceIDs.Put(tx, &s)
		return api.Reply{Status: http.StatusNoContent, ResponseData: map[string]any{"lock": lock}}, target, nil
	}
}

// locked is the fault of changing something that its lock protects.
func locked(noun, id string) error {
	return fault.New(fault.Conflict, "locked", "The %s %s is locked; unlock it first.", noun, id)
}

// already is the fault of a change that asks for the state that there is
// (reference/iam-identity.md section 4.1).
func already(noun, id, state string, is bool) error {
	not := ""
	if !is {
		not = "not "
	}
	return fault.New(fault.Conflict, "conflict", "The %s %s is %s%s already.", noun, id, not, state)
}

func headerTrue(c *api.Call, name string) bool {
	return strings.EqualFold(c.R.Header.Get(name), "true")
}
