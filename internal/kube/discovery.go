package kube

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"
)

// Discovery is what an API server says about the tokens that its cluster issues.
type Discovery struct {
	Issuer  string          // as the discovery document has it; "" where that may not be read
	JWKS    json.RawMessage // nil where it may not be read
	KeyIDs  []string        // of the JWKS
	Version string          // of the API server, such as v1.35.3
	Refused error           // why Issuer and JWKS are not there; nil when they are

	// OpenShift says that the cluster has OpenShift's configuration, and
	// OpenShiftIssuer what its administrator set there, if anything.
	OpenShift       bool
	OpenShiftIssuer string
}

// openShift is the API group that each OpenShift cluster has and no other does.
const openShift = "config.openshift.io"

// Discover reads a cluster's issuer and keys through its API server, which works
// with rights that anonymous callers do not have. A cluster that keeps the two
// to itself is no error, see Refused.
func Discover(ctx context.Context, c *Client) (Discovery, error) {
	var d Discovery
	var version struct {
		Version string `json:"gitVersion"`
	}
	if err := c.Do(ctx, http.MethodGet, "/version", nil, &version); err != nil && !closed(err) {
		return d, err
	}
	d.Version = version.Version
	var groups struct {
		Groups []struct {
			Name string `json:"name"`
		} `json:"groups"`
	}
	if err := c.Do(ctx, http.MethodGet, "/apis", nil, &groups); err != nil && !closed(err) {
		return d, err
	}
	for _, g := range groups.Groups {
		d.OpenShift = d.OpenShift || g.Name == openShift
	}
	if d.OpenShift {
		var a struct {
			Spec struct {
				Issuer string `json:"serviceAccountIssuer"`
			} `json:"spec"`
		}
		if err := c.Do(ctx, http.MethodGet, "/apis/"+openShift+"/v1/authentications/cluster", nil, &a); err != nil && !closed(err) {
			return d, err
		}
		d.OpenShiftIssuer = a.Spec.Issuer
	}
	var doc struct {
		Issuer string `json:"issuer"`
	}
	err := c.Do(ctx, http.MethodGet, "/.well-known/openid-configuration", nil, &doc)
	if err == nil {
		var jwks []byte
		if err = c.Do(ctx, http.MethodGet, "/openid/v1/jwks", nil, &jwks); err == nil {
			d.Issuer, d.JWKS = doc.Issuer, jwks
			d.KeyIDs, err = keyIDs(jwks)
		}
	}
	if err != nil && !closed(err) {
		return d, err
	}
	d.Refused = err
	return d, nil
}

// closed reports whether an API server answered that there is nothing to see.
func closed(err error) bool {
	return Code(err) == http.StatusForbidden || Code(err) == http.StatusNotFound
}

func keyIDs(jwks []byte) ([]string, error) {
	var set struct {
		Keys []struct {
			ID string `json:"kid"`
		} `json:"keys"`
	}
	if err := json.Unmarshal(jwks, &set); err != nil {
		return nil, fmt.Errorf("the API server's /openid/v1/jwks is not a key set: %w", err)
	}
	if len(set.Keys) == 0 {
		return nil, errors.New("the API server's /openid/v1/jwks holds no keys")
	}
	ids := make([]string, len(set.Keys))
	for i, k := range set.Keys {
		ids[i] = k.ID
	}
	slices.Sort(ids)
	return ids, nil
}

// ServiceAccountToken is a token of a service account, and what it says of itself.
type ServiceAccountToken struct {
	Token   string
	Expires time.Time // as the API server says, which may give less than was asked for
	Issuer  string
	Subject string
	KeyID   string
}

// RequestToken makes a token of a service account, for the API server's own
// audience when that is empty.
func RequestToken(ctx context.Context, c *Client, namespace, account, audience string, life time.Duration) (ServiceAccountToken, error) {
	spec := map[string]any{"expirationSeconds": int(life.Seconds())}
	if audience != "" {
		spec["audiences"] = []string{audience}
	}
	in := map[string]any{"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
	var out struct {
		Status struct {
			Token   string    `json:"token"`
			Expires time.Time `json:"expirationTimestamp"`
		} `json:"status"`
	}
	path := "/api/v1/namespaces/" + url.PathEscape(namespace) + "/serviceaccounts/" + url.PathEscape(account) + "/token"
	if err := c.Do(ctx, http.MethodPost, path, in, &out); err != nil {
		return ServiceAccountToken{}, err
	}
	t := ServiceAccountToken{Token: out.Status.Token, Expires: out.Status.Expires}
	return t, t.read()
}

// read fills in what the token says of itself. Nothing is verified.
func (t *ServiceAccountToken) read() error {
	parts := strings.Split(t.Token, ".")
	if len(parts) != 3 {
		return errors.New("the token of the service account is not a JWT")
	}
	var header struct {
		KeyID string `json:"kid"`
	}
	var claims struct {
		Issuer  string `json:"iss"`
		Subject string `json:"sub"`
	}
	for i, into := range []any{&header, &claims} {
		b, err := base64.RawURLEncoding.DecodeString(parts[i])
		if err == nil {
			err = json.Unmarshal(b, into)
		}
		if err != nil {
			return fmt.Errorf("the token of the service account cannot be read: %w", err)
		}
	}
	t.KeyID, t.Issuer, t.Subject = header.KeyID, claims.Issuer, claims.Subject
	return nil
}
