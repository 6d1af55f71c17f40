package clusters

import (
	"strings"

	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/cluster"
)

// serverInput is an API server in a body. In a change, what is absent stays as
// it is.
type serverInput struct {
	URL   *string `json:"url"`
	CA    *string `json:"ca"`    // "" is the system's authorities
	Token *string `json:"token"` // "" is none
}

// setServer applies a body's API server to a cluster. A token that is there goes
// on counting only while the address and the authorities that vouch for it stay:
// else whoever may change a registration could have the token sent to himself.
func (h family) setServer(k *cluster.Cluster, in *serverInput) error {
	var old cluster.APIServer
	if k.Server != nil {
		old = *k.Server
	}
	next := old
	if in.URL != nil || k.Server == nil {
		if in.URL == nil {
			return api.Invalid("The field server.url is required: the address of the cluster's API server.").On("server.url")
		}
		var err error
		if next.URL, err = serverURL(*in.URL); err != nil {
			return err
		}
	}
	if in.CA != nil {
		var err error
		if next.CA, err = certificates("server.ca", *in.CA); err != nil {
			return err
		}
	}
	k.Server = &next
	if in.Token != nil {
		next.Sealed = nil
		if *in.Token == "" {
			return nil
		}
		if len(*in.Token) > maxToken || strings.ContainsFunc(*in.Token, func(r rune) bool { return r <= ' ' || r > '~' }) {
			return api.Invalid("The field server.token must be a bearer token of at most %d bytes, without spaces and line ends.", maxToken).On("server.token")
		}
		next.Sealed = h.Sealer.Seal([]byte(*in.Token), k.SealLabel())
		return nil
	}
	if len(old.Sealed) > 0 && (next.URL != old.URL || next.CA != old.CA) {
		return api.Invalid("The server's url or ca changes, so give server.token again: the one that is there is not sent to another place ('--reviewer-token' or '--token-review' of 'tabard ks cluster-update').").On("server.token")
	}
	return nil
}

// serverURL checks an API server's address and writes it in one form.
func serverURL(raw string) (string, error) {
	u, err := cluster.ServerURL(raw)
	if err != nil {
		return "", api.Invalid("The field server.url must be the https URL of an API server: https://cluster.example:6443, or https://gateway.example/k8s/clusters/c-1 where a gateway serves it under a path.").On("server.url")
	}
	return u, nil
}
