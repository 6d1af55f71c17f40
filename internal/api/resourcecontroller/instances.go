package resourcecontroller

import (
	"bytes"
	"encoding/json"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/resource"
)

// Bounds on an instance that the reference does not name.
const (
	maxParameters = 16 << 10 // bytes of JSON; a page of the list holds 100 of them
	maxTags       = 100
	maxTag        = 128 // characters
	maxPage       = 100 // also the default (reference/access-and-audit.md section 5.2)
)

// instanceType is the only type of instance.
const instanceType = "service_instance"

// instanceStates are the values of the query parameter state
// (reference/access-and-audit.md section 5.2). Instances are active from their
// creation until they are gone.
var instanceStates = []string{"active", "inactive", "provisioning", "pre_provisioning", "failed", "removed", "pending_reclamation"}

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
	RequestorID    string `json:"requestor_id"`
}

// encodeInstance writes links as paths, as the published samples are: the
// sample application joins them to its base URL unless they begin with https,
// so that an absolute link would break it on a server without TLS
// (reference/access-and-audit.md section 5.1).
func encodeInstance(c *api.Call, i *resource.Instance) instanceBody {
	self := "/v2/resource_instances/" + url.PathEscape(i.GUID)
	operation := "create"
	if i.Revision > 1 {
		operation = "update"
	}
	b := instanceBody{
		ID: i.CRN, GUID: i.GUID, URL: self, CRN: i.CRN, Name: i.Name, AccountID: i.AccountID,
		ResourceGroupID: i.GroupID, ResourceGroupCRN: groupCRN(c, i.GroupID),
		ResourceID: i.Service, ResourcePlanID: i.PlanID, RegionID: i.Target,
		TargetCRN: c.Names.Of("globalcatalog", "", "", "", "deployment", i.PlanID+"%3A"+i.Target).String(),
		State:     "active", Type: instanceType, Parameters: i.Parameters, Tags: i.Tags,
		LastOperation: lastOperation{Type: operation, State: "succeeded", Description: "Completed."},
		PlanHistory:   []planPeriod{{ResourcePlanID: i.PlanID, StartDate: stamp(i.CreatedAt), RequestorID: i.CreatedBy}},

		ResourceAliasesURL: self + "/resource_aliases", ResourceBindingsURL: self + "/resource_bindings", ResourceKeysURL: self + "/resource_keys",
		CreatedAt: stamp(i.CreatedAt), CreatedBy: i.CreatedBy, UpdatedAt: stamp(i.ModifiedAt), UpdatedBy: i.ModifiedBy,
	}
	if len(b.Parameters) == 0 {
		b.Parameters = json.RawMessage("{}")
	}
	if b.Tags == nil {
		b.Tags = []string{}
	}
	return b
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

// listInstances shows a page of the instances that the caller may see. A start
// value carries the limit and the filters of the first request, and nothing
// that decides what may be seen.
func listInstances(c *api.Call, may func(map[string]string) bool) (api.Reply, error) {
	cursor, err := instanceCursor(c)
	if err != nil {
		return api.Reply{}, err
	}
	matches, err := instanceFilter(cursor.Query)
	if err != nil {
		return api.Reply{}, err
	}
	var seen []*resource.Instance
	for _, i := range c.Directory.ResourcesByAccount.Get(c.Account()) {
		if matches(i) && may(instanceResource(c, i)) {
			seen = append(seen, i)
		}
	}
	page, next := api.Page(seen, cursor, cursor.Limit, func(i *resource.Instance) string { return api.SortKey(i.CreatedAt, i.GUID) })
	answer := struct {
		RowsCount int            `json:"rows_count"`
		NextURL   *string        `json:"next_url"` // null on the last page: "" makes the sample application loop
		Resources []instanceBody `json:"resources"`
	}{RowsCount: len(page), Resources: make([]instanceBody, len(page))}
	for n, i := range page {
		answer.Resources[n] = encodeInstance(c, i)
	}
	if next != nil {
		link := "/v2/resource_instances?" + url.Values{"start": {next.String()}}.Encode()
		answer.NextURL = &link
	}
	return api.Reply{Body: answer}, nil
}

// instanceCursor returns where the page begins. With start, all other
// parameters are ignored.
func instanceCursor(c *api.Call) (api.Cursor, error) {
	q := c.R.URL.Query()
	if start := q.Get("start"); start != "" {
		cursor, err := api.ParseCursor("start", start)
		if cursor.Limit < 1 || cursor.Limit > maxPage {
			cursor.Limit = maxPage
		}
		return cursor, err
	}
	limit, err := c.IntParameter("limit", maxPage, 1, maxPage)
	if err != nil {
		return api.Cursor{}, err
	}
	filters := url.Values{}
	for _, name := range []string{"guid", "name", "resource_group_id", "resource_id", "resource_plan_id", "type", "sub_type", "state", "updated_from", "updated_to"} {
		if q.Has(name) {
			filters.Set(name, q.Get(name))
		}
	}
	return api.Cursor{Limit: limit, Query: filters}, nil
}

func instanceFilter(q url.Values) (func(*resource.Instance) bool, error) {
	state := q.Get("state")
	if state != "" && !slices.Contains(instanceStates, state) {
		return nil, invalidParameter("state", state, "one of "+strings.Join(instanceStates, ", "))
	}
	var times [2]time.Time
	for n, name := range []string{"updated_from", "updated_to"} {
		s := q.Get(name)
		if s == "" {
			continue
		}
		t, err := time.Parse(time.RFC3339, s)
		if err != nil {
			return nil, invalidParameter(name, s, "a time such as 2026-01-08T00:00:00.000Z")
		}
		times[n] = t
	}
	is := func(name, value string) bool { return q.Get(name) == "" || q.Get(name) == value }
	return func(i *resource.Instance) bool {
		return is("guid", i.GUID) && is("name", i.Name) && is("resource_group_id", i.GroupID) && is("resource_id", i.Service) &&
			is("resource_plan_id", i.PlanID) && is("type", instanceType) && is("sub_type", "") && is("state", "active") &&
			!i.ModifiedAt.Before(times[0]) && (times[1].IsZero() || !i.ModifiedAt.After(times[1]))
	}, nil
}

type newInstance struct {
	Name       string          `json:"name"`
	Target     string          `json:"target"`
	GroupID    string          `json:"resource_group"`
	PlanID     string          `json:"resource_plan_id"`
	Tags       []string        `json:"tags"`
	Parameters json.RawMessage `json:"parameters"`
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
	if strings.EqualFold(c.R.Header.Get("Entity-Lock"), "true") {
		return api.Invalid("Instances cannot be locked on this server; leave the Entity-Lock header out.").OnHeader("Entity-Lock")
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
	c.Directory.Resources.Put(tx, i)
	return api.Reply{
		Status: 201, Body: encodeInstance(c, i), ETag: i.Tag(i.GUID),
		ResponseData: map[string]any{"service": i.Service, "resource_plan_id": i.PlanID, "resource_group_id": i.GroupID, "region_id": i.Target},
	}, instanceTarget(c, i), nil
}

// loadInstance finds an instance by GUID or CRN.
func loadInstance(c *api.Call) (*resource.Instance, api.Target, error) {
	id := c.R.PathValue("id")
	guid := id
	asked, notCRN := crn.Parse(id)
	if notCRN == nil {
		guid = asked.Instance
	}
	i, ok := c.Directory.Resources.Get(guid)
	if !ok || i.AccountID != c.Account() {
		return nil, api.Target{}, api.NotFound("resource instance", id)
	}
	if notCRN == nil {
		// The whole CRN counts: one that names another account or service
		// denotes another instance, though its GUID is known.
		if own, err := crn.Parse(i.CRN); err != nil || !own.Same(asked) {
			return nil, api.Target{}, api.NotFound("resource instance", id)
		}
	}
	return i, instanceTarget(c, i), nil
}

func loadInstanceFor[B any](c *api.Call, _ *B) (*resource.Instance, api.Target, error) {
	return loadInstance(c)
}

func showInstance(c *api.Call, i *resource.Instance) (api.Reply, error) {
	return api.Reply{Body: encodeInstance(c, i), ETag: i.Tag(i.GUID)}, nil
}

type instancePatch struct {
	Name       *string         `json:"name"`
	Parameters json.RawMessage `json:"parameters"`
	PlanID     *string         `json:"resource_plan_id"`
}

func updateInstance(c *api.Call, tx *directory.Tx, b *instancePatch, old *resource.Instance) (api.Reply, api.Target, error) {
	target := instanceTarget(c, old)
	if err := c.IfMatch(&old.Meta, old.GUID, false); err != nil {
		return api.Reply{}, target, err
	}
	if b.PlanID != nil && *b.PlanID != old.PlanID {
		return api.Reply{}, target, api.Invalid("The plan of an instance cannot be changed.").On("resource_plan_id")
	}
	i := *old
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
	c.Directory.Resources.Put(tx, &i)
	return api.Reply{Body: encodeInstance(c, &i), ETag: i.Tag(i.GUID), ResponseData: data}, instanceTarget(c, &i), nil
}

func deleteInstance(c *api.Call, tx *directory.Tx, _ *api.None, i *resource.Instance) (api.Reply, api.Target, error) {
	target := instanceTarget(c, i)
	if err := c.IfMatch(&i.Meta, i.GUID, false); err != nil {
		return api.Reply{}, target, err
	}
	c.Directory.Resources.Delete(tx, i)
	return api.Reply{Status: 204, ResponseData: map[string]any{"service": i.Service}}, target, nil
}
