package iamidentity

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"time"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/bootstrap"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/identity"
)

// Actions on API keys that do not depend on whose key it is.
const (
	keyGet    = "iam-identity.apikey.get"
	keyList   = "iam-identity.apikey.list"
	keyUpdate = "iam-identity.apikey.update"
	keyDelete = "iam-identity.apikey.delete"
	keyManage = "iam-identity.apikey.manage"
)

// valueHeader is where a request names a key by its value.
const valueHeader = "IAM-ApiKey"

// maxKeyLength bounds an API key that a client brings along, in bytes.
const maxKeyLength = 256

// keyHolder is a kind of identity that has API keys. Their events have names
// of their own (reference/access-and-audit.md section 6.2), and so does the
// action that creates a key.
type keyHolder struct {
	what   string // in event names
	create string
	typ    string // the list's type filter
}

var (
	keysOfUsers      = keyHolder{"user-apikey", "iam-identity.user-apikey.create", "user"}
	keysOfServiceIDs = keyHolder{"serviceid-apikey", "iam-identity.apikey.create", "serviceid"}
)

func holder(iamID string) keyHolder {
	if crn.KindOf(iamID) == crn.KindServiceID {
		return keysOfServiceIDs
	}
	return keysOfUsers
}

func (h keyHolder) typeURI() string { return "iam-identity/" + h.what }

func (r *routes) registerAPIKeys() {
	for _, p := range collection("GET", "/v1/apikeys") {
		api.List(r.Family, p, keyList, r.listKeys)
	}
	const path = "/v1/apikeys/{apikey}"
	api.Read(r.Family, "GET /v1/apikeys/details", keyGet, r.loadKeyByValue, r.showKeyDetails)
	api.Read(r.Family, "GET "+path, keyGet, r.loadKey, r.showKey)
	for _, p := range collection("POST", "/v1/apikeys") {
		r.perHolder(p, holderInBody, func(f *api.Family, h keyHolder) {
			api.Change(f, p, h.create, "iam-identity."+h.what+".create", r.newKey(h), r.createKey)
		})
	}
	update := func(pattern string, do func(*api.Call, *directory.Tx, *api.None, *identity.APIKey) (api.Reply, api.Target, error)) {
		r.perHolder(pattern, r.holderInPath, func(f *api.Family, h keyHolder) {
			api.Change(f, pattern, keyUpdate, "iam-identity."+h.what+".update", loading[api.None](r.loadKey), do)
		})
	}
	update("POST "+path+"/lock", r.switchKey("locked", true))
	update("DELETE "+path+"/lock", r.switchKey("locked", false))
	update("POST "+path+"/disable", r.switchKey("disabled", true))
	update("DELETE "+path+"/disable", r.switchKey("disabled", false))
	r.perHolder("PUT "+path, r.holderInPath, func(f *api.Family, h keyHolder) {
		api.Change(f, "PUT "+path, keyUpdate, "iam-identity."+h.what+".update", r.changedKey, r.updateKey)
	})
	r.perHolder("DELETE "+path, r.holderInPath, func(f *api.Family, h keyHolder) {
		api.Change(f, "DELETE "+path, keyDelete, "iam-identity."+h.what+".delete", loading[api.None](r.loadKey), r.deleteKey)
	})
	report := func(pattern string, of func(*http.Request) keyHolder, load func(*api.Call) (*identity.APIKey, api.Target, error)) {
		r.perHolder(pattern, of, func(f *api.Family, h keyHolder) {
			api.Change(f, pattern, keyManage, "iam-identity."+h.what+".report-leak", loading[api.None](load), r.leakKey)
		})
	}
	report("POST "+path+"/leaked", r.holderInPath, r.loadKey)
	report("POST /v1/apikeys/leaked", r.holderOfValue, r.loadKeyByValue)
}

