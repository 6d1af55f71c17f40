package cli

import (
	"encoding/json"
	"regexp"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

var clusters = &kind{
	noun: "cluster", plural: "clusters", listed: "ks clusters", path: "/v1/clusters", array: "clusters", id: "id",
	form:    regexp.MustCompile(`^[0-9a-z]{20}$`),
	columns: columns("Name", "name", "ID", "id", "Type", "type", "Issuer", "issuer", "Audience", "audience", "Location", "location"),
	details: columns("Name", "name", "ID", "id", "CRN", "crn", "Type", "type", "Issuer", "issuer", "Audience", "audience",
		"Location", "location", "Keys", "keys", "Created", "created_at"),
}

func ksCommands() *cobra.Command {
	get := getCommand(clusters, "cluster-get (NAME|ID)", "tabard ks cluster-get my-cluster")
	get.Aliases = []string{"cluster"}
	return group("ks", "Register Kubernetes clusters",
		"The pods of a registered cluster can put on trusted profiles: their service-account tokens are believed.",
		"tabard ks clusters",
		clusterRegisterCommand(),
		listCommand(clusters, "clusters", "tabard ks clusters"),
		get,
		deleteCommand(clusters, "cluster-delete (NAME|ID)...", "delete", "tabard ks cluster-delete my-cluster -f", nil, nil),
	)
}

// defaultIssuer is what clusters are set up with when nobody says otherwise.
const defaultIssuer = "https://kubernetes.default.svc.cluster.local"

func clusterRegisterCommand() *cobra.Command {
	var issuer, caFile, jwksFile, audience, crType, location, group string
	c := spec{
		use: "cluster-register NAME (--issuer URL [--ca-file FILE] | --jwks FILE [--issuer ISSUER])", short: "Register a Kubernetes cluster", args: cobra.ExactArgs(1),
		more: "The issuer is the iss claim of the cluster's service-account tokens: kubectl get --raw\n" +
			"/.well-known/openid-configuration tells it. The server gets the cluster's keys from there. Where it cannot reach\n" +
			"the cluster, give it the keys: kubectl get --raw /openid/v1/jwks writes the file.",
		example: "tabard ks cluster-register my-cluster --issuer https://kubernetes.example.com:6443 --ca-file ca.crt\n" +
			"tabard ks cluster-register my-cluster --jwks jwks.json --issuer https://kubernetes.default.svc",
		flags: func(f *pflag.FlagSet) {
			f.StringVar(&issuer, "issuer", "", "`URL` of the tokens' issuer, exactly as in their iss claim")
			f.StringVar(&caFile, "ca-file", "", "PEM `FILE` of the CA of the issuer's server certificate")
			f.StringVar(&jwksFile, "jwks", "", "JSON `FILE` with the cluster's public keys")
			f.StringVar(&audience, "audience", "", "audience that tokens must be made for (default iam)")
			choice(f, &crType, "type", "", "type of compute resource that its pods are", "IKS_SA", "ROKS_SA")
			f.StringVar(&location, "location", "", "location in the cluster's CRN")
			f.StringVarP(&group, "group", "g", "", "resource group: name or ID")
			idFlag(f)
		},
		run: func(s *session, args []string) error {
			switch {
			case issuer == "" && jwksFile != "":
				issuer = defaultIssuer
				s.warn("--issuer was not given; taking %s, the default of kubeadm. Tokens with another iss claim will be refused.", issuer)
			case issuer == "":
				return Usage("give --issuer, and --jwks as well where the server cannot reach the cluster")
			}
			body := map[string]any{"name": args[0], "issuer": issuer}
			for k, v := range filled("audience", audience, "type", crType, "location", location) {
				body[k] = v
			}
			if caFile != "" {
				ca, err := readFile(caFile)
				if err != nil {
					return during(err, "read the CA")
				}
				body["ca"] = ca
			}
			if jwksFile != "" {
				text, err := readFile(jwksFile)
				if err != nil {
					return during(err, "read the keys")
				}
				var keys map[string]json.RawMessage
				if json.Unmarshal([]byte(text), &keys) != nil || keys["keys"] == nil {
					return Usage(`%s is not a JSON Web Key Set, an object with "keys"`, jwksFile)
				}
				body["jwks"] = json.RawMessage(text)
			}
			s.announce("Registering cluster %s", args[0])
			if group != "" {
				id, err := groups.find(s, group)
				if err != nil {
					return err
				}
				body["resource_group"] = id
			}
			return clusters.create(s, args[0], body)
		},
	}.command()
	c.MarkFlagsMutuallyExclusive("jwks", "ca-file")
	return c
}
