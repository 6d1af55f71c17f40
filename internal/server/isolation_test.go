package server

import (
	"bytes"
	"context"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/store"
)

// variants are further ways to name an object in a call than those of walk.
var variants = map[string][]call{
	"GET /v1/profiles":   {{target: "/v1/profiles?account_id=$account&name=first"}},
	"GET /v1/serviceids": {{target: "/v1/serviceids?account_id=$account&group_id=$idgroup_full"}},
	"GET /v1/apikeys": {
		{target: "/v1/apikeys?iam_id=$serviceid_iam"}, {target: "/v1/apikeys?iam_id=$user"}, {target: "/v1/apikeys?group_id=$idgroup_full"},
		{target: "/v1/apikeys?scope=account&group_id=$idgroup_full&account_id=$account"},
	},
	"POST /v1/serviceids": {{target: "/v1/serviceids", body: `{"name":"new","account_id":"$account","group_id":"$idgroup_full"}`}},
	"GET /v1/profiles/{profile}/identities/{type}/{identifier...}": {{target: "/v1/profiles/$profile/identities/serviceid/$serviceid"}},
	"GET /v1/mfa/accounts/{account_id}/report/{reference}":         {{target: "/v1/mfa/accounts/$account/report/latest"}},
	"POST /v1/profiles/{profile}/links": {{
		target: "/v1/profiles/$profile/links", body: `{"cr_type":"VSI","is_cross_account":true,"link":{"crn":"$server_crn"}}`,
	}},
	"GET /v1/policies": {{target: "/v1/policies?account_id=$account&iam_id=$user"}, {target: "/v1/policies?account_id=$account&access_group_id=$group"}},
	"GET /v2/policies": {{target: "/v2/policies?account_id=$account&iam_id=$user&format=include_last_permit"}},
	"POST /v2/policies": {
		{target: "/v2/policies", body: strings.Replace(policyV2("$group", "Reader", "kms"), "iam_id", "access_group_id", 1)},
		{target: "/v2/policies", body: policyV2("$user", "Manager", "kms")},
		{target: "/v2/policies", body: policyV2("$user", "Writer", "$service")},
		{target: "/v2/policies", body: strings.Replace(policyV2("$user", "Reader", "kms"), "crn:v1:bluemix:public:iam::::serviceRole:Reader", "crn:v1:bluemix:public:iam-access-management::a/$account::customRole:Listing", 1)},
	},
	"POST /v1/policies": {{target: "/v1/policies", body: policyV1("$profile_iam", "Reader", "kms")}},
	"GET /v2/roles":     {{target: "/v2/roles?account_id=$account&service_name=$service"}},
	"POST /v2/roles":    {{target: "/v2/roles", body: roleBody("Fresh", "$service", "$service.page.read")}},
	"GET /v2/groups":    {{target: "/v2/groups?account_id=$account&iam_id=$user"}, {target: "/v2/groups?account_id=$account&search=id:$group"}},
	"PUT /v2/groups/_allgroups/members/{iam_id}": {{target: "/v2/groups/_allgroups/members/$user?account_id=$account", body: `{"type":"user","groups":["$group_empty"]}`}},
	"POST /access/v1/evaluation": {
		{target: "/access/v1/evaluation", body: `{"subject":{"type":"user","id":"$user","properties":{"accountId":"$account"}},` + readSecret + "," + someKMS + "}"},
		{target: "/access/v1/evaluation", body: "{" + userKMS + "," + readSecret + `,"resource":{"type":"kms","id":"$instance","properties":{"accountId":"$account"}}}`},
		{target: "/access/v1/evaluation", body: "{" + userKMS + `,"action":{"name":"$service.page.read"},"resource":{"type":"$service","id":"x"}}`},
	},
	"POST /access/v1/evaluations":    {{target: "/access/v1/evaluations", body: "{" + userKMS + "," + readSecret + `,"evaluations":[{` + someKMS + `}]}`}},
	"POST /access/v1/search/subject": {{target: "/access/v1/search/subject", body: `{"subject":{"type":"user"},` + readSecret + `,"resource":{"type":"kms","id":"x","properties":{"accountId":"$account"}}}`}},
	"POST /v1/simulate/token": {
		{target: "/v1/simulate/token", body: `{"profile_id":"$profile","evidence":{"type":"instance","instance":"$server"}}`},
		{target: "/v1/simulate/token", body: `{"profile_id":"$profile","evidence":{"type":"oidc","issuer":"$workload_issuer","claims":{"sub":"x"}}}`},
	},
	"POST /v1/simulate/access": {
		{target: "/v1/simulate/access", body: `{"profile_id":"$profile","action":"kms.secrets.read","resource":{"attributes":{"serviceName":"kms"}}}`},
		{target: "/v1/simulate/access", body: `{"iam_id":"$user","action":"kms.secrets.read","resource":{"crn":"$instance_crn"}}`},
		{target: "/v1/simulate/access", body: `{"iam_id":"$user","action":"kms.secrets.read","groups":["$group"],"resource":{"attributes":{"serviceName":"kms"}}}`},
	},
	"GET /v2/resource_groups": {{target: "/v2/resource_groups?account_id=$account&name=empty"}},
	"GET /v2/resource_instances": {
		{target: "/v2/resource_instances?guid=$instance"}, {target: "/v2/resource_instances?resource_group_id=$group_default"},
		{target: "/v2/resource_instances?state=removed&guid=$instance_gone"},
	},
	"GET /v2/resource_instances/{id}":    {{target: "/v2/resource_instances/$instance_crn"}, {target: "/v2/resource_instances/crn:v1:bluemix:public:kms:us-south:a/$account:$instance::"}},
	"PATCH /v2/resource_instances/{id}":  {{target: "/v2/resource_instances/$instance_crn", body: `{"name":"renamed"}`}},
	"DELETE /v2/resource_instances/{id}": {{target: "/v2/resource_instances/$instance_crn?recursive=true"}},
	"GET /v2/resource_keys":              {{target: "/v2/resource_keys?guid=$resource_key"}},
	"GET /v2/resource_keys/{id}":         {{target: "/v2/resource_keys/$resource_key_crn"}},
	"POST /v2/resource_keys": {
		{target: "/v2/resource_keys", body: `{"name":"new","source":"$instance_crn","role":"Reader"}`},
		{target: "/v2/resource_keys", body: `{"name":"new","source":"$instance_crn","role":"crn:v1:bluemix:public:iam-access-management::a/$account::customRole:Listing"}`},
	},
	"GET /v1/reclamations":                           {{target: "/v1/reclamations?account_id=$account"}, {target: "/v1/reclamations?resource_instance_id=$instance_gone"}, {target: "/v1/reclamations?resource_instance_id=$instance_gone_crn"}},
	"GET /v1/clusters/{id}":                          {{target: "/v1/clusters/$cluster_name"}},
	"PUT /v1/cluster_groups/{id}/clusters/{cluster}": {{target: "/v1/cluster_groups/first/clusters/$cluster"}},
	"GET /v1/events":                                 {{target: "/v1/events?correlation_id=$transaction"}},
	"GET /v1/access_use":                             {{target: "/v1/access_use?iam_id=iam-$profile"}, {target: "/v1/access_use?iam_id=iam-$profile&unused=true"}},
	"GET /v1/access_recommendation":                  {{target: "/v1/access_recommendation?iam_id=iam-$profile"}, {target: "/v1/access_recommendation?iam_id=$user"}},
	"GET /v1/subnets":                                {{target: "/v1/subnets" + vpcVersion + "&vpc.id=$vpc"}, {target: "/v1/subnets" + vpcVersion + "&resource_group.id=$group_default"}},
	"GET /v1/instances":                              {{target: "/v1/instances" + vpcVersion + "&vpc.id=$vpc"}},
	"GET /v1/floating_ips":                           {{target: "/v1/floating_ips" + vpcVersion + "&target.id=$nic"}},
	"POST /v1/floating_ips":                          {{target: "/v1/floating_ips" + vpcVersion, body: `{"name":"new","target":{"id":"$nic"}}`}, {target: "/v1/floating_ips" + vpcVersion, body: `{"name":"new","target":{"id":"$vni"}}`}},
	"GET /v1/security_groups":                        {{target: "/v1/security_groups" + vpcVersion + "&vpc.id=$vpc"}},
	"POST /v1/security_groups":                       {{target: "/v1/security_groups" + vpcVersion, body: `{"vpc":{"id":"$vpc"}}`}},
	"POST /v1/security_groups/{id}/rules":            {{target: "/v1/security_groups/$group_free/rules" + vpcVersion, body: `{"direction":"inbound","protocol":"any","remote":{"id":"$group_used"}}`}},
	"POST /v1/instances":                             {{target: "/v1/instances" + vpcVersion, body: attachedBody("new")}, {target: "/v1/instances" + vpcVersion, body: strings.Replace(serverBody("new"), "$image", "$image_own", 1)}},
	"PATCH /v1/floating_ips/{id}":                    {{target: "/v1/floating_ips/$fip" + vpcVersion, body: `{"target":{"id":"$nic"}}`}},
	"POST /v2/accounts/{account_id}/users":           {{target: "/v2/accounts/$account/users", body: `{"users":[{"email":"user@$account.example.com"}]}`}},
	"GET /v2/accounts/{account_id}/users":            {{target: "/v2/accounts/$account/users?search=iam_id:$user"}},
}

