package resourcecontroller

import (
	"encoding/json"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/bootstrap"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/identity"
	"tabard.dev/tabard/internal/resource"
)

// A resource key is the credential of a program that works with one instance.
// Behind it stand a service ID, an API key of that, and a policy with a role on
// the instance; without a role there is no policy, and the service ID may do
// nothing yet. They come and go with the key. A key can be made for a service
// ID that exists instead; then that stays when the key goes.

// Actions on keys. They are asked for on the key's instance.
const (
	keyRetrieve       = "resource-controller.key.retrieve"
	keyUpdate         = "resource-controller.key.update"
	keyDelete         = "resource-controller.key.delete"
	retrieveAllValues = "resource-controller.credential.retrieve_all"
	policyCreate      = "iam.policy.create"

	// Those that a caller needs besides, when he names a service ID or the
	// account restricts who makes identities.
	serviceIDCreate = "iam-identity.serviceid.create"
	apiKeyCreate    = "iam-identity.apikey.create"
)

// keyType is the resource type of keys in CRNs.
const keyType = "resource-key"

// Bounds that are ours, except for the service IDs of an account
// (reference/iam-identity.md section 4.11).
const (
	maxKeys                 = 200 // of one instance; all go in one transaction with it
	maxServiceIDsPerAccount = 2000
)

func (r *routes) registerKeys() {
	const path = "/v2/resource_keys/{id}"
	api.List(r.Family, "GET /v2/resource_keys", keyRetrieve, r.listKeys)
	change(r, "POST /v2/resource_keys", "resource-controller.key.create", "key.create", r.loadNewKey, r.createKey)
	api.Read(r.Family, "GET "+path, keyRetrieve, r.loadKey, r.showKey)
	change(r, "PATCH "+path, keyUpdate, "key.update", loading[keyPatch](r.loadKey), r.updateKey)
	change(r, "DELETE "+path, keyDelete, "key.delete", loading[api.None](r.loadKey), r.deleteKey)
	api.Read(r.Family, "GET /v2/resource_instances/{id}/resource_keys", instanceRetrieve, r.loadInstance, r.listKeysOfInstance)
}

type keyBody struct {
	ID                  string       `json:"id"`
	GUID                string       `json:"guid"`
	URL                 string       `json:"url"`
	CRN                 string       `json:"crn"`
	Name                string       `json:"name"`
	State               string       `json:"state"`
	AccountID           string       `json:"account_id"`
	ResourceGroupID     string       `json:"resource_group_id"`
	ResourceGroupCRN    string       `json:"resource_group_crn"`
	ResourceID          string       `json:"resource_id"`
	SourceCRN           string       `json:"source_crn"`
	Role                string       `json:"role,omitempty"`
	OnetimeCredentials  bool         `json:"onetime_credentials"`
	IAMCompatible       bool         `json:"iam_compatible"`
	Migrated            bool         `json:"migrated"`
	Credentials         *credentials `json:"credentials"`
	ResourceInstanceURL string       `json:"resource_instance_url"`
	ResourceAliasURL    *string      `json:"resource_alias_url"`
	CreatedAt           string       `json:"created_at"`
	CreatedBy           string       `json:"created_by"`
	UpdatedAt           string       `json:"updated_at"`
	UpdatedBy           string       `json:"updated_by"`
	DeletedAt           *string      `json:"deleted_at"`
	DeletedBy           string       `json:"deleted_by"`
}

// credentials are null for a removed key. For a caller who may not see them
// they are REDACTED and nothing else.
type credentials struct {
	Redacted     string `json:"REDACTED,omitempty"`
	APIKey       string `json:"apikey,omitempty"`
	Description  string `json:"iam_apikey_description,omitempty"`
	APIKeyID     string `json:"iam_apikey_id,omitempty"`
	APIKeyName   string `json:"iam_apikey_name,omitempty"`
	RoleCRN      string `json:"iam_role_crn,omitempty"`
	ServiceIDCRN string `json:"iam_serviceid_crn,omitempty"`
}

