# What a pipeline with a profile of its own applies.

terraform {
  required_providers {
    ibm = { source = "IBM-Cloud/ibm" }
  }
}

provider "ibm" {}

resource "ibm_resource_group" "group" {
  name = "tf-assumed"
}

resource "ibm_iam_trusted_profile" "profile" {
  name = "tf assumed"
}
