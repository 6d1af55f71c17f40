package resourcecontroller

import (
	"bytes"
	"encoding/json"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/resource"
	"tabard.dev/tabard/internal/retention"
)

// Actions on instances.
const (
	instanceRetrieve = "resource-controller.instance.retrieve"
	instanceUpdate   = "resource-controller.instance.update"
	instanceDelete   = "resource-controller.instance.delete"
)

// Bounds on an instance that the reference does not name.
const (
	maxParameters = 16 << 10 // bytes of JSON; a page of the list holds 100 of them
	maxTags       = 100
	maxTag        = 128 // characters
	maxPlans      = 100 // entries of the plan history; the oldest go first
)

// instanceType is the only type of instance.
const instanceType = "service_instance"

// instanceStates are the values of the query parameter state
// (reference/access-and-audit.md section 5.2). Nothing is provisioned here, so
// instances are active, removed or on the way from one to the other.
var instanceStates = []string{"active", "inactive", "provisioning", "pre_provisioning", "failed", "removed", "pending_reclamation"}

func (r *routes) registerInstances() {
	const path = "/v2/resource_instances/{id}"
	api.List(r.Family, "GET /v2/resource_instances", instanceRetrieve, listInstances)
	change(r, "POST /v2/resource_instances", "resource-controller.instance.create", "instance.create", loadNewInstance, createInstance)
	api.Read(r.Family, "GET "+path, instanceRetrieve, r.loadInstance, showInstance)
	change(r, "PATCH "+path, instanceUpdate, "instance.update", loading[instancePatch](r.loadInstance), updateInstance)
	change(r, "DELETE "+path, instanceDelete, "instance.delete", loading[api.None](r.loadDeletion), r.deleteInstance)
	change(r, "POST "+path+"/lock", instanceUpdate, "instance.update", loading[api.None](r.loadInstance), lockInstance(true))
	change(r, "DELETE "+path+"/lock", instanceUpdate, "instance.update", loading[api.None](r.loadInstance), lockInstance(false))
	change(r, "DELETE "+path+"/last_operation", instanceUpdate, "instance.update", loading[api.None](r.loadInstance), cancelOperation)
}

type instanceBody struct {
	ID                  string          `json:"id"`
	GUID                string          `json:"guid"`
	URL                 string          `json:"url"`
	CRN                 string          `json:"crn"`
	Name                string          `json:"name"`
	AccountID           string          `json:"account_id"`
	ResourceGroupID     string          `json:"resource_group_id"`
	ResourceGroupCRN    string          `json:"resource_group_crn"`
	ResourceID          string          `json:"resource_id"`
	ResourcePlanID      string          `json:"resource_plan_id"`
	RegionID            string          `json:"region_id"`
	TargetCRN           string          `json:"target_crn"`
	State               string          `json:"state"`
	Type                string          `json:"type"`
	SubType             string          `json:"sub_type"`
	Parameters          json.RawMessage `json:"parameters"`
	Extensions          struct{}        `json:"extensions"`
	Tags                []string        `json:"tags"`
	AllowCleanup        bool            `json:"allow_cleanup"`
	OnetimeCredentials  bool            `json:"onetime_credentials"`
	Locked              bool            `json:"locked"`
	Migrated            bool            `json:"migrated"`
	DashboardURL        string          `json:"dashboard_url"`
	LastOperation       lastOperation   `json:"last_operation"`
	PlanHistory         []planPeriod    `json:"plan_history"`
	ResourceAliasesURL  string          `json:"resource_aliases_url"`
	ResourceBindingsURL string          `json:"resource_bindings_url"`
	ResourceKeysURL     string          `json:"resource_keys_url"`
	ControlledBy        string          `json:"controlled_by"`
	ResellerChannelID   string          `json:"reseller_channel_id"`
	CreatedAt           string          `json:"created_at"`
	CreatedBy           string          `json:"created_by"`
	UpdatedAt           string          `json:"updated_at"`
	UpdatedBy           string          `json:"updated_by"`
	DeletedAt           *string         `json:"deleted_at"`
	DeletedBy           string          `json:"deleted_by"`
	ScheduledReclaimAt  *string         `json:"scheduled_reclaim_at"`
	ScheduledReclaimBy  string          `json:"scheduled_reclaim_by"`
	RestoredAt          *string         `json:"restored_at"`
	RestoredBy          string          `json:"restored_by"`
}

