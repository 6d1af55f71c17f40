package accounts

import (
	"cmp"
	"net/http"
	"net/mail"
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
)

const userManagement = "user-management"

// Actions on users.
const (
	userRetrieve    = "user-management.user.retrieve"
	userCreate      = "user-management.user.create"
	userUpdate      = "user-management.user.update"
	userDelete      = "user-management.user.delete"
	userStateChange = "user-management.user.state-change"
)

// Two actions for the first API key of somebody else: the right to make users'
// keys, and the one of administrators alone.
const (
	userKeyCreate = "iam-identity.user-apikey.create"
	keyManage     = "iam-identity.apikey.manage"
)

func (r *routes) registerUsers() {
	const (
		users = "/v2/accounts/{account_id}/users"
		user  = users + "/{iam_id}"
	)
	api.List(r.Family, "GET "+users, userRetrieve, r.listUsers)
	// Not a Read: nobody needs the action to see himself.
	api.List(r.Family, "GET "+user, userRetrieve, r.showUser)
	api.ChangeAfter(r.Family, "POST "+users, userCreate, userCreate, r.prepareInvitation, r.loadInvitation, r.invite)
	// One published client changes a user with PUT, the other one with PATCH.
	for _, method := range []string{"PATCH ", "PUT "} {
		api.Change(r.Family, method+user, userUpdate, userUpdate, loadUser[userChanges](r, userUpdate), r.updateUser)
	}
	for _, p := range []string{user, "/v3/accounts/{account_id}/users/{iam_id}"} {
		api.Change(r.Family, "DELETE "+p, userDelete, userDelete, loadUser[api.None](r, userDelete), r.removeUser)
	}
	api.Change(r.Family, "POST "+user+"/apikey", userKeyCreate, userKeyCreate, r.loadKeyless, r.firstKey)
}

// ownAccount demands that the account of the path is the caller's. Any other
// one is unknown to him, whether it exists or not.
func ownAccount(c *api.Call) error {
	if id := c.R.PathValue("account_id"); id != c.Account() {
		return api.NotFound("account", id)
	}
	return nil
}

func userResource(c *api.Call, iamID string) map[string]string {
	if iamID == "" {
		return c.InAccount(userManagement)
	}
	return c.InAccount(userManagement, access.ResourceType, "user", access.Resource, iamID)
}

func (r *routes) userTarget(c *api.Call, iamID, name string) api.Target {
	return api.Target{
		Resource: userResource(c, iamID), Name: name, TypeURI: "user-management/user",
		CRN: r.Names.Of(userManagement, "", c.Account(), "", "user", iamID).String(),
	}
}

// States of a user.
const (
	userActive   = "ACTIVE"
	userPending  = "PENDING"
	userDisabled = "DISABLED"
)

// stateOf returns a user's state. An invitation is taken up by the first login,
// with a first API key as well.
func (r *routes) stateOf(u *identity.User) string {
	switch {
	case u.Disabled:
		return userDisabled
	case u.Invited && !r.loggedIn(u):
		return userPending
	}
	return userActive
}

func (r *routes) loggedIn(u *identity.User) bool {
	logins, _ := r.Usage.Of(directory.UserKey(u.AccountID, u.IAMID))
	return logins > 0
}

type userView struct {
	ID             string `json:"id"`
	IAMID          string `json:"iam_id"`
	Realm          string `json:"realm"`
	UserID         string `json:"user_id"`
	FirstName      string `json:"firstname"`
	LastName       string `json:"lastname"`
	State          string `json:"state"`
	SubState       string `json:"sub_state"`
	Email          string `json:"email"`
	Phone          string `json:"phonenumber"`
	AlternatePhone string `json:"altphonenumber"`
	Photo          string `json:"photo"`
	AccountID      string `json:"account_id"`
	AddedOn        string `json:"added_on"`
}

func (r *routes) viewUser(u *identity.User) userView {
	v := userView{
		ID: u.IAMID, IAMID: u.IAMID, Realm: crn.Realm(u.IAMID), UserID: cmp.Or(u.Email, u.IAMID),
		FirstName: u.FirstName, LastName: u.LastName, State: r.stateOf(u),
		Email: u.Email, Phone: u.Phone, AccountID: u.AccountID, AddedOn: stamp(u.CreatedAt),
	}
	if v.FirstName == "" && v.LastName == "" {
		v.FirstName = u.Name
	}
	return v
}

