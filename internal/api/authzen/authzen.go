// Package authzen answers a service that asks whether somebody may do
// something in it: the OpenID AuthZEN Authorization API 1.0, and the older
// /v2/authz as a thin translation onto the same evaluator
// (reference/access-and-audit.md section 3). The asking service authenticates
// like every caller and may ask only about the services on which it has the
// action iam.decision.evaluate, which the role Decision Point gives; else the
// interface would tell anybody about everybody's access.
package authzen

import (
	"errors"
	"net/http"
	"strings"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/fault"
)

// MaxAge is how long a decision may be kept by whoever asked, in seconds. It
// follows from promise 6: a revocation counts everywhere within a second.
const MaxAge = 1

// maxQuestions bounds one batch.
const maxQuestions = 100

// Subjects says whether an identity is one at all. *grant.Service implements
// it.
type Subjects interface {
	// Live returns an error unless the account is open and the identity exists
	// in it.
	Live(accountID, iamID string) error
}

type handler struct{ subjects Subjects }

// Register adds the routes.
func Register(mux *http.ServeMux, cfg *api.Config, subjects Subjects) {
	f := &api.Family{Config: cfg, Mux: mux, Service: "IAM Access Decisions", Shape: api.PlainShape}
	h := &handler{subjects}
	api.Ask(f, "POST /access/v1/evaluation", access.ActionDecide, h.evaluation)
	api.Ask(f, "POST /access/v1/evaluations", access.ActionDecide, h.evaluations)
	api.Ask(f, "POST /access/v1/search/action", access.ActionDecide, h.searchAction)
	api.Ask(f, "POST /access/v1/search/subject", access.ActionDecide, h.searchSubject)
	api.Ask(f, "POST /v2/authz", access.ActionDecide, h.authz)
	api.Ask(f, "POST /v2/authz/roles", access.ActionDecide, h.authzRoles)
	mux.HandleFunc("GET /.well-known/authzen-configuration", configuration(cfg.URL))
}

// Entities of a question (AuthZEN section 5). Fields that are not known are
// ignored, as it demands.
type (
	entity struct {
		Type       string         `json:"type"`
		ID         string         `json:"id"`
		Properties map[string]any `json:"properties"`
	}
	action struct {
		Name string `json:"name"`
	}
	question struct {
		Subject  *entity        `json:"subject"`
		Action   *action        `json:"action"`
		Resource *entity        `json:"resource"`
		Context  map[string]any `json:"context"`
	}
)

// answer is one decision.
type answer struct {
	Decision bool     `json:"decision"`
	Context  *context `json:"context,omitempty"`
}

// context explains a decision.
type context struct {
	Reason           string   `json:"reason,omitempty"`
	PolicyID         string   `json:"policy_id,omitempty"`
	PermittedActions []string `json:"permitted_actions,omitempty"`
	MaxAge           int      `json:"max_cache_age_seconds"`
	TransactionID    string   `json:"transaction_id,omitempty"`
	Error            *problem `json:"error,omitempty"` // of one question in a batch
}

type problem struct {
	Status  int    `json:"status"`
	Message string `json:"message"`
}

func (h *handler) evaluation(c *api.Call, q *question) (api.Reply, error) {
	a, err := h.decide(c, *q)
	if err != nil {
		return api.Reply{}, err
	}
	return api.Reply{Body: a}, nil
}

// decide answers one question.
func (h *handler) decide(c *api.Call, q question) (answer, error) {
	request, err := h.request(c, q)
	if err != nil {
		return answer{}, err
	}
	if err := mayAsk(c, request.Resource); err != nil {
		return answer{}, err
	}
	out := answer{Context: &context{MaxAge: MaxAge, TransactionID: api.TransactionID(c.R.Context())}}
	if err := h.live(c, q.Subject, request); err != nil {
		out.Context.Reason = "the subject is not an identity of an open account, or its token does not count any more"
		return out, nil
	}
	d := access.Decide(c.Directory, request)
	out.Decision, out.Context.Reason = d.Allowed, reason(d)
	out.Context.PermittedActions = access.Permitted(c.Directory, request)
	if d.Allowed {
		out.Context.PolicyID = d.Policy.ID
		c.Usage.Permit(d.Policy.ID, c.Now())
		return out, nil
	}
	return out, c.RecordDecision(request, d)
}

// reason says in a few words what decided. What a policy holds is not for the
// asking service: an administrator finds the trace under the transaction id.
func reason(d access.Decision) string {
	if d.Allowed {
		return "policy " + d.Policy.ID + " allows it"
	}
	failed, _ := d.Explain().Failed()
	return "no policy allows it: the check " + failed.Name + " failed"
}

