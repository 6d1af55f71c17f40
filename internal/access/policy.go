// Package access holds policies, roles, access groups and the catalog of
// services, and decides: may this subject do this action on this resource?
// Decide is a pure function over a view of the objects. Default deny: no
// policy matched means no.
package access

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/identity"
	"tabard.dev/tabard/internal/object"
)

// Limits (reference/access-and-audit.md sections 1.4 and 1.13).
const (
	MaxPoliciesPerSubject = 1000
	MaxValueLength        = 1000
	MaxAnyOf              = 10
	MaxGroupsPerAccount   = 500
	MaxGroupsPerIdentity  = 50
	MaxMembersPerCall     = 50
)

// Names of the resource attributes that every service knows
// (reference/access-and-audit.md section 2.2).
const (
	AccountID       = "accountId"
	ServiceName     = "serviceName"
	ServiceType     = "serviceType"
	ServiceGroupID  = "service_group_id"
	ServiceInstance = "serviceInstance"
	Region          = "region"
	ResourceType    = "resourceType"
	Resource        = "resource"
	ResourceGroupID = "resourceGroupId"
)

// Subject attributes.
const (
	IAMID         = "iam_id"
	AccessGroupID = "access_group_id"
)

// States and types of a policy.
const (
	Active  = "active"
	Deleted = "deleted"

	TypeAccess        = "access"
	TypeAuthorization = "authorization"
)

// Policy grants roles on resources to a subject. It is kept in the terms of
// the v2 API; API says through which version it was written, because clients
// choose their own version by it.
type Policy struct {
	object.Meta
	ID          string      `json:"id"`
	AccountID   string      `json:"account_id"`
	API         int         `json:"api"` // 1 or 2
	Type        string      `json:"type"`
	Description string      `json:"description,omitempty"`
	State       string      `json:"state"`
	Subject     []Attribute `json:"subject"`
	Resource    []Attribute `json:"resource"`
	Tags        []Attribute `json:"tags,omitempty"`
	Roles       []string    `json:"roles"` // role CRNs
	Pattern     string      `json:"pattern,omitempty"`
	Rule        *Rule       `json:"rule,omitempty"`
	DeletedAt   time.Time   `json:"deleted_at,omitzero"`
}

// Attribute is one demand on a subject, resource or tag.
type Attribute struct {
	Key      string   `json:"key"`
	Operator Operator `json:"operator"`
	Value    Value    `json:"value"`
}

// Operator of an attribute.
type Operator string

// The attribute operators (reference/access-and-audit.md section 1.3).
const (
	StringEquals      Operator = "stringEquals"
	StringMatch       Operator = "stringMatch"
	StringExists      Operator = "stringExists"
	StringEqualsAnyOf Operator = "stringEqualsAnyOf"
	StringMatchAnyOf  Operator = "stringMatchAnyOf"
)

// Value is a text, a boolean (stringExists) or a list of texts (…AnyOf).
type Value struct {
	Text   string
	Exists *bool
	List   []string
}

// Text returns a Value that is a text.
func Text(s string) Value { return Value{Text: s} }

// MarshalJSON writes the value in its own JSON type.
func (v Value) MarshalJSON() ([]byte, error) {
	switch {
	case v.Exists != nil:
		return json.Marshal(*v.Exists)
	case v.List != nil:
		return json.Marshal(v.List)
	}
	return json.Marshal(v.Text)
}

// UnmarshalJSON accepts a string, a boolean or an array of strings.
func (v *Value) UnmarshalJSON(b []byte) error {
	*v = Value{}
	b = bytes.TrimSpace(b)
	switch {
	case len(b) == 0:
		return errors.New("empty value")
	case b[0] == '[':
		v.List = []string{}
		return json.Unmarshal(b, &v.List)
	case b[0] == 't', b[0] == 'f':
		v.Exists = new(bool)
		return json.Unmarshal(b, v.Exists)
	case b[0] == '"':
		return json.Unmarshal(b, &v.Text)
	}
	return fmt.Errorf("want a string, a boolean or an array of strings, got %.20s", b)
}

func (v Value) String() string {
	b, err := v.MarshalJSON()
	if err != nil {
		return ""
	}
	return string(b)
}

func (v Value) equal(w Value) bool {
	return v.Text == w.Text && slices.Equal(v.List, w.List) &&
		(v.Exists == nil) == (w.Exists == nil) && (v.Exists == nil || *v.Exists == *w.Exists)
}