func (r *routes) encodeKey(c *api.Call, k *resource.Key) keyBody {
	b := keyBody{
		ID: k.CRN, GUID: k.GUID, URL: "/v2/resource_keys/" + url.PathEscape(k.GUID), CRN: k.CRN, Name: k.Name, State: k.State,
		AccountID: k.AccountID, ResourceGroupID: k.GroupID, ResourceGroupCRN: groupCRN(c, k.GroupID),
		ResourceID: sourceOf(k).Service, SourceCRN: k.SourceCRN, Role: k.Role, IAMCompatible: true,
		ResourceInstanceURL: "/v2/resource_instances/" + url.PathEscape(k.InstanceGUID),
		CreatedAt:           stamp(k.CreatedAt), CreatedBy: k.CreatedBy, UpdatedAt: stamp(k.ModifiedAt), UpdatedBy: k.ModifiedBy,
		DeletedAt: stampIfAny(k.DeletedAt), DeletedBy: k.DeletedBy,
	}
	if b.State == "" {
		b.State = resource.StateActive
	}
	if b.State == resource.StateRemoved {
		return b
	}
	if b.Credentials = (&credentials{Redacted: "REDACTED"}); r.mayUse(c, k) {
		apiKey, ok := r.Directory.APIKeys.Get(k.APIKeyID)
		if !ok {
			apiKey = nil
		}
		b.Credentials = r.credentials(c, k, apiKey, r.value(k, ok))
	}
	return b
}

func (r *routes) credentials(c *api.Call, k *resource.Key, apiKey *identity.APIKey, value string) *credentials {
	b := &credentials{APIKey: value, APIKeyID: k.APIKeyID, RoleCRN: k.Role}
	if apiKey != nil {
		b.Description, b.APIKeyName = apiKey.Description, apiKey.Name
	}
	b.ServiceIDCRN = c.Names.Of("iam-identity", "", k.AccountID, "", "serviceid", k.ServiceID).String()
	return b
}

// mayUse reports whether the caller may see the API key of a resource key.
// Whoever made the key may, as long as he still has the rights that it gives,
// and whoever may retrieve all credentials of the instance. That somebody else
// has the same role is not enough: the service ID can have been given more
// since, and its API key would give that away. For the same reason, whoever
// sees all credentials does not see those of a service ID that has more than
// the key's policy, unless he could make an API key of it himself.
func (r *routes) mayUse(c *api.Call, k *resource.Key) bool {
	on := keyResource(c, k)
	if k.CreatedBy == c.Caller.IAMID && lacking(c, k.Role, on) == "" {
		return true
	}
	return c.May(retrieveAllValues, on) &&
		(r.onlyForKey(k) || c.May(apiKeyCreate, c.InAccount("iam-identity", access.ResourceType, "serviceid", access.Resource, k.ServiceID)))
}

// onlyForKey reports whether the service ID of a key has nothing but what was
// made for the key.
func (r *routes) onlyForKey(k *resource.Key) bool {
	iamID := crn.IAMID(k.ServiceID)
	p, err := keyParametersOf(k.Parameters)
	return err == nil && p.ServiceIDCRN == "" && len(r.Directory.StaticGroupsOf(k.AccountID, iamID)) == 0 &&
		!slices.ContainsFunc(r.Directory.PoliciesOfSubject.Get(directory.Key(k.AccountID, iamID)), func(p *access.Policy) bool { return p.ID != k.PolicyID })
}

// value is the API key itself, or "" when it is gone. One that is sealed under
// another master key is gone, too.
func (r *routes) value(k *resource.Key, ok bool) string {
	if !ok || len(k.Sealed) == 0 {
		return ""
	}
	secret, err := r.sealer.Open(k.Sealed, sealLabel(k.GUID))
	if err != nil {
		r.Log.Error("open the API key of a resource key", "key", k.GUID, "error", err)
		return ""
	}
	return string(secret)
}

// sourceOf is the CRN of the key's instance.
func sourceOf(k *resource.Key) crn.CRN {
	source, err := crn.Parse(k.SourceCRN)
	if err != nil {
		return crn.CRN{}
	}
	return source
}

