package webhook

import (
	"encoding/json"
	"testing"
)

const asInstalled = `[
	{"name": "require.iam.tabard.dev", "failurePolicy": "Fail", "objectSelector": {},
	 "namespaceSelector": {"matchExpressions": [
		{"key": "iam.tabard.dev/identity", "operator": "In", "values": ["required"]},
		{"key": "kubernetes.io/metadata.name", "operator": "NotIn", "values": ["kube-system", "a"]}]},
	 "rules": [{"apiGroups": [""], "apiVersions": ["v1"], "resources": ["pods"], "operations": ["CREATE"]}]},
	{"name": "inject.iam.tabard.dev", "failurePolicy": "Ignore",
	 "namespaceSelector": {"matchExpressions": [{"key": "iam.tabard.dev/identity", "operator": "NotIn", "values": ["required"]}]},
	 "rules": [{"apiGroups": ["*"], "apiVersions": ["*"], "resources": ["*"], "operations": ["*"]}]},
	{"name": "somebody-elses.example.com"}
]`

func TestWhatLetsPodsPastTheWebhookIsDrift(t *testing.T) {
	for name, c := range map[string]struct {
		change  func(h []hook) []hook
		require string
		inject  string
	}{
		"nothing":               {func(h []hook) []hook { return h }, "", ""},
		"another order":         {func(h []hook) []hook { return []hook{h[1], h[0]} }, "", ""},
		"one is gone":           {func(h []hook) []hook { return h[1:] }, "it is not there", ""},
		"all are gone":          {func([]hook) []hook { return nil }, "it is not there", "it is not there"},
		"a softer policy":       {func(h []hook) []hook { h[0].FailurePolicy = "Ignore"; return h }, "failurePolicy", ""},
		"a harder policy":       {func(h []hook) []hook { h[1].FailurePolicy = "Fail"; return h }, "", "failurePolicy"},
		"the other's selector":  {func(h []hook) []hook { h[0].NamespaceSelector = h[1].NamespaceSelector; return h }, "namespaceSelector", ""},
		"no selector":           {func(h []hook) []hook { h[0].NamespaceSelector = selector{}; return h }, "namespaceSelector", ""},
		"one namespace alone":   {func(h []hook) []hook { h[0].NamespaceSelector.MatchExpressions[1].Operator = "In"; return h }, "namespaceSelector", ""},
		"an exception for pods": {func(h []hook) []hook { h[0].ObjectSelector.MatchLabels = map[string]string{"a": "b"}; return h }, "objectSelector", ""},
		"a condition":           {func(h []hook) []hook { h[0].MatchConditions = json.RawMessage(`[{}]`); return h }, "matchConditions", ""},
		"other resources": {func(h []hook) []hook {
			h[0].Rules[0].Resources, h[0].FailurePolicy = []string{"pods/status"}, "Ignore"
			return h
		}, "failurePolicy, rules", ""},
		"updates alone": {func(h []hook) []hook { h[0].Rules[0].Operations = []string{"UPDATE"}; return h }, "rules", ""},
	} {
		var hooks []hook
		if err := json.Unmarshal([]byte(asInstalled), &hooks); err != nil {
			t.Fatal(err)
		}
		got := drift(c.change(hooks))
		if got[hookRequire] != c.require || got[hookInject] != c.inject || len(got) != 2 {
			t.Errorf("%s: %q", name, got)
		}
	}
}
