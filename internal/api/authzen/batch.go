package authzen

import (
	"encoding/json"
	"net/http"

	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/grant"
)

// Semantics of a batch (AuthZEN section 7.1.2).
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
		a, err := h.decide(c, q.over(b.question))
		if err != nil {
			a, err = failed(err)
		}
		if err != nil {
			return api.Reply{}, err
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
// A server that cannot answer now says so for the whole batch.
func failed(err error) (answer, error) {
	f := fault.Of(err)
	if f.Kind == fault.Unavailable || f.Kind == fault.Internal {
		return answer{}, err
	}
	return answer{Context: &context{MaxAge: MaxAge, Error: &problem{Status: grant.StatusOf(f.Kind), Message: f.Message}}}, nil
}

// configuration serves the metadata of the decision point (AuthZEN section 9).
func configuration(url string) http.HandlerFunc {
	doc, err := json.Marshal(map[string]string{
		"policy_decision_point":       url,
		"access_evaluation_endpoint":  url + "/access/v1/evaluation",
		"access_evaluations_endpoint": url + "/access/v1/evaluations",
		"search_subject_endpoint":     url + "/access/v1/search/subject",
		"search_action_endpoint":      url + "/access/v1/search/action",
	})
	return func(w http.ResponseWriter, _ *http.Request) {
		if err != nil {
			w.WriteHeader(http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		// The client may be gone; there is nobody left to tell.
		_, _ = w.Write(doc)
	}
}
