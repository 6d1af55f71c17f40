package resourcecontroller

import (
	"cmp"
	"slices"
	"time"

	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/resource"
)

// States of a reclamation. One that is kept is scheduled: an action is done
// when its answer, which bears one of the others, goes out.
const (
	scheduled  = "SCHEDULED"
	reclaiming = "RECLAIMING"
	restoring  = "RESTORING"
)

// maxComment bounds the comment on an action, in characters; the bound is ours.
const maxComment = 1000

func (r *routes) registerReclamations() {
	const path = "/v1/reclamations/{id}/actions/"
	api.List(r.Family, "GET /v1/reclamations", instanceRetrieve, r.listReclamations)
	// Who may delete an instance may also take that back.
	change(r, "POST "+path+"reclaim", instanceDelete, "instance.delete", r.loadReclamation, r.reclaim)
	change(r, "POST "+path+"restore", instanceDelete, "instance.restore", r.loadReclamation, r.restore)
	api.Open(r.Family, "POST "+path+"{action}", "everybody gets the same answer: there is no such action", func(c *api.Call) (api.Reply, error) {
		action := c.R.PathValue("action")
		return api.Reply{}, fault.New(fault.Invalid, "invalid_parameter", "The action %q is not one of reclaim and restore.", action).OnParameter("action_name", action)
	})
}

type reclamationBody struct {
	ID                 string   `json:"id"`
	EntityID           string   `json:"entity_id"`
	EntityTypeID       string   `json:"entity_type_id"`
	EntityCRN          string   `json:"entity_crn"`
	ResourceInstanceID string   `json:"resource_instance_id"`
	ResourceGroupID    string   `json:"resource_group_id"`
	AccountID          string   `json:"account_id"`
	PolicyID           string   `json:"policy_id"`
	State              string   `json:"state"`
	TargetTime         string   `json:"target_time"`
	CustomProperties   struct{} `json:"custom_properties"`
	CreatedAt          string   `json:"created_at"`
	CreatedBy          string   `json:"created_by"`
	UpdatedAt          string   `json:"updated_at"`
	UpdatedBy          string   `json:"updated_by"`
}

func encodeReclamation(r *resource.Reclamation) reclamationBody {
	return reclamationBody{
		ID: r.ID, EntityID: r.InstanceGUID, EntityTypeID: instanceType, EntityCRN: r.InstanceCRN, ResourceInstanceID: r.InstanceGUID,
		ResourceGroupID: r.GroupID, AccountID: r.AccountID, State: r.State, TargetTime: stamp(r.At),
		CreatedAt: stamp(r.CreatedAt), CreatedBy: r.CreatedBy, UpdatedAt: stamp(r.ModifiedAt), UpdatedBy: r.ModifiedBy,
	}
}

// findReclamation finds a reclamation of an account and its instance.
func (r *routes) findReclamation(account, id string) (*resource.Reclamation, *resource.Instance, bool) {
	rec, ok := r.Directory.Reclamations.Get(id)
	if !ok || rec.AccountID != account {
		return nil, nil, false
	}
	i, ok := r.Directory.Resources.Get(rec.InstanceGUID)
	return rec, i, ok
}

// listReclamations has no paging. An instance may be named by GUID or CRN.
func (r *routes) listReclamations(c *api.Call, may func(map[string]string) bool) (api.Reply, error) {
	f := filter{q: c.R.URL.Query()}
	out := []reclamationBody{}
	for _, rec := range r.Directory.ReclamationsByAccount.Get(c.Account()) {
		i, ok := r.Directory.Resources.Get(rec.InstanceGUID)
		if ok && f.is("account_id", rec.AccountID) && f.is("resource_group_id", rec.GroupID) &&
			(f.is("resource_instance_id", rec.InstanceGUID) || f.is("resource_instance_id", rec.InstanceCRN)) && may(instanceResource(c, i)) {
			out = append(out, encodeReclamation(rec))
		}
	}
	slices.SortFunc(out, func(a, b reclamationBody) int {
		return cmp.Or(cmp.Compare(a.CreatedAt, b.CreatedAt), cmp.Compare(a.ID, b.ID))
	})
	return api.Reply{Body: map[string]any{"resources": out}}, nil
}

// reclamationAction is the body of an action. Whom a caller names in request_by
// proves nothing, so that the event says who called.
type reclamationAction struct {
	RequestBy string `json:"request_by"`
	Comment   string `json:"comment"`
}

// pending is a reclamation with its instance.
type pending struct {
	reclamation *resource.Reclamation
	instance    *resource.Instance
}

// OptionalBody implements [api.OptionalBody]: every field may be left out.
func (reclamationAction) OptionalBody() {}

func (r *routes) loadReclamation(c *api.Call, b *reclamationAction) (pending, api.Target, error) {
	id := c.R.PathValue("id")
	rec, i, ok := r.findReclamation(c.Account(), id)
	if !ok || i.State != resource.StateReclamation {
		return pending{}, api.Target{}, api.NotFound("reclamation", id)
	}
	if !api.Printable(b.Comment, maxComment) || !api.Printable(b.RequestBy, maxComment) {
		return pending{}, instanceTarget(c, i), api.Invalid("The fields comment and request_by must have at most %d printable characters.", maxComment).On("comment")
	}
	return pending{rec, i}, instanceTarget(c, i), nil
}

func (r *routes) reclaim(c *api.Call, tx *directory.Tx, b *reclamationAction, p pending) (api.Reply, api.Target, error) {
	i := *p.instance
	i.State, i.LastOp = resource.StateRemoved, done(opReclaim)
	i.DeletedAt, i.DeletedBy = tx.Now, tx.By
	return r.settle(c, tx, b, p.reclamation, &i, reclaiming)
}

func (r *routes) restore(c *api.Call, tx *directory.Tx, b *reclamationAction, p pending) (api.Reply, api.Target, error) {
	i := *p.instance
	i.State, i.LastOp = resource.StateActive, done(opRestore)
	i.ReclaimAt, i.ReclaimBy = time.Time{}, ""
	i.RestoredAt, i.RestoredBy = tx.Now, tx.By
	return r.settle(c, tx, b, p.reclamation, &i, restoring)
}

// settle ends a reclamation.
func (r *routes) settle(c *api.Call, tx *directory.Tx, b *reclamationAction, rec *resource.Reclamation, i *resource.Instance, state string) (api.Reply, api.Target, error) {
	r.Directory.Reclamations.Delete(tx, rec)
	r.Directory.Resources.Put(tx, i)
	data := instanceData(i)
	data["reclamation_id"], data["comment"] = rec.ID, b.Comment
	answer := encodeReclamation(rec)
	answer.State, answer.UpdatedAt, answer.UpdatedBy = state, stamp(tx.Now), tx.By
	return api.Reply{Body: answer, ResponseData: data}, instanceTarget(c, i), nil
}
