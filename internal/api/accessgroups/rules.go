package accessgroups

import (
	"net/http"
	"slices"
	"strings"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/identity"
)

// Bounds of a rule. Those of the expiration, in hours, are the API's
// (reference/access-and-audit.md section 4.2); the others are ours, because a
// login walks all conditions.
const (
	minExpiration = 1
	maxExpiration = 24
	maxConditions = 50
	maxRealm      = 1000
	maxClaim      = 250
	maxValue      = 4000
)

// ruleBody is the body of create and replace.
type ruleBody struct {
	Name       *string              `json:"name"`
	Expiration int                  `json:"expiration"`
	RealmName  string               `json:"realm_name"`
	Conditions []identity.Condition `json:"conditions"`
}

type ruleView struct {
	ID               string               `json:"id"`
	Name             string               `json:"name,omitempty"`
	Expiration       int                  `json:"expiration"`
	RealmName        string               `json:"realm_name"`
	AccessGroupID    string               `json:"access_group_id"`
	AccountID        string               `json:"account_id"`
	Conditions       []identity.Condition `json:"conditions"`
	CreatedAt        string               `json:"created_at"`
	CreatedByID      string               `json:"created_by_id"`
	LastModifiedAt   string               `json:"last_modified_at"`
	LastModifiedByID string               `json:"last_modified_by_id"`
}

func viewRule(r *access.GroupRule) ruleView {
	return ruleView{
		ID: r.ID, Name: r.Name, Expiration: r.Expiration, RealmName: r.RealmName,
		AccessGroupID: r.GroupID, AccountID: r.AccountID, Conditions: r.Conditions,
		CreatedAt: timestamp(r.CreatedAt), CreatedByID: r.CreatedBy,
		LastModifiedAt: timestamp(r.ModifiedAt), LastModifiedByID: r.ModifiedBy,
	}
}

// describeRule is a rule's place in an activity event: what it says, so that
// the log alone tells who became a member when.
func describeRule(r *access.GroupRule) map[string]any {
	return map[string]any{
		"id": r.ID, "name": r.Name, "expiration": r.Expiration, "realm_name": r.RealmName, "conditions": r.Conditions,
	}
}

func (b *ruleBody) check() error {
	if b.Name != nil && !api.Printable(*b.Name, maxName) {
		return api.Invalid("The name must have at most %d characters, none of them a control character.", maxName).On("name")
	}
	if b.Expiration < minExpiration || b.Expiration > maxExpiration {
		return api.Invalid("The expiration must be a number of hours from %d to %d.", minExpiration, maxExpiration).On("expiration")
	}
	if strings.TrimSpace(b.RealmName) == "" || !api.Printable(b.RealmName, maxRealm) {
		return api.Invalid("The realm_name must have 1 to %d characters, none of them a control character: it is the identity provider's issuer.", maxRealm).On("realm_name")
	}
	if len(b.Conditions) == 0 || len(b.Conditions) > maxConditions {
		return api.Invalid("A rule must have 1 to %d conditions: one without any would admit everybody.", maxConditions).On("conditions")
	}
	for _, cond := range b.Conditions {
		if err := checkCondition(cond); err != nil {
			return err
		}
	}
	return nil
}

func checkCondition(cond identity.Condition) error {
	if strings.TrimSpace(cond.Claim) == "" || !api.Printable(cond.Claim, maxClaim) {
		return api.Invalid("The claim of a condition must have 1 to %d characters, none of them a control character.", maxClaim).On("conditions.claim")
	}
	if !cond.Operator.Valid() {
		return api.Invalid("The operator of a condition must be EQUALS, NOT_EQUALS, EQUALS_IGNORE_CASE, NOT_EQUALS_IGNORE_CASE, IN or CONTAINS.").On("conditions.operator")
	}
	if strings.TrimSpace(cond.Value) == "" || len(cond.Value) > maxValue {
		return api.Invalid("The value of a condition must be JSON in a string, of 1 to %d bytes.", maxValue).On("conditions.value")
	}
	if !cond.CanHold() {
		return api.Invalid(`The value of a condition must be a JSON string, number or boolean, such as "\"text\"", or for IN an array of them.`).On("conditions.value")
	}
	return nil
}

