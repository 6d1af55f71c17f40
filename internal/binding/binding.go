// Package binding is the Kubernetes controller that turns TrustedProfileBindings
// into links: who may create one in a namespace gives a service account of that
// namespace a trusted profile, as far as the namespace's annotation allows. It
// speaks to the cluster's API server and to the IAM server over their public
// APIs only, and proves itself to the latter with its own pod's token.
//
// It is not what admits a pod: the IAM server decides that at each exchange, by
// the links that stand there, whether this controller runs or not.
package binding

import (
	"errors"
	"regexp"
	"slices"
	"strings"
	"time"
)

// Names that the controller and its users agree on.
const (
	// AllowedProfiles is the annotation of a namespace that names the profiles
	// its bindings may give away: names with commas between them, each of which
	// may end in a * for any ending. A namespace without it may give none.
	AllowedProfiles = "iam.tabard.dev/allowed-profiles"

	// Finalizer keeps a deleted binding until its link is gone.
	Finalizer = "iam.tabard.dev/link"

	apiVersion = "iam.tabard.dev/v1alpha1"
	kind       = "TrustedProfileBinding"
	collection = "/apis/" + apiVersion + "/trustedprofilebindings"
)

// Reasons of the condition Ready.
const (
	ReasonLinked              = "Linked"
	ReasonLinkExists          = "LinkExists" // made by somebody else
	ReasonProfileNotFound     = "ProfileNotFound"
	ReasonNotAllowed          = "NotAllowed"
	ReasonAccountNotFound     = "ServiceAccountNotFound"
	ReasonForbidden           = "Forbidden"
	ReasonRefused             = "Refused" // by the IAM server, for what the binding asks
	ReasonClusterUnregistered = "ClusterNotRegistered"
	ReasonForeignCluster      = "ForeignCluster" // the controller was given another cluster's name
	ReasonUnavailable         = "TabardUnavailable"
	ReasonInvalid             = "Invalid"
)

// binding is a TrustedProfileBinding, as far as the controller reads it.
type binding struct {
	Metadata metadata `json:"metadata"`
	Spec     spec     `json:"spec"`
	Status   status   `json:"status"`
}

type metadata struct {
	Namespace       string            `json:"namespace"`
	Name            string            `json:"name"`
	UID             string            `json:"uid"`
	ResourceVersion string            `json:"resourceVersion"`
	Generation      int64             `json:"generation"`
	Deleted         *time.Time        `json:"deletionTimestamp"`
	Finalizers      []string          `json:"finalizers"`
	Annotations     map[string]string `json:"annotations"`
}

type spec struct {
	ServiceAccount string `json:"serviceAccountName"`
	ProfileName    string `json:"profileName"`
	ProfileID      string `json:"profileID"`
}

// status says where the link is. ProfileID is written before a link is made, so
// that whoever goes on after a crash knows the one profile to look at.
type status struct {
	ObservedGeneration int64       `json:"observedGeneration,omitempty"`
	LinkID             string      `json:"linkID,omitempty"`
	ProfileID          string      `json:"profileID,omitempty"`
	Conditions         []condition `json:"conditions,omitempty"`
}

type condition struct {
	Type               string    `json:"type"`
	Status             string    `json:"status"` // True, False or Unknown
	ObservedGeneration int64     `json:"observedGeneration,omitempty"`
	LastTransitionTime time.Time `json:"lastTransitionTime"`
	Reason             string    `json:"reason"`
	Message            string    `json:"message"`
}

func (s *status) ready() condition {
	if i := slices.IndexFunc(s.Conditions, func(c condition) bool { return c.Type == "Ready" }); i >= 0 {
		return s.Conditions[i]
	}
	return condition{}
}

// key names a binding in its cluster.
type key struct{ namespace, name string }

func (k key) String() string { return k.namespace + "/" + k.name }

func (k key) path() string {
	// Both are DNS labels or subdomains: the API server has seen to that.
	return "/apis/" + apiVersion + "/namespaces/" + k.namespace + "/trustedprofilebindings/" + k.name
}

func (b *binding) key() key { return key{b.Metadata.Namespace, b.Metadata.Name} }

// profileID is the form of a profile's id, which becomes part of a path.
var profileID = regexp.MustCompile(`^Profile-[0-9A-Za-z-]{1,64}$`)

// check says why a binding cannot be carried out as it stands. The resource's
// schema says the same; a cluster may have an older one.
func (s *spec) check() error {
	switch {
	case s.ServiceAccount == "" || strings.ContainsAny(s.ServiceAccount, "/:"):
		return errors.New("spec.serviceAccountName must be the name of a service account in the binding's namespace")
	case (s.ProfileName == "") == (s.ProfileID == ""):
		return errors.New("give either spec.profileName or spec.profileID")
	case s.ProfileID != "" && !profileID.MatchString(s.profileID()):
		return errors.New("spec.profileID must have the form Profile-<uuid>; a profile's name goes into spec.profileName")
	}
	return nil
}

// profileID returns the id without the prefix of IAM ids, with which people copy
// it out of tokens and policies.
func (s *spec) profileID() string { return strings.TrimPrefix(s.ProfileID, "iam-") }

// allows reports whether a namespace's annotation names a profile.
func allows(annotation, profile string) bool {
	for pattern := range strings.SplitSeq(annotation, ",") {
		pattern = strings.TrimSpace(pattern)
		if prefix, any := strings.CutSuffix(pattern, "*"); any && strings.HasPrefix(profile, prefix) {
			return true
		}
		if pattern != "" && pattern == profile {
			return true
		}
	}
	return false
}

// Links of bindings are known by their names, tpb:NAMESPACE/BINDING:UID. No
// namespace has a slash or a colon in its name, and the UID is the API server's
// choice, so no binding can be made to look like another one's.
const (
	linkPrefix = "tpb:"
	maxBinding = 140 // characters of a binding's name in that of its link, of which 250 can be had
)

func (b *binding) linkName() string {
	name := b.Metadata.Name
	name = name[:min(len(name), maxBinding)] // it is ASCII
	return linkPrefix + b.Metadata.Namespace + "/" + name + ":" + b.Metadata.UID
}

// linkOf is the form of those names. A long name of a binding is cut off.
var linkOf = regexp.MustCompile(`^tpb:([a-z0-9][-a-z0-9]{0,62})/([a-z0-9][-.a-z0-9]*):([0-9a-zA-Z-]{1,64})$`)

// linkOwner returns the name and UID of the binding that a link was made for.
// People may give links any name; what comes out is fit to be part of a path.
func linkOwner(name string) (k key, uid string, ok bool) {
	m := linkOf.FindStringSubmatch(name)
	if m == nil {
		return key{}, "", false
	}
	return key{m[1], m[2]}, m[3], true
}