type lastOperation struct {
	Type        string `json:"type"`
	State       string `json:"state"`
	SubType     string `json:"sub_type"`
	Async       bool   `json:"async"`
	Description string `json:"description"`
	ReasonCode  string `json:"reason_code"`
	PollAfter   int    `json:"poll_after"`
	Cancelable  bool   `json:"cancelable"`
	Poll        bool   `json:"poll"`
}

type planPeriod struct {
	ResourcePlanID string `json:"resource_plan_id"`
	StartDate      string `json:"start_date"`
	RequestorID    string `json:"requestor_id,omitempty"`
}

// encodeInstance writes links as paths, as the published samples are: the
// sample application joins them to its base URL unless they begin with https,
// so that an absolute link would break it on a server without TLS
// (reference/access-and-audit.md section 5.1).
func encodeInstance(c *api.Call, i *resource.Instance) instanceBody {
	self := "/v2/resource_instances/" + url.PathEscape(i.GUID)
	b := instanceBody{
		ID: i.CRN, GUID: i.GUID, URL: self, CRN: i.CRN, Name: i.Name, AccountID: i.AccountID,
		ResourceGroupID: i.GroupID, ResourceGroupCRN: groupCRN(c, i.GroupID),
		ResourceID: i.Service, ResourcePlanID: i.PlanID, RegionID: i.Target,
		TargetCRN: c.Names.Of("globalcatalog", "", "", "", "deployment", i.PlanID+"%3A"+i.Target).String(),
		State:     stateOf(i), Type: instanceType, Parameters: i.Parameters, Tags: i.Tags,
		AllowCleanup: i.AllowCleanup, Locked: i.Locked,
		LastOperation: operationOf(i), PlanHistory: planHistory(i),

		ResourceAliasesURL: self + "/resource_aliases", ResourceBindingsURL: self + "/resource_bindings", ResourceKeysURL: self + "/resource_keys",
		CreatedAt: stamp(i.CreatedAt), CreatedBy: i.CreatedBy, UpdatedAt: stamp(i.ModifiedAt), UpdatedBy: i.ModifiedBy,
		DeletedAt: stampIfAny(i.DeletedAt), DeletedBy: i.DeletedBy,
		ScheduledReclaimAt: stampIfAny(i.ReclaimAt), ScheduledReclaimBy: i.ReclaimBy,
		RestoredAt: stampIfAny(i.RestoredAt), RestoredBy: i.RestoredBy,
	}
	if len(b.Parameters) == 0 {
		b.Parameters = json.RawMessage("{}")
	}
	if b.Tags == nil {
		b.Tags = []string{}
	}
	return b
}

func stateOf(i *resource.Instance) string {
	if i.State == "" {
		return resource.StateActive
	}
	return i.State
}

// operationOf shows all that a deletion which waits goes through as operations
// of one type.
func operationOf(i *resource.Instance) lastOperation {
	o := lastOperation{Type: i.LastOp.Type, SubType: i.LastOp.SubType, State: i.LastOp.State, Description: i.LastOp.Description}
	switch o.Type {
	case "":
		o.Type = opCreate
	case opScheduleReclaim, opReclaim, opRestore:
		o.Type, o.SubType = "reclamation", o.Type
	}
	if o.State == "" {
		o.State = "succeeded"
	}
	if o.Description == "" {
		o.Description = "Completed."
	}
	return o
}

// Types of [resource.LastOperation].
const (
	opCreate          = "create"
	opUpdate          = "update"
	opDelete          = "delete"
	opLock            = "lock"
	opUnlock          = "unlock"
	opScheduleReclaim = "schedule_reclaim"
	opReclaim         = "reclaim"
	opRestore         = "restore"
)

func done(operation string) resource.LastOperation {
	return resource.LastOperation{Type: operation, State: "succeeded"}
}

