// Package resource holds resource groups and the instances of services that
// an account has, as Resource Controller and Resource Manager show them.
package resource

import (
	"encoding/json"

	"tabard.dev/tabard/internal/object"
)

// Group is a resource group: the compartment that an account's resources are
// kept in.
type Group struct {
	object.Meta
	ID        string `json:"id"` // 32 hexadecimal digits
	AccountID string `json:"account_id"`
	Name      string `json:"name"` // unique in the account
	Default   bool   `json:"default,omitempty"`
}

// Instance is a service instance.
type Instance struct {
	object.Meta
	GUID       string          `json:"guid"`
	CRN        string          `json:"crn"`
	AccountID  string          `json:"account_id"`
	Name       string          `json:"name"`
	GroupID    string          `json:"resource_group_id"`
	Service    string          `json:"service"`
	PlanID     string          `json:"resource_plan_id"`
	Target     string          `json:"target"` // region
	Parameters json.RawMessage `json:"parameters,omitempty"`
	Tags       []string        `json:"tags,omitempty"`
}

// MaxNameLength of a service instance, in characters.
const MaxNameLength = 180
