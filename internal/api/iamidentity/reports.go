package iamidentity

import (
	"cmp"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/identity"
)

const (
	reportGet     = "iam-identity.report.get"
	reportCreate  = "iam-identity.report.create"
	reportTypeURI = "iam-identity/report"
)

// A report's contents are computed when it is read for the first time, but not
// before it has this age: logins that were under way when it was asked for are
// recorded by then, on every node.
const reportSettles = 2 * time.Second

// Bounds on what reports take up. Reports live for a day
// (reference/iam-identity.md section 4.9); the other bounds are ours.
const (
	reportLife     = 24 * time.Hour
	maxReports     = 10      // of one kind in an account; the oldest make room
	maxKeptReport  = 1 << 20 // bytes; larger ones are computed for each read
	defaultHours   = 720
	maxReportHours = 24 * 365 * 10
)

// latest is the reference of an account's newest report.
const latest = "latest"

// reportKind is what differs among the reports.
type reportKind struct {
	kind    string                                  // also the value of the parameter type
	prepare func(*api.Call, *identity.Report) error // reads further parameters
	compute func(*routes, *identity.Report) any     // the body of the answer
}

func (r *routes) registerReports() {
	r.registerReport("/v1/activity/accounts/{account_id}/report", inactivityReport)
}

// registerReport adds the routes of one kind of report.
func (r *routes) registerReport(path string, k reportKind) {
	api.Change(r.Family, "POST "+path, reportCreate, reportCreate, r.newReport(k), r.createReport)
	api.Read(r.Family, "GET "+path+"/{reference}", reportGet, r.loadReport(k), r.showReport(k))
}

func (r *routes) reportTarget(c *api.Call, id string) api.Target {
	return api.Target{
		Resource: accountResource(c), CRN: r.Names.Of(service, "", c.Account(), "", "report", id).String(), Name: id, TypeURI: reportTypeURI,
	}
}

func (r *routes) newReport(k reportKind) func(*api.Call, *api.None) (*identity.Report, api.Target, error) {
	return func(c *api.Call, _ *api.None) (*identity.Report, api.Target, error) {
		if err := inOwnAccount(c); err != nil {
			return nil, api.Target{TypeURI: reportTypeURI}, err
		}
		id := strings.ReplaceAll(uuid.NewString(), "-", "")
		target := r.reportTarget(c, id)
		if typ := c.R.URL.Query().Get("type"); typ != "" && typ != k.kind {
			return nil, target, api.Invalid("The parameter type must be %s.", k.kind).OnParameter("type", typ)
		}
		report := &identity.Report{ID: id, AccountID: c.Account(), Kind: k.kind, To: r.Now().UTC()}
		return report, target, k.prepare(c, report)
	}
}

type referenceView struct {
	Reference string `json:"reference"`
}

// createReport stages a new report and removes those that have had their time.
func (r *routes) createReport(c *api.Call, tx *directory.Tx, _ *api.None, report *identity.Report) (api.Reply, api.Target, error) {
	kept := 1
	for _, old := range r.newestReports(report.AccountID) {
		if old.Kind == report.Kind {
			kept++
		}
		if report.To.Sub(old.To) > reportLife || old.Kind == report.Kind && kept > maxReports {
			r.Directory.Reports.Delete(tx, old)
		}
	}
	r.Directory.Reports.Put(tx, report)
	data := map[string]any{"type": report.Kind}
	if report.Hours > 0 {
		data["duration"] = report.Hours
	}
	return api.Reply{Status: http.StatusAccepted, Body: referenceView{report.ID}, ResponseData: data}, r.reportTarget(c, report.ID), nil
}

// newestReports returns an account's reports of every kind, the newest first.
func (r *routes) newestReports(accountID string) []*identity.Report {
	reports := r.Directory.ReportsByAccount.Get(accountID)
	slices.SortFunc(reports, func(a, b *identity.Report) int {
		return cmp.Or(b.To.Compare(a.To), b.CreatedAt.Compare(a.CreatedAt), strings.Compare(a.ID, b.ID))
	})
	return reports
}