var (
	idOf    = regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}|\b[0-9a-f]{32}\b|IBMid-[0-9A-F]{10}|\bc[0-9a-z]{19}\b|^[A-Za-z0-9_-]{44}$|^(?:papers|scroll)$|0717_first`)
	varying = regexp.MustCompile(`[0-9a-fA-F]{8,}(-[0-9a-fA-F]{4,})*|\bc[0-9a-z]{19}\b|[A-Za-z0-9_-]{40,}|IBMid-[0-9A-F]{10}|\d{4}-\d\d-\d\dT[\d:.]+|02(:[0-9a-f]{2}){5}|papers|scroll|parchm|"address":"[0-9.]+"`)
)

// unknown returns an id of the same form that nothing has.
func unknown(value string) string {
	if _, err := strconv.Atoi(value); err == nil {
		return value + "000000" // a place in the log that nothing has reached
	}
	out := idOf.ReplaceAllStringFunc(value, func(id string) string {
		if id == "papers" || id == "scroll" {
			return "parchm"
		}
		digits, begin := "0123456789abcdef", 0
		if strings.HasPrefix(id, "IBMid-") {
			digits, begin = "0123456789ABCDEF", len("IBMid-")
		}
		b := []byte(id)
		for i := begin; i < len(b); i++ {
			if at := strings.IndexByte(digits, b[i]); at >= 0 {
				b[i] = digits[(at+5)%16]
			}
		}
		if id[0] == 'c' && len(id) == 20 {
			b[0] = 'c' // a cluster
		}
		return string(b)
	})
	if out == value {
		return value + "-unknown"
	}
	return out
}

// names returns the names that a call's texts use.
func (c call) names() []string {
	var out []string
	for _, text := range append([]string{c.target, c.body}, c.header...) {
		for _, found := range regexp.MustCompile(`\$(\w+)`).FindAllStringSubmatch(text, -1) {
			if !slices.Contains(out, found[1]) {
				out = append(out, found[1])
			}
		}
	}
	return out
}

// within returns the revisions of an account's objects.
func (r *running) within(account string) map[string]int64 {
	r.t.Helper()
	out := map[string]int64{}
	err := r.s.store.Load(context.Background(), func(rec store.Record) error {
		if strings.Contains(rec.ID, account) || bytes.Contains(rec.Doc, []byte(`"account_id":"`+account+`"`)) {
			out[rec.Kind+" "+rec.ID] = rec.Revision
		}
		return nil
	})
	if err != nil {
		r.t.Fatal(err)
	}
	return out
}

func (r *running) newestEvent(account string) string {
	r.t.Helper()
	stored, err := r.s.store.Events(context.Background(), store.Query{AccountID: account, Limit: 1})
	if err != nil {
		r.t.Fatal(err)
	}
	if len(stored) == 0 {
		return ""
	}
	return stored[0].Position.String()
}

func TestNothingOfOneAccountIsVisibleFromAnother(t *testing.T) {
	for _, direction := range []string{"from the operator's account", "from a tenant's account"} {
		t.Run(direction, func(t *testing.T) {
			r := start(t)
			mine, theirs := r.home, r.other
			if direction != "from the operator's account" {
				mine, theirs = theirs, mine
			}
			mine = mine.with("caller", mine["owner"])
			objects, newest := r.within(theirs["account"]), r.newestEvent(theirs["account"])
			for i, s := range r.steps() {
				if i%share != 0 {
					continue
				}
				// The operator sees and closes all accounts, and nothing in them.
				if operates := mine["account"] == r.home["account"]; operates &&
					(strings.HasPrefix(s.Action, "installation.") || s.Kind == api.KindOpen && strings.HasSuffix(s.Pattern, "/accounts/{account_id}")) {
					continue
				}
				base, _ := inSlash(s.Pattern)
				for _, c := range append([]call{s.call}, variants[base]...) {
					r.compare(step{s.Route, c}, mine, theirs)
					if diff := changed(objects, r.within(theirs["account"])); len(diff) > 0 {
						t.Errorf("%s: changed %q in the other account", s, diff)
						r.reset()
					}
					if r.newestEvent(theirs["account"]) != newest {
						t.Errorf("%s: left an event in the other account's log", s)
						r.reset()
					}
				}
			}
			r.quiet()
		})
	}
}

// compare makes a call with the other account's names in the place of its own,
// one by one and all together, and with names that nothing has. The answers
// must be the same.
func (r *running) compare(s step, mine, theirs vars) {
	r.t.Helper()
	var swapped []string
	for _, name := range s.names() {
		if theirs[name] != "" && theirs[name] != mine[name] && name != "jwks" && name != "sshkey_new" {
			swapped = append(swapped, name)
		}
	}
	sets := [][]string{}
	for _, name := range swapped {
		sets = append(sets, []string{name})
	}
	if len(swapped) > 1 {
		sets = append(sets, swapped)
	}
	for _, set := range sets {
		foreign, nothing := mine.with(), mine.with()
		for _, name := range set {
			foreign[name], nothing[name] = theirs[name], unknown(theirs[name])
		}
		var answers [2]answerOf
		for i, v := range []vars{foreign, nothing} {
			answers[i] = send(r.s, s.request(s.Route, v, mine["owner_token"]))
			if s.Kind == api.KindChange && answers[i].ok() {
				r.reset()
			}
		}
		a, b := answers[0], answers[1]
		if x, y := varying.ReplaceAll(a.body, []byte("#")), varying.ReplaceAll(b.body, []byte("#")); a.status != b.status || !bytes.Equal(x, y) {
			r.t.Errorf("%s with the other account's %q: %d %s\nwith unknown ones: %d %s", s, set, a.status, x, b.status, y)
		}
		if a.status >= http.StatusInternalServerError {
			r.t.Errorf("%s with the other account's %q: %d %s", s, set, a.status, a.body)
		}
	}
}
