package activityapi

import (
	"context"
	"net/http"

	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/export"
)

// Exports are the routes on which events leave for other systems.
type Exports interface {
	Status(ctx context.Context) ([]export.Status, error)
}

// RegisterExports adds the route that shows how the exports do. They send the
// events of all accounts, so that they are the operator's affair.
func RegisterExports(mux *http.ServeMux, cfg *api.Config, exports Exports) {
	f := &api.Family{Config: cfg, Mux: mux, Service: "Activity Log", Shape: api.PlainShape}
	api.Read(f, "GET /v1/events/routes", actionLog, loadOperator, func(c *api.Call, _ struct{}) (api.Reply, error) {
		routes, err := exports.Status(c.R.Context())
		if err != nil {
			return api.Reply{}, err
		}
		return api.Reply{Body: map[string]any{"routes": routes}}, nil
	})
}