func (r *routes) loadReport(k reportKind) func(*api.Call) (*identity.Report, api.Target, error) {
	return func(c *api.Call) (*identity.Report, api.Target, error) {
		if err := inOwnAccount(c); err != nil {
			return nil, api.Target{TypeURI: reportTypeURI}, err
		}
		reference := c.R.PathValue("reference")
		for _, report := range r.newestReports(c.Account()) {
			if report.Kind == k.kind && (reference == latest || reference == report.ID) {
				return report, r.reportTarget(c, report.ID), nil
			}
		}
		return nil, api.Target{TypeURI: reportTypeURI}, api.NotFound("report", reference)
	}
}

// showReport answers 204 until a report can be computed. From its first answer
// on a report stays as it is, whatever happens in the account.
func (r *routes) showReport(k reportKind) func(*api.Call, *identity.Report) (api.Reply, error) {
	return func(c *api.Call, report *identity.Report) (api.Reply, error) {
		if len(report.Doc) > 0 {
			return api.Reply{Body: json.RawMessage(report.Doc)}, nil
		}
		if r.Now().Sub(report.To) < reportSettles {
			return api.Reply{Status: http.StatusNoContent}, nil
		}
		doc, err := json.Marshal(k.compute(r, report))
		if err != nil {
			return api.Reply{}, fmt.Errorf("encode report %s: %w", report.ID, err)
		}
		if len(doc) <= maxKeptReport {
			doc, err = r.keepReport(c, report.ID, doc)
		}
		return api.Reply{Body: json.RawMessage(doc)}, err
	}
}

// keepReport keeps the contents of a report, which asking for it has already
// put on record, and returns those that were kept first.
func (r *routes) keepReport(c *api.Call, id string, doc []byte) ([]byte, error) {
	err := r.Directory.Update(c.R.Context(), c.Caller.IAMID, func(tx *directory.Tx) error {
		current, ok := r.Directory.Reports.Get(id)
		switch {
		case !ok: // a newer one has taken its place
		case len(current.Doc) > 0:
			doc = current.Doc
		default:
			finished := *current
			finished.Doc = doc
			r.Directory.Reports.Put(tx, &finished)
		}
		return nil
	})
	return doc, err
}

var inactivityReport = reportKind{
	kind:    identity.ReportInactive,
	prepare: prepareInactivity,
	compute: (*routes).computeInactivity,
}

func prepareInactivity(c *api.Call, report *identity.Report) error {
	hours, err := c.IntParameter("duration", defaultHours, 1, maxReportHours)
	report.Hours, report.From = hours, report.To.Add(-time.Duration(hours)*time.Hour)
	return err
}

// inactivityView is the report of what has not logged in for some time
// (reference/iam-identity.md section 4.9).
type inactivityView struct {
	CreatedBy  string           `json:"created_by"`
	Reference  string           `json:"reference"`
	Duration   string           `json:"report_duration"` // hours
	Start      string           `json:"report_start_time"`
	End        string           `json:"report_end_time"`
	Users      []inactiveUser   `json:"users"`
	APIKeys    []inactiveKey    `json:"apikeys"`
	ServiceIDs []inactiveEntity `json:"serviceids"`
	Profiles   []inactiveEntity `json:"profiles"`
}

type inactiveUser struct {
	IAMID     string `json:"iam_id"`
	Name      string `json:"name,omitempty"`
	Username  string `json:"username"`
	Email     string `json:"email,omitempty"`
	LastAuthn string `json:"last_authn,omitempty"` // absent for one that never was
}

type inactiveKey struct {
	ID        string        `json:"id"`
	Name      string        `json:"name,omitempty"`
	Type      string        `json:"type"`
	ServiceID *keyServiceID `json:"serviceid,omitempty"`
	User      *keyUser      `json:"user,omitempty"`
	LastAuthn string        `json:"last_authn,omitempty"`
}

type keyServiceID struct {
	ID   string `json:"id"`
	Name string `json:"name,omitempty"`
}

