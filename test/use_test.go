package test

import (
	"strings"
	"testing"

	"tabard.dev/tabard/test/harness"
)

// TestARecommendationIsAppliedAsItIsPrinted works as a profile that may do more
// than it needs, runs what tabard iam recommend prints, and does the same work
// again: it goes on, and what was not used is refused. The counts outlive a
// restart.
func TestARecommendationIsAppliedAsItIsPrinted(t *testing.T) {
	s := harness.Start(t, "--driver", "none")
	s.Login()
	sh := harness.StartShell(t, s, nil, nil)
	sh.Run(`
		tabard iam trusted-profile-create worker
		tabard iam trusted-profile-policy-create worker --roles Administrator --account-management
		tabard iam trusted-profile-policy-create worker --roles Editor --service-name is
		tabard iam trusted-profile-policy-create worker --roles Administrator --service-name kms
		me=$(tabard target --output json | sed -n 's/.*"iam_id": "\(.*\)",*/\1/p')
		tabard iam trusted-profile-identity-create worker --id $me --id-type USER`)
	const work = `
		tabard iam trusted-profile-assume worker
		tabard iam trusted-profiles
		tabard iam access-groups
		tabard is keys
		tabard iam trusted-profile-leave`
	sh.Run(work)
	s.Stop()
	s.Launch()
	used := sh.Run("tabard iam access-use worker")
	for _, action := range []string{"iam-identity.profile.get", "is.key.key.list"} {
		if !strings.Contains(used, action) {
			t.Errorf("after a restart the use of %s is not known:\n%s", action, used)
		}
	}
	for _, flags := range []string{"", " --custom-role"} {
		printed := sh.Run("tabard iam recommend worker" + flags)
		_, commands, ok := strings.Cut(printed, "To apply it all the same:\n")
		if !ok {
			t.Fatalf("nothing to apply:\n%s", printed)
		}
		sh.Run(commands)
		if out := sh.Run(work); !strings.Contains(out, "worker") {
			t.Errorf("the work does not go on:\n%s", out)
		}
		sh.Run(`
			tabard iam trusted-profile-assume worker
			if tabard iam trusted-profile-create more; then exit 1; fi
			if tabard is vpc-create more; then exit 1; fi
			tabard iam trusted-profile-leave`)
	}
	if left := sh.Run("tabard iam recommend worker --custom-role"); strings.Contains(left, "To apply it") {
		t.Errorf("what was applied is not the end of it:\n%s", left)
	}
}
