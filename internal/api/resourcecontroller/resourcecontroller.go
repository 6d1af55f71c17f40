// Package resourcecontroller is the API of Resource Manager and Resource
// Controller: resource groups, the service instances in them, and the plans
// that instances are made with (reference/access-and-audit.md section 5).
// Instances exist here as names that policies and lists are about; running a
// service is not this server's work.
package resourcecontroller

import (
	"net/http"
	"time"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/grant"
)

// service is the name under which policies speak of resource groups.
const service = "resource-controller"

// Register adds the family's routes.
func Register(mux *http.ServeMux, cfg *api.Config) {
	f := &api.Family{Config: cfg, Mux: mux, Service: "Resource Controller", Shape: shape}

	api.List(f, "GET /v2/resource_groups", "resource-controller.group.retrieve", listGroups)
	api.Change(f, "POST /v2/resource_groups", "resource-controller.group.create", "resource-controller.group.create", loadNewGroup, createGroup)
	api.Read(f, "GET /v2/resource_groups/{id}", "resource-controller.group.retrieve", loadGroup, showGroup)
	api.Change(f, "PATCH /v2/resource_groups/{id}", "resource-controller.group.update", "resource-controller.group.update", loadGroupFor[groupPatch], updateGroup)
	api.Change(f, "DELETE /v2/resource_groups/{id}", "resource-controller.group.delete", "resource-controller.group.delete", loadGroupFor[api.None], deleteGroup)
	const constant = "quotas are the same constants for everybody"
	api.Open(f, "GET /v2/quota_definitions", constant, listQuotas)
	api.Open(f, "GET /v2/quota_definitions/{id}", constant, showQuota)

	api.List(f, "GET /v2/resource_instances", "resource-controller.instance.retrieve", listInstances)
	api.Change(f, "POST /v2/resource_instances", "resource-controller.instance.create", "resource-controller.instance.create", loadNewInstance, createInstance)
	api.Read(f, "GET /v2/resource_instances/{id}", "resource-controller.instance.retrieve", loadInstance, showInstance)
	api.Change(f, "PATCH /v2/resource_instances/{id}", "resource-controller.instance.update", "resource-controller.instance.update", loadInstanceFor[instancePatch], updateInstance)
	api.Change(f, "DELETE /v2/resource_instances/{id}", "resource-controller.instance.delete", "resource-controller.instance.delete", loadInstanceFor[api.None], deleteInstance)

	api.Open(f, "GET /v2/resource_plans", "the service catalog is the same for everybody", listPlans)
}

// errorBody carries both things that the published clients look for, message
// and errors: the services' own shape is not public
// (reference/access-and-audit.md sections 5.3 and 7).
type errorBody struct {
	Message       string       `json:"message"`
	StatusCode    int          `json:"status_code"`
	TransactionID string       `json:"transaction_id"`
	Errors        []errorEntry `json:"errors"`
}

type errorEntry struct {
	Code    string `json:"code"`
	Message string `json:"message"`
}

func shape(c *api.Call, f *fault.Error) (int, any) {
	status := grant.StatusOf(f.Kind)
	message := f.Message
	if f.Detail != "" {
		message += " " + f.Detail
	}
	return status, errorBody{
		Message: message, StatusCode: status, TransactionID: api.TransactionID(c.R.Context()),
		Errors: []errorEntry{{Code: f.Code, Message: message}},
	}
}

// listPlans is ours: it stands for the part of the global catalog that a
// client needs to turn a service and plan name into a plan id.
func listPlans(c *api.Call) (api.Reply, error) {
	plans := []*access.Plan{}
	for _, s := range c.Directory.Catalog(c.Account()).Services() {
		plans = append(plans, s.Plans...)
	}
	return api.Reply{Body: plans}, nil
}

// stamp is a time in the format of both services: UTC, with milliseconds.
func stamp(t time.Time) string { return t.UTC().Format("2006-01-02T15:04:05.000Z") }