// apply writes the body into a rule. A body without a name leaves the name:
// Terraform replaces rules without sending it.
func (b *ruleBody) apply(r *access.GroupRule) {
	if b.Name != nil {
		r.Name = *b.Name
	}
	r.Expiration, r.RealmName, r.Conditions = b.Expiration, b.RealmName, b.Conditions
}

func createRule(c *api.Call, tx *directory.Tx, b *ruleBody, g *access.Group) (api.Reply, api.Target, error) {
	t := target(c, g.ID, g.Name, "iam-groups/rule")
	if err := b.check(); err != nil {
		return api.Reply{}, t, err
	}
	if c.Directory.GroupRulesByGroup.Len(g.ID) >= access.MaxRulesPerGroup {
		return api.Reply{}, t, fault.New(fault.Conflict, "conflict", "The access group has %d rules already, which is the most that one can have.", access.MaxRulesPerGroup)
	}
	r := &access.GroupRule{ID: "ClaimRule-" + uuid.NewString(), AccountID: g.AccountID, GroupID: g.ID}
	b.apply(r)
	c.Directory.GroupRules.Put(tx, r)
	return api.Reply{
		Status: http.StatusCreated, Body: viewRule(r), ETag: r.Tag(r.ID), ResponseData: map[string]any{"rule": describeRule(r)},
	}, t, nil
}

// listRules shows the rules in the order of their creation. There are few, so
// the list has no pages.
func listRules(c *api.Call, g *access.Group) (api.Reply, error) {
	rules := c.Directory.GroupRulesByGroup.Get(g.ID)
	slices.SortFunc(rules, func(a, b *access.GroupRule) int {
		return strings.Compare(api.SortKey(a.CreatedAt, a.ID), api.SortKey(b.CreatedAt, b.ID))
	})
	views := make([]ruleView, len(rules))
	for i, r := range rules {
		views[i] = viewRule(r)
	}
	return api.Reply{Body: map[string]any{"rules": views}}, nil
}

// ofGroup is a rule, found together with its group.
type ofGroup struct {
	group *access.Group
	rule  *access.GroupRule
}

// findRule loads the rule that the path names. Access is decided on its group.
func findRule(c *api.Call) (ofGroup, api.Target, error) {
	g, t, err := find("iam-groups/rule")(c)
	if err != nil {
		return ofGroup{}, t, err
	}
	id := c.R.PathValue("rule")
	r, ok := c.Directory.GroupRules.Get(id)
	if !ok || r.GroupID != g.ID || r.AccountID != c.Account() {
		return ofGroup{}, t, api.NotFound("rule", id)
	}
	return ofGroup{g, r}, t, nil
}

func findRuleFor[B any](c *api.Call, _ *B) (ofGroup, api.Target, error) { return findRule(c) }

func readRule(_ *api.Call, found ofGroup) (api.Reply, error) {
	return api.Reply{Body: viewRule(found.rule), ETag: found.rule.Tag(found.rule.ID)}, nil
}

// replaceRule ends the memberships that the rule has made: they were given for
// what it said before.
func replaceRule(c *api.Call, tx *directory.Tx, b *ruleBody, found ofGroup) (api.Reply, api.Target, error) {
	old, t := found.rule, target(c, found.group.ID, found.group.Name, "iam-groups/rule")
	if err := c.IfMatch(&old.Meta, old.ID, true); err != nil {
		return api.Reply{}, t, err
	}
	if err := b.check(); err != nil {
		return api.Reply{}, t, err
	}
	r := *old
	b.apply(&r)
	c.Directory.GroupRules.Put(tx, &r)
	return api.Reply{
		Body: viewRule(&r), ETag: r.Tag(r.ID),
		ResponseData: map[string]any{"rule": describeRule(&r), "previous": describeRule(old)},
	}, t, nil
}

func removeRule(c *api.Call, tx *directory.Tx, _ *api.None, found ofGroup) (api.Reply, api.Target, error) {
	r, t := found.rule, target(c, found.group.ID, found.group.Name, "iam-groups/rule")
	if err := c.IfMatch(&r.Meta, r.ID, false); err != nil {
		return api.Reply{}, t, err
	}
	c.Directory.GroupRules.Delete(tx, r)
	return api.Reply{Status: http.StatusNoContent, ResponseData: map[string]any{"rule": describeRule(r)}}, t, nil
}
