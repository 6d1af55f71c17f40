// Package accessuse is the API of what access is used for: which policy
// permitted which action to whom, how often and when last, and which smaller
// policies the observed use needs. It is ours. It only reads: what it
// recommends is put into effect with the API of policies.
package accessuse

import (
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
)

const (
	service      = "iam-access-management"
	resourceType = "insight"
	actionGet    = "iam-access-management.insight.get"

	defaultPage = 100
	maxPage     = 1000

	maxWindow = access.MaxDays // days
)

// Register adds the family's routes.
func Register(mux *http.ServeMux, cfg *api.Config) {
	f := &api.Family{Config: cfg, Mux: mux, Service: "IAM Access Management", Shape: api.PlainShape}
	api.Read(f, "GET /v1/access_use", actionGet, loadFilter, list)
	api.Read(f, "GET /v1/access_recommendation", actionGet, loadQuestion, recommend)
}

// target is what is known of one identity's access, or of all of the account.
func target(c *api.Call, iamID string) api.Target {
	if len(iamID) > access.MaxValueLength || crn.KindOf(iamID) == crn.KindCRN {
		iamID = "" // the use of all services that act under a CRN is counted together
	}
	return api.Target{
		Resource: c.InAccount(service, access.ResourceType, resourceType, access.Resource, iamID),
		CRN:      c.Names.Of(service, "", c.Account(), "", resourceType, "").String(),
		Name:     iamID, TypeURI: service + "/" + resourceType,
	}
}

// filter says which use to show.
type filter struct {
	iamID, policyID, action string
	unused                  bool
	page                    api.Cursor
}

// parameters are those of a list; a start value carries all of them.
var parameters = []string{"iam_id", "policy_id", "action", "unused"}

func loadFilter(c *api.Call) (filter, api.Target, error) {
	q := c.R.URL.Query()
	f := filter{page: api.Cursor{Query: url.Values{}}}
	var err error
	if start := q.Get("start"); start != "" {
		if f.page, err = api.ParseCursor("start", start); err != nil {
			return f, target(c, ""), err
		}
		q = f.page.Query
		if f.page.Limit < 1 || f.page.Limit > maxPage {
			f.page.Limit = defaultPage
		}
	} else {
		if f.page.Limit, err = c.IntParameter("limit", defaultPage, 1, maxPage); err != nil {
			return f, target(c, ""), err
		}
		for _, name := range parameters {
			if v := q.Get(name); v != "" {
				f.page.Query.Set(name, v)
			}
		}
	}
	f.iamID, f.policyID, f.action = q.Get("iam_id"), q.Get("policy_id"), q.Get("action")
	if f.unused, err = flag("unused", q.Get("unused")); err != nil {
		return f, target(c, f.iamID), err
	}
	if f.unused && f.iamID == "" {
		return f, target(c, ""), fault.New(fault.Invalid, "invalid_parameter", "The parameter unused needs iam_id: whose unused access is to be shown?").OnParameter("iam_id", "")
	}
	return f, target(c, f.iamID), nil
}

func flag(name, value string) (bool, error) {
	if value == "" {
		return false, nil
	}
	b, err := strconv.ParseBool(value)
	if err != nil {
		return false, fault.New(fault.Invalid, "invalid_parameter", "The parameter %s must be true or false.", name).OnParameter(name, value)
	}
	return b, nil
}

// use is what one policy permitted to one subject.
type use struct {
	IAMID       string          `json:"iam_id"` // "crn" for the services that act under their CRN
	PolicyID    string          `json:"policy_id"`
	PolicyState string          `json:"policy_state"` // active, deleted, or gone when it can no longer be restored
	Service     string          `json:"service_name,omitempty"`
	Action      string          `json:"action"`
	Count       int64           `json:"count"`
	FirstAt     string          `json:"first_at,omitempty"`
	LastAt      string          `json:"last_at,omitempty"`
	Days        int             `json:"days"`
	PeriodDays  int             `json:"period_days,omitempty"` // when it comes at regular distances
	Resources   *access.Touched `json:"resources,omitempty"`
}

// missed are requests that found no room among the records.
type missed struct {
	IAMID  string `json:"iam_id"`
	Count  int64  `json:"count"`
	LastAt string `json:"last_at"`
}

const gone = "gone"

