// Package authzen answers a service that asks whether somebody may do
// something in it: the OpenID AuthZEN Authorization API 1.0, and the older
// /v2/authz as a thin translation onto the same evaluator
// (reference/access-and-audit.md section 3). The asking service authenticates
// like every caller and may ask only about the services on which it has the
// action iam.decision.evaluate, which the role Decision Point gives; else the
// interface would tell anybody about everybody's access.
package authzen

import (
	"cmp"
	"errors"
	"net/http"
	"strings"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/usage"
)

// MaxAge is how long a decision may be kept by whoever asked, in seconds. It
// follows from promise 6: a revocation counts everywhere within a second.
const MaxAge = 1

// Bounds on a question. A refusal is recorded with what was asked, so they
// bound the activity log too.
const (
	maxQuestions  = 100  // of one batch
	maxText       = 2048 // bytes of an id, a name or the value of a property
	maxProperties = 50
	maxTags       = 1000
)

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
	mux.HandleFunc("GET /.well-known/authzen-configuration", configuration(cfg))
}

// Entities of a question (reference/access-and-audit.md section 3.2). Fields
// that are not known are ignored, as AuthZEN demands.
type (
	entity struct {
		Type       string         `json:"type"`
		ID         *string        `json:"id"` // nil is absent; "" is the service as a whole
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
	Context  *details `json:"context,omitempty"`
}

// details explain a decision.
type details struct {
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
	a, err := h.evaluate(c, *q)
	if err != nil {
		return api.Reply{}, err
	}
	return api.Reply{Body: a}, nil
}

// evaluate answers one question that has all its parts.
func (h *handler) evaluate(c *api.Call, q question) (answer, error) {
	switch {
	case q.Subject == nil || q.Action == nil || q.Resource == nil:
		return answer{}, api.Invalid("A question needs subject, action and resource.")
	case q.Subject.Type == "":
		return answer{}, api.Invalid("subject.type is required: user, service_id, profile or crn.").On("subject.type")
	}
	if err := q.Resource.complete(); err != nil {
		return answer{}, err
	}
	return h.decide(c, q)
}

// complete demands what a resource must have in AuthZEN. The older interface
// does without.
func (r entity) complete() error {
	if r.Type == "" || r.ID == nil {
		return api.Invalid("resource.type and resource.id are required; the type is SERVICE or SERVICE/KIND, and the id is empty when the question is about the service as a whole.").On("resource")
	}
	return nil
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
	out := answer{Context: &details{MaxAge: MaxAge, TransactionID: api.TransactionID(c.R.Context())}}
	if err := h.live(c, q.Subject, request); err != nil {
		out.Context.Reason = "the subject is not an identity of an open account, or its token does not count any more"
		noteGone(c, request, err)
		return out, nil
	}
	d := access.Decide(c.Directory, request)
	out.Decision, out.Context.Reason = d.Allowed, reason(d)
	out.Context.PermittedActions = access.Permitted(c.Directory, request)
	c.NoteDecision(request, d)
	if d.Allowed {
		out.Context.PolicyID = d.Policy.ID
		c.Usage.Permit(d.Policy.ID, c.Now())
		c.Usage.Use(request, d.Policy, usage.Once)
	}
	return out, nil
}

// noteGone takes a refusal that no policy was asked about: the
// subject itself does not count.
func noteGone(c *api.Call, q access.Request, why error) {
	var t activity.Trace
	t.Fail("subject", "an identity of an open account, with a token that counts", q.Subject+": "+why.Error(),
		"look for the identity, its API key and the account's state; a token that was refused must be replaced")
	for _, check := range access.Decide(c.Directory, access.Request{}).Explain() {
		t.Skip(check.Name)
	}
	c.NoteDenial(q, t)
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
	id := q.Subject.id()
	if id == "" || q.Action.Name == "" {
		return access.Request{}, api.Invalid("subject.id and action.name must not be empty.")
	}
	if len(id) > maxText || len(q.Action.Name) > maxText {
		return access.Request{}, api.Invalid("subject.id and action.name must not be longer than %d bytes.", maxText)
	}
	if err := typed(q.Subject.Type, id); err != nil {
		return access.Request{}, err
	}
	account, err := q.Subject.text(access.AccountID)
	if err != nil {
		return access.Request{}, err
	}
	if _, err := q.Subject.text(accessToken); err != nil {
		return access.Request{}, err
	}
	resource, tags, err := attributes(c, *q.Resource)
	if err != nil {
		return access.Request{}, err
	}
	return access.Request{
		Subject: id, AccountID: cmp.Or(account, c.Account()), Action: q.Action.Name, Resource: resource, Time: c.Now(), Tags: tags,
	}, nil
}

// accessToken is the property of a subject that comes with its token.
const accessToken = "access_token"

func (r entity) id() string {
	if r.ID == nil {
		return ""
	}
	return *r.ID
}

// text returns a property of a subject, "" when it is absent. One of another
// form is an error: ignored, it could make a yes out of a no.
func (r entity) text(name string) (string, error) {
	value, present := r.Properties[name]
	s, ok := value.(string)
	if present && (!ok || s == "") {
		return "", api.Invalid("The subject property %s must be a string that is not empty.", name).On("subject.properties")
	}
	return s, nil
}

// Types of a subject. Each belongs to one form of IAM ID.
var subjectTypes = map[string]crn.Kind{
	"user": crn.KindUser, "service_id": crn.KindServiceID, "profile": crn.KindProfile, "crn": crn.KindCRN,
}

func typed(subjectType, id string) error {
	kind := crn.KindOf(id)
	if kind == crn.KindUnknown {
		return api.Invalid("subject.id %q is not an IAM ID, such as IBMid-…, iam-ServiceId-… or iam-Profile-….", id).On("subject.id")
	}
	if subjectType == "" {
		return nil
	}
	if want, ok := subjectTypes[subjectType]; !ok || want != kind {
		return api.Invalid("subject.type %.100q does not go with the id %q; it is one of user, service_id, profile, crn, as the id says.", subjectType, id).On("subject.type")
	}
	return nil
}

// attributes returns the resource attributes that a question names, and the
// access tags: those of the CRN, or of the type and id, with the properties
// added. A property must not contradict what the CRN or the type says.
func attributes(c *api.Call, r entity) (map[string]string, []string, error) {
	out := map[string]string{}
	add := func(name, value string) error {
		if len(value) > maxText {
			return api.Invalid("The resource's %.100s must not be longer than %d bytes.", name, maxText).On("resource")
		}
		if old, ok := out[name]; ok && old != value {
			return api.Invalid("The resource's %s is %q in one place and %q in another.", name, old, value).On("resource")
		}
		out[name] = value
		return nil
	}
	if id := r.id(); strings.HasPrefix(id, "crn:") {
		parsed, err := crn.Parse(id)
		if err != nil {
			return nil, nil, api.Invalid("The resource's id %.100q is not a CRN.", id).On("resource").Because(err)
		}
		out = access.AttributesOf(parsed)
	} else if id != "" {
		if err := add(access.Resource, id); err != nil {
			return nil, nil, err
		}
	}
	service, kind, _ := strings.Cut(r.Type, "/")
	for name, value := range map[string]string{access.ServiceName: service, access.ResourceType: kind} {
		if value == "" {
			continue
		}
		if err := add(name, value); err != nil {
			return nil, nil, err
		}
	}
	tags, err := tagsOf(r)
	if err != nil {
		return nil, nil, err
	}
	if len(r.Properties) > maxProperties {
		return nil, nil, api.Invalid("A resource has no more than %d properties.", maxProperties).On("resource.properties")
	}
	for name, value := range r.Properties {
		s, ok := value.(string)
		switch {
		case name == "tags":
			continue
		case len(name) > maxText:
			return nil, nil, api.Invalid("The name of a resource property must not be longer than %d bytes.", maxText).On("resource.properties")
		case !ok:
			return nil, nil, api.Invalid("The resource property %s must be a string.", name).On("resource.properties")
		case name == access.ServiceType || name == access.ServiceGroupID:
			return nil, nil, api.Invalid("The resource property %s follows from the service and cannot be given.", name).On("resource.properties")
		}
		if err := add(name, s); err != nil {
			return nil, nil, err
		}
	}
	if out[access.AccountID] == "" {
		out[access.AccountID] = c.Account()
	}
	if out[access.ServiceName] == "" {
		return nil, nil, api.Invalid("The resource needs a service: as its type, in its CRN, or as the property serviceName.").On("resource")
	}
	return out, tags, nil
}

// tagsOf returns the access tags of a resource, each key:value.
func tagsOf(r entity) ([]string, error) {
	value := r.Properties["tags"]
	if value == nil {
		return nil, nil
	}
	items, ok := value.([]any)
	if !ok || len(items) > maxTags {
		return nil, api.Invalid("The resource property tags must be an array of no more than %d strings.", maxTags).On("resource.properties")
	}
	var tags []string
	for _, item := range items {
		s, ok := item.(string)
		if !ok || len(s) > maxText {
			return nil, api.Invalid("The resource property tags must be an array of strings, each KEY:VALUE.").On("resource.properties")
		}
		tags = append(tags, s)
	}
	return tags, nil
}

// live refuses subjects that are gone. A subject that comes with its access
// token is held to it: the token must count now and be the subject's own.
// Services and compute resources that act under their CRN are known elsewhere.
func (h *handler) live(c *api.Call, subject *entity, q access.Request) error {
	service := crn.KindOf(q.Subject) == crn.KindCRN
	if q.AccountID != q.Resource[access.AccountID] && !service {
		// Decide refuses it, whoever it is. Whether another account has such an
		// identity is not for the asking service (promise 5).
		return nil
	}
	if raw, ok := subject.Properties[accessToken].(string); ok {
		claims, err := c.Auth.Caller(raw)
		if err != nil {
			return err
		}
		if claims.IAMID != q.Subject || claims.Account.BSS != q.AccountID {
			return errors.New("the access token is not the subject's")
		}
		return nil
	}
	if service {
		return nil
	}
	return h.subjects.Live(q.AccountID, q.Subject)
}
