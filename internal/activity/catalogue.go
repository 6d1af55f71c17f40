package activity

import (
	"slices"
	"strings"
)

// Entry says of one action what its events are like. Failed ones have the
// severity that follows from their status instead.
type Entry struct {
	// Action is the event's. One that begins with "*." stands for the actions
	// of any service that resource instances are of.
	Action   string
	Severity string // of a success
	Data     bool   // a data event: use of what there is, and no change of it

	// Says is what requestData and responseData tell beside what is the same in
	// all of a section.
	Says string
}

// Section is the part of the catalogue that one service writes.
type Section struct {
	Title   string
	Same    string // what requestData and responseData tell in all events of the section
	Entries []Entry
}

// What the events of changes have in common.
const sameOfChanges = "requestData: `method`, `path`, and the object as `created`, `changed` (old and new values) or `deleted`, with what went with it in `also`. responseData: ids and counts of the answer."

// entries makes the entries of one severity, without more to say.
func entries(severity string, actions ...string) []Entry {
	out := make([]Entry, len(actions))
	for i, a := range actions {
		out[i] = Entry{Action: a, Severity: severity}
	}
	return out
}

func says(severity, action, what string) Entry {
	return Entry{Action: action, Severity: severity, Says: what}
}

// Catalogue is every action that Tabard records, in the order of
// reference/access-and-audit.md section 6 (names that it does not list are made
// like those that it does). Routine is normal, changes are a warning, deletions
// and what is about credentials, or about who may get in at all, are critical.
//
// Refused reads are in it only where the reference names an event for them;
// others bear the IAM action that the caller lacked. See ReadEvent.
func Catalogue() []Section {
	return []Section{
		{
			Title: "Identity", Same: sameOfChanges,
			Entries: slices.Concat(
				[]Entry{
					says(Warning, "iam-identity.account-profile.create", ""),
					says(Warning, "iam-identity.account-profile.update", "Also of links, claim rules and identities: `object` is what was made, changed or removed (link, claim-rule, profile), with its type, CRN, namespace, name and conditions; responseData has `change`. In the log of a profile's account too when somebody else's resource goes that it was linked to."),
					says(Critical, "iam-identity.account-profile.delete", "`also` has the links, rules and policies that went with it."),
				},
				entries(Warning, "iam-identity.account-serviceid.create", "iam-identity.account-serviceid.update"),
				entries(Critical, "iam-identity.account-serviceid.delete"),
				entries(Warning, "iam-identity.account-serviceid-group.create", "iam-identity.account-serviceid-group.update"),
				entries(Critical, "iam-identity.account-serviceid-group.delete"),
				entries(Critical,
					"iam-identity.user-apikey.create", "iam-identity.user-apikey.update", "iam-identity.user-apikey.delete",
					"iam-identity.serviceid-apikey.create", "iam-identity.serviceid-apikey.update", "iam-identity.serviceid-apikey.delete"),
				[]Entry{
					says(Critical, "iam-identity.serviceid-apikey.read", "The stored value of a key was shown."),
					says(Critical, "iam-identity.user-apikey.report-leak", ""), says(Critical, "iam-identity.serviceid-apikey.report-leak", ""),
					says(Critical, "iam-identity.accountsettings.update", "`request_body` has `old_…` and `new_…` of each setting that changed."),
				},
				entries(Critical, "iam-identity.idp.create", "iam-identity.idp.update", "iam-identity.idp.delete",
					"iam-identity.workload-issuer.create", "iam-identity.workload-issuer.update", "iam-identity.workload-issuer.delete"),
				entries(Normal, "iam-identity.preferences.update", "iam-identity.report.create"),
				entries(Critical, "iam-identity.preferences.delete"),
				entries(Critical, "iam-identity.account.create"),
			),
		},
		{
			Title: "Logins and tokens",
			Same:  "requestData: `grant_type`, `client_id`, and the profile that was named. responseData: `jti` and `expiration` of the token. The trace has the checks.",
			Entries: slices.Concat(
				entries(Normal, "iam-identity.user-apikey.login", "iam-identity.serviceid-apikey.login", "iam-identity.user-refreshtoken.login",
					"iam-identity.trustedprofile-apikey.login", "iam-identity.computeresource-token.login"),
				[]Entry{
					says(Normal, "iam-identity.user-federated.login", "With an identity provider's ID token."),
					says(Normal, "iam-identity.user-authcode.login", "The same, and a profile put on."),
					says(Normal, "iam-identity.host-token.login", "Of a host's agent."),
					says(Normal, "iam-identity.user-apikey.introspect", "Somebody asked what a key is good for."),
					says(Warning, "iam-identity.token.login", "A form that no grant could be made out of: always a failure."),
					says(Warning, "iam-identity.token.verify", "A request with a token that does not count: always a failure. It stands in the account of the token if this server has signed it, else in the operator's."),
				},
			),
		},
		{
			Title: "Users and accounts", Same: sameOfChanges,
			Entries: slices.Concat(
				entries(Critical, "user-management.user.create"),
				[]Entry{says(Warning, "user-management.user.update", "Also when an invitation is taken up.")},
				entries(Critical, "user-management.user.delete", "installation.account.create", "installation.account.close", "installation.account.reopen"),
			),
		},
		{
			Title: "Policies and roles", Same: sameOfChanges,
			Entries: slices.Concat(
				entries(Warning, "iam-am.policy.create", "iam-am.policy.update"),
				entries(Critical, "iam-am.policy.delete"),
				[]Entry{says(Critical, "iam-am.policy.purge", "A deleted policy cannot be restored any more.")},
				entries(Warning, "iam-access-management.customRole.create", "iam-access-management.customRole.update"),
				entries(Critical, "iam-access-management.customRole.delete"),
				entries(Warning, "iam-access-management.service.create", "iam-access-management.service.update"),
				entries(Critical, "iam-access-management.service.delete"),
				entries(Critical, "iam-access-management.account-settings.update"),
				[]Entry{
					{Action: "iam-access-management.account-settings.eval", Severity: Warning, Data: true, Says: "An identity of another account was let in or kept out. responseData: `decision`, `isEnforced`."},
					{Action: ActionEvaluated, Severity: Normal, Data: true, Says: "A decision; see below. A denial is a warning."},
				},
			),
		},
		{
			Title: "Access groups", Same: sameOfChanges,
			Entries: slices.Concat(
				entries(Warning, "iam-groups.group.create", "iam-groups.group.update"),
				entries(Critical, "iam-groups.group.delete"),
				[]Entry{
					says(Warning, "iam-groups.member.add", "`changed.members` has who was added."),
					says(Critical, "iam-groups.member.delete", "`changed.members` has who was removed."),
					says(Warning, "iam-groups.federated-member.add", "A rule made somebody a member at login. responseData: `iam_id`, `rule_id`, `access_group_id`."),
				},
				entries(Warning, "iam-groups.rule.create", "iam-groups.rule.update"),
				entries(Critical, "iam-groups.rule.delete", "iam-groups.account-settings.update"),
				entries(Normal, "iam-groups.group.read", "iam-groups.groups.list", "iam-groups.member.read", "iam-groups.members.list",
					"iam-groups.rule.read", "iam-groups.rules.list", "iam-groups.account-settings.read"),
			),
		},
		{
			Title: "Resources", Same: sameOfChanges,
			Entries: slices.Concat(
				entries(Warning, "*.instance.create", "*.instance.update"),
				entries(Critical, "*.instance.delete", "*.instance.schedule_reclaim"),
				entries(Warning, "*.instance.restore"),
				entries(Critical, "*.key.create", "*.key.delete"),
				[]Entry{says(Critical, "*.key.read", "The credentials in a resource key were shown.")},
				entries(Warning, "*.key.update", "resource-controller.group.create", "resource-controller.group.update"),
				entries(Critical, "resource-controller.group.delete"),
			),
		},
		{
			Title: "Clusters", Same: sameOfChanges,
			Entries: slices.Concat(
				entries(Critical, "containers-kubernetes.cluster.create", "containers-kubernetes.cluster.update",
					"containers-kubernetes.cluster.delete", "containers-kubernetes.cluster-keys.refresh"),
				entries(Warning, "containers-kubernetes.cluster-group.create", "containers-kubernetes.cluster-group.update",
					"containers-kubernetes.cluster-group.add-cluster", "containers-kubernetes.cluster-group.remove-cluster"),
				entries(Critical, "containers-kubernetes.cluster-group.delete"),
			),
		},
		{
			Title: "Hosts", Same: sameOfChanges,
			Entries: slices.Concat(
				entries(Critical, "host.join-token.create", "host.host.join", "host.host.revoke", "host.host.delete"),
				[]Entry{
					says(Warning, "host.machine.adopt", ""),
					says(Warning, "host.event.record", "A host sent an event that it should not have: always a failure."),
				},
			),
		},
		{
			Title: "Virtual servers", Same: sameOfChanges,
			Entries: slices.Concat(
				entries(Warning, "is.instance.instance.create", "is.instance.instance.update"),
				entries(Critical, "is.instance.instance.delete"),
				[]Entry{
					says(Warning, "is.instance.action.create", "Start, stop or reboot. responseData: `type`, `force`."),
					says(Critical, "is.instance.console.read", "How to get into the machine was shown."),
				},
				entries(Warning, "is.instance.network-interface.update", "is.instance.network-interface.attach", "is.instance.network-interface.detach",
					"is.virtual-network-interface.virtual-network-interface.update",
					"is.virtual-network-interface.floating-ip.attach", "is.virtual-network-interface.floating-ip.detach",
					"is.volume.volume.update"),
				manyOf("is.vpc.vpc", "is.subnet.subnet", "is.security-group.security-group", "is.security-group.rule",
					"is.floating-ip.floating-ip", "is.key.key", "is.image.image"),
				entries(Warning, "is.security-group.security-group.attach", "is.security-group.security-group.detach", "is.image.file.upload"),
				entries(Normal, "is.instance.instance.read", "is.vpc.vpc.read", "is.subnet.subnet.read", "is.security-group.security-group.read",
					"is.floating-ip.floating-ip.read", "is.key.key.read", "is.image.image.read", "is.volume.volume.read",
					"is.virtual-network-interface.virtual-network-interface.read"),
			),
		},
		{
			Title: "Instance metadata",
			Same:  "The initiator and the target are the instance. Reads that follow the first one within a minute share an event: responseData has `reads`, `since`, `until`, and in `after` the transaction of the first.",
			Entries: slices.Concat(
				[]Entry{
					says(Normal, "is.metadata.jwt-token.create", "responseData: `jti`, `expires_in` of the identity token."),
					says(Normal, "is.metadata.computeresource-token.request", "Has its IAM event under the same `correlationId`."),
					says(Normal, "is.metadata.certificate.create", ""),
				},
				dataEntries("is.metadata.instance.read", "is.metadata.instance.initialization",
					"is.metadata.instance-key.get", "is.metadata.instance-key.list",
					"is.metadata.instance-network-interface.get", "is.metadata.instance-network-interface.list",
					"is.metadata.instance-network-attachment.get", "is.metadata.instance-network-attachment.list",
					"is.metadata.instance-cluster-network-attachment.get", "is.metadata.instance-cluster-network-attachment.list",
					"is.metadata.instance-virtual-network-interface.get", "is.metadata.instance-virtual-network-interface.list",
					"is.metadata.instance-placement-group.get", "is.metadata.instance-placement-group.list",
					"is.metadata.instance-software-attachment.read", "is.metadata.instance-software-attachment.list",
					"is.metadata.instance-volume-attachment.get", "is.metadata.instance-volume-attachment.list"),
			),
		},
		{
			Title: "The activity log", Same: sameOfChanges,
			Entries: []Entry{
				says(Critical, "activity.settings.update", "`request_body` has the old and the new value."),
				says(Warning, ReserveRelease, "responseData: what was `released`, and what is `free` now."),
				says(Critical, DayDelete, "Of the server's own. responseData: the day, its positions, why it was dropped, and how many of its events no route had delivered yet."),
				says(Warning, StoreUpdate, "Of the server's own. responseData: the `state` that the store is in, which it `was` in, and `why`. Critical when it takes no writes."),
				says(Critical, StoreRestore, "Of the server's own. A removed file was put back; responseData has what was `found`."),
				says(Critical, "activity.route.create", "Of the server's own. requestData: the route's `target`, and `from` where it begins."),
				says(Critical, "activity.route.delete", "Of the server's own. requestData: `next`, which the route had come to."),
				says(Critical, "activity.route.fail", "Of the server's own. requestData: the `target` and `since` when it fails."),
				says(Normal, "activity.route.recover", "Of the server's own. requestData: the `target` and `failing_since`."),
				says(Critical, "activity.route.lose", "Of the server's own. requestData: the positions that were dropped before the route came to them."),
			},
		},
	}
}

