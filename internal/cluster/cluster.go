// Package cluster holds registered Kubernetes clusters and hypervisor hosts:
// the parties whose signatures attest is told to believe, and about whose own
// workloads only (promise 5).
package cluster

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"regexp"
	"strings"
	"time"
	"unicode"

	"tabard.dev/tabard/internal/identity"
	"tabard.dev/tabard/internal/object"
)

// DefaultAudience is what a service-account token must be made for.
const DefaultAudience = "iam"

// Cluster is a Kubernetes cluster whose service-account tokens count as
// evidence in one account.
type Cluster struct {
	object.Meta
	ID              string          `json:"id"` // 20 lower-case letters and digits
	CRN             string          `json:"crn"`
	AccountID       string          `json:"account_id"`
	Name            string          `json:"name"` // unique in the account
	Type            identity.CRType `json:"type"` // IKS_SA or ROKS_SA
	Location        string          `json:"location"`
	ResourceGroupID string          `json:"resource_group_id"`
	Issuer          string          `json:"issuer"` // exactly the iss of its tokens
	Audience        string          `json:"audience"`

	// Keys come from JWKS when it is given, else from the cluster's API server
	// when that is given, else from the issuer's discovery document, whose server
	// certificate CA vouches for when it is given.
	JWKS   json.RawMessage `json:"jwks,omitempty"`
	CA     string          `json:"ca,omitempty"` // PEM
	Server *APIServer      `json:"server,omitempty"`

	// Review has the cluster's API server asked about each token, by
	// TokenReview, so that those of deleted pods and service accounts are
	// refused. It needs Server.
	Review bool `json:"review,omitempty"`

	GroupIDs []string `json:"group_ids,omitempty"` // of the cluster groups it is in, sorted
}

// APIServer is how a cluster's API server is reached. Its URL is often another
// than the issuer.
type APIServer struct {
	URL    string `json:"url"`              // https://host:port, perhaps with a path, as [ServerURL] writes it
	CA     string `json:"ca,omitempty"`     // PEM; the system's authorities when empty
	Sealed []byte `json:"sealed,omitempty"` // bearer token, see token.Sealer and SealLabel
}

// SealLabel ties a cluster's sealed bearer token to the cluster and to the
// address that the token is sent to.
func (c *Cluster) SealLabel() string {
	if c.Server == nil {
		return ""
	}
	return "API server " + c.Server.URL + " of cluster " + c.ID
}

// Validate checks what a caller gave.
func (c *Cluster) Validate() error {
	if c.Name == "" || len(c.Name) > 100 {
		return errors.New("name must have 1 to 100 characters")
	}
	if strings.ContainsRune(c.Name, ':') || strings.ContainsFunc(c.Name, unicode.IsControl) {
		return errors.New("name must not contain colons or control characters")
	}
	if c.Type != identity.IKSSA && c.Type != identity.ROKSSA {
		return fmt.Errorf("type must be %s or %s", identity.IKSSA, identity.ROKSSA)
	}
	if c.Issuer == "" {
		return errors.New("issuer is required: the iss claim of the cluster's service-account tokens")
	}
	if len(c.Audience) == 0 || len(c.Audience) > 256 {
		return errors.New("audience must have 1 to 256 characters")
	}
	if c.Server != nil {
		if err := ValidServerURL(c.Server.URL); err != nil {
			return err
		}
	}
	if c.Review && c.Server == nil {
		return errors.New("review needs server: the API server that is to be asked about tokens")
	}
	if len(c.JWKS) > 0 || c.Server != nil {
		return nil
	}
	return ValidFetchURL(c.Issuer)
}

// ValidServerURL reports why a URL is not an API server's.
func ValidServerURL(raw string) error {
	_, err := ServerURL(raw)
	return err
}

// maxServerURL bounds an API server's URL, in bytes.
const maxServerURL = 1024

// serverPath is what may stand before /api in an API server's URL, where a
// gateway serves several of them. What could be written in two ways, or leads
// upwards, is not among it.
var serverPath = regexp.MustCompile(`^(/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)*$`)

// ServerURL returns an API server's URL in one spelling, so that one server does
// not have two names: the host in small letters, without the default port and
// without a / at the end. A credential is sent there, so only https will do.
func ServerURL(raw string) (string, error) {
	u, err := url.Parse(raw)
	if err != nil || len(raw) > maxServerURL || u.Scheme != "https" || u.Hostname() == "" || u.Opaque != "" || u.User != nil ||
		strings.ContainsAny(raw, "?#") || strings.ContainsFunc(u.Host, func(r rune) bool { return unicode.IsControl(r) || unicode.IsSpace(r) }) {
		return "", fmt.Errorf("server %q must be a URL such as https://10.0.0.1:6443", clip(raw))
	}
	path := strings.TrimSuffix(u.Path, "/")
	if u.RawPath != "" || !serverPath.MatchString(path) {
		return "", fmt.Errorf("server %q must have a path of letters, digits and - _ . ~ only, such as https://gateway.example.com/k8s/clusters/c-1, or none", clip(raw))
	}
	host := strings.ToLower(u.Hostname())
	if strings.Contains(host, ":") {
		host = "[" + host + "]"
	}
	if port := u.Port(); port != "" && port != "443" {
		host += ":" + port
	}
	return "https://" + host + path, nil
}

