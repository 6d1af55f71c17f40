package cli

import (
	"net/http"
	"regexp"

	"github.com/spf13/cobra"
)

var clusters = &kind{
	noun: "cluster", plural: "clusters", listed: "ks clusters", path: "/v1/clusters", array: "clusters", id: "id",
	form: regexp.MustCompile(`^[0-9a-z]{20}$`),
	columns: append(columns("Name", "name", "ID", "id", "Type", "type", "Issuer", "issuer", "Audience", "audience", "Location", "location",
		"Keys from", "keys_from"), column{title: "Review", of: affirmed("review")}, column{title: "Groups", path: "groups.name"}),
	details: append(columns("Name", "name", "ID", "id", "CRN", "crn", "Type", "type", "Issuer", "issuer", "Audience", "audience",
		"Location", "location", "Resource group ID", "resource_group_id", "Groups", "groups.name"),
		column{title: "Keys from", of: keysFrom}, column{title: "Keys", path: "keys"}, column{title: "Key IDs", path: "key_ids"}, column{title: "API server", path: "server.url"},
		column{title: "Token review", of: reviewed}, column{title: "Created", path: "created_at"}),
}

// Where a cluster's keys come from, as the API calls it.
const (
	keysUploaded = "uploaded"
	keysServer   = "server"
	keysIssuer   = "issuer"
)

// keysFrom says where a cluster's keys come from and what that means when it
// gets new ones.
func keysFrom(o object) string {
	switch from := o.text("keys_from"); from {
	case keysUploaded:
		return "uploaded; after the cluster has changed its keys run: tabard ks cluster-update " + o.text("name") + " --rotate-keys --kubeconfig FILE"
	case keysServer:
		return "the API server; new keys are noticed"
	case keysIssuer:
		return "the issuer; new keys are noticed"
	default:
		return from
	}
}

// affirmed shows a truth value as people say it.
func affirmed(path string) func(object) string {
	return func(o object) string { return map[bool]string{true: "yes", false: "no"}[o.text(path) == "true"] }
}

func reviewed(o object) string {
	if o.text("review") == "true" {
		return "yes; tokens of deleted pods and service accounts are refused"
	}
	return "no; tokens of deleted pods and service accounts count until they end"
}

var clusterGroups = &kind{
	noun: "cluster group", plural: "cluster groups", listed: "ks cluster-groups", path: "/v1/cluster_groups", array: "cluster_groups", id: "id",
	form:    prefixed("ClusterGroup-"),
	columns: columns("Name", "name", "ID", "id", "Description", "description", "Clusters", "cluster_count"),
	details: columns("Name", "name", "ID", "id", "CRN", "crn", "Description", "description", "Clusters", "clusters.name", "Created", "created_at"),
}

func ksCommands() *cobra.Command {
	get := getCommand(clusters, "cluster-get (NAME|ID)", "tabard ks cluster-get my-cluster")
	get.Aliases = []string{"cluster"}
	del := deleteCommand(clusters, "cluster-delete (NAME|ID)...", "delete", "tabard ks cluster-delete my-cluster -f", nil, nil)
	del.Long += "\n\nIts tokens count no more, at once. What --token-review made in the cluster itself stays there:\n" +
		"  kubectl delete namespace " + reviewerNamespace + "\n" +
		"  kubectl delete clusterrolebinding,clusterrole " + reviewerAccount
	c := group("ks", "Register Kubernetes clusters",
		"The pods of a registered cluster can put on trusted profiles: their service-account tokens are believed.\n"+
			"A rule can name a group of clusters, so that one rule covers a fleet.",
		"tabard ks clusters",
		clusterRegisterCommand(),
		clusterUpdateCommand(),
		listCommand(clusters, "clusters", "tabard ks clusters"),
		get, del,
	)
	c.AddCommand(clusterGroupCommands()...)
	return c
}

func clusterGroupCommands() []*cobra.Command {
	get := getCommand(clusterGroups, "cluster-group-get (NAME|ID)", "tabard ks cluster-group-get production")
	get.Aliases = []string{"cluster-group"}
	return []*cobra.Command{
		createCommand(clusterGroups, "cluster-group-create NAME", `tabard ks cluster-group-create production --description "Where customers are"`,
			"A rule names it as the claim cluster_group: --conditions claim:cluster_group,operator:CONTAINS,value:production.", description, false),
		listCommand(clusterGroups, "cluster-groups", "tabard ks cluster-groups"),
		get,
		inAccount(clusterGroups, "ks", "cluster-group", "production").update(change{
			method: http.MethodPatch, options: text(field{"description", "d", "description", "new description; an empty one clears it"}),
			example: `--description "Where customers are"`, more: "Its name stays: rules name groups by it.",
		}),
		deleteCommand(clusterGroups, "cluster-group-delete (NAME|ID)...", "delete", "tabard ks cluster-group-delete production -f", nil, nil),
		clusterGroupMemberCommand("add", http.MethodPut, "Put clusters into a cluster group", "The rules that name the group count for their pods at once.",
			"added to"),
		clusterGroupMemberCommand("remove", http.MethodDelete, "Take clusters out of a cluster group", "The rules that name the group count for their pods no more.",
			"removed from"),
	}
}

// clusterGroupMemberCommand changes which clusters are in a group.
func clusterGroupMemberCommand(verb, method, short, more, done string) *cobra.Command {
	return spec{
		use: "cluster-group-" + verb + " GROUP CLUSTER...", short: short, more: more + "\n\nGroup and clusters are named by name or ID.",
		example: "tabard ks cluster-group-" + verb + " production my-cluster other-cluster",
		args:    cobra.MinimumNArgs(2),
		run: func(s *session, args []string) error {
			group, err := clusterGroups.find(s, args[0])
			if err != nil {
				return err
			}
			ids := make([]string, len(args)-1)
			for i, ref := range args[1:] {
				if ids[i], err = clusters.find(s, ref); err != nil {
					return err
				}
			}
			for i, id := range ids {
				s.announce("Changing cluster group %s", args[0])
				if _, err := s.send(request{method: method, path: clusterGroups.at(group, "clusters", id)}); err != nil {
					return during(err, verb+" cluster "+args[i+1])
				}
				s.ok("Cluster %s was %s cluster group %s.", args[i+1], done, args[0])
			}
			return nil
		},
	}.command()
}
