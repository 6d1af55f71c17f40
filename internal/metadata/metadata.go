// Package metadata is the instance metadata and identity service that an
// instance reaches at 169.254.169.254
// (reference/instance-metadata-and-vpc.md sections 1 and 2). A handler is made
// for one instance and knows it from its maker: nothing that a request carries
// ever chooses an identity.
//
// The service runs on the host that the instance is placed on. Identity tokens,
// identity certificates and metadata need nothing but the host's own keys and
// what it knows of the instance; IAM tokens need the IAM server.
package metadata

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"path"
	"slices"
	"strings"
	"time"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/attest"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/grant"
	"tabard.dev/tabard/internal/host/authority"
	"tabard.dev/tabard/internal/vpc"
)

// Instances tells what is known of an instance now. It is asked on every
// request, so that a change of a live instance counts at once.
type Instances interface {
	Placement(instanceID string) (*vpc.Placement, bool)
}

// IAM exchanges an identity token for an access token and records the exchange,
// with the request's own event beside it. An error of kind Unavailable means
// that nothing has been recorded; one with the code CodeServerAway means that
// the server could not be asked.
type IAM interface {
	Instance(ctx context.Context, o grant.Origin, r grant.InstanceRequest) (grant.Answer, error)
}

// CodeServerAway is the code of IAM's fault when the server cannot be reached.
const CodeServerAway = "server_unavailable"

// Tokens checks identity tokens that come back. A refusal is a *attest.Refusal.
type Tokens interface {
	Verify(raw string) (attest.Proof, *attest.IdentityClaims, error)
}

// Signer signs identity tokens with the host's key.
type Signer interface {
	Sign(claims any, typ string) (string, error)
}

// Certifier makes identity certificates with the host's issuer.
type Certifier interface {
	Certify(r *authority.Request, of authority.Instance, life time.Duration) (authority.Certificate, error)
}

// Recorder makes events durable. Whatever its error is, the events are taken
// for not recorded.
type Recorder interface {
	Record(ctx context.Context, events ...*activity.Event) error
}

// Config are the service's collaborators.
type Config struct {
	Instances    Instances
	IAM          IAM
	Tokens       Tokens
	Signer       Signer
	Certificates Certifier // nil: there are no identity certificates
	Journal      Recorder
	Names        crn.Names
	Region       string
	Limits       Limits // of each instance
	Now          func() time.Time
	Log          *slog.Logger

	// Observe, when not nil, is told of every request: the operation, which is
	// one of the Operation constants, and "ok" or the error code. Requests over
	// the limit are seen here and nowhere else.
	Observe func(operation, outcome string, took time.Duration)
}

// Operations that Observe is told of.
const (
	OperationIdentityToken = "identity-token"
	OperationIAMToken      = "iam-token"
	OperationCertificate   = "certificate"
	OperationRead          = "read"
	OperationUnknown       = "unknown" // a path that does not exist here
)

// Service makes the handlers of instances.
type Service struct {
	cfg    Config
	limits *limiter
	reads  *reads
	door   http.Handler
}

// New returns the service. Run must run beside it.
func New(cfg Config) *Service {
	s := &Service{cfg: cfg, limits: newLimiter(cfg.Limits), reads: newReads(cfg)}
	mux := http.NewServeMux()
	methods := map[string][]string{}
	for _, rt := range s.routes() {
		mux.HandleFunc(rt.method+" "+rt.path, s.handle(&rt))
		methods[rt.path] = append(methods[rt.path], rt.method)
	}
	for path, allowed := range methods {
		// Section 1.10 of the reference knows no 405.
		mux.HandleFunc(path, s.handle(unknown("This path answers to "+strings.Join(allowed, " and ")+" only.")))
	}
	nothing := s.handle(unknown("There is no such resource here."))
	mux.HandleFunc("/", nothing)
	s.door = api.WithTransaction(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if path.Clean(r.URL.Path) != r.URL.Path {
			nothing(w, r) // the router would answer with a redirect; nothing here redirects
			return
		}
		mux.ServeHTTP(w, r)
	}))
	return s
}