// Get returns the value of the first stringEquals demand on a key.
func Get(attrs []Attribute, key string) (string, bool) {
	for _, a := range attrs {
		if a.Key == key && a.Operator == StringEquals {
			return a.Value.Text, true
		}
	}
	return "", false
}

// SubjectID returns the IAM ID or access group id that an access policy
// grants to; the subject of an authorization has none.
func (p *Policy) SubjectID() string {
	for _, key := range []string{IAMID, AccessGroupID} {
		if id, ok := Get(p.Subject, key); ok {
			return id
		}
	}
	return ""
}

// Service returns the service name that the policy is about, or "" when it is
// about more than one service.
func (p *Policy) Service() string {
	name, _ := Get(p.Resource, ServiceName)
	return name
}

// SameGrant reports whether two policies grant an overlapping role to the same
// subject on the same resource, which the API refuses as a conflict
// (reference/access-and-audit.md section 1.11).
func (p *Policy) SameGrant(q *Policy) bool {
	if p.Type != q.Type || !sameAttributes(p.Subject, q.Subject) ||
		!sameAttributes(p.Resource, q.Resource) || !sameAttributes(p.Tags, q.Tags) || !p.Rule.equal(q.Rule) {
		return false
	}
	return slices.ContainsFunc(p.Roles, func(r string) bool { return slices.Contains(q.Roles, r) })
}

func sameAttributes(a, b []Attribute) bool {
	if len(a) != len(b) {
		return false
	}
	for _, x := range a {
		if !slices.ContainsFunc(b, func(y Attribute) bool {
			return x.Key == y.Key && x.Operator == y.Operator && x.Value.equal(y.Value)
		}) {
			return false
		}
	}
	return true
}

// Validate checks a policy against the rules of the API
// (reference/access-and-audit.md section 1.4) and against the catalog's roles.
// The error's text is for the caller.
func (p *Policy) Validate(c *Catalog) error {
	switch p.Type {
	case TypeAccess, TypeAuthorization:
	case "":
		return errors.New("type is required: access or authorization")
	default:
		return fmt.Errorf("type %q is not one of access, authorization", p.Type)
	}
	for _, part := range [][]Attribute{p.Subject, p.Resource, p.Tags} {
		if err := validateAttributes(part); err != nil {
			return err
		}
	}
	if err := p.validateSubject(); err != nil {
		return err
	}
	if err := p.validateRule(); err != nil {
		return err
	}
	if account, _ := Get(p.Resource, AccountID); account == "" {
		return errors.New("resource must have the attribute accountId")
	} else if account != p.AccountID {
		return errors.New("resource attribute accountId must be the account of the policy")
	}
	scope := 0
	for _, key := range []string{ServiceType, ServiceName, ResourceGroupID, ServiceGroupID, ResourceType} {
		if slices.ContainsFunc(p.Resource, func(a Attribute) bool { return a.Key == key }) {
			scope++
		}
	}
	if scope == 0 {
		return errors.New("resource must have at least one of serviceType, serviceName, resourceGroupId and service_group_id")
	}
	if len(p.Roles) == 0 {
		return errors.New("at least one role is required")
	}
	service := p.Service()
	for _, role := range p.Roles {
		if !c.HasRole(role, service) {
			return fmt.Errorf("role %q is not a role of service %q; list them with GET /v2/roles?service_name=%s", role, service, service)
		}
	}
	return nil
}

// sourceKeys are the attributes that can describe the service that an
// authorization lets in.
var sourceKeys = []string{ServiceName, ServiceInstance, Region, ResourceType, Resource, AccountID, ResourceGroupID}

func (p *Policy) validateSubject() error {
	if p.Type == TypeAuthorization {
		for _, a := range p.Subject {
			if !slices.Contains(sourceKeys, a.Key) {
				return fmt.Errorf("subject attribute %s is not one of %s", a.Key, strings.Join(sourceKeys, ", "))
			}
		}
		has := func(key string) bool {
			return slices.ContainsFunc(p.Subject, func(a Attribute) bool { return a.Key == key })
		}
		if !has(AccountID) || !has(ServiceName) && !has(ResourceGroupID) {
			return errors.New("the subject of an authorization needs accountId and one of serviceName and resourceGroupId")
		}
		return nil
	}
	if len(p.Subject) != 1 || p.SubjectID() == "" {
		return errors.New("subject must be exactly one of iam_id and access_group_id, with stringEquals")
	}
	if id, ok := Get(p.Subject, IAMID); ok && crn.KindOf(id) == crn.KindUnknown {
		return fmt.Errorf("subject %q is not an IAM ID; name an access group as access_group_id", id)
	}
	return nil
}

