package authzen

import (
	"cmp"
	"encoding/base64"
	"encoding/json"
	"strings"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api"
)

// The older interface (reference/access-and-audit.md section 3.1): an array of
// questions in IAM's own terms.

type legacyQuestion struct {
	RequestID string `json:"requestId"`
	Subject   struct {
		Attributes      map[string]string `json:"attributes"`
		AccessTokenBody string            `json:"accessTokenBody"`
	} `json:"subject"`
	Action   string `json:"action"`
	Resource struct {
		CRN        string            `json:"crn"`
		Attributes map[string]string `json:"attributes"`
	} `json:"resource"`
}

// question translates into the terms of the one evaluator.
func (l legacyQuestion) question() (question, error) {
	id, account := l.Subject.Attributes["id"], l.Subject.Attributes["accountId"]
	if l.Subject.AccessTokenBody != "" {
		// The asking service has checked the token, or has not: the subject is
		// its word either way.
		var claims struct {
			IAMID   string `json:"iam_id"`
			Account struct {
				BSS string `json:"bss"`
			} `json:"account"`
		}
		b, err := base64.RawURLEncoding.DecodeString(strings.TrimRight(l.Subject.AccessTokenBody, "="))
		if err != nil || json.Unmarshal(b, &claims) != nil || claims.IAMID == "" {
			return question{}, api.Invalid("subject.accessTokenBody must be the middle part of an access token.").On("subject")
		}
		for _, said := range []struct{ name, attribute, token string }{{"id", id, claims.IAMID}, {"account", account, claims.Account.BSS}} {
			if said.attribute != "" && said.token != "" && said.attribute != said.token {
				return question{}, api.Invalid("The subject's %s is %.100q in its attributes and %.100q in its token.", said.name, said.attribute, said.token).On("subject")
			}
		}
		id, account = claims.IAMID, cmp.Or(claims.Account.BSS, account)
	}
	q := question{
		Subject: &entity{ID: &id, Properties: map[string]any{}},
		Action:  &action{Name: l.Action}, Resource: &entity{ID: &l.Resource.CRN, Properties: map[string]any{}},
	}
	if account != "" {
		q.Subject.Properties[access.AccountID] = account
	}
	if l.Resource.CRN != "" && !strings.HasPrefix(l.Resource.CRN, "crn:") {
		return question{}, api.Invalid("resource.crn %.100q is not a CRN.", l.Resource.CRN).On("resource")
	}
	for name, value := range l.Resource.Attributes {
		q.Resource.Properties[name] = value
	}
	return q, nil
}

type legacyDecision struct {
	Permitted  bool       `json:"permitted"`
	Reason     string     `json:"reason"`
	Obligation obligation `json:"obligation"`
}

type obligation struct {
	Actions []string         `json:"actions"`
	MaxAge  int              `json:"maxCacheAgeSeconds"`
	Subject legacyAttributes `json:"subject"`
}

type legacyAttributes struct {
	Attributes map[string]string `json:"attributes"`
}

type legacyAnswer struct {
	Status    string          `json:"status"`
	RequestID string          `json:"requestId,omitempty"`
	Decision  *legacyDecision `json:"authorizationDecision,omitempty"`
}

// authz answers the array in its order. A question that may not be asked
// refuses the whole call.
func (h *handler) authz(c *api.Call, questions *[]legacyQuestion) (api.Reply, error) {
	if len(*questions) == 0 || len(*questions) > maxQuestions {
		return api.Reply{}, api.Invalid("The body must be an array of 1 to %d questions.", maxQuestions)
	}
	out := []legacyAnswer{}
	for _, l := range *questions {
		q, err := l.question()
		if err != nil {
			return api.Reply{}, err
		}
		a, err := h.decide(c, q)
		if err != nil {
			return api.Reply{}, err
		}
		actions := a.Context.PermittedActions
		if actions == nil {
			actions = []string{}
		}
		out = append(out, legacyAnswer{Status: "200", RequestID: l.RequestID, Decision: &legacyDecision{
			Permitted: a.Decision, Reason: a.Context.Reason,
			Obligation: obligation{Actions: actions, MaxAge: MaxAge, Subject: legacyAttributes{map[string]string{"id": q.Subject.id()}}},
		}})
	}
	return api.Reply{Body: map[string]any{"responses": out}}, nil
}

type legacyRoles struct {
	SubjectID   map[string]string `json:"subjectId"`
	RoleActions []roleActions     `json:"roleActions"`
}

type roleActions struct {
	Role struct {
		CRN         string `json:"crn"`
		DisplayName string `json:"displayName"`
	} `json:"role"`
	Actions []roleAction `json:"actions"`
}

type roleAction struct {
	Action string `json:"action"`
}

// authzRoles lists the roles that subjects have on resources, with the actions
// of each.
func (h *handler) authzRoles(c *api.Call, questions *[]legacyQuestion) (api.Reply, error) {
	if len(*questions) == 0 || len(*questions) > maxQuestions {
		return api.Reply{}, api.Invalid("The body must be an array of 1 to %d questions.", maxQuestions)
	}
	catalog := c.Directory.Catalog(c.Account())
	out := []legacyRoles{}
	for _, l := range *questions {
		l.Action = anyAction
		q, err := l.question()
		if err != nil {
			return api.Reply{}, err
		}
		request, err := h.request(c, q)
		if err != nil {
			return api.Reply{}, err
		}
		if err := mayAsk(c, request.Resource); err != nil {
			return api.Reply{}, err
		}
		found := legacyRoles{SubjectID: map[string]string{"userId": request.Subject}, RoleActions: []roleActions{}}
		if h.live(c, q.Subject, request) == nil {
			for _, id := range access.RolesOn(c.Directory, request) {
				found.RoleActions = append(found.RoleActions, describe(catalog, id, request.Resource[access.ServiceName]))
			}
		}
		c.NoteSearch(request, len(found.RoleActions))
		out = append(out, found)
	}
	return api.Reply{Body: map[string]any{"responses": out}}, nil
}

func describe(catalog *access.Catalog, id, service string) roleActions {
	var r roleActions
	r.Role.CRN = id
	if role, ok := catalog.Role(id); ok {
		r.Role.DisplayName = role.DisplayName
	}
	r.Actions = []roleAction{}
	for _, a := range catalog.Actions(id, service) {
		r.Actions = append(r.Actions, roleAction{a})
	}
	return r
}
