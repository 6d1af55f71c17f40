// Package resourcecontroller is the API of Resource Manager and Resource
// Controller: resource groups, the service instances in them, the keys and
// reclamations of these, and the plans that instances are made with
// (reference/access-and-audit.md section 5). Instances exist here as names that
// policies, keys and lists are about; running a service is not this server's
// work. Resource aliases and bindings belong to Cloud Foundry: there are none.
package resourcecontroller

import (
	"net/http"
	"time"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/grant"
	"tabard.dev/tabard/internal/token"
)

// service is the name under which policies speak of resource groups.
const service = "resource-controller"

// routes is what the handlers work with.
type routes struct {
	*api.Family
	sealer *token.Sealer // of the API keys in credentials
}

// Register adds the family's routes.
func Register(mux *http.ServeMux, cfg *api.Config, sealer *token.Sealer) {
	r := &routes{&api.Family{Config: cfg, Mux: mux, Service: "Resource Controller", Shape: shape}, sealer}
	r.registerGroups()
	r.registerInstances()
	r.registerKeys()
	r.registerReclamations()
	r.registerAliases()
	api.Open(r.Family, "GET /v2/resource_plans", "the services of an account are known to everybody in it", listPlans)
}

// Codes of faults whose status is not the one of their kind.
const (
	codeLocked        = "locked"
	codePending       = "pending_reclamation"
	codeNotCancelable = "not_cancelable"
	codeGone          = "gone"
)

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

// registerAliases answers what clients ask about aliases and bindings. An
// instance's lists of them exist, because its links lead there, and are empty.
func (r *routes) registerAliases() {
	none := func(*api.Call) (api.Reply, error) {
		return api.Reply{}, fault.New(fault.NotFound, "not_found", "Resource aliases and bindings are Cloud Foundry's; this server has none.")
	}
	for _, pattern := range []string{
		"GET /v2/resource_aliases", "POST /v2/resource_aliases", "GET /v2/resource_aliases/{id}", "PATCH /v2/resource_aliases/{id}",
		"DELETE /v2/resource_aliases/{id}", "GET /v2/resource_aliases/{id}/resource_bindings",
		"GET /v2/resource_bindings", "POST /v2/resource_bindings", "GET /v2/resource_bindings/{id}", "PATCH /v2/resource_bindings/{id}",
		"DELETE /v2/resource_bindings/{id}",
	} {
		api.Open(r.Family, pattern, "everybody gets the same answer: there are none", none)
	}
	api.Read(r.Family, "GET /v2/resource_instances/{id}/resource_aliases", instanceRetrieve, r.loadInstance, emptyList)
	api.Read(r.Family, "GET /v2/resource_instances/{id}/resource_bindings", instanceRetrieve, r.loadInstance, emptyList)
}

func emptyList[T any](*api.Call, T) (api.Reply, error) {
	return api.Reply{Body: pageBody[struct{}]{Resources: []struct{}{}}}, nil
}

// loading makes a route's loader of one that needs no body.
func loading[B, T any](load func(*api.Call) (T, api.Target, error)) func(*api.Call, *B) (T, api.Target, error) {
	return func(c *api.Call, _ *B) (T, api.Target, error) { return load(c) }
}

// stamp is a time in the format of both services: UTC, with milliseconds.
func stamp(t time.Time) string { return t.UTC().Format("2006-01-02T15:04:05.000Z") }

// stampIfAny is null for what has not happened.
func stampIfAny(t time.Time) *string {
	if t.IsZero() {
		return nil
	}
	s := stamp(t)
	return &s
}
