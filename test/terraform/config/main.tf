# What the end-to-end test applies, plans again and destroys with the published
# provider: every resource that works against this server, each once with the
# least and where it matters once with the most that it can say.

terraform {
  required_providers {
    ibm = { source = "IBM-Cloud/ibm" }
  }
}

variable "suffix" { type = string }
variable "account_id" { type = string }
variable "description" { default = "first" }

provider "ibm" {}

resource "ibm_resource_group" "group" {
  name = "tf-${var.suffix}"
}

resource "ibm_iam_trusted_profile" "profile" {
  name        = "tf profile ${var.suffix}"
  description = var.description
}

resource "ibm_iam_trusted_profile" "second" {
  name = "tf second profile"
}

resource "ibm_iam_trusted_profile_claim_rule" "jobs" {
  profile_id = ibm_iam_trusted_profile.profile.id
  type       = "Profile-CR"
  name       = "jobs ${var.suffix}"
  cr_type    = "IKS_SA"
  conditions {
    claim    = "namespace"
    operator = "EQUALS"
    value    = "\"batch\""
  }
}

resource "ibm_iam_trusted_profile_claim_rule" "directory" {
  profile_id = ibm_iam_trusted_profile.profile.id
  type       = "Profile-SAML"
  name       = "directory"
  realm_name = "https://idp.example.com/saml"
  expiration = 43200
  conditions {
    claim    = "groups"
    operator = "CONTAINS"
    value    = "\"admins\""
  }
}

resource "ibm_iam_trusted_profile_link" "pod" {
  profile_id = ibm_iam_trusted_profile.profile.id
  cr_type    = "IKS_SA"
  name       = "web"
  link {
    crn       = "crn:v1:bluemix:public:containers-kubernetes:us-south:a/${var.account_id}:tf::"
    namespace = "shop"
    name      = "web"
  }
}

resource "ibm_iam_service_id" "ci" {
  name        = "tf ci ${var.suffix}"
  description = var.description
}

resource "ibm_iam_service_api_key" "key" {
  name           = "tf key ${var.suffix}"
  iam_service_id = ibm_iam_service_id.ci.iam_id
  description    = var.description
}

resource "ibm_iam_trusted_profile_identity" "ci" {
  profile_id    = ibm_iam_trusted_profile.profile.id
  identifier    = ibm_iam_service_id.ci.id
  identity_type = "serviceid"
  type          = "serviceid"
  description   = "pipeline"
}

# Nothing here changes: the provider's update sends no identities at all.
resource "ibm_iam_trusted_profile_identities" "all" {
  profile_id = ibm_iam_trusted_profile.second.id
  identities {
    iam_id      = ibm_iam_service_id.ci.iam_id
    identifier  = ibm_iam_service_id.ci.id
    type        = "serviceid"
    description = "pipeline"
  }
}

resource "ibm_iam_trusted_profile_policy" "service" {
  profile_id  = ibm_iam_trusted_profile.profile.id
  roles       = var.description == "first" ? ["Operator"] : ["Operator", "Viewer"]
  description = var.description
  resources {
    service = "is"
  }
}

resource "ibm_iam_trusted_profile_policy" "all" {
  profile_id = ibm_iam_trusted_profile.second.id
  roles      = ["Viewer", "Reader"]
}

resource "ibm_iam_trusted_profile_policy" "hours" {
  iam_id = ibm_iam_trusted_profile.second.iam_id
  roles  = ["Viewer"]
  resources {
    service = "kms"
  }
  rule_conditions {
    key      = "{{environment.attributes.day_of_week}}"
    operator = "dayOfWeekAnyOf"
    value    = ["1+00:00", "2+00:00", "3+00:00", "4+00:00", "5+00:00"]
  }
  rule_conditions {
    key      = "{{environment.attributes.current_time}}"
    operator = "timeGreaterThanOrEquals"
    value    = ["09:00:00+00:00"]
  }
  rule_conditions {
    key      = "{{environment.attributes.current_time}}"
    operator = "timeLessThanOrEquals"
    value    = ["17:00:00+00:00"]
  }
  rule_operator = "and"
  pattern       = "time-based-conditions:weekly:custom-hours"
}

resource "ibm_iam_custom_role" "rotator" {
  name         = "TfRotator"
  display_name = "Tf rotator ${var.suffix}"
  description  = var.description
  service      = "kms"
  actions      = ["kms.secrets.rotate"]
}

resource "ibm_iam_service_policy" "custom" {
  iam_service_id = ibm_iam_service_id.ci.id
  roles          = ["Viewer", ibm_iam_custom_role.rotator.display_name]
  resources {
    service           = "kms"
    resource_group_id = ibm_resource_group.group.id
  }
}

resource "ibm_iam_service_policy" "management" {
  iam_service_id     = ibm_iam_service_id.ci.id
  roles              = ["Viewer"]
  account_management = true
}

resource "ibm_iam_access_group" "team" {
  name        = "tf team ${var.suffix}"
  description = var.description
}

resource "ibm_iam_access_group_members" "team" {
  access_group_id = ibm_iam_access_group.team.id
  iam_service_ids = [ibm_iam_service_id.ci.id]
  iam_profile_ids = [ibm_iam_trusted_profile.profile.id]
}

# The provider's update sends no name, and it puts the quotes around values itself.
resource "ibm_iam_access_group_dynamic_rule" "managers" {
  name              = "managers"
  access_group_id   = ibm_iam_access_group.team.id
  expiration        = var.description == "first" ? 4 : 8
  identity_provider = "https://idp.example.com/saml"
  conditions {
    claim    = "isManager"
    operator = "EQUALS"
    value    = "true"
  }
}

resource "ibm_iam_access_group_policy" "group" {
  access_group_id = ibm_iam_access_group.team.id
  roles           = ["Viewer"]
  description     = var.description
  resources {
    resource_group_id = ibm_resource_group.group.id
  }
}

resource "ibm_iam_access_group_policy" "tags" {
  access_group_id = ibm_iam_access_group.team.id
  roles           = ["Editor"]
  resource_tags {
    name  = "env"
    value = "dev"
  }
}

output "profile_id" { value = ibm_iam_trusted_profile.profile.id }
output "apikey" {
  value     = ibm_iam_service_api_key.key.apikey
  sensitive = true
}