// keyResource are the attributes of the key's instance, on which its actions
// are asked for.
func keyResource(c *api.Call, k *resource.Key) map[string]string {
	source := sourceOf(k)
	return c.InAccount(source.Service, access.ServiceInstance, k.InstanceGUID, access.Region, source.Location, access.ResourceGroupID, k.GroupID)
}

func keyTarget(c *api.Call, k *resource.Key) api.Target {
	return api.Target{Resource: keyResource(c, k), CRN: k.CRN, Name: k.Name, TypeURI: sourceOf(k).Service + "/key"}
}

// findKey finds a key of an account by GUID or CRN.
func (r *routes) findKey(account, id string) (*resource.Key, bool) {
	guid := id
	asked, notCRN := crn.Parse(id)
	if notCRN == nil {
		guid = asked.Resource
	}
	k, ok := r.Directory.ResourceKeys.Get(guid)
	if !ok || k.AccountID != account {
		return nil, false
	}
	if notCRN == nil {
		if own, err := crn.Parse(k.CRN); err != nil || !own.Same(asked) {
			return nil, false
		}
	}
	return k, true
}

func (r *routes) loadKey(c *api.Call) (*resource.Key, api.Target, error) {
	id := c.R.PathValue("id")
	k, ok := r.findKey(c.Account(), id)
	if !ok {
		return nil, api.Target{}, api.NotFound("resource key", id)
	}
	return k, keyTarget(c, k), nil
}

func (r *routes) showKey(c *api.Call, k *resource.Key) (api.Reply, error) {
	body := r.encodeKey(c, k)
	return api.Reply{Body: body, ETag: k.Tag(k.GUID)}, c.RecordDisclosure(keyRead, disclosed(c, k, body)...)
}

// keyRead is the event of a read that shows credentials, where the service has
// no name for it.
const keyRead = "resource-controller.key.read"

// disclosed returns the key as a target when its credentials are in the body.
func disclosed(c *api.Call, k *resource.Key, body keyBody) []api.Target {
	if body.Credentials == nil || body.Credentials.APIKey == "" {
		return nil
	}
	return []api.Target{eventful(keyTarget(c, k), "key.read")}
}

// activeKeys are the keys of an instance that are not removed.
func (r *routes) activeKeys(instance string) []*resource.Key {
	return slices.DeleteFunc(r.Directory.ResourceKeysByInstance.Get(instance), func(k *resource.Key) bool { return k.State == resource.StateRemoved })
}

// listKeys shows the keys of the instances on which the caller may see them.
func (r *routes) listKeys(c *api.Call, may func(map[string]string) bool) (api.Reply, error) {
	cursor, err := cursor(c, "guid", "name", "resource_group_id", "resource_id", "updated_from", "updated_to")
	if err != nil {
		return api.Reply{}, err
	}
	f, err := newFilter(cursor.Query)
	if err != nil {
		return api.Reply{}, err
	}
	var seen []*resource.Key
	for _, k := range r.Directory.ResourceKeysByAccount.Get(c.Account()) {
		if k.State != resource.StateRemoved && f.is("guid", k.GUID) && f.is("name", k.Name) && f.is("resource_group_id", k.GroupID) &&
			f.is("resource_id", sourceOf(k).Service) && f.updated(k.ModifiedAt) && may(keyResource(c, k)) {
			seen = append(seen, k)
		}
	}
	return r.pageOfKeys(c, "/v2/resource_keys", cursor, seen)
}

func (r *routes) listKeysOfInstance(c *api.Call, i *resource.Instance) (api.Reply, error) {
	cursor, err := cursor(c)
	if err != nil {
		return api.Reply{}, err
	}
	seen := slices.DeleteFunc(r.activeKeys(i.GUID), func(k *resource.Key) bool { return !c.May(keyRetrieve, keyResource(c, k)) })
	return r.pageOfKeys(c, "/v2/resource_instances/"+url.PathEscape(i.GUID)+"/resource_keys", cursor, seen)
}