func list(c *api.Call, f filter) (api.Reply, error) {
	d := c.Directory
	state := func(id string) string {
		p, ok := d.Policies.Get(id)
		if !ok || p.AccountID != c.Account() {
			return gone
		}
		return p.State
	}
	var all []use
	without := []missed{}
	for _, u := range c.Usage.Uses(c.Account(), f.iamID) {
		if u.Action == "" {
			without = append(without, missed{u.Subject, u.Count, timestamp(u.Last)})
			continue
		}
		if !f.unused {
			all = append(all, use{
				IAMID: u.Subject, PolicyID: u.PolicyID, PolicyState: state(u.PolicyID), Service: u.Service, Action: u.Action,
				Count: u.Count, FirstAt: timestamp(u.First), LastAt: timestamp(u.Last), Days: u.Days.Len(), PeriodDays: u.Days.Period(), Resources: &u.Touched,
			})
		}
	}
	if f.unused {
		r := ask(c, f.iamID, access.Question{Window: maxWindow * 24 * time.Hour})
		for _, a := range slices.Concat(r.Own, r.Groups) {
			for _, s := range a.Unused {
				for _, action := range s.Actions {
					all = append(all, use{IAMID: f.iamID, PolicyID: a.Policy.ID, PolicyState: a.Policy.State, Service: s.Service, Action: action})
				}
			}
		}
	}
	all = slices.DeleteFunc(all, func(u use) bool {
		return f.policyID != "" && u.PolicyID != f.policyID || f.action != "" && u.Action != f.action
	})
	type next struct {
		Start string `json:"start"`
	}
	out := struct {
		Since  string   `json:"counted_since"`
		Limit  int      `json:"limit"`
		Uses   []use    `json:"uses"`
		Missed []missed `json:"missed"` // use of which nothing else is known
		Next   *next    `json:"next,omitempty"`
	}{Since: timestamp(c.Usage.Since()), Limit: f.page.Limit, Uses: []use{}, Missed: without}
	page, after := api.Page(all, f.page, f.page.Limit, func(u use) string {
		return directory.Key(u.IAMID, u.PolicyID, u.Service, u.Action)
	})
	out.Uses = append(out.Uses, page...)
	if after != nil {
		out.Next = &next{after.String()}
	}
	return api.Reply{Body: out}, nil
}

func timestamp(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.RFC3339)
}

// question is about one identity.
type question struct {
	iamID string
	days  int
	access.Question
}

func loadQuestion(c *api.Call) (question, api.Target, error) {
	q := c.R.URL.Query()
	out := question{iamID: q.Get("iam_id")}
	if out.iamID == "" {
		return out, target(c, ""), fault.New(fault.Invalid, "invalid_parameter", "The parameter iam_id is required: whose policies are to be made smaller?").OnParameter("iam_id", "")
	}
	t := target(c, out.iamID)
	var err error
	if out.days, err = c.IntParameter("window_days", int(access.DefaultWindow/(24*time.Hour)), 1, maxWindow); err != nil {
		return out, t, err
	}
	out.Window = time.Duration(out.days) * 24 * time.Hour
	if out.CustomRole, err = flag("custom_role", q.Get("custom_role")); err != nil {
		return out, t, err
	}
	return out, t, nil
}

// exists reports whether an identity is one of the caller's account.
func exists(c *api.Call, iamID string) bool {
	d := c.Directory
	switch crn.KindOf(iamID) {
	case crn.KindProfile:
		p, ok := d.Profiles.Get(crn.Identifier(iamID))
		return ok && p.AccountID == c.Account()
	case crn.KindServiceID:
		s, ok := d.ServiceIDs.Get(crn.Identifier(iamID))
		return ok && s.AccountID == c.Account()
	case crn.KindUser:
		_, ok := d.Users.Get(directory.UserKey(c.Account(), iamID))
		return ok
	}
	return false
}

// ask gathers the evidence about an identity and asks for a recommendation.
func ask(c *api.Call, iamID string, q access.Question) access.Recommendation {
	d, account, now := c.Directory, c.Account(), c.Now()
	active := func(subject string) []*access.Policy {
		return slices.DeleteFunc(d.PoliciesOfSubject.Get(directory.Key(account, subject)), func(p *access.Policy) bool {
			return p.State != access.Active || p.Type != access.TypeAccess
		})
	}
	e := access.Evidence{AccountID: account, Subject: iamID, Own: active(iamID), Uses: c.Usage.Uses(account, iamID), Since: c.Usage.Since()}
	for _, group := range d.GroupsOf(account, iamID, now) {
		e.Groups = append(e.Groups, active(group)...)
	}
	return access.Recommend(now, q, d.Catalog(account), e)
}

func recommend(c *api.Call, q question) (api.Reply, error) {
	if !exists(c, q.iamID) {
		return api.Reply{}, api.NotFound("identity", strings.ToValidUTF8(q.iamID, "\uFFFD"))
	}
	r := ask(c, q.iamID, q.Question)
	out := recommendation{
		IAMID: q.iamID, WindowDays: q.days, From: timestamp(r.From), Since: timestamp(c.Usage.Since()), Missed: r.Missed,
		Policies: []advice{}, Groups: []advice{}, Changes: []change{},
	}
	for _, a := range r.Own {
		out.Policies = append(out.Policies, adviceOf(a))
	}
	for _, a := range r.Groups {
		shown := adviceOf(a)
		shown.GroupID, shown.Verdict = a.Policy.SubjectID(), ""
		out.Groups = append(out.Groups, shown)
	}
	for _, step := range r.Changes {
		out.Changes = append(out.Changes, changeOf(step))
	}
	return api.Reply{Body: out}, nil
}
