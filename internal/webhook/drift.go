package webhook

import (
	"encoding/json"
	"slices"
	"strings"
)

// hook is a webhook in the configuration that API servers read.
type hook struct {
	Name         string `json:"name"`
	ClientConfig struct {
		CABundle []byte `json:"caBundle"`
	} `json:"clientConfig"`
	FailurePolicy     string          `json:"failurePolicy"`
	NamespaceSelector selector        `json:"namespaceSelector"`
	ObjectSelector    selector        `json:"objectSelector"`
	MatchConditions   json.RawMessage `json:"matchConditions"`
	Rules             []rule          `json:"rules"`
}

type selector struct {
	MatchLabels      map[string]string `json:"matchLabels"`
	MatchExpressions []expression      `json:"matchExpressions"`
}

type expression struct {
	Key      string   `json:"key"`
	Operator string   `json:"operator"`
	Values   []string `json:"values"`
}

type rule struct {
	APIGroups   []string `json:"apiGroups"`
	APIVersions []string `json:"apiVersions"`
	Resources   []string `json:"resources"`
	Operations  []string `json:"operations"`
}

// Names of the webhooks in the configuration.
const (
	hookRequire = "require.iam.tabard.dev"
	hookInject  = "inject.iam.tabard.dev"
)

// drift says what stands otherwise in the configuration than the manifests have
// it, for each of the webhooks, so that pods may get past it. Which namespaces
// are left out by their names is for operators to choose.
//
// Nobody but the operators puts it right: what keeps a cluster as a repository
// says would take it back, again and again.
func drift(hooks []hook) map[string]string {
	out := map[string]string{hookRequire: "it is not there", hookInject: "it is not there"}
	for _, h := range hooks {
		policy, operator := "Fail", "In"
		switch h.Name {
		case hookRequire:
		case hookInject:
			policy, operator = "Ignore", "NotIn"
		default:
			continue
		}
		var fields []string
		differs := func(field string, is bool) {
			if is {
				fields = append(fields, field)
			}
		}
		differs("failurePolicy", h.FailurePolicy != policy)
		differs("namespaceSelector", !h.NamespaceSelector.identity(operator))
		differs("objectSelector", len(h.ObjectSelector.MatchLabels)+len(h.ObjectSelector.MatchExpressions) > 0)
		differs("matchConditions", len(h.MatchConditions) > 0)
		differs("rules", !slices.ContainsFunc(h.Rules, rule.pods))
		out[h.Name] = strings.Join(fields, ", ")
	}
	return out
}

// identity reports whether a selector goes by the label of namespaces that
// demand an identity, and by nothing else but their names.
func (s selector) identity(operator string) bool {
	label := false
	for _, e := range s.MatchExpressions {
		switch {
		case e.Key == LabelIdentity && e.Operator == operator && slices.Equal(e.Values, []string{"required"}):
			label = true
		case e.Key == "kubernetes.io/metadata.name" && e.Operator == "NotIn":
		default:
			return false
		}
	}
	return label && len(s.MatchLabels) == 0
}

// pods reports whether a rule is about the creation of pods.
func (r rule) pods() bool {
	has := func(list []string, want string) bool {
		return slices.Contains(list, want) || slices.Contains(list, "*")
	}
	return has(r.APIGroups, "") && has(r.APIVersions, "v1") && has(r.Resources, "pods") && has(r.Operations, "CREATE")
}