func (r *routes) pageOfKeys(c *api.Call, path string, cursor api.Cursor, seen []*resource.Key) (api.Reply, error) {
	key := func(k *resource.Key) string { return api.SortKey(k.CreatedAt, k.GUID) }
	var shown []api.Target
	reply := page(path, cursor, seen, key, func(k *resource.Key) keyBody {
		body := r.encodeKey(c, k)
		shown = append(shown, disclosed(c, k, body)...)
		return body
	})
	return reply, c.RecordDisclosure(keyRead, shown...)
}

type newKey struct {
	Name       string          `json:"name"`
	Source     string          `json:"source"`
	Role       string          `json:"role"`
	Parameters json.RawMessage `json:"parameters"`

	platform keyParameters
}

// keyParameters are those of the parameters that are not the service's own.
type keyParameters struct {
	ServiceIDCRN string `json:"serviceid_crn"`
}

func keyParametersOf(raw json.RawMessage) (p keyParameters, err error) {
	if len(raw) == 0 {
		return p, nil
	}
	if err := json.Unmarshal(raw, &p); err != nil {
		return p, api.Invalid("The parameter serviceid_crn must be the CRN of a service ID.").On("parameters")
	}
	return p, nil
}

func (r *routes) loadNewKey(c *api.Call, b *newKey) (*resource.Key, api.Target, error) {
	if strings.TrimSpace(b.Name) == "" || !api.Printable(b.Name, resource.MaxNameLength) {
		return nil, api.Target{}, api.Invalid("The field name must have 1 to %d printable characters.", resource.MaxNameLength).On("name")
	}
	var err error
	if b.Parameters, err = validParameters(b.Parameters); err != nil {
		return nil, api.Target{}, err
	}
	if b.platform, err = keyParametersOf(b.Parameters); err != nil {
		return nil, api.Target{}, err
	}
	i, ok := r.findInstance(c.Account(), b.Source)
	if !ok {
		return nil, api.Target{}, api.NotFound("resource instance", b.Source)
	}
	k := &resource.Key{
		GUID: uuid.NewString(), AccountID: i.AccountID, Name: b.Name, SourceCRN: i.CRN, InstanceGUID: i.GUID, GroupID: i.GroupID,
		Parameters: b.Parameters, State: resource.StateActive,
	}
	k.CRN = c.Names.Of(i.Service, i.Target, i.AccountID, i.GUID, keyType, k.GUID).String()
	return k, keyTarget(c, k), inUse(i)
}

func (r *routes) createKey(c *api.Call, tx *directory.Tx, b *newKey, k *resource.Key) (api.Reply, api.Target, error) {
	target := keyTarget(c, k)
	if len(r.activeKeys(k.InstanceGUID)) >= maxKeys {
		return api.Reply{}, target, fault.New(fault.Conflict, "limit_exceeded", "The resource instance %q has %d resource keys, which is the limit.", k.InstanceGUID, maxKeys)
	}
	role, err := roleOf(c, sourceOf(k).Service, b.Role)
	if err == nil {
		k.Role = role
		err = giveable(c, k)
	}
	if err == nil {
		err = r.putServiceID(c, tx, b, k)
	}
	if err != nil {
		return api.Reply{}, target, err
	}
	d := r.Directory
	iamID := crn.IAMID(k.ServiceID)
	secret := bootstrap.NewAPIKey()
	apiKey := &identity.APIKey{
		ID: "ApiKey-" + uuid.NewString(), AccountID: k.AccountID, IAMID: iamID, Name: k.Name,
		Description: "Made for the resource key " + k.CRN, Hash: r.sealer.Hash(secret),
	}
	// The value is kept with the resource key, not with the API key: the
	// identity API would show it to whoever may read API keys.
	k.Sealed = r.sealer.Seal([]byte(secret), sealLabel(k.GUID))
	d.APIKeys.Put(tx, apiKey)
	k.APIKeyID = apiKey.ID
	if k.Role != "" {
		p := policyOf(k, iamID)
		if err := p.Validate(d.Catalog(k.AccountID)); err != nil {
			return api.Reply{}, target, api.Invalid("The role cannot be granted: %v.", err).On("role")
		}
		d.Policies.Put(tx, p)
		k.PolicyID = p.ID
	}
	d.ResourceKeys.Put(tx, k)
	body := r.encodeKey(c, k)
	body.Credentials = r.credentials(c, k, apiKey, secret)
	return api.Reply{Status: http.StatusCreated, Body: body, ETag: k.Tag(k.GUID), ResponseData: keyData(k)}, target, nil
}

