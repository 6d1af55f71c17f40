package access_test

import (
	"encoding/json"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"tabard.dev/tabard/internal/access"
)

// This file is Decide a second time, written from reference/access-and-audit.md
// section 2: it walks all policies there are, knows no index, and has the
// actions of the small catalog below as a table. It shares no code with the
// first one.

const smallCatalog = `
common:
  Viewer: {actions: [c.read]}
  Operator: {actions: [c.read, c.operate]}
  Editor: {extends: [Operator], actions: [c.edit]}
  Administrator: {extends: [Editor], actions: [c.admin]}
  Reader: {actions: [s.read]}
  Writer: {extends: [Reader], actions: [s.write]}
  Manager: {extends: [Writer]}
  Decision Point: {actions: [iam.decision.evaluate]}
services:
  - name: is
    kind: service
    roles:
      Viewer: {actions: [is.list]}
      Operator: {extends: [Viewer], actions: [is.operate]}
      Editor: {extends: [Operator], actions: [is.create]}
      Administrator: {extends: [Editor]}
  - name: kms
    kind: service
    service_roles:
      Reader: {actions: [kms.read]}
      Key Purge: {actions: [kms.purge]}
  - name: iam-identity
    kind: platform_service
    roles:
      Viewer: {actions: [id.get]}
      Administrator: {extends: [Viewer], actions: [id.create]}
`

const (
	viewer        = "crn:v1:bluemix:public:iam::::role:Viewer"
	operator      = "crn:v1:bluemix:public:iam::::role:Operator"
	administrator = "crn:v1:bluemix:public:iam::::role:Administrator"
	reader        = "crn:v1:bluemix:public:iam::::serviceRole:Reader"
	keyPurge      = "crn:v1:bluemix:public:kms::::serviceRole:KeyPurge"
	decisionPoint = "crn:v1:bluemix:public:iam::::serviceRole:DecisionPoint"
	deskClerk     = "crn:v1:bluemix:public:lib::::serviceRole:DeskClerk"
	auditorA      = "crn:v1:bluemix:public:iam-access-management::a/" + accountA + "::customRole:Auditor"
	auditorB      = "crn:v1:bluemix:public:iam-access-management::a/" + accountB + "::customRole:Auditor"
	guestA        = "crn:v1:bluemix:public:iam-access-management::a/" + accountA + "::customRole:Guest"
	noRole        = "crn:v1:bluemix:public:iam::::role:Emperor"
)

// library is a service that an account registers. Its row of the action table
// counts only there; elsewhere it is a service that nobody knows.
func library(account string) *access.RegisteredService {
	s := &access.RegisteredService{AccountID: account, Definition: access.Definition{
		Name: "lib", Kind: access.KindPlatform,
		Actions: []access.ActionDefinition{{ID: "lib.look"}, {ID: "lib.run"}, {ID: "lib.read"}, {ID: "lib.lend"}},
		Platform: map[string]access.RoleDefinition{
			"Viewer": {Actions: []string{"lib.look"}}, "Operator": {Extends: []string{"Viewer"}, Actions: []string{"lib.run"}},
		},
		ServiceRoles: map[string]access.RoleDefinition{
			"Reader": {Actions: []string{"lib.read"}}, "Desk Clerk": {Extends: []string{"Reader"}, Actions: []string{"lib.lend"}},
		},
	}}
	s.Revision = 1
	return s
}

// auditor and guest are roles that an account makes.
func auditor(account string) *access.CustomRole {
	r := &access.CustomRole{ID: "role-1-" + account, AccountID: account, Name: "Auditor", DisplayName: "Auditor", Service: "kms", Actions: []string{"kms.read", "c.edit"}}
	r.Revision = 1
	return r
}

func guest(account string) *access.CustomRole {
	r := &access.CustomRole{ID: "role-2-" + account, AccountID: account, Name: "Guest", DisplayName: "Guest", Service: "lib", Actions: []string{"lib.look"}}
	r.Revision = 1
	return r
}

// actionTable is the small catalog with what accounts may add to it, written
// out; "" stands for every service that is not in it. Every row has the role
// Decision Point beside these.
var actionTable = map[string]map[string]string{
	"is": {
		viewer: "c.read is.list", operator: "c.read c.operate is.list is.operate",
		administrator: "c.read c.operate c.edit c.admin is.list is.operate is.create",
	},
	"kms": {
		viewer: "c.read", operator: "c.read c.operate", administrator: "c.read c.operate c.edit c.admin",
		reader: "s.read kms.read", keyPurge: "kms.purge",
	},
	"iam-identity": {
		viewer: "c.read id.get", operator: "c.read c.operate", administrator: "c.read c.operate c.edit c.admin id.get id.create",
	},
	"lib": {
		viewer: "c.read lib.look", operator: "c.read c.operate lib.look lib.run", administrator: "c.read c.operate c.edit c.admin",
		reader: "s.read lib.read", deskClerk: "lib.read lib.lend",
	},
	"": {
		viewer: "c.read", operator: "c.read c.operate", administrator: "c.read c.operate c.edit c.admin", reader: "s.read",
	},
}

