package resourcecontroller

import "tabard.dev/tabard/internal/api"

// defaultQuota is the quota definition that every group has. Nothing here is
// metered, so it is the only one; clients need its link to lead somewhere
// (reference/access-and-audit.md section 5.3).
const defaultQuota = "7ce89f4a4c0b4a1c8f5b2f0d6e3a9b10"

// unlimited is how the wire says that there is no limit.
const unlimited = -1

var quotas = []quotaBody{{
	ID: defaultQuota, Name: "Unlimited", Type: "UNLIMITED", Apps: unlimited, ServiceInstances: unlimited, InstancesPerLite: unlimited,
	InstancesPerApp: unlimited, InstanceMemory: "0", TotalInstanceMemory: "0", VSILimit: unlimited,
	ResourceQuotas: []string{}, CreatedAt: "2024-01-01T00:00:00.000Z", UpdatedAt: "2024-01-01T00:00:00.000Z",
}}

type quotaBody struct {
	ID                  string   `json:"id"`
	Name                string   `json:"name"`
	Type                string   `json:"type"`
	Apps                int      `json:"number_of_apps"`
	ServiceInstances    int      `json:"number_of_service_instances"`
	InstancesPerLite    int      `json:"default_number_of_instances_per_lite_plan"`
	InstancesPerApp     int      `json:"instances_per_app"`
	InstanceMemory      string   `json:"instance_memory"`
	TotalInstanceMemory string   `json:"total_app_memory"`
	VSILimit            int      `json:"vsi_limit"`
	ResourceQuotas      []string `json:"resource_quotas"`
	CreatedAt           string   `json:"created_at"`
	UpdatedAt           string   `json:"updated_at"`
}

func listQuotas(*api.Call) (api.Reply, error) {
	return api.Reply{Body: map[string]any{"resources": quotas}}, nil
}

func showQuota(c *api.Call) (api.Reply, error) {
	id := c.R.PathValue("id")
	for _, q := range quotas {
		if q.ID == id {
			return api.Reply{Body: q}, nil
		}
	}
	return api.Reply{}, api.NotFound("quota definition", id)
}
