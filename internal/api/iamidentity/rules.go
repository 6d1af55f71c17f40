package iamidentity

import (
	"net/http"
	"slices"
	"strings"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/cluster"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/identity"
)

// Bounds of our own on a rule. A token request walks all conditions of a
// profile's rules.
const (
	maxConditions = 50
	maxClaim      = 250
	maxValue      = 4000
	maxExpiration = 24 * 60 * 60 // seconds
)

func (r *routes) registerRules() {
	const path = "/v1/profiles/{profile}/rules"
	api.Change(r.Family, "POST "+path, profileUpdate, profileUpdated, r.newRule, r.createRule)
	api.Read(r.Family, "GET "+path, profileGet, r.loadProfile, r.listRules)
	api.Read(r.Family, "GET "+path+"/{rule}", profileGet, r.loadRule, r.showRule)
	api.Change(r.Family, "PUT "+path+"/{rule}", profileUpdate, profileUpdated, r.changedRule, r.updateRule)
	api.Change(r.Family, "DELETE "+path+"/{rule}", profileUpdate, profileUpdated, loading[api.None](r.loadRule), r.deleteRule)
}

// ruleBody is the body of create and update (reference/iam-identity.md section
// 4.3).
type ruleBody struct {
	Type       string               `json:"type"`
	Name       string               `json:"name"`
	RealmName  string               `json:"realm_name"`
	CRType     identity.CRType      `json:"cr_type"`
	Expiration int                  `json:"expiration"`
	Conditions []identity.Condition `json:"conditions"`
}

// check also drops what does not belong to the rule's type: clients send
// realm_name and expiration with Profile-CR rules, where they mean nothing.
func (b *ruleBody) check() error {
	switch b.Type {
	case identity.RuleCR:
		b.RealmName, b.Expiration = "", 0
		if !b.CRType.Valid() {
			return api.Invalid("cr_type is required for rules of type %s and must be one of VSI, PVS, BMS, IKS_SA, ROKS_SA, CE, OIDC.", identity.RuleCR).On("cr_type")
		}
	case identity.RuleSAML:
		b.CRType = ""
		if err := checkName("realm_name", b.RealmName); err != nil {
			return err
		}
		if b.Expiration < 0 || b.Expiration > maxExpiration {
			return api.Invalid("expiration must be a number of seconds from 0 to %d.", maxExpiration).On("expiration")
		}
	default:
		return api.Invalid("type must be one of %s, %s.", identity.RuleSAML, identity.RuleCR).On("type")
	}
	if err := checkText("name", b.Name, maxName); err != nil {
		return err
	}
	if len(b.Conditions) == 0 || len(b.Conditions) > maxConditions {
		return api.Invalid("conditions must have 1 to %d entries: a rule without any would trust everything.", maxConditions).On("conditions")
	}
	for _, cond := range b.Conditions {
		if err := checkCondition(cond, b.Type); err != nil {
			return err
		}
	}
	return nil
}

// checkCondition does not look at the claim's name: one that is unknown for
// the compute resource's type never matches (reference/iam-identity.md
// section 4.3). Rules of type OIDC are ours, and held to more: see lint.
func checkCondition(cond identity.Condition, ruleType string) error {
	if err := checkName("conditions.claim", cond.Claim); err != nil {
		return err
	}
	if err := checkText("conditions.claim", cond.Claim, maxClaim); err != nil {
		return err
	}
	if !cond.Operator.Valid() {
		return api.Invalid("conditions.operator must be one of EQUALS, NOT_EQUALS, EQUALS_IGNORE_CASE, NOT_EQUALS_IGNORE_CASE, CONTAINS, IN.").On("conditions.operator")
	}
	if strings.TrimSpace(cond.Value) == "" || len(cond.Value) > maxValue {
		return api.Invalid("conditions.value must be JSON in a string, of 1 to %d bytes.", maxValue).On("conditions.value")
	}
	if ruleType == identity.RuleCR && !cond.CanHold() {
		return api.Invalid(`conditions.value must be a JSON string, number or boolean, such as "\"text\"", or for IN an array of them.`).On("conditions.value")
	}
	return nil
}

// lint refuses rules about workload issuers that would admit strangers, or
// nobody. It looks at the account's issuers, and so runs in the transaction.
func (r *routes) lint(c *api.Call, b *ruleBody) error {
	if b.Type != identity.RuleCR || b.CRType != identity.OIDC {
		return nil
	}
	err := cluster.Lint(b.Conditions, r.Directory.WorkloadIssuersByAccount.Get(c.Account()))
	if err == nil {
		return nil
	}
	return api.Invalid("%v", err).On("conditions")
}

func (b *ruleBody) apply(rule *identity.ClaimRule) {
	rule.Type, rule.Name, rule.RealmName = b.Type, b.Name, b.RealmName
	rule.CRType, rule.Expiration, rule.Conditions = b.CRType, b.Expiration, b.Conditions
}

// ruleView always has an expiration, which clients require; it is 0 for rules
// of type Profile-CR.
type ruleView struct {
	ID         string               `json:"id"`
	EntityTag  string               `json:"entity_tag"`
	CreatedAt  string               `json:"created_at"`
	ModifiedAt string               `json:"modified_at"`
	Name       string               `json:"name,omitempty"`
	Type       string               `json:"type"`
	RealmName  string               `json:"realm_name,omitempty"`
	Expiration int                  `json:"expiration"`
	CRType     identity.CRType      `json:"cr_type,omitempty"`
	Conditions []identity.Condition `json:"conditions"`
}