// world is all there is: every policy and group of every account, what puts
// people into groups, and what the accounts have added to the catalog.
type world struct {
	interaction *access.Settings // of the one account that has any
	policies    []*access.Policy
	groups      []*access.Group
	rules       []*access.GroupRule
	memberships []*access.Membership
	settings    []*access.GroupSettings
	services    []*access.RegisteredService
	roles       []*access.CustomRole
}

// decideByWalking is section 2.1 with 2.5.
func decideByWalking(w world, q access.Request) bool {
	account := q.Resource["accountId"]
	if q.AccountID == "" || account == "" {
		return false
	}
	resource := withDerived(w, account, q.Resource)
	groups := groupsByWalking(w, q)
	for _, p := range w.policies {
		applies := p.AccountID == account && p.State == "active"
		switch p.Type {
		case "access":
			applies = applies && account == q.AccountID
			for _, s := range p.Subject {
				applies = applies && (s.Key == "iam_id" && s.Value.Text == q.Subject ||
					s.Key == "access_group_id" && slices.Contains(groups, s.Value.Text))
			}
		case "authorization":
			source := segments(q.Subject)
			for _, s := range p.Subject {
				applies = applies && source != nil && demandMet(s, source[s.Key])
			}
			applies = applies && source != nil
		default:
			applies = false
		}
		for _, a := range p.Resource {
			applies = applies && slices.ContainsFunc(valuesOf(resource, a.Key), func(v *string) bool { return demandMet(a, v) })
		}
		for _, a := range p.Tags {
			applies = applies && slices.ContainsFunc(q.Tags, func(tag string) bool {
				key, value, isTag := strings.Cut(tag, ":")
				return isTag && key == a.Key && demandMet(a, &value)
			})
		}
		if !applies || p.Rule != nil && !ruleByHand(p.Rule, q) {
			continue
		}
		for _, role := range p.Roles {
			if slices.Contains(actionsByTable(w, account, q.Resource["serviceName"], role), q.Action) {
				return true
			}
		}
	}
	return false
}

// segments are the attributes of the service that a CRN names (section 2.2).
func segments(subject string) map[string]*string {
	text, ok := strings.CutPrefix(subject, "crn-")
	seg := strings.SplitN(text, ":", 10)
	if !ok || len(seg) < 10 || seg[0] != "crn" || seg[1] != "v1" || seg[2] == "" || seg[3] == "" || seg[4] == "" || strings.ContainsAny(text, " \x7f") {
		return nil
	}
	out := map[string]*string{}
	for i, key := range map[int]string{4: "serviceName", 5: "region", 7: "serviceInstance", 8: "resourceType", 9: "resource"} {
		if seg[i] != "" {
			out[key] = &seg[i]
		}
	}
	if id, ok := strings.CutPrefix(seg[6], "a/"); ok && id != "" {
		out["accountId"] = &id
	}
	return out
}

// groupsByWalking are the groups of section 2.1, step 1.
func groupsByWalking(w world, q access.Request) []string {
	out := []string{"AccessGroupId-PublicAccess"}
	for _, s := range w.settings {
		if s.AccountID == q.AccountID && !s.PublicAccess {
			out = nil
		}
	}
	for _, g := range w.groups {
		for _, m := range g.Members {
			if g.AccountID == q.AccountID && m.IAMID == q.Subject {
				out = append(out, g.ID)
			}
		}
		for _, m := range w.memberships {
			for _, one := range m.Groups {
				for _, r := range w.rules {
					if m.AccountID == q.AccountID && m.IAMID == q.Subject && one.GroupID == g.ID && q.Time.Before(one.Until) &&
						r.ID == one.RuleID && r.GroupID == g.ID && r.Revision == one.Revision {
						out = append(out, g.ID)
					}
				}
			}
		}
	}
	return out
}

// known reports whether the account knows a service by name.
func (w world) known(account, service string) bool {
	return service == "is" || service == "kms" || service == "iam-identity" ||
		slices.ContainsFunc(w.services, func(s *access.RegisteredService) bool { return s.AccountID == account && s.Name == service })
}