func planHistory(i *resource.Instance) []planPeriod {
	if len(i.Plans) == 0 {
		return []planPeriod{{ResourcePlanID: i.PlanID, StartDate: stamp(i.CreatedAt), RequestorID: i.CreatedBy}}
	}
	out := make([]planPeriod, len(i.Plans))
	for n, p := range i.Plans {
		out[n] = planPeriod{ResourcePlanID: p.PlanID, StartDate: stamp(p.Start)}
		if p.Start.Equal(i.CreatedAt) {
			out[n].RequestorID = i.CreatedBy
		}
	}
	return out
}

// instanceResource are an instance's attributes: those of its own service,
// because actions on instances ride on the roles of each service
// (reference/access-and-audit.md section 2.8).
func instanceResource(c *api.Call, i *resource.Instance) map[string]string {
	return c.InAccount(i.Service, access.ServiceInstance, i.GUID, access.Region, i.Target, access.ResourceGroupID, i.GroupID)
}

func instanceTarget(c *api.Call, i *resource.Instance) api.Target {
	return api.Target{Resource: instanceResource(c, i), CRN: i.CRN, Name: i.Name, TypeURI: i.Service + "/instance"}
}

// listInstances shows the instances that the caller may see; without the
// parameter state only those that are in use.
func listInstances(c *api.Call, may func(map[string]string) bool) (api.Reply, error) {
	cursor, err := cursor(c, "guid", "name", "resource_group_id", "resource_id", "resource_plan_id", "type", "sub_type", "state", "updated_from", "updated_to")
	if err != nil {
		return api.Reply{}, err
	}
	f, err := newFilter(cursor.Query)
	if err != nil {
		return api.Reply{}, err
	}
	state := cursor.Query.Get("state")
	if state == "" {
		state = resource.StateActive
	}
	if !slices.Contains(instanceStates, state) {
		return api.Reply{}, invalidParameter("state", state, "one of "+strings.Join(instanceStates, ", "))
	}
	var seen []*resource.Instance
	for _, i := range c.Directory.ResourcesByAccount.Get(c.Account()) {
		if stateOf(i) == state && f.is("guid", i.GUID) && f.is("name", i.Name) && f.is("resource_group_id", i.GroupID) &&
			f.is("resource_id", i.Service) && f.is("resource_plan_id", i.PlanID) && f.is("type", instanceType) && f.is("sub_type", "") &&
			f.updated(i.ModifiedAt) && may(instanceResource(c, i)) {
			seen = append(seen, i)
		}
	}
	key := func(i *resource.Instance) string { return api.SortKey(i.CreatedAt, i.GUID) }
	return page("/v2/resource_instances", cursor, seen, key, func(i *resource.Instance) instanceBody { return encodeInstance(c, i) }), nil
}

type newInstance struct {
	Name       string          `json:"name"`
	Target     string          `json:"target"`
	GroupID    string          `json:"resource_group"`
	PlanID     string          `json:"resource_plan_id"`
	Tags       []string        `json:"tags"`
	Parameters json.RawMessage `json:"parameters"`

	AllowCleanup bool `json:"allow_cleanup"`
}

// loadNewInstance also demands Viewer on the group: creating in a group needs
// it besides Editor on the service (reference/access-and-audit.md section 2.2).
func loadNewInstance(c *api.Call, b *newInstance) (*resource.Instance, api.Target, error) {
	plan, ok := c.Directory.Catalog(c.Account()).Plan(b.PlanID)
	if !ok {
		return nil, api.Target{}, api.Invalid("The field resource_plan_id %q is not a plan of the catalog; GET /v2/resource_plans lists them.", b.PlanID).On("resource_plan_id")
	}
	i := &resource.Instance{
		GUID: uuid.NewString(), AccountID: c.Account(), Name: b.Name, GroupID: b.GroupID, Service: plan.Service,
		PlanID: plan.ID, Target: b.Target, Parameters: b.Parameters, Tags: b.Tags,
		AllowCleanup: b.AllowCleanup, Locked: strings.EqualFold(c.R.Header.Get("Entity-Lock"), "true"), LastOp: done(opCreate),
	}
	if err := validNewInstance(c, i); err != nil {
		return nil, api.Target{}, err
	}
	i.CRN = c.Names.Of(i.Service, i.Target, i.AccountID, i.GUID, "", "").String()
	g, err := findGroup(c, i.GroupID)
	if err != nil {
		return nil, api.Target{}, err
	}
	target := instanceTarget(c, i)
	// No policy can name an instance that does not exist yet.
	delete(target.Resource, access.ServiceInstance)
	return i, target, c.Authorize("resource-controller.group.retrieve", groupResource(c, g.ID))
}