// mayAsk refuses callers who may not ask about the resource.
func mayAsk(c *api.Call, resource map[string]string) error {
	if resource[access.AccountID] != c.Account() {
		return fault.New(fault.Denied, "not_authorized", "A service may ask about resources of its own account only.")
	}
	return c.Authorize(access.ActionDecide, resource)
}

// request turns a question into the evaluator's terms
// (reference/access-and-audit.md section 3.4).
func (h *handler) request(c *api.Call, q question) (access.Request, error) {
	if q.Subject == nil || q.Action == nil || q.Resource == nil {
		return access.Request{}, api.Invalid("A question needs subject, action and resource.")
	}
	if q.Subject.ID == "" || q.Action.Name == "" {
		return access.Request{}, api.Invalid("subject.id and action.name must not be empty.")
	}
	if err := typed(*q.Subject); err != nil {
		return access.Request{}, err
	}
	resource, err := attributes(c, *q.Resource)
	if err != nil {
		return access.Request{}, err
	}
	return access.Request{
		Subject: q.Subject.ID, AccountID: property(q.Subject.Properties, access.AccountID, c.Account()),
		Action: q.Action.Name, Resource: resource, Time: c.Now(),
		Tags: list(q.Resource.Properties["tags"]),
	}, nil
}

// Types of a subject. Each belongs to one form of IAM ID.
var subjectTypes = map[string]crn.Kind{
	"user": crn.KindUser, "service_id": crn.KindServiceID, "profile": crn.KindProfile, "crn": crn.KindCRN,
}

func typed(subject entity) error {
	kind := crn.KindOf(subject.ID)
	if kind == crn.KindUnknown {
		return api.Invalid("subject.id %q is not an IAM ID, such as IBMid-…, iam-ServiceId-… or iam-Profile-….", subject.ID)
	}
	if subject.Type == "" {
		return nil
	}
	if want, ok := subjectTypes[subject.Type]; !ok || want != kind {
		return api.Invalid("subject.type %q does not go with the id %q; it is one of user, service_id, profile, crn, as the id says.", subject.Type, subject.ID)
	}
	return nil
}

// attributes returns the resource attributes that a question names: those of
// the CRN, or of the type and id, with the properties added. A property must
// not contradict what the CRN or the type says.
func attributes(c *api.Call, r entity) (map[string]string, error) {
	out := map[string]string{}
	service, kind, _ := strings.Cut(r.Type, "/")
	if parsed, err := crn.Parse(r.ID); err == nil {
		out = access.AttributesOf(parsed)
	} else if r.ID != "" {
		out[access.Resource] = r.ID
	}
	add := func(name, value string) error {
		if old, ok := out[name]; ok && old != value {
			return api.Invalid("The resource's %s is %q in one place and %q in another.", name, old, value).On("resource")
		}
		out[name] = value
		return nil
	}
	if service != "" {
		if err := add(access.ServiceName, service); err != nil {
			return nil, err
		}
	}
	if kind != "" {
		if err := add(access.ResourceType, kind); err != nil {
			return nil, err
		}
	}
	for name, value := range r.Properties {
		s, ok := value.(string)
		switch {
		case name == "tags":
			continue
		case !ok:
			return nil, api.Invalid("The resource property %s must be a string.", name).On("resource.properties")
		case name == access.ServiceType || name == access.ServiceGroupID:
			return nil, api.Invalid("The resource property %s follows from the service and cannot be given.", name).On("resource.properties")
		}
		if err := add(name, s); err != nil {
			return nil, err
		}
	}
	if out[access.AccountID] == "" {
		out[access.AccountID] = c.Account()
	}
	if out[access.ServiceName] == "" {
		return nil, api.Invalid("The resource needs a service: as its type, in its CRN, or as the property serviceName.").On("resource")
	}
	return out, nil
}

// live refuses subjects that are gone. A subject that comes with its access
// token is held to it: the token must count now and be the subject's own.
// Services and compute resources that act under their CRN are known elsewhere.
func (h *handler) live(c *api.Call, subject *entity, q access.Request) error {
	if raw := property(subject.Properties, "access_token", ""); raw != "" {
		claims, err := c.Auth.Caller(raw)
		if err != nil {
			return err
		}
		if claims.IAMID != q.Subject || claims.Account.BSS != q.AccountID {
			return errors.New("the access token is not the subject's")
		}
		return nil
	}
	if crn.KindOf(q.Subject) == crn.KindCRN {
		return nil
	}
	return h.subjects.Live(q.AccountID, q.Subject)
}

func property(m map[string]any, name, def string) string {
	if s, ok := m[name].(string); ok && s != "" {
		return s
	}
	return def
}

func list(v any) []string {
	items, _ := v.([]any)
	var out []string
	for _, i := range items {
		if s, ok := i.(string); ok {
			out = append(out, s)
		}
	}
	return out
}