type keyUser struct {
	IAMID    string `json:"iam_id"`
	Name     string `json:"name,omitempty"`
	Username string `json:"username,omitempty"`
	Email    string `json:"email,omitempty"`
}

type inactiveEntity struct {
	ID        string `json:"id"`
	Name      string `json:"name,omitempty"`
	LastAuthn string `json:"last_authn,omitempty"`
}

// inactiveSince reports whether something that was made at a time has not
// logged in since the beginning of a report, and when it last did, if ever.
// What is younger than the report's period cannot have been inactive for that
// long and is left out, and so is what has logged in since the report was asked
// for: nobody is to remove it.
func (r *routes) inactiveSince(report *identity.Report, usageID string, made time.Time) (last string, inactive bool) {
	_, at := r.Usage.Of(usageID)
	if made.After(report.From) || !at.Before(report.From) {
		return "", false
	}
	if at.IsZero() {
		return "", true
	}
	return stamp(at), true
}

func (r *routes) computeInactivity(report *identity.Report) any {
	d := r.Directory
	v := inactivityView{
		CreatedBy: report.CreatedBy, Reference: report.ID, Duration: strconv.Itoa(report.Hours),
		Start: stamp(report.From), End: stamp(report.To),
		Users: []inactiveUser{}, APIKeys: []inactiveKey{}, ServiceIDs: []inactiveEntity{}, Profiles: []inactiveEntity{},
	}
	for _, u := range sorted(d.UsersByAccount.Get(report.AccountID), func(u *identity.User) string { return u.IAMID }) {
		if last, yes := r.inactiveSince(report, directory.UserKey(report.AccountID, u.IAMID), u.CreatedAt); yes {
			v.Users = append(v.Users, inactiveUser{u.IAMID, u.Name, userName(u), u.Email, last})
		}
	}
	for _, k := range sorted(d.APIKeysByAccount.Get(report.AccountID), func(k *identity.APIKey) string { return k.ID }) {
		if last, yes := r.inactiveSince(report, k.ID, k.CreatedAt); yes {
			v.APIKeys = append(v.APIKeys, r.inactiveKey(k, last))
		}
	}
	for _, s := range sorted(d.ServiceIDsByAccount.Get(report.AccountID), func(s *identity.ServiceID) string { return s.ID }) {
		if last, yes := r.inactiveSince(report, directory.UserKey(report.AccountID, crn.IAMID(s.ID)), s.CreatedAt); yes {
			v.ServiceIDs = append(v.ServiceIDs, inactiveEntity{s.ID, s.Name, last})
		}
	}
	for _, p := range sorted(d.ProfilesByAccount.Get(report.AccountID), func(p *identity.Profile) string { return p.ID }) {
		if last, yes := r.inactiveSince(report, directory.UserKey(report.AccountID, crn.IAMID(p.ID)), p.CreatedAt); yes {
			v.Profiles = append(v.Profiles, inactiveEntity{p.ID, p.Name, last})
		}
	}
	return v
}

func (r *routes) inactiveKey(k *identity.APIKey, last string) inactiveKey {
	v := inactiveKey{ID: k.ID, Name: k.Name, Type: holder(k.IAMID).typ, LastAuthn: last}
	if crn.KindOf(k.IAMID) == crn.KindServiceID {
		v.ServiceID = &keyServiceID{ID: crn.BareID(k.IAMID)}
		if s, ok := r.Directory.ServiceIDs.Get(v.ServiceID.ID); ok {
			v.ServiceID.Name = s.Name
		}
		return v
	}
	v.User = &keyUser{IAMID: k.IAMID}
	if u, ok := r.Directory.Users.Get(directory.UserKey(k.AccountID, k.IAMID)); ok {
		v.User.Name, v.User.Username, v.User.Email = u.Name, userName(u), u.Email
	}
	return v
}

// sorted orders objects by a text of theirs.
func sorted[T any](items []T, key func(T) string) []T {
	slices.SortFunc(items, func(a, b T) int { return strings.Compare(key(a), key(b)) })
	return items
}