// seesAll reports whether the caller sees every user without the action: people
// do, unless the account restricts it (reference/iam-identity.md section 4.8).
// Software has no colleagues and needs the action.
func (r *routes) seesAll(c *api.Call) bool {
	return crn.KindOf(c.Caller.IAMID) == crn.KindUser &&
		r.Directory.SettingsOf(c.Account()).RestrictUserList != identity.Restricted
}

type userPage struct {
	TotalResults int        `json:"total_results"`
	Limit        int        `json:"limit"`
	FirstURL     string     `json:"first_url"`
	NextURL      string     `json:"next_url,omitempty"`
	Resources    []userView `json:"resources"`
}

func (r *routes) listUsers(c *api.Call, may func(map[string]string) bool) (api.Reply, error) {
	if err := ownAccount(c); err != nil {
		return api.Reply{}, err
	}
	keep, err := searched(c)
	if err != nil {
		return api.Reply{}, err
	}
	all := r.seesAll(c)
	seen := slices.DeleteFunc(r.Directory.UsersByAccount.Get(c.Account()), func(u *identity.User) bool {
		return !keep(r.viewUser(u)) || !all && u.IAMID != c.Caller.IAMID && !may(userResource(c, u.IAMID))
	})
	path := "/v2/accounts/" + c.Account() + "/users"
	p, err := paged(c, path, seen, func(u *identity.User) string { return api.SortKey(u.CreatedAt, u.IAMID) })
	if err != nil {
		return api.Reply{}, err
	}
	first := c.R.URL.Query()
	first.Del("_start")
	out := userPage{TotalResults: p.total, Limit: p.limit, FirstURL: path, NextURL: p.next, Resources: make([]userView, len(p.items))}
	if len(first) > 0 {
		out.FirstURL += "?" + first.Encode()
	}
	for i, u := range p.items {
		out.Resources[i] = r.viewUser(u)
	}
	return api.Reply{Body: out}, nil
}

// searched returns what the parameters user_id and search keep. A search is a
// comma-separated list of field:value; a user who meets one of them is found.
func searched(c *api.Call) (func(userView) bool, error) {
	fields := map[string]func(userView) string{
		"firstname": func(u userView) string { return u.FirstName },
		"lastname":  func(u userView) string { return u.LastName },
		"email":     func(u userView) string { return u.Email },
		"state":     func(u userView) string { return u.State },
		"substate":  func(u userView) string { return u.SubState },
		"iam_id":    func(u userView) string { return u.IAMID },
		"realm":     func(u userView) string { return u.Realm },
		"userId":    func(u userView) string { return u.UserID },
	}
	q := c.R.URL.Query()
	userID, search := q.Get("user_id"), q.Get("search")
	type term struct {
		of    func(userView) string
		value string
	}
	var terms []term
	if search != "" {
		for s := range strings.SplitSeq(search, ",") {
			name, value, ok := strings.Cut(s, ":")
			if !ok || fields[name] == nil {
				return nil, api.Invalid("The parameter search must be a list of field:value, with the fields firstname, lastname, email, state, substate, iam_id, realm and userId.").OnParameter("search", search)
			}
			terms = append(terms, term{fields[name], value})
		}
	}
	return func(u userView) bool {
		if userID != "" && !strings.EqualFold(u.UserID, userID) {
			return false
		}
		return len(terms) == 0 || slices.ContainsFunc(terms, func(t term) bool { return strings.EqualFold(t.of(u), t.value) })
	}, nil
}

// showUser asks for the action before it looks, so that whoever lacks it does
// not learn who there is.
func (r *routes) showUser(c *api.Call, _ func(map[string]string) bool) (api.Reply, error) {
	if err := ownAccount(c); err != nil {
		return api.Reply{}, err
	}
	iamID := c.R.PathValue("iam_id")
	if iamID != c.Caller.IAMID && !r.seesAll(c) {
		if err := c.Authorize(userRetrieve, userResource(c, iamID)); err != nil {
			return api.Reply{}, err
		}
	}
	u, ok := r.Directory.Users.Get(directory.UserKey(c.Account(), iamID))
	if !ok {
		return api.Reply{}, api.NotFound("user", iamID)
	}
	return api.Reply{Body: r.viewUser(u), ETag: u.Tag(u.IAMID)}, nil
}

// loadUser finds the user of the path for a change. Whoever lacks the action
// does not learn who there is.
func loadUser[B any](r *routes, action string) func(*api.Call, *B) (*identity.User, api.Target, error) {
	return func(c *api.Call, _ *B) (*identity.User, api.Target, error) {
		iamID := c.R.PathValue("iam_id")
		t := r.userTarget(c, iamID, "")
		if err := ownAccount(c); err != nil {
			return nil, api.Target{TypeURI: t.TypeURI}, err
		}
		u, ok := r.Directory.Users.Get(directory.UserKey(c.Account(), iamID))
		if !ok {
			if err := c.Authorize(action, t.Resource); err != nil {
				return nil, t, err
			}
			return nil, t, api.NotFound("user", iamID)
		}
		return u, r.userTarget(c, iamID, u.Name), nil
	}
}

