package grant

import (
	"slices"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/crn"
)

// Attempts makes refused requests visible to the account that they aimed at. Note
// must not wait, so that no answer tells by its time what exists elsewhere.
type Attempts interface {
	Note(account string, e *activity.Event)
}

// noteAimed tells the account of a profile that was named by its id or CRN of a
// refusal that stands in another account's log.
func (a *attempt) noteAimed() {
	if a.svc.cfg.Attempts == nil {
		return
	}
	d := a.svc.cfg.Directory
	id := crn.BareID(a.request["profile_id"])
	if name, err := crn.Parse(a.request["profile_crn"]); id == "" && err == nil {
		id = name.Resource
	}
	p, ok := d.Profiles.Get(id)
	if !ok || p.AccountID == a.event.AccountID || slices.ContainsFunc(a.elsewhere, func(c copied) bool { return c.AccountID == p.AccountID }) {
		return
	}
	seen := a.event
	seen.Target.ID = a.svc.cfg.Names.Of("iam-identity", "", p.AccountID, "", "profile", p.ID).String()
	seen.Target.Name, seen.LogSourceCRN = "", a.svc.logSource(p.AccountID)
	a.svc.cfg.Attempts.Note(p.AccountID, &seen)
}