// Run writes the records of metadata reads, which no answer waits for, until
// the context ends, and what is left of them then.
func (s *Service) Run(ctx context.Context) { s.reads.run(ctx) }

// Handler returns the handler of one instance. Handlers of one instance share
// its limits.
func (s *Service) Handler(instanceID string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.door.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), callerKey{}, instanceID)))
	})
}

// callerKey keys the id of the instance that a request came from in a context.
// Only Handler writes it.
type callerKey struct{}

// route is a path of the service.
type route struct {
	method, path string
	operation    string
	old          bool   // of the generation that ended with version 2025-08-26
	action       string // of its activity event
	what         string // that the event's message says was done
	credential   string // type, as events name it
	body         int64  // bound of the request's body, in bytes
	budget       budget
	issues       bool     // gives out a credential: the answer waits for its durable record
	checks       []string // beside those of every route, in their order
	answer       func(*request) (any, error)
}

// Bounds on bodies, in bytes.
const (
	maxBody        = 8 << 10
	maxRequestBody = 64 << 10 // with a certificate request
)

// Credentials as events name them (reference section 5.2).
const (
	noCredential  = "compute-resource" // the listener alone knows who asks
	identityToken = "instance-identity-token"
)

func unknown(message string) *route {
	return &route{
		operation: OperationUnknown, action: "is.metadata.instance.read", what: "read", credential: noCredential, body: maxBody, budget: readBudget,
		answer: func(*request) (any, error) { return nil, fault.New(fault.NotFound, "not_found", "%s", message) },
	}
}

func (s *Service) routes() []route {
	var out []route
	for _, gen := range []struct {
		prefix, iam string
		old         bool
	}{{"/instance_identity/v1", "/iam_token", true}, {"/identity/v1", "/iam_tokens", false}} {
		out = append(out, route{
			method: http.MethodPut, path: gen.prefix + "/token", operation: OperationIdentityToken, old: gen.old, issues: true,
			action: "is.metadata.jwt-token.create", what: "create identity token for", credential: noCredential,
			body: maxBody, budget: identityBudget, checks: []string{checkFlavor, checkBody}, answer: s.identityToken,
		}, route{
			method: http.MethodPost, path: gen.prefix + gen.iam, operation: OperationIAMToken, old: gen.old, issues: true,
			action: "is.metadata.computeresource-token.request", what: "request IAM token for", credential: noCredential,
			body: maxBody, budget: iamBudget, checks: []string{checkBearer, checkProfile}, answer: s.iamToken,
		})
		if s.cfg.Certificates != nil {
			out = append(out, route{
				method: http.MethodPost, path: gen.prefix + "/certificates", operation: OperationCertificate, old: gen.old, issues: true,
				action: "is.metadata.certificate.create", what: "create identity certificate for", credential: identityToken,
				body: maxRequestBody, budget: iamBudget, checks: []string{checkBearer, checkCaller, checkBody, checkRequest}, answer: s.certificate,
			})
		}
	}
	return append(out, s.metadataRoutes()...)
}

// Names of the checks that every request walks through, in their order, and of
// those of single routes.
const (
	checkDirect   = "direct-request"
	checkService  = "metadata-service"
	checkInstance = "instance-status"
	checkVersion  = "api-version"

	checkFlavor  = "metadata-flavor"
	checkBody    = "request-body"
	checkBearer  = "bearer"
	checkCaller  = "caller"
	checkProfile = "trusted-profile"
	checkServer  = "iam-server"
	checkRequest = "certificate-request"
)

// request is one request under way.
type request struct {
	*http.Request
	placement *vpc.Placement
	instance  *vpc.Instance // of the placement
	event     *activity.Event
	recorded  bool // the event is durable already
}

func (r *request) pass(check, wanted, found string) { r.event.Trace.Pass(check, wanted, found) }

func (r *request) fail(check, wanted, found, hint string) {
	r.event.Trace.Fail(check, wanted, found, hint)
}

