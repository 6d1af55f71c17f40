// Package accounts is the API of accounts and of the people in them: the
// installation's operator makes, lists and closes accounts, an account invites
// users and lets in those of its identity providers. The look-ups have the
// shapes that published clients read (account-management v4, user-management
// v2, and the account list of the command line); what an identity may do is
// decided elsewhere, and so is who gets a token.
package accounts

import (
	"net/http"
	"slices"
	"strings"
	"time"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/attest"
	"tabard.dev/tabard/internal/bootstrap"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/identity"
	"tabard.dev/tabard/internal/token"
)

// installation is the service that accounts are resources of. They all belong
// to the operator's account, so that no policy of another one is about them.
const installation = "installation"

// Actions on accounts.
const (
	accountList   = "installation.account.list"
	accountRead   = "installation.account.read"
	accountCreate = "installation.account.create"
	accountClose  = "installation.account.close"
)

// Bounds on texts, in characters. None is published.
const (
	maxName  = 100
	maxEmail = 254
	maxPhone = 50
)

// pageLimit is the length of a page, and the most that a caller can ask for.
const pageLimit = 100

// routes are the handlers of the family.
type routes struct {
	*api.Family
	sealer *token.Sealer
	keys   *attest.Keys
}

// Register adds the routes. The sealer hashes the API keys of owners and
// invited users; keys is asked for those of an identity provider when it is
// registered.
func Register(mux *http.ServeMux, cfg *api.Config, sealer *token.Sealer, keys *attest.Keys) {
	r := &routes{
		Family: &api.Family{Config: cfg, Mux: mux, Service: "Account Management", Shape: api.PlainShape},
		sealer: sealer, keys: keys,
	}
	const everybodysOwn = "everybody may look up the account that he is in; another one is shown to the operator only"
	for _, p := range []string{"/v1/accounts", "/coe/v2/accounts"} {
		api.List(r.Family, "GET "+p, accountList, r.list(p))
		api.Open(r.Family, "GET "+p+"/{account_id}", everybodysOwn, r.show)
	}
	api.Open(r.Family, "GET /v4/accounts/{account_id}", everybodysOwn, r.showV4)
	api.Change(r.Family, "POST /v1/accounts", accountCreate, accountCreate, r.loadNew, r.create)
	api.Change(r.Family, "DELETE /v1/accounts/{account_id}", accountClose, accountClose, r.load, r.close)
	api.Change(r.Family, "POST /v1/accounts/{account_id}/reopen", accountClose, "installation.account.reopen", r.load, r.reopen)
	r.registerUsers()
	r.registerProviders()
}

// resource returns the attributes of an account, or of all of them.
func (r *routes) resource(id string) map[string]string {
	m := map[string]string{access.AccountID: r.OperatorAccount, access.ServiceName: installation, access.ResourceType: "account"}
	if id != "" {
		m[access.Resource] = id
	}
	return m
}

func (r *routes) target(id, name string) api.Target {
	return api.Target{
		Resource: r.resource(id), Name: name, TypeURI: "installation/account",
		CRN: r.Names.Of(installation, "", r.OperatorAccount, "", "account", id).String(),
	}
}

// visible reports whether the caller may see an account that exists.
func (r *routes) visible(c *api.Call, id, action string) bool {
	return id == c.Account() || r.operates(c) && c.May(action, r.resource(id))
}

// operates reports whether the caller acts in the operator's account.
func (r *routes) operates(c *api.Call) bool { return c.Account() == r.OperatorAccount }

// refuse returns the refusal of an action on accounts, or nil for those of the
// operator's account who have the right. It comes before any look at which
// accounts there are.
func (r *routes) refuse(c *api.Call, action, id string) error {
	if r.operates(c) && c.May(action, r.resource(id)) {
		return nil
	}
	if err := c.Authorize(action, r.resource(id)); err != nil {
		return err
	}
	return fault.New(fault.Denied, "not_authorized", "%s acts in account %s, which is not the operator's.", c.Caller.IAMID, c.Account())
}

