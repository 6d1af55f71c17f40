// Package vpcapi is the regional VPC API: the subset of it that it takes to
// run an instance with a trusted profile and to reach it
// (reference/instance-metadata-and-vpc.md section 3). It keeps the objects and
// says what should be; the host on which an instance is placed makes it so and
// moves its status on.
package vpcapi

import (
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"time"

	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/grant"
	"tabard.dev/tabard/internal/vpc"
)

// Options are what the family needs beyond the configuration of all families.
type Options struct {
	// Place returns the id of the host that is to run a new instance in a zone.
	// An empty one means that there is none now and says why; the instance then
	// waits for one. Nil places nothing.
	Place func(zone string, p vpc.InstanceProfile, image vpc.Image) (hostID, reason string)

	// Fits returns why a host has no room for an instance that is placed on it
	// when it has a hardware profile: one that starts, or one that is resized and
	// has another profile still. An empty reason means that it fits. It is asked
	// within the transaction that changes the instance. Nil means that all fit.
	Fits func(hostID string, i *vpc.Instance, p vpc.InstanceProfile) (reason string)

	// Images keeps the files of registered images. Nil means that no image can
	// be registered.
	Images *Images

	// LocalAccess returns how to enter a running instance of a local driver.
	// It is encoded as JSON. False means that the instance has no such way in.
	LocalAccess func(instanceID string) (any, bool)
}

// service is the family at work.
type service struct {
	*api.Family
	opts   Options
	region vpc.Region
	d      *directory.Directory

	vpcs        kind[vpc.VPC]
	subnets     kind[vpc.Subnet]
	sshKeys     kind[vpc.Key]
	instances   kind[vpc.Instance]
	floatingIPs kind[vpc.FloatingIP]
	groups      kind[vpc.SecurityGroup]
	images      kind[vpc.Image]
}

// roots are the first path segments after /v1 that belong to this family.
var roots = []string{
	"regions", "vpcs", "subnets", "keys", "images", "operating_systems",
	"instance", "instances", "floating_ips", "security_groups", "volume", "volumes", "virtual_network_interfaces",
}

// Register adds the family's routes. It panics when the configured region is
// not one that an installation can be.
func Register(mux *http.ServeMux, cfg *api.Config, opts Options) {
	region, ok := vpc.RegionNamed(cfg.Region)
	if !ok {
		panic("the VPC API has no region " + cfg.Region)
	}
	routes := http.NewServeMux()
	s := &service{
		Family: &api.Family{Config: cfg, Mux: routes, Service: "Virtual Private Cloud", Shape: shape},
		opts:   opts, region: region, d: cfg.Directory,
	}
	s.kinds()
	s.catalogRoutes()
	s.networkRoutes()
	s.securityGroupRoutes()
	s.keyRoutes()
	s.floatingIPRoutes()
	s.instanceRoutes()
	s.interfaceRoutes()
	s.virtualRoutes()
	s.volumeRoutes()
	s.imageRoutes()
	for _, root := range roots {
		mux.Handle("/v1/"+root, s.checked(routes))
		mux.Handle("/v1/"+root+"/", s.checked(routes))
	}
}

// checked refuses what is wrong with a request before anybody looks at its
// token, in the order of section 3.1: route, version, generation.
func (s *service) checked(routes *http.ServeMux) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, pattern := routes.Handler(r); pattern == "" {
			s.refuse(w, r, fault.New(fault.NotFound, "invalid_route", "There is no %s %s.", r.Method, r.URL.Path))
			return
		}
		if f := s.checkVersion(r); f != nil {
			s.refuse(w, r, f)
			return
		}
		// Who sends no body says nothing. Whether he may ask at all is the
		// more useful answer than that the body is missing.
		if r.ContentLength == 0 {
			r.Body = io.NopCloser(strings.NewReader("{}"))
		}
		routes.ServeHTTP(w, r)
	})
}

// The version dates that are accepted (section 3.7). A client's clock may run
// ahead by a day.
const (
	versionFormat = "2006-01-02"
	firstVersion  = "2019-01-01"
	firstServed   = "2019-05-31"
	versionSkew   = 24 * time.Hour
)

