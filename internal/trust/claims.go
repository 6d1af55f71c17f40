package trust

import "tabard.dev/tabard/internal/identity"

// ClaimsOf returns the claims that rules about a type of compute resource can
// compare, in the order in which they are shown
// (reference/iam-identity.md section 6.3). Not every resource of the type has
// all of them. It is nil for [identity.OIDC], where the registration of the
// issuer decides.
func ClaimsOf(t identity.CRType) []string {
	switch t {
	case identity.IKSSA, identity.ROKSSA:
		return []string{
			"crn", "service_instance", "location", "resource_group_id", "resource_group_name", "cluster_group",
			"namespace", "name", "pod", "pod_uid", "node",
		}
	case identity.VSI, identity.BMS:
		return []string{
			"crn", "resource", "region", "zone", "vpc_id", "subnet_id", "resource_group_id", "resource_group_name", "instance_group_name",
		}
	case identity.PVS:
		return []string{
			"workspaces.name", "workspaces.crn", "subnets.name", "subnets.crn", "iaas.crn", "iaas.name", "iaas.account_id",
			"iaas.zone", "iaas.region", "iaas.resource_group_id",
		}
	case identity.CE:
		return []string{"crn", "service_instance", "location", "resource_group_id", "component_type", "component_name"}
	}
	return nil
}