// sealLabel ties a stored value to its resource key.
func sealLabel(guid string) string { return "resource key " + guid }

// keyData is a key's place in an activity event.
func keyData(k *resource.Key) map[string]any {
	return map[string]any{
		"service": sourceOf(k).Service, "source_crn": k.SourceCRN, "role": k.Role,
		"serviceid": k.ServiceID, "apikey_id": k.APIKeyID, "policy_id": k.PolicyID,
	}
}

// roleOf returns the CRN of a role of the service by its name or CRN. The role
// may be left out.
func roleOf(c *api.Call, serviceName, asked string) (string, error) {
	if asked == "" {
		return "", nil
	}
	invalid := api.Invalid("The field role %q is not a role of service %s; GET /v2/roles?service_name=%s lists them.", asked, serviceName, serviceName).On("role")
	s, ok := c.Directory.Catalog(c.Account()).Service(serviceName)
	if !ok {
		return "", invalid
	}
	want := access.CanonicalRole(asked)
	for _, role := range s.Roles {
		if role.CRN == want || role.DisplayName == asked || role.CRN[strings.LastIndexByte(role.CRN, ':')+1:] == asked {
			return role.CRN, nil
		}
	}
	return "", invalid
}

// giveable refuses a key that would give its holder more than the caller could
// give. In the reference the right to create keys is enough; then an Operator of
// the service, who manages no access, could make a key with the role Manager
// and use it himself. Here the caller needs every action of the role on the
// instance, or the right to write the key's policy
// (reference/access-and-audit.md section 2.6).
func giveable(c *api.Call, k *resource.Key) error {
	on := keyResource(c, k)
	action := lacking(c, k.Role, on)
	if action == "" || always(c, policyCreate, on) {
		return nil
	}
	const why = "A resource key can only be given a role whose actions the caller has himself on the whole instance, at all times, unless he may grant access to it."
	// Asked again for the trace of the refusal.
	if err := c.Authorize(action, on); err != nil {
		return fault.Of(err).WithDetail(why)
	}
	return fault.New(fault.Denied, "not_authorized", "%s may %s only under conditions that the resource key would not have.", c.Caller.IAMID, action).WithDetail(why)
}

// lacking returns an action of the role that the caller does not have, or "".
func lacking(c *api.Call, role string, on map[string]string) string {
	for _, action := range c.Directory.Catalog(c.Account()).Actions(role, on[access.ServiceName]) {
		if !always(c, action, on) {
			return action
		}
	}
	return ""
}

// always reports whether the caller may do an action on all that an instance
// holds, whenever he likes.
func always(c *api.Call, action string, on map[string]string) bool {
	return c.MayThrough(unconditional{c.Directory}, action, on)
}

// unconditional is a view without the policies that hold only at some times, or
// only where an attribute is absent. The policy of a resource key has no such
// limits: it covers everything inside the instance.
type unconditional struct{ access.View }

// PoliciesOf implements [access.View].
func (v unconditional) PoliciesOf(accountID, subjectID, service string) []*access.Policy {
	return slices.DeleteFunc(v.View.PoliciesOf(accountID, subjectID, service), conditional)
}

// AuthorizationsOn implements [access.View].
func (v unconditional) AuthorizationsOn(accountID, service string) []*access.Policy {
	return slices.DeleteFunc(v.View.AuthorizationsOn(accountID, service), conditional)
}

func conditional(p *access.Policy) bool {
	return p.Rule != nil || slices.ContainsFunc(p.Resource, func(a access.Attribute) bool {
		return a.Operator == access.StringExists && a.Value.Exists != nil && !*a.Value.Exists
	})
}