// perHolder registers a route once for each kind of key holder, because a
// route has one action and one event. Which of them serves a request only
// chooses these names; the routes check for themselves what they are given.
func (r *routes) perHolder(pattern string, of func(*http.Request) keyHolder, register func(*api.Family, keyHolder)) {
	muxes := map[keyHolder]*http.ServeMux{}
	for _, h := range []keyHolder{keysOfUsers, keysOfServiceIDs} {
		f := *r.Family
		f.Mux = http.NewServeMux()
		register(&f, h)
		muxes[h] = f.Mux
	}
	r.Mux.HandleFunc(pattern, func(w http.ResponseWriter, req *http.Request) { muxes[of(req)].ServeHTTP(w, req) })
}

func (r *routes) holderInPath(req *http.Request) keyHolder {
	if k, ok := r.Directory.APIKeys.Get(req.PathValue("apikey")); ok {
		return holder(k.IAMID)
	}
	return keysOfUsers
}

func (r *routes) holderOfValue(req *http.Request) keyHolder {
	if k, ok := r.Directory.APIKeysByHash.One(r.sealer.Hash(req.Header.Get(valueHeader))); ok {
		return holder(k.IAMID)
	}
	return keysOfUsers
}

// holderInBody looks ahead in the body and leaves it to be read again.
func holderInBody(req *http.Request) keyHolder {
	head, err := io.ReadAll(io.LimitReader(req.Body, api.MaxBody+1))
	req.Body = struct {
		io.Reader
		io.Closer
	}{io.MultiReader(bytes.NewReader(head), req.Body), req.Body}
	var b struct {
		IAMID string `json:"iam_id"`
	}
	if err != nil || json.Unmarshal(head, &b) != nil {
		return keysOfUsers // which refuses the body
	}
	return holder(b.IAMID)
}

// keyBody is the body of create, and the inline key of a new service ID
// (reference/iam-identity.md section 4.7).
type keyBody struct {
	Name             string `json:"name"`
	IAMID            string `json:"iam_id"`
	AccountID        string `json:"account_id"`
	Description      string `json:"description"`
	APIKey           string `json:"apikey"`
	StoreValue       bool   `json:"store_value"`
	SupportSessions  bool   `json:"support_sessions"`
	ActionWhenLeaked string `json:"action_when_leaked"`
	ExpiresAt        string `json:"expires_at"`

	expires time.Time
}

// checkHolder refuses what only the other kind of holder can have.
func (b *keyBody) checkHolder(h keyHolder) error {
	if b.StoreValue && h != keysOfServiceIDs {
		return api.Invalid("store_value can be true for API keys of service IDs only.").On("store_value")
	}
	return checkSessions(b.SupportSessions, h)
}

func checkSessions(support bool, h keyHolder) error {
	if support && h != keysOfUsers {
		return api.Invalid("support_sessions can be true for API keys of users only.").On("support_sessions")
	}
	return nil
}

func (b *keyBody) check(now time.Time) error {
	if err := checkOptional(&b.Name, &b.Description); err != nil {
		return err
	}
	if b.APIKey != "" {
		if len(b.APIKey) < identity.MinAPIKeyLength || len(b.APIKey) > maxKeyLength || !graphic(b.APIKey) {
			return api.Invalid("apikey must have %d to %d printable ASCII characters and no blanks.", identity.MinAPIKeyLength, maxKeyLength).On("apikey")
		}
	}
	if err := checkLeakAction(b.ActionWhenLeaked); err != nil {
		return err
	}
	var err error
	b.expires, err = parseExpiry(b.ExpiresAt, now)
	return err
}

func graphic(s string) bool {
	for i := range len(s) {
		if s[i] <= ' ' || s[i] >= 0x7f {
			return false
		}
	}
	return true
}

func checkLeakAction(s string) error {
	if !slices.Contains([]string{"", identity.LeakNone, identity.LeakDisable, identity.LeakDelete}, s) {
		return api.Invalid("action_when_leaked must be one of none, disable, delete.").On("action_when_leaked")
	}
	return nil
}