// userChanges is the body of an update. What is absent keeps its value.
type userChanges struct {
	FirstName      *string `json:"firstname"`
	LastName       *string `json:"lastname"`
	State          *string `json:"state"`
	Email          *string `json:"email"`
	Phone          *string `json:"phonenumber"`
	AlternatePhone *string `json:"altphonenumber"`
	Photo          *string `json:"photo"`
}

func (b *userChanges) check() error {
	for field, s := range map[string]*string{"firstname": b.FirstName, "lastname": b.LastName} {
		if s != nil && *s != "" {
			if err := checkName(field, *s); err != nil {
				return err
			}
		}
	}
	for field, s := range map[string]*string{"altphonenumber": b.AlternatePhone, "photo": b.Photo} {
		if s != nil && *s != "" {
			return api.Invalid("%s is not kept here; leave it out.", field).On(field)
		}
	}
	switch {
	case b.Phone != nil && !api.Printable(*b.Phone, maxPhone):
		return api.Invalid("phonenumber must have at most %d characters, none of them a control character.", maxPhone).On("phonenumber")
	case b.Email != nil && !validEmail(*b.Email):
		return api.Invalid("email must be an e-mail address of at most %d characters.", maxEmail).On("email")
	case b.State != nil && *b.State != userActive && *b.State != userDisabled:
		return api.Invalid("state must be %s or %s.", userActive, userDisabled).On("state")
	}
	return nil
}

func (r *routes) updateUser(c *api.Call, tx *directory.Tx, b *userChanges, old *identity.User) (api.Reply, api.Target, error) {
	t := r.userTarget(c, old.IAMID, old.Name)
	fail := func(err error) (api.Reply, api.Target, error) { return api.Reply{}, t, err }
	if err := b.check(); err != nil {
		return fail(err)
	}
	if err := c.IfMatch(&old.Meta, old.IAMID, false); err != nil {
		return fail(err)
	}
	u := *old
	set(&u.FirstName, b.FirstName)
	set(&u.LastName, b.LastName)
	set(&u.Phone, b.Phone)
	set(&u.Email, b.Email)
	if name := strings.TrimSpace(u.FirstName + " " + u.LastName); name != "" {
		u.Name = name
	}
	if b.State != nil {
		u.Disabled = *b.State == userDisabled
	}
	if u.Disabled != old.Disabled {
		if err := c.Authorize(userStateChange, t.Resource); err != nil {
			return fail(err)
		}
		if u.Disabled && r.owns(c, u.IAMID) {
			return fail(fault.New(fault.Conflict, "account_owner", "The account's owner cannot be disabled."))
		}
	}
	if !strings.EqualFold(u.Email, old.Email) {
		// Whoever logs in with the address of an invitation takes it up.
		if old.Invited {
			return fail(fault.New(fault.Conflict, "invitation_pending", "The address of a pending invitation cannot be changed; remove the user and invite the other address."))
		}
		if other := r.userWithEmail(c.Account(), u.Email); other != nil {
			return fail(emailTaken(u.Email))
		}
	}
	r.Directory.Users.Put(tx, &u)
	return api.Reply{
		Status: http.StatusNoContent, ETag: u.Tag(u.IAMID),
		ResponseData: map[string]any{
			"iam_id": u.IAMID, "name": u.Name, "email": u.Email, "state": r.stateOf(&u),
			"previous": map[string]any{"name": old.Name, "email": old.Email, "state": r.stateOf(old)},
		},
	}, r.userTarget(c, u.IAMID, u.Name), nil
}

// owns reports whether an identity is the owner of the caller's account.
func (r *routes) owns(c *api.Call, iamID string) bool {
	a, ok := r.Directory.Accounts.Get(c.Account())
	return ok && a.OwnerID == iamID
}

// userWithEmail returns a user of an account with an address, in whatever case.
func (r *routes) userWithEmail(accountID, email string) *identity.User {
	for _, u := range r.Directory.UsersByAccount.Get(accountID) {
		if strings.EqualFold(u.Email, email) {
			return u
		}
	}
	return nil
}

func emailTaken(email string) *fault.Error {
	return fault.New(fault.Conflict, "user_exists", "The account has a user with the address %s already.", email).On("email")
}