func validateAttributes(attrs []Attribute) error {
	seen := map[string]bool{}
	for _, a := range attrs {
		if a.Key == "" {
			return errors.New("an attribute has no key")
		}
		if seen[a.Key] {
			return fmt.Errorf("attribute %s stands twice", a.Key)
		}
		seen[a.Key] = true
		if err := a.validate(); err != nil {
			return fmt.Errorf("attribute %s: %w", a.Key, err)
		}
	}
	return nil
}

func (a Attribute) validate() error {
	bounded := func(s string) error {
		if s == "" || len(s) > MaxValueLength {
			return fmt.Errorf("value must have 1 to %d characters", MaxValueLength)
		}
		return nil
	}
	switch a.Operator {
	case StringEquals, StringMatch:
		if a.Value.Exists != nil || a.Value.List != nil {
			return fmt.Errorf("operator %s takes a string", a.Operator)
		}
		return bounded(a.Value.Text)
	case StringExists:
		if a.Value.Exists == nil {
			return errors.New("operator stringExists takes true or false")
		}
	case StringEqualsAnyOf, StringMatchAnyOf:
		if len(a.Value.List) == 0 || len(a.Value.List) > MaxAnyOf {
			return fmt.Errorf("operator %s takes an array of 1 to %d strings", a.Operator, MaxAnyOf)
		}
		for _, s := range a.Value.List {
			if err := bounded(s); err != nil {
				return err
			}
		}
	default:
		return fmt.Errorf("operator %q is not known", a.Operator)
	}
	return nil
}

// Group is an access group.
type Group struct {
	object.Meta
	ID          string   `json:"id"` // AccessGroupId-<uuid>
	AccountID   string   `json:"account_id"`
	Name        string   `json:"name"` // unique in the account, without regard to case
	Description string   `json:"description,omitempty"`
	Members     []Member `json:"members,omitempty"`
}

// PublicAccess is the group that every account has and every identity of the
// account is in, unless the account's settings say otherwise.
const PublicAccess = "AccessGroupId-PublicAccess"

// GroupSettings are an account's settings for access groups.
type GroupSettings struct {
	object.Meta
	AccountID    string `json:"account_id"`
	PublicAccess bool   `json:"public_access_enabled"`
}

// MaxRulesPerGroup bounds the dynamic rules of an access group
// (reference/access-and-audit.md section 1.13).
const MaxRulesPerGroup = 5

// GroupRule makes federated users whose claims meet all conditions members of
// a group for some hours from their login
// (reference/access-and-audit.md section 4.2).
type GroupRule struct {
	object.Meta
	ID         string               `json:"id"` // ClaimRule-<uuid>
	AccountID  string               `json:"account_id"`
	GroupID    string               `json:"access_group_id"`
	Name       string               `json:"name"`
	Expiration int                  `json:"expiration"` // hours, 1 to 24
	RealmName  string               `json:"realm_name"` // the issuer
	Conditions []identity.Condition `json:"conditions"`
}

// Membership is what a federated user's last login gave him.
type Membership struct {
	object.Meta
	AccountID string          `json:"account_id"`
	IAMID     string          `json:"iam_id"`
	Groups    []DynamicMember `json:"groups"`
}

// DynamicMember is one membership by rule. It ends with its time, with the
// rule, and when the rule is changed.
type DynamicMember struct {
	GroupID  string    `json:"access_group_id"`
	RuleID   string    `json:"rule_id"`
	Revision int64     `json:"revision"` // of the rule at login
	Since    time.Time `json:"since"`
	Until    time.Time `json:"until"`
}

// Settings are an account's access management settings
// (reference/access-and-audit.md section 1.10), by identity type: user,
// service_id, service.
type Settings struct {
	object.Meta
	AccountID string                    `json:"account_id"`
	External  map[string]ExternalAccess `json:"external"`
}

// Identity types of the settings.
const (
	ExternalUser      = "user"
	ExternalServiceID = "service_id"
	ExternalService   = "service"
)

// States of a setting: everybody is let in, only the accounts that are listed,
// or everybody with an event for those that are not listed.
const (
	ExternalEnabled = "enabled"
	ExternalLimited = "limited"
	ExternalMonitor = "monitor"
)