func (s *service) checkVersion(r *http.Request) *fault.Error {
	q := r.URL.Query()
	version := q.Get("version")
	invalid := func(code, format string, args ...any) *fault.Error {
		return fault.New(fault.Invalid, code, format, args...).OnParameter("version", version)
	}
	if version == "" {
		return invalid("missing_version", "The version query parameter is required, in the form YYYY-MM-DD.")
	}
	date, err := time.Parse(versionFormat, version)
	if err != nil {
		return invalid("invalid_version", "The version query parameter must have the form YYYY-MM-DD.")
	}
	if version < firstVersion || date.After(s.Now().Add(versionSkew)) {
		return invalid("invalid_version_range", "The version must not be before %s nor in the future.", firstVersion)
	}
	if version < firstServed {
		return invalid("version_not_supported", "The version must be %s or later.", firstServed)
	}
	switch generation := q.Get("generation"); generation {
	case "":
		return fault.New(fault.Invalid, "missing_generation_parameter", "The generation query parameter is required; it must be 2.").OnParameter("generation", "")
	case "2":
		return nil
	default:
		return fault.New(fault.Invalid, "invalid_generation_parameter", "The generation query parameter must be 2.").OnParameter("generation", generation)
	}
}

// refuse answers a request that reached no route.
func (s *service) refuse(w http.ResponseWriter, r *http.Request, f *fault.Error) {
	status, body := shape(&api.Call{Family: s.Family, R: r}, f)
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.WriteHeader(status)
	// The client may be gone; there is nobody left to tell.
	_ = json.NewEncoder(w).Encode(body)
}

// errorBody is the error shape of section 3.7. Unlike the metadata service's
// it has no status_code.
type errorBody struct {
	Errors []errorItem `json:"errors"`
	Trace  string      `json:"trace"`
}

type errorItem struct {
	Code     string       `json:"code"`
	Message  string       `json:"message"`
	MoreInfo string       `json:"more_info"`
	Target   *errorTarget `json:"target,omitempty"`
}

type errorTarget struct {
	Name  string `json:"name"`
	Type  string `json:"type"` // field, parameter or header
	Value string `json:"value,omitempty"`
}

const moreInfo = "https://cloud.ibm.com/apidocs/vpc"

func shape(c *api.Call, f *fault.Error) (int, any) {
	item := errorItem{Code: code(f), Message: f.Message, MoreInfo: moreInfo}
	if f.Detail != "" {
		item.Message += " " + f.Detail
	}
	if f.Target.Name != "" {
		item.Target = &errorTarget{Name: f.Target.Name, Type: f.Target.Type, Value: f.Target.Value}
	}
	status := grant.StatusOf(f.Kind)
	switch {
	case staleTag(f):
		status = http.StatusPreconditionFailed
	case f.Code == insufficientStorage:
		status = http.StatusInsufficientStorage
	}
	return status, errorBody{Errors: []errorItem{item}, Trace: api.TransactionID(c.R.Context())}
}

// staleTag tells the caller's own precondition from a change that came in
// between without one.
func staleTag(f *fault.Error) bool { return f.Kind == fault.Stale && f.Target.Type == "header" }

// code returns the code of section 3.7 for a fault of this family or of what
// all families share.
func code(f *fault.Error) string {
	if f.Code == insufficientStorage {
		return f.Code
	}
	switch f.Kind {
	case fault.Internal:
		return "internal_error"
	case fault.Unavailable:
		return "service_error"
	case fault.Denied:
		return "not_authorized"
	case fault.TooLarge:
		return "http_request_size_exceeded"
	case fault.Limited:
		return "rate_limit_exceeded"
	case fault.Stale:
		if staleTag(f) {
			return "precondition_failed"
		}
		return "invalid_state"
	}
	switch f.Code {
	case "invalid_body":
		if f.Target.Type == "field" && f.Target.Name != "" {
			return "bad_field"
		}
		return "bad_request"
	case "invalid_parameter":
		return "validation_failure"
	case "conflict":
		return "validation_unique_failed"
	}
	return f.Code
}

// quota refuses one more of what there can be no more than most of. of says
// whose they are, and plural what they are.
func quota(have, most int, of, plural string) error {
	if have < most {
		return nil
	}
	return fault.New(fault.Invalid, "over_quota", "%s has %d %s already, the most it can have; delete one first.", of, have, plural)
}

// Faults of this family.

func missing(field string) *fault.Error {
	return fault.New(fault.Invalid, "validation_required_field", "The property %s is required.", field).On(field)
}

func badField(field, format string, args ...any) *fault.Error {
	return fault.New(fault.Invalid, "bad_field", format, args...).On(field)
}

func invalidState(format string, args ...any) *fault.Error {
	return fault.New(fault.Conflict, "invalid_state", format, args...)
}
