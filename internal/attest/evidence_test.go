package attest_test

import (
	"errors"
	"slices"
	"testing"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/attest"
)

var (
	kubernetesChecks = []string{
		attest.CheckForm, attest.CheckIssuer, attest.CheckSignature, attest.CheckAudience, attest.CheckTime, attest.CheckClaims,
	}
	ownChecks      = append(slices.Clone(kubernetesChecks), attest.CheckPlacement)
	instanceChecks = slices.Insert(slices.Clone(ownChecks), 2, attest.CheckHost)
)

// wantTrace demands every check in its order: those before failed passed, those
// after it were skipped. An empty failed stands for a trace without a failure.
func wantTrace(t *testing.T, trace activity.Trace, checks []string, failed string) {
	t.Helper()
	if !slices.EqualFunc(trace, checks, func(c activity.Check, name string) bool { return c.Name == name }) {
		t.Fatalf("trace %+v, want the checks %v", trace, checks)
	}
	want := activity.Pass
	for _, c := range trace {
		if c.Name == failed {
			if c.Outcome != activity.Fail || c.Hint == "" {
				t.Errorf("check %+v, want a failure with a hint", c)
			}
			want = activity.Skip
			continue
		}
		if c.Outcome != want {
			t.Errorf("check %s is %s, want %s", c.Name, c.Outcome, want)
		}
	}
	if failed != "" && want != activity.Skip {
		t.Errorf("no check %s in %+v", failed, trace)
	}
}

// wantRefusal demands a refusal for the reason, at the check.
func wantRefusal(t *testing.T, err error, reason attest.Reason, checks []string, failed string) *attest.Refusal {
	t.Helper()
	var r *attest.Refusal
	if !errors.As(err, &r) {
		t.Fatalf("error %v, want a refusal", err)
	}
	if r.Reason != reason {
		t.Errorf("reason %s, want %s: %v", r.Reason, reason, r)
	}
	if r.Detail == "" {
		t.Error("the refusal has no detail for the caller")
	}
	wantTrace(t, r.Trace, checks, failed)
	return r
}