// name is an API server's URL in one spelling, whatever was registered.
func (s *APIServer) name() string {
	if u, err := ServerURL(s.URL); err == nil {
		return u
	}
	return s.URL
}

// ValidFetchURL reports why a URL may not be fetched: keys are only believed
// over TLS, except from the machine itself.
func ValidFetchURL(raw string) error {
	u, err := url.Parse(raw)
	if err != nil || u.Host == "" || u.User != nil || u.Fragment != "" {
		return fmt.Errorf("issuer %q is not a URL; register the keys themselves with jwks", raw)
	}
	switch u.Scheme {
	case "https":
		return nil
	case "http":
		host := u.Hostname()
		ip, err := netip.ParseAddr(host)
		if host == "localhost" || err == nil && ip.IsLoopback() {
			return nil
		}
	}
	return fmt.Errorf("issuer %q must be an https URL (http only on loopback)", raw)
}

// Host is a machine that runs instances and signs for them. The key set is
// public; the private half stays with the host.
type Host struct {
	object.Meta
	ID      string          `json:"id"` // host-<uuid>, or "local" for the server's own machine
	Name    string          `json:"name"`
	Zone    string          `json:"zone,omitempty"` // "" takes instances of every zone
	JWKS    json.RawMessage `json:"jwks"`
	Revoked bool            `json:"revoked,omitempty"` // it signs for nobody any more

	// Address is where other hosts reach it, so that VPCs span hosts; as it has
	// said when it was there last. Invalid means that they do not reach it.
	Address netip.Addr `json:"address,omitzero"`
}

// ValidAddress reports why hosts cannot reach each other at an address.
func ValidAddress(a netip.Addr) error {
	if !a.Is4() || a.IsLoopback() || a.IsUnspecified() || a.IsMulticast() || a == netip.AddrFrom4([4]byte{255, 255, 255, 255}) {
		return fmt.Errorf("%s is not an IPv4 address at which other hosts reach this one", a)
	}
	return nil
}

// HostCursor remembers which of a host's events stand in the activity log, so
// that none is recorded twice.
type HostCursor struct {
	object.Meta
	HostID   string `json:"host_id"`
	Outbox   string `json:"outbox"`   // id of what the events come out of
	Recorded int64  `json:"recorded"` // number of the last one in it
}

// JoinToken lets one host join, once.
type JoinToken struct {
	object.Meta
	ID      string    `json:"id"`
	Hash    string    `json:"hash"`
	Name    string    `json:"name"`              // that the host is to have
	Zone    string    `json:"zone,omitempty"`    // that it is in
	HostID  string    `json:"host_id,omitempty"` // of the host that joins again, with a new key
	Expires time.Time `json:"expires"`
	UsedBy  string    `json:"used_by,omitempty"` // id of the host that has joined with it
}

// LocalHost is the id of the machine that the server itself runs instances on.
const LocalHost = "local"

// MaxJoinTokenLife bounds the time in which a host has to join.
const MaxJoinTokenLife = time.Hour

// KeyIDs returns the ids of the host's keys.
func (h *Host) KeyIDs() []string { return keyIDs(h.JWKS) }

// Claims returns what no two clusters of one account may share, so that a token
// can come from one of them only: the issuer with each of the uploaded keys,
// with the API server that the keys come from, or alone. Many clusters are set
// up with the same issuer. That of a cluster whose keys come from the issuer
// itself is free for no other cluster of the account, which whoever registers
// clusters must see to: it does not follow from these.
func (c *Cluster) Claims() []string {
	var ids []string
	switch {
	case len(c.JWKS) > 0:
		for _, id := range keyIDs(c.JWKS) {
			ids = append(ids, "key "+id)
		}
	case c.Server != nil:
		ids = []string{"server " + c.Server.name()}
	default:
		ids = []string{""}
	}
	claims := make([]string, len(ids))
	for i, id := range ids {
		claims[i] = c.Issuer + "\x00" + id
	}
	return claims
}

func keyIDs(jwks []byte) []string {
	var set struct {
		Keys []struct {
			KeyID string `json:"kid"`
		} `json:"keys"`
	}
	if json.Unmarshal(jwks, &set) != nil {
		return nil // whoever has no readable keys signs nothing
	}
	ids := make([]string, len(set.Keys))
	for i, k := range set.Keys {
		ids[i] = k.KeyID
	}
	return ids
}
