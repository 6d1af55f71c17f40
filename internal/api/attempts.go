package api

import (
	"bytes"
	"encoding/json"
	"maps"
	"net/http"
	"slices"
	"strings"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/grant"
)

// Bounds on what a failed request may have named.
const (
	maxNamed   = 24
	maxNamedID = 512 // bytes
)

// noteAttempt tells the accounts, other than the caller's, of what a failed
// request named in its path, its query or the first level of its body. They see
// their own object and the caller's id.
func (c *Call) noteAttempt(action string, target Target, f *fault.Error) {
	switch f.Kind {
	case fault.NotFound, fault.Denied, fault.Invalid, fault.Unauthenticated:
	default:
		return
	}
	if c.Attempts == nil || c.Hosts {
		return
	}
	aimed := map[string]directory.Owned{}
	for _, id := range c.named() {
		if o, ok := c.owner(id); ok {
			if known, again := aimed[o.AccountID]; !again || known.Kind == "account" {
				aimed[o.AccountID] = o
			}
		}
	}
	if len(aimed) == 0 {
		return
	}
	// Only what the server has made of the request goes on to the other account.
	e := c.event(action, Target{TypeURI: target.TypeURI})
	e.SetReason(grant.StatusOf(f.Kind), "")
	for account, o := range aimed {
		seen := *e
		seen.Target.ID, seen.Target.Name = o.Name(c.Names), ""
		seen.LogSourceCRN = c.Names.Of(strings.SplitN(action, ".", 2)[0], c.Region, account, "", "", "").String()
		c.Attempts.Note(account, &seen)
	}
}

// owner finds what an id is of; what belongs to the installation, such as a
// host, is the operator's.
func (c *Call) owner(id string) (directory.Owned, bool) {
	o, ok := c.Directory.Owner(id)
	if ok && o.AccountID == "" {
		o.AccountID = c.OperatorAccount
	}
	who := ""
	if c.Caller != nil {
		who = c.Account()
	}
	return o, ok && o.AccountID != who
}

// named returns the ids that a request may have named.
func (c *Call) named() []string {
	var out []string
	add := func(s string) {
		if s != "" && len(s) <= maxNamedID && len(out) < maxNamed && !slices.Contains(out, s) {
			out = append(out, s)
		}
	}
	for segment := range strings.SplitSeq(c.R.URL.Path, "/") {
		add(segment)
	}
	q := c.R.URL.Query()
	for _, name := range slices.Sorted(maps.Keys(q)) {
		for _, v := range q[name] {
			add(v)
		}
	}
	if len(bytes.TrimSpace(c.body)) > 0 {
		var fields map[string]json.RawMessage
		if json.Unmarshal(c.body, &fields) != nil {
			return out
		}
		for _, name := range slices.Sorted(maps.Keys(fields)) {
			var s string
			if !strings.HasSuffix(name, "id") && !strings.HasSuffix(name, "crn") && name != "source" && name != "identifier" {
				continue // text such as a name means nothing outside the account
			}
			if json.Unmarshal(fields[name], &s) == nil {
				add(s)
			}
		}
	}
	return out
}

// partition divides what a transaction changes into what belongs to the account
// of its event, its target first, and what belongs to others: the operator makes
// accounts, and who deletes a resource ends the links of others to it.
func (c *Call) partition(changes []activity.Changed, e *activity.Event) (own, foreign []activity.Changed) {
	about := e.Target.ID
	if name, err := crn.Parse(about); err == nil && name.Resource != "" {
		about = name.Resource
	}
	at := -1
	for _, ch := range changes {
		owner := directory.OwnerOf(ch)
		switch {
		case owner != "" && owner != e.AccountID && ch.Kind != "account":
			foreign = append(foreign, ch)
			continue
		case at < 0 && (ch.ID == about || strings.HasSuffix(ch.ID, "/"+about)):
			at = len(own)
		}
		own = append(own, ch)
	}
	if at > 0 {
		first := own[at]
		own = slices.Insert(slices.Delete(own, at, at+1), 0, first)
	}
	return own, foreign
}

// maxUnlinked bounds the events of one change in the logs of other accounts.
const maxUnlinked = 100

// recordUnlinked writes the end of links into the logs of the accounts whose
// profiles they were of, when it was another account's resource that went.
func (c *Call) recordUnlinked(tx *directory.Tx, foreign []activity.Changed) error {
	written := 0
	for _, ch := range foreign {
		account := directory.OwnerOf(ch)
		profile, ok := c.Directory.LinkedProfile(ch)
		if ch.Next != nil || !ok {
			continue
		}
		if written++; written > maxUnlinked {
			return nil
		}
		data, err := activity.ChangeData("", "", nil, []activity.Changed{ch})
		if err != nil {
			return err
		}
		e := &activity.Event{
			ID: uuid.NewString(), Time: activity.Time{Time: c.Now()}, Action: "iam-identity.account-profile.update",
			Message:       "IAM Identity Service: update account-profile " + profile.Name,
			CorrelationID: uuid.NewString(), AccountID: account,
			LogSourceCRN: c.Names.Of("iam-identity", c.Region, account, "", "", "").String(),
			Initiator:    activity.Initiator{TypeURI: activity.UnknownType},
			Target: activity.Target{
				ID: c.Names.Of("iam-identity", "", account, "", "profile", profile.ID).String(), Name: profile.Name, TypeURI: "iam-identity/account-profile",
			},
			Observer: activity.Observer{Name: "ActivityTracker"}, RequestData: data,
			ResponseData: encoded(map[string]any{"change": "link deleted", "because": "the compute resource that it named was deleted in its account"}),
		}
		e.SetReason(http.StatusNoContent, "")
		tx.Record(e)
	}
	return nil
}