// putServiceID stages the service ID of a key, or finds the one that the
// caller named.
func (r *routes) putServiceID(c *api.Call, tx *directory.Tx, b *newKey, k *resource.Key) error {
	d := r.Directory
	onServiceIDs := c.InAccount("iam-identity", access.ResourceType, "serviceid")
	if b.platform.ServiceIDCRN != "" {
		s, err := r.namedServiceID(c, b.platform.ServiceIDCRN)
		if err != nil {
			return err
		}
		k.ServiceID = s.ID
		return c.Authorize(apiKeyCreate, api.With(onServiceIDs, access.Resource, s.ID))
	}
	if d.ServiceIDsByAccount.Len(k.AccountID) >= maxServiceIDsPerAccount {
		return fault.New(fault.Conflict, "limit_exceeded", "The account has %d service IDs, which is the limit; a resource key needs one of its own.", maxServiceIDsPerAccount)
	}
	// A restriction that a resource key got around would be none.
	settings := d.SettingsOf(k.AccountID)
	for _, restriction := range []struct{ setting, action string }{
		{settings.RestrictCreateServiceID, serviceIDCreate},
		{settings.RestrictCreateAPIKey, apiKeyCreate},
	} {
		if restriction.setting != identity.Restricted {
			continue
		}
		if err := c.Authorize(restriction.action, onServiceIDs); err != nil {
			return err
		}
	}
	s := &identity.ServiceID{
		ID: crn.ServiceIDPrefix + uuid.NewString(), AccountID: k.AccountID, Name: k.Name,
		Description: "Made for the resource key " + k.CRN, Instances: []string{k.SourceCRN},
	}
	d.ServiceIDs.Put(tx, s)
	k.ServiceID = s.ID
	return nil
}

func (r *routes) namedServiceID(c *api.Call, name string) (*identity.ServiceID, error) {
	asked, err := crn.Parse(name)
	if err != nil {
		return nil, api.Invalid("The parameter serviceid_crn is %v.", err).On("parameters")
	}
	s, ok := r.Directory.ServiceIDs.Get(asked.Resource)
	if !ok || s.AccountID != c.Account() || !c.Names.Of("iam-identity", "", s.AccountID, "", "serviceid", s.ID).Same(asked) {
		return nil, api.NotFound("service ID", name)
	}
	if n := r.Directory.APIKeysByIdentity.Len(directory.Key(s.AccountID, crn.IAMID(s.ID))); n >= identity.MaxKeysPerIdentity {
		return nil, fault.New(fault.Conflict, "limit_exceeded", "The service ID %s has %d API keys, which is the limit.", s.ID, n)
	}
	return s, nil
}

func policyOf(k *resource.Key, iamID string) *access.Policy {
	equals := func(key, value string) access.Attribute {
		return access.Attribute{Key: key, Operator: access.StringEquals, Value: access.Text(value)}
	}
	return &access.Policy{
		ID: uuid.NewString(), AccountID: k.AccountID, API: 1, Type: access.TypeAccess, State: access.Active,
		Description: "Made for the resource key " + k.CRN,
		Subject:     []access.Attribute{equals(access.IAMID, iamID)},
		Resource: []access.Attribute{
			equals(access.ServiceName, sourceOf(k).Service), equals(access.ServiceInstance, k.InstanceGUID), equals(access.AccountID, k.AccountID),
		},
		Roles: []string{k.Role},
	}
}

type keyPatch struct {
	Name *string `json:"name"`
}

func keyGone(k *resource.Key) error {
	if k.State == resource.StateRemoved {
		return fault.New(fault.Gone, codeGone, "The resource key %q is removed.", k.GUID)
	}
	return nil
}