func viewRule(rule *identity.ClaimRule) ruleView {
	return ruleView{
		ID: rule.ID, EntityTag: rule.Tag(rule.ID), CreatedAt: stamp(rule.CreatedAt), ModifiedAt: stamp(rule.ModifiedAt),
		Name: rule.Name, Type: rule.Type, RealmName: rule.RealmName, Expiration: rule.Expiration,
		CRType: rule.CRType, Conditions: rule.Conditions,
	}
}

// ruleChange is a rule's place in an activity event: what it says, so that the
// log alone tells whom the profile trusted when.
func ruleChange(what string, rule *identity.ClaimRule) map[string]any {
	return map[string]any{"change": what, "rule": map[string]any{
		"id": rule.ID, "name": rule.Name, "type": rule.Type, "realm_name": rule.RealmName, "cr_type": rule.CRType,
		"conditions": rule.Conditions,
	}}
}

// ofProfile is a part of a profile, found together with it.
type ofProfile[T any] struct {
	profile *identity.Profile
	part    *T
}

func (r *routes) newRule(c *api.Call, b *ruleBody) (*identity.Profile, api.Target, error) {
	if err := b.check(); err != nil {
		return nil, api.Target{TypeURI: "iam-identity/account-profile"}, err
	}
	return r.loadProfile(c)
}

func (r *routes) createRule(c *api.Call, tx *directory.Tx, b *ruleBody, p *identity.Profile) (api.Reply, api.Target, error) {
	target := r.profileTarget(c, p)
	if err := r.lint(c, b); err != nil {
		return api.Reply{}, target, err
	}
	n := r.Directory.RulesByProfile.Len(p.ID)
	if n >= identity.MaxRulesPerProfile {
		return api.Reply{}, target, atLimit("The trusted profile %s has %d claim rules, which is the limit.", p.ID, identity.MaxRulesPerProfile)
	}
	rule := &identity.ClaimRule{ID: "ClaimRule-" + uuid.NewString(), ProfileID: p.ID, AccountID: p.AccountID}
	b.apply(rule)
	r.Directory.Rules.Put(tx, rule)
	data := ruleChange("rule created", rule)
	nearLimit(data, n+1, identity.MaxRulesPerProfile)
	return api.Reply{Status: http.StatusCreated, Body: viewRule(rule), ETag: rule.Tag(rule.ID), ResponseData: data}, target, nil
}

func (r *routes) listRules(_ *api.Call, p *identity.Profile) (api.Reply, error) {
	rules := r.Directory.RulesByProfile.Get(p.ID)
	slices.SortFunc(rules, func(a, b *identity.ClaimRule) int {
		return strings.Compare(api.SortKey(a.CreatedAt, a.ID), api.SortKey(b.CreatedAt, b.ID))
	})
	views := make([]ruleView, len(rules))
	for i, rule := range rules {
		views[i] = viewRule(rule)
	}
	return api.Reply{Body: map[string]any{"rules": views}}, nil
}

func (r *routes) loadRule(c *api.Call) (ofProfile[identity.ClaimRule], api.Target, error) {
	p, target, err := r.loadProfile(c)
	if err != nil {
		return ofProfile[identity.ClaimRule]{}, target, err
	}
	id := c.R.PathValue("rule")
	rule, ok := r.Directory.Rules.Get(id)
	if !ok || rule.ProfileID != p.ID {
		return ofProfile[identity.ClaimRule]{}, target, api.NotFound("claim rule", id)
	}
	return ofProfile[identity.ClaimRule]{p, rule}, target, nil
}

func (r *routes) showRule(_ *api.Call, found ofProfile[identity.ClaimRule]) (api.Reply, error) {
	return api.Reply{Body: viewRule(found.part), ETag: found.part.Tag(found.part.ID)}, nil
}

func (r *routes) changedRule(c *api.Call, b *ruleBody) (ofProfile[identity.ClaimRule], api.Target, error) {
	if err := b.check(); err != nil {
		return ofProfile[identity.ClaimRule]{}, api.Target{TypeURI: "iam-identity/account-profile"}, err
	}
	return r.loadRule(c)
}

func (r *routes) updateRule(c *api.Call, tx *directory.Tx, b *ruleBody, found ofProfile[identity.ClaimRule]) (api.Reply, api.Target, error) {
	target := r.profileTarget(c, found.profile)
	if err := c.IfMatch(&found.part.Meta, found.part.ID, true); err != nil {
		return api.Reply{}, target, err
	}
	if err := r.lint(c, b); err != nil {
		return api.Reply{}, target, err
	}
	rule := *found.part
	b.apply(&rule)
	r.Directory.Rules.Put(tx, &rule)
	return api.Reply{Body: viewRule(&rule), ETag: rule.Tag(rule.ID), ResponseData: ruleChange("rule updated", &rule)}, target, nil
}

func (r *routes) deleteRule(c *api.Call, tx *directory.Tx, _ *api.None, found ofProfile[identity.ClaimRule]) (api.Reply, api.Target, error) {
	r.Directory.Rules.Delete(tx, found.part)
	return api.Reply{Status: http.StatusNoContent, ResponseData: ruleChange("rule deleted", found.part)}, r.profileTarget(c, found.profile), nil
}
