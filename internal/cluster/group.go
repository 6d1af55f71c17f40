package cluster

import "tabard.dev/tabard/internal/object"

// Group is a set of clusters of one account that a rule can name, so that one
// rule covers a fleet: the claim cluster_group has the names of the groups that
// a pod's cluster is in. Which clusters are in it stands in their GroupIDs.
type Group struct {
	object.Meta
	ID          string `json:"id"` // ClusterGroup-<uuid>
	CRN         string `json:"crn"`
	AccountID   string `json:"account_id"`
	Name        string `json:"name"` // unique in the account
	Description string `json:"description,omitempty"`
}