// expiryForms are the ways in which clients write expires_at
// (reference/iam-identity.md section 4.1).
var expiryForms = []string{
	"2006-01-02T15:04-0700", "2006-01-02T15:04:05-0700", "2006-01-02T15:04Z07:00", time.RFC3339,
	"2006-01-02T15:04-07", "2006-01-02T15:04:05-07",
}

// lastYear is the last one that a time in JSON can have.
const lastYear = 9999

// parseExpiry reads an end that lies in the future; "" means none.
func parseExpiry(s string, now time.Time) (time.Time, error) {
	if s == "" {
		return time.Time{}, nil
	}
	for _, form := range expiryForms {
		if t, err := time.Parse(form, s); err == nil {
			if t = t.UTC(); !t.After(now) || t.Year() > lastYear {
				return time.Time{}, api.Invalid("expires_at must be in the future and before the year %d.", lastYear+1).On("expires_at")
			}
			return t, nil
		}
	}
	return time.Time{}, api.Invalid("expires_at must be a time such as 2049-01-02T18:30+0000.").On("expires_at")
}

func (b *keyBody) key(accountID, iamID string) *identity.APIKey {
	return &identity.APIKey{
		ID: "ApiKey-" + uuid.NewString(), AccountID: accountID, IAMID: iamID,
		Name: b.Name, Description: b.Description, ExpiresAt: b.expires,
		SupportSessions: b.SupportSessions, ActionWhenLeaked: b.ActionWhenLeaked,
	}
}

// putNewKey stages a key and returns its value: the one given, or a new one.
// The value is kept only when its owner asked for that.
func (r *routes) putNewKey(tx *directory.Tx, k *identity.APIKey, b *keyBody) (string, error) {
	d := r.Directory
	if d.APIKeysByIdentity.Len(directory.Key(k.AccountID, k.IAMID)) >= identity.MaxKeysPerIdentity {
		return "", atLimit("The identity %s has %d API keys, which is the limit.", k.IAMID, identity.MaxKeysPerIdentity)
	}
	secret := b.APIKey
	if secret == "" {
		secret = bootstrap.NewAPIKey()
	}
	if b.StoreValue {
		k.Sealed = r.sealer.Seal([]byte(secret), sealLabel(k.ID))
	}
	k.Hash = r.sealer.Hash(secret)
	if d.APIKeysByHash.Len(k.Hash) > 0 {
		return "", fault.New(fault.Conflict, "conflict", "The value of apikey cannot be used; choose another one.").On("apikey")
	}
	d.APIKeys.Put(tx, k)
	return secret, nil
}

// sealLabel ties a stored value to its key.
func sealLabel(keyID string) string { return "API key " + keyID }

// storedValue returns the value of a key that was asked to be stored, else "".
// To see it is to become the service ID, so it is shown to those who could make
// a key of it themselves, and every time stands in the activity log.
func (r *routes) storedValue(c *api.Call, k *identity.APIKey) (string, error) {
	target := r.keyTarget(c, k)
	if len(k.Sealed) == 0 || !c.May(keysOfServiceIDs.create, target.Resource) {
		return "", nil
	}
	secret, err := r.sealer.Open(k.Sealed, sealLabel(k.ID))
	if err != nil {
		return "", fmt.Errorf("open the stored value of %s: %w", k.ID, err)
	}
	return string(secret), c.RecordDisclosure("iam-identity.serviceid-apikey.read", target)
}

type keyView struct {
	ID               string `json:"id"`
	EntityTag        string `json:"entity_tag"`
	CRN              string `json:"crn"`
	Locked           bool   `json:"locked"`
	Disabled         bool   `json:"disabled"`
	CreatedAt        string `json:"created_at"`
	CreatedBy        string `json:"created_by"`
	ModifiedAt       string `json:"modified_at"`
	Name             string `json:"name"`
	Description      string `json:"description,omitempty"`
	ExpiresAt        string `json:"expires_at,omitempty"`
	IAMID            string `json:"iam_id"`
	AccountID        string `json:"account_id"`
	APIKey           string `json:"apikey,omitempty"` // on create, and where the value is stored
	SupportSessions  bool   `json:"support_sessions"`
	ActionWhenLeaked string `json:"action_when_leaked"`
	Leaked           bool   `json:"leaked"`
	extras
}

