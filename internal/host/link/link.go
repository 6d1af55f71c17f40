// Package link is what a host agent and the server say to each other: the
// messages of the stream of placements, reports, exchanges and events, and how
// a fault crosses the wire whole. It is ours; the reference has no counterpart.
package link

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/netip"
	"time"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/vpc"
)

// Paths of the server's routes for agents.
const (
	PathJoin     = "/v1/agent/join"
	PathStream   = "/v1/agent/stream"
	PathReports  = "/v1/agent/reports"
	PathEvents   = "/v1/agent/events"
	PathExchange = "/v1/agent/iam_tokens"
	PathFound    = "/v1/agent/machines"
	PathImages   = "/v1/agent/images/" // and the image's id
)

// Fingerprint binds a proof to a join token without showing it.
func Fingerprint(joinToken string) string {
	sum := sha256.Sum256([]byte(joinToken))
	return base64.RawURLEncoding.EncodeToString(sum[:])
}

// JoinRequest is what an agent joins with: the token, the public key that it
// has made, and the proof that it holds the private one.
type JoinRequest struct {
	Token string          `json:"join_token"`
	Key   json.RawMessage `json:"jwk"`
	Proof string          `json:"proof"`
}

// JoinAnswer tells the host who it is.
type JoinAnswer struct {
	ID    string `json:"id"`
	Name  string `json:"name"`
	KeyID string `json:"kid"` // for the header of all that it signs
	Hello
}

// Hello is what a host needs to know of the installation.
type Hello struct {
	Region string `json:"region"`
	CName  string `json:"cname"`
	CType  string `json:"ctype"`
	Zone   string `json:"zone,omitempty"`
	Recorded
}

// Capacity is what a host offers. It stands in the query of the stream.
type Capacity struct {
	Drivers   []string `json:"drivers"`
	VCPUs     int      `json:"vcpus"`
	MemoryMiB int      `json:"memory_mib"`
	DiskMiB   int      `json:"disk_mib,omitempty"` // for the disks of machines; 0 means that it is not counted
	Version   string   `json:"version"`

	// Address is where other hosts reach this one, so that VPCs span hosts. It is
	// of IPv4; invalid means that they do not.
	Address netip.Addr `json:"address,omitzero"`

	// IdentityCA is the certificate, in PEM, under which the host's instances
	// get identity certificates, for those who check them.
	IdentityCA string `json:"identity_ca,omitempty"`
}

// Message is one line of the stream. A new stream begins with Hello, goes on
// with every placement of the host and then says Synced: what the host knows
// of and did not hear is not placed on it any more. From then on come changes,
// and a Ping where there are none.
type Message struct {
	Hello     *Hello         `json:"hello,omitempty"`
	Placement *vpc.Placement `json:"placement,omitempty"`
	Gone      string         `json:"gone,omitempty"` // id of an instance that is not placed here any more
	Synced    bool           `json:"synced,omitempty"`
	Ping      bool           `json:"ping,omitempty"`
}

// PingEvery is the longest silence of a stream. A host that hears nothing for
// three times as long takes the server for gone.
const PingEvery = 5 * time.Second

// MaxMessage bounds one line of the stream, in bytes: a placement with the
// largest user data and many keys and rules.
const MaxMessage = 4 << 20

// Exchange asks for an access token in the name of an instance.
type Exchange struct {
	Instance    string          `json:"instance"`
	Token       string          `json:"token"` // the identity token that the host has signed
	ProfileID   string          `json:"profile_id,omitempty"`
	ProfileName string          `json:"profile_name,omitempty"`
	ProfileCRN  string          `json:"profile_crn,omitempty"`
	Transaction string          `json:"transaction"`
	Address     string          `json:"address"` // that the instance called from
	Agent       string          `json:"agent"`
	Event       *activity.Event `json:"event,omitempty"` // of the metadata service's call
}

// ExchangeAnswer is the access token.
type ExchangeAnswer struct {
	AccessToken string `json:"access_token"`
	IssuedAt    int64  `json:"issued_at"`
	Expires     int64  `json:"expires"`
}

// Events are events of the host's metadata service in order; the first one has
// the number First and each further one the next. They are not decoded with the
// batch: one that is damaged must not hold up the others.
type Events struct {
	Outbox string            `json:"outbox"` // id of what they come out of; each counts for itself
	First  int64             `json:"first"`
	Events []json.RawMessage `json:"events"`
}

// Bounds on one batch of events.
const (
	MaxEvents     = 500
	MaxBatchBytes = 768 << 10
	MaxOutbox     = 64      // bytes of an outbox's id
	MaxNumber     = 1 << 53 // of an event
)

// Recorded answers Events, and stands in Hello: what is up to this number of the
// outbox stands in the log.
type Recorded struct {
	Outbox   string `json:"outbox,omitempty"`
	Recorded int64  `json:"recorded"`
}

// Machine is one that the host has found, which something else runs.
type Machine struct {
	Name    string            `json:"name"`
	Device  string            `json:"device"`           // its tap or veth
	Domain  string            `json:"domain,omitempty"` // UUID of its libvirt domain
	MAC     string            `json:"mac"`
	Address string            `json:"address,omitempty"` // where it is known
	Bridge  string            `json:"bridge,omitempty"`
	State   string            `json:"state"`
	Tags    map[string]string `json:"tags,omitempty"`
}

// MaxMachines bounds what a host may say to have found.
const MaxMachines = 4096

// Found is what the host has found.
type Found struct {
	Machines []Machine `json:"machines"`
}

// Fault is a fault on the wire between server and agent, whole, so that the
// metadata service answers as if the server were in the same process. Its cause
// stays behind.
type Fault struct {
	Kind       fault.Kind   `json:"kind"`
	Code       string       `json:"code"`
	Message    string       `json:"message"`
	Detail     string       `json:"detail,omitempty"`
	Target     fault.Target `json:"target"`
	RetryAfter int          `json:"retry_after,omitempty"` // seconds
}

// FaultBody is the body of a failed request of an agent.
type FaultBody struct {
	Fault       Fault   `json:"fault"`
	Errors      []Brief `json:"errors"` // the fault again, as other APIs tell it
	Transaction string  `json:"trace"`
}

// Brief is the short form of a fault, for people and their tools.
type Brief struct {
	Code    string `json:"code"`
	Message string `json:"message"`
}

// FaultOf prepares a fault for the wire.
func FaultOf(f *fault.Error) Fault {
	return Fault{
		Kind: f.Kind, Code: f.Code, Message: f.Message, Detail: f.Detail, Target: f.Target,
		RetryAfter: int(f.RetryAfter / time.Second),
	}
}

// Error turns it back.
func (f Fault) Error() *fault.Error {
	if f.Kind.String() == "" {
		return fault.Of(fmt.Errorf("the server answered with an unknown kind of fault %d: %s", f.Kind, f.Message))
	}
	return &fault.Error{
		Kind: f.Kind, Code: f.Code, Message: f.Message, Detail: f.Detail, Target: f.Target,
		RetryAfter: time.Duration(f.RetryAfter) * time.Second,
	}
}
