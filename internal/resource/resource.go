// Package resource holds resource groups and the instances of services that
// an account has, as Resource Controller and Resource Manager show them.
package resource

import (
	"encoding/json"
	"time"

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
	State     string `json:"state,omitempty"` // "" means ACTIVE
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

	Locked       bool          `json:"locked,omitempty"`
	AllowCleanup bool          `json:"allow_cleanup,omitempty"`
	State        string        `json:"state,omitempty"` // "" means StateActive
	LastOp       LastOperation `json:"last_operation,omitzero"`
	Plans        []PlanPeriod  `json:"plan_history,omitempty"`
	DeletedAt    time.Time     `json:"deleted_at,omitzero"`
	DeletedBy    string        `json:"deleted_by,omitempty"`
	ReclaimAt    time.Time     `json:"scheduled_reclaim_at,omitzero"`
	ReclaimBy    string        `json:"scheduled_reclaim_by,omitempty"`
	RestoredAt   time.Time     `json:"restored_at,omitzero"`
	RestoredBy   string        `json:"restored_by,omitempty"`
}

// States of an instance or key.
const (
	StateActive      = "active"
	StateRemoved     = "removed"
	StateReclamation = "pending_reclamation"
)

// LastOperation is what was done last to an instance.
type LastOperation struct {
	Type        string `json:"type,omitempty"` // create, update, delete, reclaim, restore, lock, unlock
	SubType     string `json:"sub_type,omitempty"`
	State       string `json:"state,omitempty"` // in progress, succeeded or failed
	Description string `json:"description,omitempty"`
}

// PlanPeriod is a plan that an instance had from a time on.
type PlanPeriod struct {
	PlanID string    `json:"resource_plan_id"`
	Start  time.Time `json:"start_date"`
}

// Key is a credential for a resource instance: a service ID of its own, an API
// key of that, and a policy with a role on the instance.
type Key struct {
	object.Meta
	GUID         string          `json:"guid"`
	CRN          string          `json:"crn"`
	AccountID    string          `json:"account_id"`
	Name         string          `json:"name"`
	SourceCRN    string          `json:"source_crn"`
	InstanceGUID string          `json:"instance_guid"`
	GroupID      string          `json:"resource_group_id"`
	Role         string          `json:"role,omitempty"` // CRN
	Parameters   json.RawMessage `json:"parameters,omitempty"`
	ServiceID    string          `json:"service_id,omitempty"`
	APIKeyID     string          `json:"apikey_id,omitempty"`
	Sealed       []byte          `json:"sealed,omitempty"` // the API key's value, see token.Sealer
	PolicyID     string          `json:"policy_id,omitempty"`
	State        string          `json:"state,omitempty"`
	DeletedAt    time.Time       `json:"deleted_at,omitzero"`
	DeletedBy    string          `json:"deleted_by,omitempty"`
}

// Reclamation is a deletion that waits: until its time the instance can be
// restored.
type Reclamation struct {
	object.Meta
	ID           string    `json:"id"`
	AccountID    string    `json:"account_id"`
	InstanceGUID string    `json:"instance_guid"`
	InstanceCRN  string    `json:"instance_crn"`
	GroupID      string    `json:"resource_group_id"`
	State        string    `json:"state"` // SCHEDULED, RECLAIMING, RESTORING
	At           time.Time `json:"target_time"`
	Comment      string    `json:"comment,omitempty"`
}

// MaxNameLength of a service instance, in characters.
const MaxNameLength = 180