// keyView shows a key without its value.
func (r *routes) keyView(k *identity.APIKey) keyView {
	v := keyView{
		ID: k.ID, EntityTag: k.Tag(k.ID), CRN: r.keyCRN(k), Locked: k.Locked, Disabled: k.Disabled,
		CreatedAt: stamp(k.CreatedAt), CreatedBy: k.CreatedBy, ModifiedAt: stamp(k.ModifiedAt),
		Name: k.Name, Description: k.Description, IAMID: k.IAMID, AccountID: k.AccountID,
		SupportSessions: k.SupportSessions, ActionWhenLeaked: leakAction(k), Leaked: k.Leaked,
	}
	if !k.ExpiresAt.IsZero() {
		v.ExpiresAt = stamp(k.ExpiresAt)
	}
	return v
}

func leakAction(k *identity.APIKey) string {
	if k.ActionWhenLeaked == "" {
		return identity.LeakNone
	}
	return k.ActionWhenLeaked
}

func (r *routes) keyCRN(k *identity.APIKey) string {
	return r.Names.Of(service, "", k.AccountID, "", "apikey", k.ID).String()
}

func keyResource(c *api.Call, id string) map[string]string {
	return c.InAccount(service, access.ResourceType, "apikey", access.Resource, id)
}

// keyTarget makes a user the owner of his keys: he sees them and gives them up
// without being allowed to by anybody.
func (r *routes) keyTarget(c *api.Call, k *identity.APIKey) api.Target {
	t := api.Target{Resource: keyResource(c, k.ID), CRN: r.keyCRN(k), Name: k.Name, TypeURI: holder(k.IAMID).typeURI()}
	if crn.KindOf(k.IAMID) == crn.KindUser {
		t.Owner = k.IAMID
	}
	return t
}

func (r *routes) loadKey(c *api.Call) (*identity.APIKey, api.Target, error) {
	id := c.R.PathValue("apikey")
	k, ok := r.Directory.APIKeys.Get(id)
	if !ok || k.AccountID != c.Account() {
		return nil, api.Target{TypeURI: keysOfUsers.typeURI()}, api.NotFound("API key", id)
	}
	return k, r.keyTarget(c, k), nil
}

// loadKeyByValue finds a key of the caller's account by its value, which is
// never repeated in an answer.
func (r *routes) loadKeyByValue(c *api.Call) (*identity.APIKey, api.Target, error) {
	secret := c.R.Header.Get(valueHeader)
	target := api.Target{TypeURI: keysOfUsers.typeURI()}
	if secret == "" {
		return nil, target, api.Invalid("The request needs an %s header with the value of an API key.", valueHeader).OnHeader(valueHeader)
	}
	k, ok := r.Directory.APIKeysByHash.One(r.sealer.Hash(secret))
	if !ok || k.AccountID != c.Account() {
		return nil, target, fault.New(fault.NotFound, "not_found", "The API key with this value was not found.")
	}
	return k, r.keyTarget(c, k), nil
}

func (r *routes) showKey(c *api.Call, k *identity.APIKey) (api.Reply, error) {
	v, err := r.keyDetails(c, k)
	if err != nil {
		return api.Reply{}, err
	}
	v.APIKey, err = r.storedValue(c, k)
	return api.Reply{Body: v, ETag: v.EntityTag}, err
}

// showKeyDetails answers whoever has the value already.
func (r *routes) showKeyDetails(c *api.Call, k *identity.APIKey) (api.Reply, error) {
	v, err := r.keyDetails(c, k)
	return api.Reply{Body: v, ETag: v.EntityTag}, err
}

func (r *routes) keyDetails(c *api.Call, k *identity.APIKey) (keyView, error) {
	v := r.keyView(k)
	var err error
	v.extras, err = r.extras(c, v.CRN, k.ID, &k.Meta)
	return v, err
}

