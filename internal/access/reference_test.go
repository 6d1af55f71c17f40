package access_test

import (
	"regexp"
	"slices"
	"strings"

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
	noRole        = "crn:v1:bluemix:public:iam::::role:Emperor"
)

// actionTable is the small catalog written out; "" stands for every service
// that is not in it.
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
	"": {
		viewer: "c.read", operator: "c.read c.operate", administrator: "c.read c.operate c.edit c.admin", reader: "s.read",
	},
}

// world is all there is: every policy and group of every account.
type world struct {
	policies []*access.Policy
	groups   []*access.Group
}

// decideByWalking is section 2.1.
func decideByWalking(w world, q access.Request) bool {
	if q.AccountID == "" || q.Resource["accountId"] != q.AccountID {
		return false
	}
	var groups []string
	for _, g := range w.groups {
		for _, m := range g.Members {
			if g.AccountID == q.AccountID && m.IAMID == q.Subject {
				groups = append(groups, g.ID)
			}
		}
	}
	resource := withDerived(q.Resource)
	service := topService(q.Resource["serviceName"])
	for _, p := range w.policies {
		applies := p.AccountID == q.AccountID && p.State == "active" && p.Type == "access"
		for _, s := range p.Subject {
			applies = applies && (s.Key == "iam_id" && s.Value.Text == q.Subject ||
				s.Key == "access_group_id" && slices.Contains(groups, s.Value.Text))
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
		if !applies {
			continue
		}
		for _, role := range p.Roles {
			if slices.Contains(strings.Fields(actionTable[service][role]), q.Action) {
				return true
			}
		}
	}
	return false
}

// topService is the row of the action table: a child service of VPC has the
// actions of its parent (section 2.9).
func topService(name string) string {
	for known := range actionTable {
		if known != "" && (name == known || strings.HasPrefix(name, known+".")) {
			return known
		}
	}
	return ""
}

// withDerived adds the attributes that follow from the service (section 2.2).
func withDerived(resource map[string]string) map[string]string {
	out := map[string]string{}
	if name := resource["serviceName"]; name != "" {
		out["serviceType"] = "service"
		if topService(name) == "iam-identity" {
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