func validNewInstance(c *api.Call, i *resource.Instance) error {
	if err := validInstanceName(i.Name); err != nil {
		return err
	}
	if !validLocation(i.Target) {
		return api.Invalid("The field target must name a region, such as %s or global.", c.Region).On("target")
	}
	if i.GroupID == "" {
		return api.Invalid("The field resource_group is required: the id of a resource group.").On("resource_group")
	}
	if len(i.Tags) > maxTags || slices.ContainsFunc(i.Tags, func(t string) bool { return t == "" || !api.Printable(t, maxTag) }) {
		return api.Invalid("The field tags can have %d tags of 1 to %d printable characters.", maxTags, maxTag).On("tags")
	}
	var err error
	i.Parameters, err = validParameters(i.Parameters)
	return err
}

func validInstanceName(name string) error {
	if strings.TrimSpace(name) == "" || !api.Printable(name, resource.MaxNameLength) {
		return api.Invalid("The field name must have 1 to %d printable characters.", resource.MaxNameLength).On("name")
	}
	return nil
}

// validLocation keeps what becomes a segment of a CRN to letters, digits and
// hyphens.
func validLocation(s string) bool {
	return len(s) >= 1 && len(s) <= 64 && strings.IndexFunc(s, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '-'
	}) < 0
}

// validParameters returns the parameters in compact form, nil when there are
// none.
func validParameters(raw json.RawMessage) (json.RawMessage, error) {
	if len(raw) == 0 || string(raw) == "null" {
		return nil, nil
	}
	var compact bytes.Buffer
	if err := json.Compact(&compact, raw); err != nil || compact.Bytes()[0] != '{' || compact.Len() > maxParameters {
		return nil, api.Invalid("The field parameters must be a JSON object of at most %d bytes.", maxParameters).On("parameters")
	}
	return compact.Bytes(), nil
}

func createInstance(c *api.Call, tx *directory.Tx, _ *newInstance, i *resource.Instance) (api.Reply, api.Target, error) {
	if g, ok := c.Directory.ResourceGroups.Get(i.GroupID); ok && groupState(g) != stateActive {
		return api.Reply{}, instanceTarget(c, i), fault.New(fault.Conflict, "group_suspended",
			"The resource group %q is suspended; nothing can be created in it.", g.Name)
	}
	i.Plans = []resource.PlanPeriod{{PlanID: i.PlanID, Start: tx.Now}}
	c.Directory.Resources.Put(tx, i)
	data := instanceData(i)
	data["region_id"], data["lock"] = i.Target, i.Locked
	return api.Reply{Status: http.StatusCreated, Body: encodeInstance(c, i), ETag: i.Tag(i.GUID), ResponseData: data}, instanceTarget(c, i), nil
}

// instanceData is an instance's place in an activity event.
func instanceData(i *resource.Instance) map[string]any {
	return map[string]any{"service": i.Service, "resource_plan_id": i.PlanID, "resource_group_id": i.GroupID, "state": stateOf(i)}
}

// findInstance finds an instance of an account by GUID or CRN.
func (r *routes) findInstance(account, id string) (*resource.Instance, bool) {
	guid := id
	asked, notCRN := crn.Parse(id)
	if notCRN == nil {
		guid = asked.Instance
	}
	i, ok := r.Directory.Resources.Get(guid)
	if !ok || i.AccountID != account {
		return nil, false
	}
	if notCRN == nil {
		// The whole CRN counts: one that names another account or service
		// denotes another instance, though its GUID is known.
		if own, err := crn.Parse(i.CRN); err != nil || !own.Same(asked) {
			return nil, false
		}
	}
	return i, true
}