// newKey decides whose key may be created at all: a caller makes keys for
// himself and for service IDs of his account. A key for another user would be
// that user's rights in the caller's hands, so no action allows it. For himself
// he needs the action only where the account restricts it
// (reference/iam-identity.md section 4.8).
func (r *routes) newKey(route keyHolder) func(*api.Call, *keyBody) (*identity.APIKey, api.Target, error) {
	return func(c *api.Call, b *keyBody) (*identity.APIKey, api.Target, error) {
		target := api.Target{Resource: keyResource(c, ""), TypeURI: route.typeURI()}
		if err := b.check(r.Now()); err != nil {
			return nil, target, err
		}
		target.Name = b.Name
		if err := b.checkHolder(route); err != nil {
			return nil, target, err
		}
		if b.AccountID != "" {
			if err := checkAccount(c, b.AccountID); err != nil {
				return nil, target, err
			}
		}
		kind := crn.KindOf(b.IAMID)
		switch {
		case b.IAMID == "":
			return nil, target, api.Invalid("iam_id is required.").On("iam_id")
		case holder(b.IAMID) != route:
			return nil, target, api.Invalid("iam_id must be given once.").On("iam_id")
		case kind == crn.KindServiceID:
			id := crn.Identifier(b.IAMID)
			s, ok := r.Directory.ServiceIDs.Get(id)
			if !ok || s.AccountID != c.Account() {
				return nil, target, api.NotFound("service ID", id)
			}
			// The right is asked for on the service ID, so that it can be given
			// for one of them.
			target.Resource = serviceIDResource(c, id)
		case !userID(b.IAMID):
			return nil, target, api.Invalid("iam_id must be the IAM ID of a user or service ID.").On("iam_id")
		case b.IAMID != c.Caller.IAMID:
			return nil, target, fault.New(fault.Denied, "not_authorized", "%s cannot create an API key for another user.", c.Caller.IAMID)
		default:
			target.Owner = r.openTo(c, r.Directory.SettingsOf(c.Account()).RestrictCreateAPIKey != identity.Restricted)
		}
		k := b.key(c.Account(), b.IAMID)
		k.Locked, k.Disabled = headerTrue(c, "Entity-Lock"), headerTrue(c, "Entity-Disable")
		return k, target, nil
	}
}

func (r *routes) createKey(c *api.Call, tx *directory.Tx, b *keyBody, k *identity.APIKey) (api.Reply, api.Target, error) {
	target := r.keyTarget(c, k)
	secret, err := r.putNewKey(tx, k, b)
	if err != nil {
		return api.Reply{}, target, err
	}
	v := r.keyView(k)
	v.APIKey = secret
	data := keyData(k)
	nearLimit(data, r.Directory.APIKeysByIdentity.Len(directory.Key(k.AccountID, k.IAMID))+1, identity.MaxKeysPerIdentity)
	return api.Reply{Status: http.StatusCreated, Body: v, ETag: v.EntityTag, ResponseData: data}, target, nil
}

// keyData is a key's place in an activity event.
func keyData(k *identity.APIKey) map[string]any {
	return map[string]any{
		"apikey_id": k.ID, "iam_id": k.IAMID, "lock": k.Locked, "disabled": k.Disabled, "leaked": k.Leaked,
		"action_when_leaked": leakAction(k), "value_stored": len(k.Sealed) > 0,
	}
}