func actionsByTable(w world, account, service, role string) []string {
	row := topService(w, account, service)
	for _, r := range w.roles {
		if role == "crn:v1:bluemix:public:iam-access-management::a/"+r.AccountID+"::customRole:"+r.Name {
			if r.AccountID == account && r.Service == row && row != "" {
				return r.Actions
			}
			return nil
		}
	}
	if role == decisionPoint {
		return []string{"iam.decision.evaluate"}
	}
	return strings.Fields(actionTable[row][role])
}

// topService is the row of the action table: a child service of VPC has the
// actions of its parent (section 2.9).
func topService(w world, account, name string) string {
	for known := range actionTable {
		if known != "" && w.known(account, known) && (name == known || strings.HasPrefix(name, known+".")) {
			return known
		}
	}
	return ""
}

// ruleByHand is sections 1.5 and 2.4: the instant is shifted to the offset that
// the value names, and then compared digit by digit.
func ruleByHand(r *access.Rule, q access.Request) bool {
	switch r.Operator {
	case "and", "or":
		held := 0
		for i := range r.Conditions {
			if ruleByHand(&r.Conditions[i], q) {
				held++
			}
		}
		return held > 0 && (r.Operator == "or" || held == len(r.Conditions))
	}
	var value any
	if json.Unmarshal(r.Value, &value) != nil {
		return false
	}
	name, inner := strings.CutPrefix(r.Key, "{{")
	name, outer := strings.CutSuffix(name, "}}")
	if !inner || !outer {
		return false
	}
	if key, ok := strings.CutPrefix(name, "resource.attributes."); ok {
		return resourceByHand(key, r.Operator, value, q.Resource)
	}
	if q.Time.IsZero() {
		return false
	}
	now := q.Time.Unix()
	switch name {
	case "environment.attributes.day_of_week":
		days, list := value.([]any)
		if !list {
			days = []any{value}
		}
		if list && r.Operator != "dayOfWeekAnyOf" || r.Operator != "dayOfWeekAnyOf" && r.Operator != "dayOfWeekEquals" {
			return false
		}
		today := false
		for _, d := range days {
			day, offset, ok := dayByHand(d)
			if !ok {
				return false
			}
			// 1 January 1970 was a Thursday.
			today = today || (floorDiv(now+offset, 86400)%7+7+3)%7+1 == day
		}
		return today
	case "environment.attributes.current_time":
		return compareByHand(r.Operator, "time", value, clockForm, now, func(t, offset int64) int64 {
			return t + offset - floorDiv(t+offset, 86400)*86400
		})
	case "environment.attributes.current_date":
		return compareByHand(r.Operator, "date", value, dateForm, now, func(t, offset int64) int64 { return floorDiv(t+offset, 86400) })
	case "environment.attributes.current_date_time":
		return compareByHand(r.Operator, "dateTime", value, instantForm, now, func(t, _ int64) int64 { return t })
	}
	return false
}

var (
	clockForm   = regexp.MustCompile(`^(?P<h>\d\d?):(?P<m>\d\d):(?P<s>\d\d)([.,]\d+)?(?P<z>Z|[+-]\d\d:\d\d)$`)
	dateForm    = regexp.MustCompile(`^(?P<Y>\d{4})-(?P<M>\d\d)-(?P<D>\d\d)(?P<z>Z|[+-]\d\d:\d\d)$`)
	instantForm = regexp.MustCompile(`^(?P<Y>\d{4})-(?P<M>\d\d)-(?P<D>\d\d)T(?P<h>\d\d?):(?P<m>\d\d):(?P<s>\d\d)([.,]\d+)?(?P<z>Z|[+-]\d\d:\d\d)$`)
	dayForm     = regexp.MustCompile(`^([1-7])([+-]\d\d:\d\d)?$`)
)

func floorDiv(a, b int64) int64 {
	q := a / b
	if a%b < 0 {
		q--
	}
	return q
}

// compareByHand reads the value by its form, puts both sides on the scale and
// compares.
func compareByHand(operator, kind string, value any, form *regexp.Regexp, now int64, scale func(t, offset int64) int64) bool {
	text, _ := value.(string)
	match := form.FindStringSubmatch(text)
	if match == nil {
		return false
	}
	part := func(name string, otherwise int) int {
		i := form.SubexpIndex(name)
		if i < 0 {
			return otherwise
		}
		n, _ := strconv.Atoi(match[i])
		return n
	}
	offset, ok := offsetByHand(match[form.SubexpIndex("z")])
	if !ok {
		return false
	}
	day := time.Date(part("Y", 1970), time.Month(part("M", 1)), part("D", 1), 0, 0, 0, 0, time.UTC)
	if day.Month() != time.Month(part("M", 1)) || day.Day() != part("D", 1) || part("h", 0) > 23 || part("m", 0) > 59 || part("s", 0) > 59 {
		return false // no such day or time
	}
	bound := scale(day.Unix()+int64(part("h", 0)*3600+part("m", 0)*60+part("s", 0))-offset, offset)
	x := scale(now, offset)
	switch strings.TrimPrefix(operator, kind) {
	case "LessThan":
		return operator != "LessThan" && x < bound
	case "LessThanOrEquals":
		return operator != "LessThanOrEquals" && x <= bound
	case "GreaterThan":
		return operator != "GreaterThan" && x > bound
	case "GreaterThanOrEquals":
		return operator != "GreaterThanOrEquals" && x >= bound
	}
	return false
}