// States of an account.
const (
	stateActive = "ACTIVE"
	stateClosed = "CLOSED"
)

func state(a *identity.Account) string {
	if a.Closed() {
		return stateClosed
	}
	return stateActive
}

type metadata struct {
	GUID      string `json:"guid"`
	URL       string `json:"url"`
	CreatedAt string `json:"created_at"`
	UpdatedAt string `json:"updated_at"`
}

// entity has the owner under all the names by which clients look for him.
type entity struct {
	Name          string   `json:"name"`
	Type          string   `json:"type"`
	State         string   `json:"state"`
	Owner         string   `json:"owner"`
	OwnerUserID   string   `json:"owner_userid"`
	OwnerUniqueID string   `json:"owner_unique_id"`
	OwnerIAMID    string   `json:"owner_iam_id"`
	CustomerID    string   `json:"customer_id"`
	CountryCode   string   `json:"country_code"`
	CurrencyCode  string   `json:"currency_code"`
	Organizations []string `json:"organizations_region"`
	Members       []string `json:"members"`
	ClosedAt      string   `json:"closed_at,omitempty"`
}

type view struct {
	Metadata metadata `json:"metadata"`
	Entity   entity   `json:"entity"`
}

// typeStandard is the one type of account that there is.
const typeStandard = "STANDARD"

func (r *routes) view(a *identity.Account) view {
	v := view{
		Metadata: metadata{GUID: a.ID, URL: r.URL + "/v1/accounts/" + a.ID, CreatedAt: stamp(a.CreatedAt), UpdatedAt: stamp(a.ModifiedAt)},
		Entity: entity{
			Name: a.Name, Type: typeStandard, State: state(a), Owner: a.OwnerID, OwnerUserID: r.ownerEmail(a),
			OwnerUniqueID: a.OwnerID, OwnerIAMID: a.OwnerID, Organizations: []string{}, Members: []string{},
		},
	}
	if a.Closed() {
		v.Entity.ClosedAt = stamp(a.ClosedAt)
	}
	return v
}

