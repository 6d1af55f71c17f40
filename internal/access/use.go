package access

import (
	"time"

	"tabard.dev/tabard/internal/object"
)

// Use is what is remembered of the permits of one policy to one subject for one
// action: how often, and on which days.
type Use struct {
	object.Meta
	ID        string    `json:"id"` // made of the subject, the policy and the action
	AccountID string    `json:"account_id"`
	Subject   string    `json:"subject"` // IAM ID; in a profile session the profile's
	PolicyID  string    `json:"policy_id"`
	Service   string    `json:"service"` // of the resource
	Action    string    `json:"action"`
	Count     int64     `json:"count"`
	First     time.Time `json:"first"`
	Last      time.Time `json:"last"`
	Days      []int     `json:"days,omitempty"` // the latest UTC days with a use, as yyyymmdd, oldest first
}