// listKeys shows the keys of one identity (scope entity, by default the
// caller's), or those of the account (scope account). A group_id leaves those
// of the service IDs in that group; without one, keys are listed whether or not
// their service ID is in a group: nobody overlooks a key because of it.
func (r *routes) listKeys(c *api.Call, may func(map[string]string) bool) (api.Reply, error) {
	v, err := parseView(c, false, "name", "description", "created_at", "created_by")
	if err != nil {
		return api.Reply{}, err
	}
	scope, err := v.oneOf("scope", "", "entity", "account")
	if err != nil {
		return api.Reply{}, err
	}
	typ, err := v.oneOf("type", "", keysOfUsers.typ, keysOfServiceIDs.typ)
	if err != nil {
		return api.Reply{}, err
	}
	iamID, group := v.query.Get("iam_id"), v.query.Get("group_id")
	var keys []*identity.APIKey
	switch {
	case scope == "account":
		keys = r.Directory.APIKeysByAccount.Get(c.Account())
	case group != "" && iamID == "":
		keys = r.keysOfGroup(c.Account(), group)
	default:
		if iamID == "" {
			iamID = c.Caller.IAMID
		}
		if iamID != c.Caller.IAMID && crn.KindOf(iamID) != crn.KindServiceID {
			return api.Reply{}, fault.New(fault.Denied, "not_authorized", "%s cannot list the API keys of another user; list those of the account with scope=account.", c.Caller.IAMID).
				OnParameter("iam_id", iamID)
		}
		keys = r.Directory.APIKeysByIdentity.Get(directory.Key(c.Account(), iamID))
	}
	keys = slices.DeleteFunc(keys, func(k *identity.APIKey) bool {
		return iamID != "" && k.IAMID != iamID || typ != "" && holder(k.IAMID).typ != typ || group != "" && !r.inGroup(k, group) ||
			!v.admits(k.ID, k.IAMID, k.Name, k.Description, &k.Meta) || r.keyTarget(c, k).Owner != c.Caller.IAMID && !may(keyResource(c, k.ID))
	})
	key := func(k *identity.APIKey) string { return v.sortKey(k.ID, k.Name, k.Description, &k.Meta) }
	return list(c, v, "/v1/apikeys", "apikeys", keys, key, func(k *identity.APIKey) (keyView, error) {
		one := r.keyView(k)
		if !v.history {
			return one, nil
		}
		var err error
		one.History, err = r.history(c, one.CRN, &k.Meta)
		return one, err
	})
}

func (r *routes) keysOfGroup(account, group string) []*identity.APIKey {
	var keys []*identity.APIKey
	for _, s := range r.Directory.ServiceIDsByGroup.Get(group) {
		keys = append(keys, r.Directory.APIKeysByIdentity.Get(directory.Key(account, crn.IAMID(s.ID)))...)
	}
	return keys
}

// inGroup reports whether a key's holder is a service ID in a group; users are
// in none.
func (r *routes) inGroup(k *identity.APIKey, group string) bool {
	s, ok := r.Directory.ServiceIDs.Get(crn.BareID(k.IAMID))
	return ok && s.AccountID == k.AccountID && s.GroupID == group
}

// openTo returns the caller when an account setting opens something to every
// user of the account and he is one; else nobody.
func (r *routes) openTo(c *api.Call, open bool) string {
	u, ok := r.Directory.Users.Get(directory.UserKey(c.Account(), c.Caller.IAMID))
	if !open || !ok || u.Disabled {
		return ""
	}
	return u.IAMID
}

// keyUpdateBody is the body of update. An empty expires_at removes the end.
type keyUpdateBody struct {
	Name             *string `json:"name"`
	Description      *string `json:"description"`
	SupportSessions  *bool   `json:"support_sessions"`
	ActionWhenLeaked string  `json:"action_when_leaked"`
	ExpiresAt        *string `json:"expires_at"`

	expires *time.Time
}

func (r *routes) changedKey(c *api.Call, b *keyUpdateBody) (*identity.APIKey, api.Target, error) {
	err := checkOptional(b.Name, b.Description)
	if err == nil {
		err = checkLeakAction(b.ActionWhenLeaked)
	}
	if err == nil && b.ExpiresAt != nil {
		var t time.Time
		t, err = parseExpiry(*b.ExpiresAt, r.Now())
		b.expires = &t
	}
	if err != nil {
		return nil, api.Target{TypeURI: keysOfUsers.typeURI()}, err
	}
	k, target, err := r.loadKey(c)
	if err == nil && b.SupportSessions != nil {
		err = checkSessions(*b.SupportSessions, holder(k.IAMID))
	}
	return k, target, err
}