// manyOf makes the entries of objects that are made, changed and deleted.
func manyOf(objects ...string) []Entry {
	var out []Entry
	for _, o := range objects {
		out = append(out, says(Warning, o+".create", ""), says(Warning, o+".update", ""), says(Critical, o+".delete", ""))
	}
	return out
}

func dataEntries(actions ...string) []Entry {
	out := entries(Normal, actions...)
	for i := range out {
		out[i].Data = true
	}
	return out
}

// ActionEvaluated is the event of an access decision.
const ActionEvaluated = "iam-access-management.policy.eval"

// catalogued has the entries by their actions.
var catalogued = func() map[string]Entry {
	out := map[string]Entry{}
	for _, s := range Catalogue() {
		for _, e := range s.Entries {
			out[e.Action] = e
		}
	}
	return out
}()

// EntryOf returns the catalogue's entry of an action.
func EntryOf(action string) (Entry, bool) {
	if e, ok := catalogued[action]; ok {
		return e, true
	}
	_, rest, _ := strings.Cut(action, ".")
	e, ok := catalogued["*."+rest]
	return e, ok
}

// severityOf returns the severity of a success. What the catalogue does not have
// counts as a change, or as a deletion if it is called one.
func severityOf(action string) string {
	if e, ok := EntryOf(action); ok {
		return e.Severity
	}
	if strings.HasSuffix(action, ".delete") || strings.Contains(action, "apikey") {
		return Critical
	}
	return Warning
}

// readEvents are the events of reads whose IAM action has another name
// (reference/access-and-audit.md sections 6.2 and 6.3).
var readEvents = map[string]string{
	"iam-groups.groups.read":  "iam-groups.group.read",
	"iam-groups.members.read": "iam-groups.member.read",
	"iam-groups.rules.read":   "iam-groups.rule.read",
}

// ReadEvent returns the name of the event of a read by the IAM action that it
// needs. Of virtual servers and what belongs to them, lists are reads.
func ReadEvent(action string) string {
	if event, ok := readEvents[action]; ok {
		return event
	}
	if object, ok := strings.CutSuffix(action, ".list"); ok && strings.HasPrefix(action, "is.") {
		return object + ".read"
	}
	return action
}