// handle serves a route.
func (s *Service) handle(rt *route) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		id, _ := r.Context().Value(callerKey{}).(string)
		started := s.cfg.Now()
		r.Body = http.MaxBytesReader(w, r.Body, rt.body)
		answer, err := s.serve(rt, id, r)
		outcome := "ok"
		if err == nil {
			writeJSON(w, http.StatusOK, answer)
		} else {
			f := fault.Of(err)
			if outcome = f.Code; f.Cause != nil && (f.Kind == fault.Internal || f.Kind == fault.Unavailable) {
				s.cfg.Log.Error("metadata request failed", "instance", id, "path", r.URL.Path,
					"transaction", api.TransactionID(r.Context()), "error", f)
			}
			writeFault(w, r, f)
		}
		if s.cfg.Observe != nil {
			s.cfg.Observe(rt.operation, outcome, s.cfg.Now().Sub(started))
		}
	}
}

// serve answers a request and sees to its record: what gives out a credential
// is recorded whatever comes of it, within the limit on refusals; reads and
// refused reads are counted.
func (s *Service) serve(rt *route, id string, r *http.Request) (any, error) {
	p, ok := s.cfg.Instances.Placement(id)
	if !ok {
		return nil, notEnabled()
	}
	if wait := s.limits.take(id, rt.budget, s.cfg.Now()); wait > 0 {
		return nil, limited(wait, "The instance asks too often. Try again later.")
	}
	req := &request{Request: r, placement: p, instance: &p.Instance}
	req.event = s.event(req, rt)
	answer, err := s.walk(req, rt)
	if err == nil {
		req.event.SetReason(http.StatusOK, "")
		switch {
		case req.recorded:
		case rt.issues:
			err = s.record(r.Context(), req.event)
		default:
			err = s.reads.note(r.Context(), id, req.event)
		}
		if err != nil {
			return nil, err
		}
		return answer, nil
	}
	f := fault.Of(err)
	denied := f.Kind == fault.Unauthenticated || f.Kind == fault.Denied
	if f.Kind == fault.Limited || !rt.issues && !denied {
		return nil, f
	}
	if rt.issues {
		// What IAM has recorded already counts, too; its answer stands.
		if wait := s.limits.take(id, refusedBudget, s.cfg.Now()); wait > 0 && !req.recorded {
			return nil, refusedTooOften(wait)
		}
	}
	if req.recorded {
		return nil, f
	}
	for _, check := range append([]string{checkDirect, checkService, checkInstance, checkVersion}, rt.checks...) {
		if !slices.ContainsFunc(req.event.Trace, func(c activity.Check) bool { return c.Name == check }) {
			req.event.Trace.Skip(check)
		}
	}
	req.event.SetReason(grant.StatusOf(f.Kind), f.Message)
	req.event.Message += " -failure"
	record := s.record
	if !rt.issues {
		record = func(ctx context.Context, e *activity.Event) error { return s.reads.refuse(ctx, id, e) }
	}
	if err := record(r.Context(), req.event); err != nil {
		return nil, err
	}
	return nil, f
}

// limited is the answer to a request over a limit, which has no event.
func limited(wait time.Duration, message string) error {
	f := fault.New(fault.Limited, "rate_limit_exceeded", "%s", message)
	f.RetryAfter = wait
	return f
}

func refusedTooOften(wait time.Duration) error {
	return limited(wait, "Too many requests of the instance for tokens and certificates were refused. See what is wrong with them, and try again later.")
}

// walk makes the checks that all routes share and then the route's own.
func (s *Service) walk(r *request, rt *route) (any, error) {
	if err := direct(r); err != nil {
		return nil, err
	}
	if err := switchedOn(r); err != nil {
		return nil, err
	}
	if status := r.instance.Status; status != vpc.Running {
		r.fail(checkInstance, vpc.Running, status, "wait until the instance runs")
		f := fault.New(fault.Unavailable, "service_error", "The instance is %s; try again when it is running.", status)
		f.RetryAfter = time.Second
		return nil, f
	}
	r.pass(checkInstance, vpc.Running, r.instance.Status)
	if err := s.version(r, rt); err != nil {
		return nil, err
	}
	return rt.answer(r)
}

// names under which the service is asked. A page in a browser that was tricked
// into asking sends another (reference section 6.2).
var names = []string{"169.254.169.254", authority.ServerName}