func (r *routes) loadInstance(c *api.Call) (*resource.Instance, api.Target, error) {
	id := c.R.PathValue("id")
	i, ok := r.findInstance(c.Account(), id)
	if !ok {
		return nil, api.Target{}, api.NotFound("resource instance", id)
	}
	return i, instanceTarget(c, i), nil
}

func showInstance(c *api.Call, i *resource.Instance) (api.Reply, error) {
	return api.Reply{Body: encodeInstance(c, i), ETag: i.Tag(i.GUID)}, nil
}

// inUse refuses to change an instance that is deleted, or on its way there.
func inUse(i *resource.Instance) error {
	switch i.State {
	case resource.StateRemoved:
		return fault.New(fault.Gone, codeGone, "The resource instance %q is removed.", i.GUID)
	case resource.StateReclamation:
		return fault.New(fault.Locked, codePending, "The resource instance %q is deleted and waits for its reclamation; restore it first.", i.GUID)
	}
	return nil
}

// unlocked refuses to change an instance that is not in use, or locked.
func unlocked(i *resource.Instance) error {
	if err := inUse(i); err != nil {
		return err
	}
	if i.Locked {
		return fault.New(fault.Locked, codeLocked, "The resource instance %q is locked; unlock it first.", i.GUID)
	}
	return nil
}

type instancePatch struct {
	Name         *string         `json:"name"`
	Parameters   json.RawMessage `json:"parameters"`
	PlanID       *string         `json:"resource_plan_id"`
	AllowCleanup *bool           `json:"allow_cleanup"`
}

func updateInstance(c *api.Call, tx *directory.Tx, b *instancePatch, old *resource.Instance) (api.Reply, api.Target, error) {
	target := instanceTarget(c, old)
	err := unlocked(old)
	if err == nil {
		err = c.IfMatch(&old.Meta, old.GUID, false)
	}
	if err != nil {
		return api.Reply{}, target, err
	}
	i := *old
	i.LastOp = done(opUpdate)
	data := map[string]any{"service": i.Service}
	if b.Name != nil {
		if err := validInstanceName(*b.Name); err != nil {
			return api.Reply{}, target, err
		}
		i.Name = *b.Name
		data["old_name"], data["new_name"] = old.Name, i.Name
	}
	if len(b.Parameters) > 0 {
		parameters, err := validParameters(b.Parameters)
		if err != nil {
			return api.Reply{}, target, err
		}
		i.Parameters = parameters
		// Their values may be secrets of the service.
		data["parameters_changed"] = true
	}
	if b.AllowCleanup != nil {
		i.AllowCleanup = *b.AllowCleanup
		data["allow_cleanup"] = i.AllowCleanup
	}
	if b.PlanID != nil && *b.PlanID != old.PlanID {
		if err := changePlan(c, tx, &i, *b.PlanID); err != nil {
			return api.Reply{}, target, err
		}
		data["old_plan"], data["new_plan"] = old.PlanID, i.PlanID
	}
	c.Directory.Resources.Put(tx, &i)
	return api.Reply{Body: encodeInstance(c, &i), ETag: i.Tag(i.GUID), ResponseData: data}, instanceTarget(c, &i), nil
}

// changePlan needs more than an update does
// (reference/access-and-audit.md section 2.8).
func changePlan(c *api.Call, tx *directory.Tx, i *resource.Instance, planID string) error {
	plan, ok := c.Directory.Catalog(c.Account()).Plan(planID)
	if !ok || plan.Service != i.Service {
		return api.Invalid("The field resource_plan_id %q is not a plan of service %s; GET /v2/resource_plans lists them.", planID, i.Service).On("resource_plan_id")
	}
	if err := c.Authorize("resource-controller.instance.update_plan", instanceResource(c, i)); err != nil {
		return err
	}
	if len(i.Plans) == 0 {
		i.Plans = []resource.PlanPeriod{{PlanID: i.PlanID, Start: i.CreatedAt}}
	}
	plans := append(slices.Clone(i.Plans), resource.PlanPeriod{PlanID: planID, Start: tx.Now})
	i.PlanID, i.Plans = planID, plans[max(0, len(plans)-maxPlans):]
	return nil
}