// offsetByHand reads an offset in seconds.
func offsetByHand(z string) (int64, bool) {
	if z == "Z" || z == "" {
		return 0, true
	}
	hours, _ := strconv.Atoi(z[1:3])
	minutes, _ := strconv.Atoi(z[4:6])
	seconds := int64(hours*3600 + minutes*60)
	if z[0] == '-' {
		seconds = -seconds
	}
	return seconds, hours <= 24 && minutes <= 60
}

func dayByHand(value any) (day, offset int64, ok bool) {
	switch v := value.(type) {
	case float64:
		return int64(v), 0, v == float64(int64(v)) && v >= 1 && v <= 7
	case string:
		match := dayForm.FindStringSubmatch(v)
		if match == nil {
			return 0, 0, false
		}
		offset, ok := offsetByHand(match[2])
		return int64(v[0] - '0'), offset, ok
	}
	return 0, 0, false
}

// resourceByHand compares an attribute as the request gives it.
func resourceByHand(key, operator string, value any, resource map[string]string) bool {
	got, present := resource[key]
	if operator == "stringExists" {
		want, ok := value.(bool)
		return ok && want == present
	}
	var list []string
	text, isText := value.(string)
	if isText {
		list = []string{text}
	}
	if items, ok := value.([]any); ok {
		for _, item := range items {
			s, _ := item.(string)
			list = append(list, s)
		}
	}
	for _, s := range list {
		switch operator {
		case "stringEquals":
			return isText && present && got == s
		case "stringMatch":
			return isText && present && wildcardByRegexp(s, got)
		case "stringEqualsAnyOf":
			if present && got == s {
				return true
			}
		case "stringMatchAnyOf":
			if present && wildcardByRegexp(s, got) {
				return true
			}
		}
	}
	return false
}

// withDerived adds the attributes that follow from the service (section 2.2).
func withDerived(w world, account string, resource map[string]string) map[string]string {
	out := map[string]string{}
	if name := resource["serviceName"]; name != "" {
		out["serviceType"] = "service"
		if top := topService(w, account, name); top == "iam-identity" || top == "lib" {
			out["serviceType"] = "platform_service"
		}
		switch name {
		case "iam-identity", "iam-access-management", "iam-groups", "user-management":
			out["service_group_id"] = "IAM"
		}
	}
	for k, v := range resource {
		out[k] = v
	}
	return out
}

// valuesOf returns what a demand on a key may be met by; nil stands for an
// absent attribute. A policy about a service covers its child services.
func valuesOf(resource map[string]string, key string) []*string {
	value, present := resource[key]
	if !present {
		return []*string{nil}
	}
	out := []*string{&value}
	if parent, _, child := strings.Cut(value, "."); child && key == "serviceName" {
		out = append(out, &parent)
	}
	return out
}

func demandMet(a access.Attribute, value *string) bool {
	if a.Operator == "stringExists" {
		return a.Value.Exists != nil && *a.Value.Exists == (value != nil)
	}
	if value == nil {
		return false
	}
	switch a.Operator {
	case "stringEquals":
		return *value == a.Value.Text
	case "stringMatch":
		return wildcardByRegexp(a.Value.Text, *value)
	case "stringEqualsAnyOf", "stringMatchAnyOf":
		for _, one := range a.Value.List {
			if a.Operator == "stringEqualsAnyOf" && one == *value || a.Operator == "stringMatchAnyOf" && wildcardByRegexp(one, *value) {
				return true
			}
		}
	}
	return false
}

var wildcardToken = regexp.MustCompile(`(?s)\{\{\*\}\}|\{\{\?\}\}|.`)

// wildcardByRegexp is section 1.4: "*" is any run of characters, "?" exactly
// one, and a literal one of them is written {{*}} or {{?}}.
func wildcardByRegexp(pattern, text string) bool {
	expr := wildcardToken.ReplaceAllStringFunc(string([]rune(pattern)), func(s string) string {
		switch s {
		case "*":
			return ".*"
		case "?":
			return "."
		case "{{*}}", "{{?}}":
			s = s[2:3]
		}
		return regexp.QuoteMeta(s)
	})
	return regexp.MustCompile("(?s)^(?:" + expr + ")$").MatchString(text)
}
