package cli

import "testing"

// family returns the names that a word makes with suffixes, of which "" is the
// word itself.
func family(word string, suffixes ...string) []string {
	out := make([]string, len(suffixes))
	for i, s := range suffixes {
		out[i] = word + s
	}
	return out
}

func TestEveryCommandThatPeopleKnowIsThere(t *testing.T) {
	crud := []string{"s", "", "-create", "-update", "-delete"}
	locks := []string{"-lock", "-unlock"}
	policies := func(word string) []string {
		return append(family(word+"-polic", "ies", "y"), family(word+"-policy", "-create", "-update", "-delete")...)
	}
	var iam []string
	for _, names := range [][]string{
		family("trusted-profile", crud...), family("trusted-profile", "-assume", "-leave"), policies("trusted-profile"),
		family("trusted-profile-link", "s", "", "-create", "-delete"), family("trusted-profile-rule", crud...),
		{"trusted-profile-identities"}, family("trusted-profile-identity", "", "-create", "-delete"),
		family("service-id", crud...), family("service-id", locks...), family("service-id-group", crud...),
		family("service-api-key", crud...), family("service-api-key", locks...), family("service-api-key", "-disable", "-enable"),
		family("api-key", crud...), family("api-key", locks...), family("api-key", "-disable", "-enable"),
		policies("service"), policies("user"), policies("access-group"),
		family("access-group", crud...), family("access-group-rule", crud...),
		family("access-group-user", "s", "-add", "-remove", "-purge"), family("access-group-service-id", "s", "-add", "-remove", "-purge"),
		family("access-group-trusted-profile", "s", "-add", "-remove", "-purge"),
		family("role", crud...), {"authorization-policies"}, family("authorization-policy", "", "-create", "-delete"),
		{"access-policies", "account-policies"}, family("access-policy", "", "-delete", "-restore"), {"policy-restore"},
		{"oauth-tokens", "bearer-token", "service-register", "inactivity-report"},
		family("account-settings", "", "-update"), family("access-management-settings", "", "-update"), family("access-group-settings", "", "-update"),
	} {
		iam = append(iam, names...)
	}
	var resource []string
	for _, names := range [][]string{
		family("group", crud...), family("service-instance", crud...), family("service-instance", locks...), family("service-key", crud...),
		family("reclamation", "s", "", "-restore", "-delete"), {"quotas", "quota", "plans"},
	} {
		resource = append(resource, names...)
	}
	var is []string
	for _, names := range [][]string{
		{"regions", "zones", "vpc-address-prefixes", "instance-profiles", "instance-profile", "operating-systems", "operating-system"},
		family("vpc", crud...), family("subnet", crud...), family("key", crud...), family("image", crud...), family("security-group", crud...),
		family("security-group-rule", "s", "", "-add", "-update", "-delete"), family("security-group-target", "s", "-add", "-remove"),
		family("instance", crud...), family("instance", "-start", "-stop", "-reboot", "-initialization-values"),
		family("instance-network-interface", "s", "", "-floating-ips", "-floating-ip-add", "-floating-ip-remove"),
		family("instance-network-attachment", "s", ""),
		family("virtual-network-interface", "s", "", "-update", "-floating-ips", "-floating-ip-add", "-floating-ip-remove"),
		family("volume", "s", "", "-update"), family("floating-ip", "s", "", "-reserve", "-update", "-release"),
	} {
		is = append(is, names...)
	}
	root := New()
	for group, names := range map[string][]string{"iam": iam, "resource": resource, "is": is} {
		for _, name := range names {
			found, rest, err := root.Find([]string{group, name})
			if err != nil || len(rest) > 0 || found.Name() != name && !found.HasAlias(name) {
				t.Errorf("there is no tabard %s %s", group, name)
			}
		}
	}
}

func TestAnUnknownFlagSuggestsTheNearOnes(t *testing.T) {
	newServer(t)
	run(t, "iam", "trusted-profile-create", "p", "--descript", "x").want(2, "unknown flag: --descript; did you mean --description?\nUsage: ")
	run(t, "iam", "trusted-profile-create", "p", "-z").want(2, "-z")
	run(t, "iam", "role-create").want(2, "missing NAME\n")
	run(t, "iam", "service-register", "x").want(2, `unexpected argument "x"`)
}