func (r *routes) ownerEmail(a *identity.Account) string {
	if u, ok := r.Directory.Users.Get(directory.UserKey(a.ID, a.OwnerID)); ok {
		return u.Email
	}
	return ""
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

type accountPage struct {
	TotalResults int     `json:"total_results"`
	Limit        int     `json:"limit"`
	NextURL      *string `json:"next_url"`
	Resources    []view  `json:"resources"`
}

// list shows the caller's own account, and the operator all that he may see.
func (r *routes) list(path string) func(*api.Call, func(map[string]string) bool) (api.Reply, error) {
	return func(c *api.Call, _ func(map[string]string) bool) (api.Reply, error) {
		var seen []*identity.Account
		if r.operates(c) {
			seen = r.Directory.Accounts.All()
			seen = slices.DeleteFunc(seen, func(a *identity.Account) bool { return !r.visible(c, a.ID, accountList) })
		} else if own, ok := r.Directory.Accounts.Get(c.Account()); ok {
			seen = append(seen, own)
		}
		p, err := paged(c, path, seen, func(a *identity.Account) string { return api.SortKey(a.CreatedAt, a.ID) })
		if err != nil {
			return api.Reply{}, err
		}
		out := accountPage{TotalResults: p.total, Limit: p.limit, Resources: make([]view, len(p.items))}
		if p.next != "" {
			out.NextURL = &p.next
		}
		for i, a := range p.items {
			out.Resources[i] = r.view(a)
		}
		return api.Reply{Body: out}, nil
	}
}

// page is one page of a list.
type page[T any] struct {
	items        []T
	total, limit int
	next         string // path and query of the next page, or ""
}

// paged cuts a page out of items by the parameters limit and _start. The URLs
// in the answer are relative: a published client puts its own endpoint before
// them without looking.
func paged[T any](c *api.Call, path string, items []T, key func(T) string) (page[T], error) {
	p := page[T]{total: len(items)}
	limit, err := c.IntParameter("limit", pageLimit, 1, pageLimit)
	if err != nil {
		return p, err
	}
	var after api.Cursor
	if start := c.R.URL.Query().Get("_start"); start != "" {
		if after, err = api.ParseCursor("_start", start); err != nil {
			return p, err
		}
	}
	var next *api.Cursor
	p.limit = limit
	p.items, next = api.Page(items, after, limit, key)
	if next != nil {
		q := c.R.URL.Query()
		q.Set("_start", api.Cursor{After: next.After}.String())
		p.next = path + "?" + q.Encode()
	}
	return p, nil
}

// lookup finds the account of the path for whoever may see it. For everybody
// else it does not exist.
func (r *routes) lookup(c *api.Call) (*identity.Account, error) {
	id := c.R.PathValue("account_id")
	a, ok := r.Directory.Accounts.Get(id)
	if !ok || !r.visible(c, id, accountRead) {
		return nil, api.NotFound("account", id)
	}
	return a, nil
}

func (r *routes) show(c *api.Call) (api.Reply, error) {
	a, err := r.lookup(c)
	if err != nil {
		return api.Reply{}, err
	}
	return api.Reply{Body: r.view(a), ETag: a.Tag(a.ID)}, nil
}

// viewV4 is an account as account-management v4 shows it; every field is
// required there.
type viewV4 struct {
	Name                   string   `json:"name"`
	ID                     string   `json:"id"`
	Owner                  string   `json:"owner"`
	OwnerUserID            string   `json:"owner_userid"`
	OwnerIAMID             string   `json:"owner_iamid"`
	Type                   string   `json:"type"`
	Status                 string   `json:"status"`
	LinkedSoftLayerAccount string   `json:"linked_softlayer_account"`
	TeamDirectoryEnabled   bool     `json:"team_directory_enabled"`
	Traits                 traitsV4 `json:"traits"`
}

type traitsV4 struct {
	EUSupported bool `json:"eu_supported"`
	POC         bool `json:"poc"`
	HIPPA       bool `json:"hippa"` // spelled so on the wire
}

func (r *routes) showV4(c *api.Call) (api.Reply, error) {
	a, err := r.lookup(c)
	if err != nil {
		return api.Reply{}, err
	}
	return api.Reply{ETag: a.Tag(a.ID), Body: viewV4{
		Name: a.Name, ID: a.ID, Owner: a.OwnerID, OwnerUserID: r.ownerEmail(a), OwnerIAMID: a.OwnerID,
		Type: typeStandard, Status: state(a), TeamDirectoryEnabled: true,
	}}, nil
}

type newAccount struct {
	Name  string `json:"name"`
	Owner struct {
		Email string `json:"email"`
		Name  string `json:"name"`
	} `json:"owner"`
}

// created is the answer to a creation: the account, and its owner in the form
// of the file that an installation's first start writes. It is the only time
// that his API key is shown.
type created struct {
	view
	Owner bootstrap.Owner `json:"owner"`
}

func (r *routes) loadNew(c *api.Call, b *newAccount) (struct{}, api.Target, error) {
	t := r.target("", "")
	if err := r.refuse(c, accountCreate, ""); err != nil {
		return struct{}{}, t, err
	}
	if err := checkName("name", b.Name); err != nil {
		return struct{}{}, t, err
	}
	t.Name = b.Name
	if !validEmail(b.Owner.Email) {
		return struct{}{}, t, api.Invalid("owner.email is required and must be an e-mail address of at most %d characters.", maxEmail).On("owner.email")
	}
	if b.Owner.Name != "" {
		if err := checkName("owner.name", b.Owner.Name); err != nil {
			return struct{}{}, t, err
		}
	}
	return struct{}{}, t, nil
}

func (r *routes) create(c *api.Call, tx *directory.Tx, b *newAccount, _ struct{}) (api.Reply, api.Target, error) {
	o := bootstrap.NewOwner(b.Name, r.URL)
	o.Email, o.Person = b.Owner.Email, b.Owner.Name
	bootstrap.NewAccount(tx, r.Directory, r.Names, o, r.sealer.Hash(o.APIKey), bootstrap.Origin{
		Transaction: api.TransactionID(c.R.Context()),
		Initiator: activity.Initiator{
			ID: c.Caller.IAMID, Name: c.Caller.Name, TypeURI: initiatorType(c.Caller),
			Credential: activity.Credential{Type: "token"},
		},
	})
	a := &identity.Account{ID: o.AccountID, Name: o.Name, OwnerID: o.IAMID}
	a.CreatedAt, a.ModifiedAt = tx.Now, tx.Now
	v := r.view(a)
	v.Entity.OwnerUserID = o.Email
	return api.Reply{
		Status: http.StatusCreated, Body: created{v, o},
		ResponseData: map[string]any{"account_id": o.AccountID, "name": o.Name, "owner_iam_id": o.IAMID, "owner_email": o.Email},
	}, r.target(o.AccountID, o.Name), nil
}

func initiatorType(c *token.Claims) string {
	switch c.SubType {
	case token.SubServiceID:
		return activity.ServiceIDType
	case token.SubProfile:
		return activity.ProfileType
	}
	return activity.UserType
}

// load finds an account that the operator is about to change.
func (r *routes) load(c *api.Call, _ *api.None) (*identity.Account, api.Target, error) {
	id := c.R.PathValue("account_id")
	t := r.target(id, "")
	if err := r.refuse(c, accountClose, id); err != nil {
		return nil, t, err
	}
	a, ok := r.Directory.Accounts.Get(id)
	if !ok {
		return nil, t, api.NotFound("account", id)
	}
	return a, r.target(id, a.Name), nil
}

// close ends all access to an account and takes nothing away from it. The
// operator's own account stays open: nobody could reopen it.
func (r *routes) close(c *api.Call, tx *directory.Tx, _ *api.None, a *identity.Account) (api.Reply, api.Target, error) {
	t := r.target(a.ID, a.Name)
	if err := c.IfMatch(&a.Meta, a.ID, false); err != nil {
		return api.Reply{}, t, err
	}
	if a.ID == r.OperatorAccount {
		return api.Reply{}, t, fault.New(fault.Conflict, "operator_account", "The operator's own account cannot be closed.")
	}
	if a.Closed() {
		return api.Reply{}, t, fault.New(fault.Conflict, "conflict", "The account is closed already.")
	}
	next := *a
	next.ClosedAt = tx.Now
	r.Directory.Accounts.Put(tx, &next)
	return api.Reply{Status: http.StatusNoContent, ResponseData: map[string]any{"account_id": a.ID, "state": stateClosed}}, t, nil
}

func (r *routes) reopen(c *api.Call, tx *directory.Tx, _ *api.None, a *identity.Account) (api.Reply, api.Target, error) {
	t := r.target(a.ID, a.Name)
	if err := c.IfMatch(&a.Meta, a.ID, false); err != nil {
		return api.Reply{}, t, err
	}
	if !a.Closed() {
		return api.Reply{}, t, fault.New(fault.Conflict, "conflict", "The account is not closed.")
	}
	next := *a
	next.ClosedAt = time.Time{}
	r.Directory.Accounts.Put(tx, &next)
	return api.Reply{
		Body: r.view(&next), ETag: next.Tag(next.ID), ResponseData: map[string]any{"account_id": a.ID, "state": stateActive},
	}, t, nil
}

// checkName demands a name that people can tell from another one.
func checkName(field, s string) error {
	if !api.Printable(s, maxName) || strings.TrimSpace(s) == "" || strings.TrimSpace(s) != s {
		return api.Invalid("%s must have 1 to %d characters, none of them a control character, and no space at its ends.", field, maxName).On(field)
	}
	return nil
}
