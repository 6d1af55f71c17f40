package authzen

import (
	"encoding/json"
	"net/http"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/grant"
)

// Semantics of a batch (reference/access-and-audit.md section 3.2).
const (
	executeAll  = "execute_all"
	firstDeny   = "deny_on_first_deny"
	firstPermit = "permit_on_first_permit"
	tooMany     = "A batch has no more than %d evaluations."
)

type batch struct {
	question
	Evaluations []question `json:"evaluations"`
	Options     struct {
		Semantic string `json:"evaluations_semantic"`
	} `json:"options"`
}

func (h *handler) evaluations(c *api.Call, b *batch) (api.Reply, error) {
	if len(b.Evaluations) == 0 {
		// Without the array the request is one for a single evaluation.
		return h.evaluation(c, &b.question)
	}
	if len(b.Evaluations) > maxQuestions {
		return api.Reply{}, api.Invalid(tooMany, maxQuestions).On("evaluations")
	}
	switch b.Options.Semantic {
	case "", executeAll, firstDeny, firstPermit:
	default:
		return api.Reply{}, api.Invalid("options.evaluations_semantic must be one of %s, %s, %s.", executeAll, firstDeny, firstPermit).On("options")
	}
	out := []answer{}
	for _, q := range b.Evaluations {
		a, err := h.evaluate(c, q.over(b.question))
		if err != nil {
			if a, err = h.failed(c, q.over(b.question), err); err != nil {
				return api.Reply{}, err
			}
		}
		out = append(out, a)
		if b.Options.Semantic == firstDeny && !a.Decision || b.Options.Semantic == firstPermit && a.Decision {
			break
		}
	}
	return api.Reply{Body: map[string]any{"evaluations": out}}, nil
}

// over returns the question with what it leaves out taken from the defaults.
func (q question) over(defaults question) question {
	if q.Subject == nil {
		q.Subject = defaults.Subject
	}
	if q.Action == nil {
		q.Action = defaults.Action
	}
	if q.Resource == nil {
		q.Resource = defaults.Resource
	}
	return q
}

// failed turns the fault of one question into its answer, which is a denial.
// One that the caller may not ask is recorded as it is when it is asked alone.
// A server that cannot answer now says so for the whole batch.
func (h *handler) failed(c *api.Call, q question, err error) (answer, error) {
	f := fault.Of(err)
	switch f.Kind {
	case fault.Unavailable, fault.Internal:
		return answer{}, err
	case fault.Denied:
		if err := h.noteRefusedAsker(c, q); err != nil {
			return answer{}, err
		}
	}
	return answer{Context: &details{
		MaxAge: MaxAge, TransactionID: api.TransactionID(c.R.Context()),
		Error: &problem{Status: grant.StatusOf(f.Kind), Message: f.Message},
	}}, nil
}

func (h *handler) noteRefusedAsker(c *api.Call, q question) error {
	request, err := h.request(c, q)
	if err != nil {
		return err
	}
	asked := access.Request{
		Subject: c.Caller.IAMID, AccountID: c.Account(), Action: access.ActionDecide, Resource: request.Resource, Time: c.Now(),
	}
	c.NoteDenial(asked, access.Decide(c.Directory, asked).Explain())
	return nil
}

// configuration serves the metadata of the decision point
// (reference/access-and-audit.md section 3.2).
func configuration(cfg *api.Config) http.HandlerFunc {
	doc, err := json.Marshal(map[string]string{
		"policy_decision_point":       cfg.URL,
		"access_evaluation_endpoint":  cfg.URL + "/access/v1/evaluation",
		"access_evaluations_endpoint": cfg.URL + "/access/v1/evaluations",
		"search_subject_endpoint":     cfg.URL + "/access/v1/search/subject",
		"search_action_endpoint":      cfg.URL + "/access/v1/search/action",
	})
	if err != nil {
		panic(err) // a map of strings always encodes
	}
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		// The client may be gone; there is nobody left to tell.
		_, _ = w.Write(doc)
	}
}