// forwarding are headers that a proxy adds. A request that came through one may
// be anybody's (reference section 6.2).
var forwarding = []string{
	"Forwarded", "Via", "X-Real-Ip", "Client-Ip", "X-Client-Ip", "True-Client-Ip", "Cf-Connecting-Ip", "X-Cluster-Client-Ip",
	"X-Original-Forwarded-For", "X-Original-Host", "X-Original-Url", "X-Rewrite-Url", "X-Envoy-External-Address", "X-Proxyuser-Ip",
}

// forwardedPrefix begins the names of headers of the same kind, such as
// X-Forwarded-For.
const forwardedPrefix = "X-Forwarded-"

// direct refuses requests that did not come straight from a program inside the
// instance.
func direct(r *request) error {
	const wanted = "a request to the service's own address or name, not forwarded"
	host := r.Host
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	var f *fault.Error
	found := "Host " + r.Host
	switch {
	case !slices.Contains(names, strings.ToLower(host)):
		f = fault.New(fault.Denied, "unauthorized", "This service answers under its own address and name only.").OnHeader("Host")
	case r.URL.Host != "":
		found = "the target " + r.RequestURI
		f = fault.New(fault.Invalid, "invalid_request", "This service is not a proxy.")
	default:
		for name := range r.Header {
			if strings.HasPrefix(name, forwardedPrefix) || slices.Contains(forwarding, name) {
				found = "the header " + name
				f = fault.New(fault.Denied, "unauthorized", "This service does not answer forwarded requests.").OnHeader(name)
				break
			}
		}
	}
	if f != nil {
		r.fail(checkDirect, wanted, found, "ask from a program inside the instance, without a proxy")
		return f
	}
	r.pass(checkDirect, wanted, found)
	return nil
}

// switchedOn refuses what comes in on a listener that is about to close,
// because the instance's settings have changed.
func switchedOn(r *request) error {
	set := r.instance.Metadata
	if !set.Enabled {
		r.fail(checkService, "enabled", "disabled", "enable the metadata service of the instance")
		return notEnabled()
	}
	found := "http"
	if r.TLS != nil {
		found = "https"
	}
	wanted := "http"
	if set.Protocol == "https" {
		wanted = "https"
	}
	if found != wanted {
		r.fail(checkService, "enabled, over "+wanted, "over "+found, "")
		return fault.New(fault.Denied, "unauthorized", "The metadata service of this instance speaks %s only.", wanted)
	}
	r.pass(checkService, "enabled, over "+wanted, "enabled, over "+found)
	return nil
}

func notEnabled() error {
	return fault.New(fault.Denied, "unauthorized", "The metadata service is not enabled on this instance.")
}

const (
	oldPathsEnd   = "2025-08-26" // the first version at which the old paths are gone
	oldestVersion = "2021-01-01"
)

// version applies the rules of reference section 1.2: required, well formed, and
// not in the future beyond a day of clock skew.
func (s *Service) version(r *request, rt *route) error {
	given := r.URL.Query()["version"]
	v := strings.Join(given, ",")
	wanted := "a date from " + oldestVersion + " to today"
	if v == "" {
		r.fail(checkVersion, wanted, "(absent)", "send the query parameter version")
		return fault.New(fault.Invalid, "missing_value", "The query parameter version is required, as YYYY-MM-DD.").OnParameter("version", "")
	}
	day, err := time.Parse(time.DateOnly, v)
	if err != nil || v < oldestVersion || day.After(s.cfg.Now().UTC().Add(24*time.Hour)) {
		r.fail(checkVersion, wanted, v, "send a date of this kind")
		return fault.New(fault.Invalid, "invalid_value", "The query parameter version must be a date from %s to today, as YYYY-MM-DD.", oldestVersion).
			OnParameter("version", activity.Clip(v))
	}
	if rt.old && v >= oldPathsEnd {
		r.fail(checkVersion, "before "+oldPathsEnd+" on this path", v, "ask under /identity/v1, or with an older version")
		return fault.New(fault.NotFound, "not_found", "From version %s on, the path is /identity/v1/….", oldPathsEnd)
	}
	r.pass(checkVersion, wanted, v)
	return nil
}
