package accessgroups

import (
	"net/http"
	"slices"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
)

const (
	addAction    = "iam-groups.members.add"
	deleteAction = "iam-groups.members.delete"
)

// newMemberships puts one identity into many groups.
type newMemberships struct {
	Type   string   `json:"type"`
	Groups []string `json:"groups"`
}

// memberships is what became of one identity in many groups.
type memberships struct {
	IAMID  string             `json:"iam_id"`
	Groups []membershipResult `json:"groups"`
}

type membershipResult struct {
	AccessGroupID string       `json:"access_group_id"`
	StatusCode    int          `json:"status_code"`
	Trace         string       `json:"trace,omitempty"`
	Errors        []errorEntry `json:"errors,omitempty"`
}

// outcome is what an activity event tells about the call.
func (m memberships) outcome() map[string]any {
	groups := make([]map[string]any, len(m.Groups))
	for i, g := range m.Groups {
		groups[i] = map[string]any{"access_group_id": activity.Clip(g.AccessGroupID), "status_code": g.StatusCode}
	}
	return map[string]any{"iam_id": m.IAMID, "groups": groups}
}

// loadMember finds the identity that the path names. The call is about the
// access groups of an account as one: who has rights on some of them only names
// them one by one.
func loadMember[B any](c *api.Call, _ *B) (string, api.Target, error) {
	account, err := accountParameter(c)
	if err != nil {
		return "", api.Target{TypeURI: "iam-groups/member"}, err
	}
	return c.R.PathValue("iam_id"), allGroupsTarget(c, account), nil
}

func allGroupsTarget(c *api.Call, account string) api.Target {
	return api.Target{
		Resource: api.With(c.InAccount(service, access.ResourceType, resourceType), access.AccountID, account),
		CRN:      groupCRN(c, ""), TypeURI: "iam-groups/member",
	}
}

// forEach does something to the group with each id and collects the outcomes.
// That the caller may act on all groups does not spare the question for each.
func forEach(c *api.Call, action, iamID string, ids []string, do func(*access.Group) *fault.Error) memberships {
	out := memberships{IAMID: iamID, Groups: make([]membershipResult, len(ids))}
	for i, id := range ids {
		out.Groups[i] = membershipResult{AccessGroupID: id, StatusCode: http.StatusOK}
		var f *fault.Error
		g, ok := groupOf(c, id)
		switch {
		case !ok:
			f = api.NotFound("access group", activity.Clip(id))
		case !c.May(action, target(c, g.ID, g.Name, "").Resource):
			f = fault.New(fault.Denied, "forbidden", "You are not authorized to %s on the access group %q.", action, id)
		default:
			f = do(g)
		}
		if f != nil {
			v := describeFault(c, f)
			out.Groups[i].StatusCode, out.Groups[i].Trace, out.Groups[i].Errors = v.StatusCode, v.Trace, v.Errors
		}
	}
	return out
}

// join adds an identity to each group that it can be added to.
func join(c *api.Call, tx *directory.Tx, b *newMemberships, iamID string) (api.Reply, api.Target, error) {
	t := allGroupsTarget(c, c.Account())
	if n := len(b.Groups); n < 1 || n > access.MaxGroupsPerIdentity {
		return api.Reply{}, t, api.Invalid("The call must name 1 to %d groups.", access.MaxGroupsPerIdentity).On("groups")
	}
	if f := admissible(c, iamID, b.Type); f != nil {
		return api.Reply{}, t, f
	}
	now := c.Directory.StaticGroupsOf(c.Account(), iamID) // and those that this call adds
	out := forEach(c, addAction, iamID, b.Groups, func(old *access.Group) *fault.Error {
		if old.ID == access.PublicAccess {
			return publicIsFixed()
		}
		if slices.Contains(now, old.ID) {
			return nil
		}
		if f := hasRoom(b.Type, iamID, len(now)); f != nil {
			return f
		}
		g := *old
		g.Members = append(slices.Clone(old.Members), access.Member{
			IAMID: iamID, Type: b.Type, CreatedAt: timestamp(tx.Now), CreatedBy: c.Caller.IAMID,
		})
		c.Directory.Groups.Put(tx, &g)
		now = append(now, g.ID)
		return nil
	})
	return api.Reply{Status: http.StatusMultiStatus, Body: out, ResponseData: out.outcome()}, t, nil
}

// leave removes an identity from every group that somebody has put it into.
func leave(c *api.Call, tx *directory.Tx, _ *api.None, iamID string) (api.Reply, api.Target, error) {
	t := allGroupsTarget(c, c.Account())
	ids := c.Directory.StaticGroupsOf(c.Account(), iamID)
	if len(ids) == 0 {
		return api.Reply{}, t, fault.New(fault.NotFound, "not_found", "The identity %q is not a member of an access group.", activity.Clip(iamID))
	}
	out := forEach(c, deleteAction, iamID, ids, func(old *access.Group) *fault.Error {
		if g, ok := without(*old, iamID); ok {
			c.Directory.Groups.Put(tx, &g)
		}
		return nil
	})
	return api.Reply{Status: http.StatusMultiStatus, Body: out, ResponseData: out.outcome()}, t, nil
}
