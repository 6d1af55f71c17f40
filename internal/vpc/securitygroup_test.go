package vpc_test

import (
	"slices"
	"testing"

	"tabard.dev/tabard/internal/vpc"
)

func TestTheDefaultGroupOfAnOlderVPCIsAlwaysTheSame(t *testing.T) {
	v := &vpc.VPC{ID: "r006-1", AccountID: "a", ResourceGroupID: "g", SecurityGroup: vpc.Ref{ID: "r006-2", Name: "older"}}
	first, second := vpc.DefaultGroup(v), vpc.DefaultGroup(v)
	if !slices.Equal(first.Rules, second.Rules) || first.Revision != 0 {
		t.Errorf("%+v and %+v", first, second)
	}
	if first.ID != "r006-2" || first.VPCID != v.ID || first.Name != "older" || len(first.Rules) != 2 || first.Rules[0].ID == first.Rules[1].ID {
		t.Errorf("%+v", first)
	}
	if first.Rules[1].RemoteGroup != first.ID || first.Rules[1].Direction != vpc.Inbound {
		t.Errorf("the inbound rule is %+v", first.Rules[1])
	}
}

func TestARuleForThreeProtocolsIsOneForEach(t *testing.T) {
	for protocol, want := range map[string][]string{
		vpc.ProtocolAll: {"all"}, vpc.ProtocolThree: {"icmp", "tcp", "udp"}, vpc.ProtocolTCP: {"tcp"},
	} {
		r := vpc.SecurityGroupRule{Protocol: protocol}
		if got := r.Protocols(); !slices.Equal(got, want) {
			t.Errorf("%s stands for %v", protocol, got)
		}
	}
}

func TestForceActsOnWhatIsUnderWay(t *testing.T) {
	for _, test := range []struct {
		status, action string
		force          bool
		want           string
	}{
		{vpc.Running, "stop", false, vpc.Stopping},
		{vpc.Stopping, "stop", false, ""},
		{vpc.Stopping, "stop", true, vpc.Stopping},
		{vpc.Restarting, "stop", true, vpc.Stopping},
		{vpc.Restarting, "reboot", false, ""},
		{vpc.Restarting, "reboot", true, vpc.Restarting},
		{vpc.Running, "start", true, ""},
		{vpc.Stopped, "stop", true, ""},
		{vpc.Deleting, "stop", true, ""},
		{vpc.Failed, "start", false, vpc.Starting},
	} {
		i := vpc.Instance{Status: test.status}
		got, err := i.Act(test.action, test.force)
		if got != test.want || (err == nil) != (test.want != "") {
			t.Errorf("%s %s force %v: %q, %v", test.action, test.status, test.force, got, err)
		}
		i.External = &vpc.External{Device: "tap0"}
		if next, err := i.Act(test.action, test.force); err == nil {
			t.Errorf("a machine of somebody else's: %s leads to %s", test.action, next)
		}
	}
}