// updateKey renames a key. What was made for it keeps its names.
func (r *routes) updateKey(c *api.Call, tx *directory.Tx, b *keyPatch, old *resource.Key) (api.Reply, api.Target, error) {
	target := keyTarget(c, old)
	err := keyGone(old)
	if err == nil {
		err = c.IfMatch(&old.Meta, old.GUID, false)
	}
	if err == nil && (b.Name == nil || strings.TrimSpace(*b.Name) == "" || !api.Printable(*b.Name, resource.MaxNameLength)) {
		err = api.Invalid("The field name must have 1 to %d printable characters.", resource.MaxNameLength).On("name")
	}
	if err != nil {
		return api.Reply{}, target, err
	}
	k := *old
	k.Name = *b.Name
	r.Directory.ResourceKeys.Put(tx, &k)
	body := r.encodeKey(c, &k)
	if err := c.RecordDisclosure(keyRead, disclosed(c, &k, body)...); err != nil {
		return api.Reply{}, target, err
	}
	return api.Reply{
		Body: body, ETag: k.Tag(k.GUID), ResponseData: map[string]any{"old_name": old.Name, "new_name": k.Name},
	}, keyTarget(c, &k), nil
}

func (r *routes) deleteKey(c *api.Call, tx *directory.Tx, _ *api.None, k *resource.Key) (api.Reply, api.Target, error) {
	target := keyTarget(c, k)
	err := keyGone(k)
	if err == nil {
		err = c.IfMatch(&k.Meta, k.GUID, false)
	}
	if err == nil {
		_, err = r.removeKeys(tx, []*resource.Key{k})
	}
	if err != nil {
		return api.Reply{}, target, err
	}
	return api.Reply{Status: http.StatusNoContent, ResponseData: keyData(k)}, target, nil
}

// removeKeys stages the removal of keys of one account, with all that was made
// for them, and returns their GUIDs. A service ID or API key that somebody has
// locked holds its key, because the lock is there to keep it.
func (r *routes) removeKeys(tx *directory.Tx, keys []*resource.Key) ([]string, error) {
	var guids []string
	groups := map[string]string{} // access groups that are being changed: the key whose service ID leaves
	for _, old := range keys {
		k := *old
		if err := r.removeIdentity(tx, &k, groups); err != nil {
			return nil, err
		}
		k.State, k.DeletedAt, k.DeletedBy = resource.StateRemoved, tx.Now, tx.By
		r.Directory.ResourceKeys.Put(tx, &k)
		guids = append(guids, k.GUID)
	}
	slices.Sort(guids)
	return guids, nil
}

func (r *routes) removeIdentity(tx *directory.Tx, k *resource.Key, groups map[string]string) error {
	d := r.Directory
	iamID := crn.IAMID(k.ServiceID)
	apiKeys := d.APIKeysByIdentity.Get(directory.Key(k.AccountID, iamID))
	s, ok := d.ServiceIDs.Get(k.ServiceID)
	named, err := keyParametersOf(k.Parameters)
	if err != nil {
		return err
	}
	own := named.ServiceIDCRN == ""
	if !own {
		apiKeys = slices.DeleteFunc(apiKeys, func(a *identity.APIKey) bool { return a.ID != k.APIKeyID })
	} else if ok && s.Locked {
		return fault.New(fault.Locked, codeLocked, "The service ID %s of the resource key %q is locked; unlock it first.", s.ID, k.GUID)
	}
	for _, a := range apiKeys {
		if a.Locked {
			return fault.New(fault.Locked, codeLocked, "The API key %s of the resource key %q is locked; unlock it first.", a.ID, k.GUID)
		}
		d.APIKeys.Delete(tx, a)
	}
	if !own {
		if p, ok := d.Policies.Get(k.PolicyID); ok {
			d.Policies.Delete(tx, p)
		}
		return nil
	}
	// Two members cannot leave one group in one transaction, because both
	// would change the group as it was before.
	for _, g := range d.StaticGroupsOf(k.AccountID, iamID) {
		if other, twice := groups[g]; twice {
			return fault.New(fault.Conflict, "conflict", "The service IDs of the resource keys %q and %q are both in the access group %s; delete one of the keys first.", other, k.GUID, g)
		}
		groups[g] = k.GUID
	}
	if ok {
		d.ServiceIDs.Delete(tx, s)
	}
	d.ForgetSubject(tx, k.AccountID, iamID)
	return nil
}