func (r *routes) updateKey(c *api.Call, tx *directory.Tx, b *keyUpdateBody, old *identity.APIKey) (api.Reply, api.Target, error) {
	target := r.keyTarget(c, old)
	if err := c.IfMatch(&old.Meta, old.ID, true); err != nil {
		return api.Reply{}, target, err
	}
	if old.Locked {
		return api.Reply{}, target, locked("API key", old.ID)
	}
	k := *old
	set(&k.Name, b.Name)
	set(&k.Description, b.Description)
	set(&k.ExpiresAt, b.expires)
	set(&k.SupportSessions, b.SupportSessions)
	if b.ActionWhenLeaked != "" {
		k.ActionWhenLeaked = b.ActionWhenLeaked
	}
	r.Directory.APIKeys.Put(tx, &k)
	v := r.keyView(&k)
	var err error
	if v.APIKey, err = r.storedValue(c, &k); err != nil {
		return api.Reply{}, target, err
	}
	data := keyData(&k)
	data["instance_name"], data["prev_instance_name"], data["expires_at"] = k.Name, old.Name, v.ExpiresAt
	return api.Reply{Body: v, ETag: v.EntityTag, ResponseData: data}, r.keyTarget(c, &k), nil
}

func (r *routes) deleteKey(c *api.Call, tx *directory.Tx, _ *api.None, k *identity.APIKey) (api.Reply, api.Target, error) {
	target := r.keyTarget(c, k)
	if k.Locked {
		return api.Reply{}, target, locked("API key", k.ID)
	}
	r.Directory.APIKeys.Delete(tx, k)
	return api.Reply{Status: http.StatusNoContent, ResponseData: keyData(k)}, target, nil
}

// switchKey locks, unlocks, disables or enables a key. A locked key can still
// be disabled: whoever must stop a key in a hurry does not meet its lock.
func (r *routes) switchKey(state string, on bool) func(*api.Call, *directory.Tx, *api.None, *identity.APIKey) (api.Reply, api.Target, error) {
	return func(c *api.Call, tx *directory.Tx, _ *api.None, old *identity.APIKey) (api.Reply, api.Target, error) {
		target := r.keyTarget(c, old)
		k := *old
		flag := &k.Locked
		if state == "disabled" {
			flag = &k.Disabled
		}
		if *flag == on {
			return api.Reply{}, target, already("API key", k.ID, state, on)
		}
		*flag = on
		r.Directory.APIKeys.Put(tx, &k)
		return api.Reply{Status: http.StatusNoContent, ResponseData: keyData(&k)}, target, nil
	}
}

// leakReport is the answer to a report of a leak.
type leakReport struct {
	ID     string `json:"id"`
	CRN    string `json:"crn"`
	IAMID  string `json:"iam_id"`
	Leaked bool   `json:"leaked"`
	Action string `json:"action"` // that was taken
}

// leakKey takes the action that a key's owner chose for the case that somebody
// finds it in public. The route is ours: POST /v1/apikeys/{id}/leaked, or POST
// /v1/apikeys/leaked with the value in the IAM-ApiKey header. The choice was
// made for this case, so a lock does not hold it up; and who finds a key twice
// may say so twice.
func (r *routes) leakKey(c *api.Call, tx *directory.Tx, _ *api.None, old *identity.APIKey) (api.Reply, api.Target, error) {
	k := *old
	k.Leaked = true
	switch leakAction(old) {
	case identity.LeakDelete:
		r.Directory.APIKeys.Delete(tx, old)
	case identity.LeakDisable:
		k.Disabled = true
		r.Directory.APIKeys.Put(tx, &k)
	default:
		r.Directory.APIKeys.Put(tx, &k)
	}
	data := keyData(&k)
	data["action"] = leakAction(old)
	report := leakReport{ID: k.ID, CRN: r.keyCRN(&k), IAMID: k.IAMID, Leaked: true, Action: leakAction(old)}
	return api.Reply{Body: report, ResponseData: data}, r.keyTarget(c, &k), nil
}