// removeUser takes a user out of the account with all that he was given there.
// The account always keeps its owner.
func (r *routes) removeUser(c *api.Call, tx *directory.Tx, _ *api.None, u *identity.User) (api.Reply, api.Target, error) {
	t := r.userTarget(c, u.IAMID, u.Name)
	if err := c.IfMatch(&u.Meta, u.IAMID, false); err != nil {
		return api.Reply{}, t, err
	}
	if r.owns(c, u.IAMID) {
		return api.Reply{}, t, fault.New(fault.Conflict, "account_owner", "The account's owner cannot be removed from it.")
	}
	policies, groups := r.Directory.ForgetSubject(tx, u.AccountID, u.IAMID)
	keys := []string{}
	for _, k := range r.Directory.APIKeysByIdentity.Get(directory.Key(u.AccountID, u.IAMID)) {
		r.Directory.APIKeys.Delete(tx, k)
		keys = append(keys, k.ID)
	}
	slices.Sort(keys)
	r.Directory.Users.Delete(tx, u)
	return api.Reply{Status: http.StatusNoContent, ResponseData: map[string]any{
		"iam_id": u.IAMID, "email": u.Email, "deleted_policies": policies, "left_access_groups": groups, "deleted_apikeys": keys,
	}}, t, nil
}

// loadKeyless finds the user who is to get a first key. It asks for the right
// to manage keys before it looks; the one to create them is the route's.
func (r *routes) loadKeyless(c *api.Call, _ *api.None) (*identity.User, api.Target, error) {
	t := api.Target{TypeURI: "iam-identity/user-apikey"}
	if err := ownAccount(c); err != nil {
		return nil, t, err
	}
	t.Resource = c.InAccount(iamIdentity, access.ResourceType, "apikey")
	if err := c.Authorize(keyManage, t.Resource); err != nil {
		return nil, t, err
	}
	iamID := c.R.PathValue("iam_id")
	u, ok := r.Directory.Users.Get(directory.UserKey(c.Account(), iamID))
	if !ok {
		return nil, t, api.NotFound("user", iamID)
	}
	return u, t, nil
}

// firstKey makes the API key with which an invited user gets in for the first
// time, for an administrator to pass on. A user who has a key or has been here
// makes his own: a further one would be his rights in somebody else's hands.
func (r *routes) firstKey(c *api.Call, tx *directory.Tx, _ *api.None, u *identity.User) (api.Reply, api.Target, error) {
	t := api.Target{TypeURI: "iam-identity/user-apikey"}
	// A login with an API key leaves the invitation open for the identity
	// provider, so the count of logins is what tells.
	if !u.Invited || u.Disabled || r.loggedIn(u) || r.Directory.APIKeysByIdentity.Len(directory.Key(u.AccountID, u.IAMID)) > 0 {
		return api.Reply{}, t, fault.New(fault.Conflict, "not_invited", "A first API key is for an invited user who has none and has never logged in; %s is not.", u.IAMID)
	}
	secret := bootstrap.NewAPIKey()
	k := &identity.APIKey{
		ID: "ApiKey-" + uuid.NewString(), AccountID: u.AccountID, IAMID: u.IAMID, Name: "invitation",
		Description: "Made with the invitation; replace it and delete it.", Hash: r.sealer.Hash(secret),
	}
	r.Directory.APIKeys.Put(tx, k)
	t.Name = k.Name
	t.CRN = r.Names.Of(iamIdentity, "", k.AccountID, "", "apikey", k.ID).String()
	return api.Reply{
		Status: http.StatusCreated,
		Body: map[string]string{
			"id": k.ID, "crn": t.CRN, "name": k.Name, "description": k.Description, "account_id": k.AccountID,
			"iam_id": k.IAMID, "apikey": secret, "created_at": stamp(k.CreatedAt), "created_by": k.CreatedBy,
		},
		ResponseData: map[string]any{"apikey_id": k.ID, "iam_id": k.IAMID},
	}, t, nil
}

// validEmail reports whether s is a bare e-mail address, without the quoting
// that the standard allows and nobody has.
func validEmail(s string) bool {
	if len(s) > maxEmail || !api.Printable(s, maxEmail) || strings.ContainsAny(s, "\"()<>[]:;,\\ ") {
		return false
	}
	a, err := mail.ParseAddress(s)
	return err == nil && a.Address == s && a.Name == ""
}

// set changes a value unless the client left it out.
func set[T any](into, from *T) {
	if from != nil {
		*into = *from
	}
}