// lockInstance may be asked for the state that there is: the answer is the
// instance in that state.
func lockInstance(lock bool) func(*api.Call, *directory.Tx, *api.None, *resource.Instance) (api.Reply, api.Target, error) {
	return func(c *api.Call, tx *directory.Tx, _ *api.None, old *resource.Instance) (api.Reply, api.Target, error) {
		target := instanceTarget(c, old)
		if err := inUse(old); err != nil {
			return api.Reply{}, target, err
		}
		i := *old
		i.Locked, i.LastOp = lock, done(opUnlock)
		if lock {
			i.LastOp = done(opLock)
		}
		c.Directory.Resources.Put(tx, &i)
		return api.Reply{
			Body: encodeInstance(c, &i), ETag: i.Tag(i.GUID), ResponseData: map[string]any{"service": i.Service, "lock": lock},
		}, target, nil
	}
}

// cancelOperation finds every operation finished: each is done within its own
// request. The message is the one that clients know.
func cancelOperation(c *api.Call, _ *directory.Tx, _ *api.None, i *resource.Instance) (api.Reply, api.Target, error) {
	return api.Reply{}, instanceTarget(c, i), fault.New(fault.Locked, codeNotCancelable, "The instance is not cancelable.")
}

// deleteInstance removes an instance, or schedules its reclamation when its
// plan says so. Its keys go at once in both cases, and only when asked for:
// whoever holds one loses access, and a restored instance gets new ones.
// loadDeletion finds the instance to be deleted. A deletion that waits has an
// event of its own.
func (r *routes) loadDeletion(c *api.Call) (*resource.Instance, api.Target, error) {
	i, target, err := r.loadInstance(c)
	if err == nil && r.reclaimed(i) {
		target.Event = i.Service + ".instance.schedule_reclaim"
	}
	return i, target, err
}

func (r *routes) deleteInstance(c *api.Call, tx *directory.Tx, _ *api.None, old *resource.Instance) (api.Reply, api.Target, error) {
	target := instanceTarget(c, old)
	if r.reclaimed(old) {
		target.Event = old.Service + ".instance.schedule_reclaim"
	}
	recursive, err := boolParameter(c, "recursive")
	if err == nil {
		err = unlocked(old)
	}
	if err == nil {
		err = c.IfMatch(&old.Meta, old.GUID, false)
	}
	if err != nil {
		return api.Reply{}, target, err
	}
	i := *old
	data := map[string]any{"service": i.Service}
	if keys := r.activeKeys(i.GUID); len(keys) > 0 {
		if recursive != "true" {
			return api.Reply{}, target, fault.New(fault.Invalid, "has_keys",
				"The resource instance %q has %d resource keys; delete them first, or with it (recursive=true).", i.GUID, len(keys))
		}
		deleted, err := r.removeKeys(tx, keys)
		if err != nil {
			return api.Reply{}, target, err
		}
		data["deleted_keys"] = deleted
	}
	if r.reclaimed(&i) {
		i.State, i.LastOp = resource.StateReclamation, done(opScheduleReclaim)
		i.ReclaimAt, i.ReclaimBy = tx.Now.Add(retention.Reclamation), tx.By
		i.RestoredAt, i.RestoredBy = time.Time{}, ""
		r.Directory.Reclamations.Put(tx, &resource.Reclamation{
			ID: uuid.NewString(), AccountID: i.AccountID, InstanceGUID: i.GUID, InstanceCRN: i.CRN, GroupID: i.GroupID,
			State: scheduled, At: i.ReclaimAt,
		})
		data["scheduled_reclaim_at"] = stamp(i.ReclaimAt)
	} else {
		i.State, i.LastOp = resource.StateRemoved, done(opDelete)
		i.DeletedAt, i.DeletedBy = tx.Now, tx.By
	}
	data["state"] = i.State
	r.Directory.Resources.Put(tx, &i)
	return api.Reply{Status: http.StatusNoContent, ResponseData: data}, target, nil
}

// reclaimed reports whether the plan of an instance lets its deletion wait.
func (r *routes) reclaimed(i *resource.Instance) bool {
	plan, ok := r.Directory.Catalog(i.AccountID).Plan(i.PlanID)
	return ok && plan.Reclamation
}