// Admits reports whether an identity of another account is let in, and whether
// the settings list its account. Without settings everybody is.
func (s *Settings) Admits(identityType, account string) (admitted, listed bool) {
	if s == nil {
		return true, true
	}
	x, ok := s.External[identityType]
	if !ok || x.State == "" || x.State == ExternalEnabled {
		return true, true
	}
	listed = slices.Contains(x.Allowed, account)
	return listed || x.State == ExternalMonitor, listed
}

// ExternalAccess says how identities of other accounts are treated.
type ExternalAccess struct {
	State   string   `json:"state"` // enabled, limited or monitor
	Allowed []string `json:"external_allowed_accounts"`
}

// Member of an access group.
type Member struct {
	IAMID     string `json:"iam_id"`
	Type      string `json:"type"` // user, service or profile
	CreatedAt string `json:"created_at"`
	CreatedBy string `json:"created_by_id"`
}

// Member returns the member with this IAM ID.
func (g *Group) Member(iamID string) (Member, bool) {
	for _, m := range g.Members {
		if m.IAMID == iamID {
			return m, true
		}
	}
	return Member{}, false
}

// Wildcard reports whether text matches a stringMatch pattern: * stands for any
// run of characters, ? for exactly one, {{*}} and {{?}} for themselves; case
// counts (reference/access-and-audit.md section 1.4). It runs in
// O(len(pattern) × len(text) / 64) at worst.
func Wildcard(pattern, text string) bool {
	p := compile(pattern)
	r := []rune(text)
	if len(p)*len(r) > simple {
		return matchAll(p, r)
	}
	star, mark := -1, 0
	i, j := 0, 0
	for j < len(r) {
		switch {
		case i < len(p) && p[i] == anyRun:
			star, mark = i, j
			i++
		case i < len(p) && (p[i] == anyOne || p[i] == token(r[j])):
			i++
			j++
		case star >= 0:
			mark++
			i, j = star+1, mark
		default:
			return false
		}
	}
	for i < len(p) && p[i] == anyRun {
		i++
	}
	return i == len(p)
}

// simple is up to how many steps the plain way of matching is the faster one.
const simple = 1 << 14

// matchAll follows all ways to match at once, one bit each: bit i is set while
// the first i tokens match what was read.
func matchAll(p []token, text []rune) bool {
	p = slices.CompactFunc(slices.Clone(p), func(a, b token) bool { return a == anyRun && b == anyRun })
	words := len(p)/64 + 1
	set := func(bits []uint64, i int) { bits[i/64] |= 1 << (i % 64) }
	runs, one := make([]uint64, words), make([]uint64, words)
	taken := map[token][]uint64{} // where a character can be the next token
	for i, t := range p {
		switch t {
		case anyRun:
			set(runs, i)
		case anyOne:
			set(one, i)
		default:
			if taken[t] == nil {
				taken[t] = make([]uint64, words)
			}
			set(taken[t], i)
		}
	}
	now := make([]uint64, words)
	set(now, 0)
	if len(p) > 0 && p[0] == anyRun {
		set(now, 1)
	}
	none := make([]uint64, words)
	for _, r := range text {
		here := taken[token(r)]
		if here == nil {
			here = none
		}
		var carry, runCarry, left uint64
		for w, bits := range now {
			step := bits & (here[w] | one[w])
			next := step<<1 | carry | bits&runs[w]
			carry = step >> 63
			// An anyRun may also stand for nothing.
			ahead := next & runs[w]
			now[w] = next | ahead<<1 | runCarry
			runCarry = ahead >> 63
			left |= now[w]
		}
		if left == 0 {
			return false
		}
	}
	return now[len(p)/64]&(1<<(len(p)%64)) != 0
}

type token int64

const (
	anyRun token = -1
	anyOne token = -2
)

func compile(pattern string) []token {
	var out []token
	for len(pattern) > 0 {
		switch {
		case strings.HasPrefix(pattern, "{{*}}"), strings.HasPrefix(pattern, "{{?}}"):
			out = append(out, token(pattern[2]))
			pattern = pattern[5:]
			continue
		case pattern[0] == '*':
			out = append(out, anyRun)
			pattern = pattern[1:]
			continue
		case pattern[0] == '?':
			out = append(out, anyOne)
			pattern = pattern[1:]
			continue
		}
		r, size := utf8.DecodeRuneInString(pattern)
		out = append(out, token(r))
		pattern = pattern[size:]
	}
	return out
}
