package server

import (
	"cmp"
	"net/http"
	"strings"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api"
)

// call is a request to one route that succeeds for whoever has the rights. Its
// texts name what an account has by $names; $caller is who calls.
type call struct {
	target string // path and query
	body   string // "" is none
	header []string

	status  int    // of the success when it is not one of 200 to 204
	on      string // the service that the action is decided on, when it is not the action's own
	refused string // the action that is missing first, when it is not the route's
	shows   string // in a list: what is there for whoever has the action, and for nobody else
	single  bool   // a route of kind list that refuses instead of showing nothing
	empty   bool   // a list that has nothing for anybody
	tagged  bool   // heeds If-Match
}

// service returns the service that the action of a call's route is decided on.
func (c call) service(action string) string {
	first, _, _ := strings.Cut(action, ".")
	return cmp.Or(c.on, first)
}

// request fills the call in.
func (c call) request(route api.Route, v vars, token string) request {
	method, path, _ := strings.Cut(route.Pattern, " ")
	if path == "" { // a route for every method
		method = http.MethodGet
	}
	q := request{method: method, target: expandTarget(c.target, v), token: token, header: map[string]string{}}
	if c.body != "" {
		q.body = []byte(expand(c.body, v))
	}
	for i := 0; i < len(c.header); i += 2 {
		q.header[c.header[i]] = expand(c.header[i+1], v)
	}
	return q
}

// succeeded reports whether an answer is the one for whoever has the rights.
func (c call) succeeded(a answerOf) bool {
	if c.status != 0 {
		return a.status == c.status
	}
	return a.ok()
}

var anyTag = []string{"If-Match", "*"}

// openRoutes are the routes that need no action, with all that they may have:
// whoever adds one has to say here that it tells nothing about an account.
var openRoutes = map[string]call{
	"GET /v2/roles":            {target: "/v2/roles?account_id=$account"},
	"GET /v1/workload_presets": {target: "/v1/workload_presets"},

	// For host agents, whose tokens none of the walk's callers has.
	"POST /v1/agent/join":       {target: "/v1/agent/join", status: 401, body: `{"join_token":"x","jwk":{},"proof":"x"}`},
	"GET /v1/agent/stream":      {target: "/v1/agent/stream?capacity={}", status: 401},
	"POST /v1/agent/reports":    {target: "/v1/agent/reports", status: 401},
	"POST /v1/agent/events":     {target: "/v1/agent/events", status: 401},
	"POST /v1/agent/iam_tokens": {target: "/v1/agent/iam_tokens", status: 401},
	"POST /v1/agent/machines":   {target: "/v1/agent/machines", status: 401},
	"GET /v1/agent/images/{id}": {target: "/v1/agent/images/x", status: 401},

	"GET /v2/quota_definitions":      {target: "/v2/quota_definitions"},
	"GET /v2/quota_definitions/{id}": {target: "/v2/quota_definitions/7ce89f4a4c0b4a1c8f5b2f0d6e3a9b10"},
	"GET /v2/resource_plans":         {target: "/v2/resource_plans"},

	"POST /v1/reclamations/{id}/actions/{action}":     {target: "/v1/reclamations/$reclamation/actions/burn", status: 400},
	"GET /v2/resource_aliases":                        {target: "/v2/resource_aliases", status: 404},
	"POST /v2/resource_aliases":                       {target: "/v2/resource_aliases", status: 404, body: `{"name":"a","source":"$instance_crn"}`},
	"GET /v2/resource_aliases/{id}":                   {target: "/v2/resource_aliases/$instance", status: 404},
	"PATCH /v2/resource_aliases/{id}":                 {target: "/v2/resource_aliases/$instance", status: 404, body: `{"name":"a"}`},
	"DELETE /v2/resource_aliases/{id}":                {target: "/v2/resource_aliases/$instance", status: 404},
	"GET /v2/resource_aliases/{id}/resource_bindings": {target: "/v2/resource_aliases/$instance/resource_bindings", status: 404},
	"GET /v2/resource_bindings":                       {target: "/v2/resource_bindings", status: 404},
	"POST /v2/resource_bindings":                      {target: "/v2/resource_bindings", status: 404, body: `{"name":"a","source":"$instance_crn"}`},
	"GET /v2/resource_bindings/{id}":                  {target: "/v2/resource_bindings/$resource_key", status: 404},
	"PATCH /v2/resource_bindings/{id}":                {target: "/v2/resource_bindings/$resource_key", status: 404, body: `{"name":"a"}`},
	"DELETE /v2/resource_bindings/{id}":               {target: "/v2/resource_bindings/$resource_key", status: 404},
	"GET /v1/accounts/{account_id}":                   {target: "/v1/accounts/$account"},
	"GET /coe/v2/accounts/{account_id}":               {target: "/coe/v2/accounts/$account"},
	"GET /v4/accounts/{account_id}":                   {target: "/v4/accounts/$account"},
	"GET /v1/regions":                                 {target: "/v1/regions" + vpcVersion},
	"GET /v1/regions/{region}":                        {target: "/v1/regions/us-south" + vpcVersion},
	"GET /v1/regions/{region}/zones":                  {target: "/v1/regions/us-south/zones" + vpcVersion},
	"GET /v1/regions/{region}/zones/{zone}":           {target: "/v1/regions/us-south/zones/us-south-1" + vpcVersion},
	"GET /v1/instance/profiles":                       {target: "/v1/instance/profiles" + vpcVersion},
	"GET /v1/instance/profiles/{name}":                {target: "/v1/instance/profiles/bx2-2x8" + vpcVersion},
	"GET /v1/volume/profiles":                         {target: "/v1/volume/profiles" + vpcVersion},
	"GET /v1/volume/profiles/{name}":                  {target: "/v1/volume/profiles/general-purpose" + vpcVersion},
	"/":                                               {target: "/nothing/here", status: 404},
}

// inSlash are the patterns of collections that answer with a trailing slash,
// too.
func inSlash(pattern string) (string, bool) { return strings.CutSuffix(pattern, "/{$}") }

// callsOf returns the calls of a route, one for each time that its pattern is
// registered.
func callsOf(pattern string) []call {
	if base, slashed := inSlash(pattern); slashed {
		calls := append([]call(nil), walk[base]...)
		for i := range calls {
			path, query, queried := strings.Cut(calls[i].target, "?")
			if calls[i].target = path + "/"; queried {
				calls[i].target += "?" + query
			}
			calls[i].shows = ""
			calls[i].empty = calls[i].empty || walk[base][i].shows != ""
		}
		return calls
	}
	return walk[pattern]
}

const (
	userKMS    = `"subject":{"type":"user","id":"$user"}`
	readSecret = `"action":{"name":"kms.secrets.list"}`
	someKMS    = `"resource":{"type":"kms","id":"$instance_crn"}`
	legacyKMS  = `[{"requestId":"1","subject":{"attributes":{"id":"$user","accountId":"$account"}},"action":"kms.secrets.list",` +
		`"resource":{"crn":"$instance_crn","attributes":{"serviceName":"kms"}}}]`
)

// walk has a call for every route that needs an action.
var walk = map[string][]call{
	// Hosts.
	"GET /v1/hosts":                {{target: "/v1/hosts", shows: "$host"}},
	"GET /v1/hosts/{id}":           {{target: "/v1/hosts/$host"}},
	"POST /v1/hosts/join_tokens":   {{target: "/v1/hosts/join_tokens", body: `{"name":"new","zone":"us-south-1","expires_in":600}`}},
	"POST /v1/hosts/{id}/revoke":   {{target: "/v1/hosts/$host/revoke"}},
	"DELETE /v1/hosts/{id}":        {{target: "/v1/hosts/$host_revoked"}},
	"GET /v1/hosts/{id}/machines":  {{target: "/v1/hosts/$host/machines"}},
	"POST /v1/hosts/{id}/machines": {{target: "/v1/hosts/$host/machines", body: `{"name":"new","device":"tap9","mac":"52:54:00:12:34:56","address":"192.0.2.9"}`}},

	// Identities.
	"POST /v1/profiles":                       {{target: "/v1/profiles", body: `{"name":"new","account_id":"$account","description":"d","email":"a@example.com"}`}},
	"GET /v1/profiles":                        {{target: "/v1/profiles?account_id=$account", shows: "$profile"}},
	"GET /v1/profiles/{profile}":              {{target: "/v1/profiles/$profile?include_activity=true&include_history=true"}},
	"PUT /v1/profiles/{profile}":              {{target: "/v1/profiles/$profile", body: `{"name":"renamed","description":"d","email":"a@example.com"}`, header: anyTag, tagged: true}},
	"DELETE /v1/profiles/{profile}":           {{target: "/v1/profiles/$profile"}},
	"POST /v1/profiles/{profile}/rules":       {{target: "/v1/profiles/$profile/rules", body: ruleBody}},
	"GET /v1/profiles/{profile}/rules":        {{target: "/v1/profiles/$profile/rules"}},
	"GET /v1/profiles/{profile}/rules/{rule}": {{target: "/v1/profiles/$profile/rules/$rule"}},
	"PUT /v1/profiles/{profile}/rules/{rule}": {{
		target: "/v1/profiles/$profile/rules/$rule", header: anyTag, tagged: true,
		body: `{"type":"Profile-CR","name":"cr","cr_type":"VSI","conditions":[{"claim":"name","operator":"EQUALS","value":"\"x\""}]}`,
	}},
	"DELETE /v1/profiles/{profile}/rules/{rule}": {{target: "/v1/profiles/$profile/rules/$rule"}},
	"POST /v1/profiles/{profile}/links": {{
		target: "/v1/profiles/$profile/links",
		body:   `{"cr_type":"IKS_SA","name":"l","is_cross_account":false,"link":{"crn":"crn:v1:bluemix:public:containers-kubernetes:us-south:a/$account:$cluster::","namespace":"default","name":"app"}}`,
	}},
	"GET /v1/profiles/{profile}/links":           {{target: "/v1/profiles/$profile/links"}},
	"DELETE /v1/profiles/{profile}/links":        {{target: "/v1/profiles/$profile/links?type=VSI&crn=crn:v1:bluemix:public:is:us-south-1:a/$account::instance:0717_first"}},
	"GET /v1/profiles/{profile}/links/{link}":    {{target: "/v1/profiles/$profile/links/$link"}},
	"DELETE /v1/profiles/{profile}/links/{link}": {{target: "/v1/profiles/$profile/links/$link"}},
	"GET /v1/profiles/{profile}/identities":      {{target: "/v1/profiles/$profile/identities"}},
	"PUT /v1/profiles/{profile}/identities": {{
		target: "/v1/profiles/$profile/identities", header: anyTag, tagged: true,
		body: `{"identities":[{"identifier":"$serviceid","type":"serviceid","description":"d"},{"identifier":"$user","type":"user","accounts":["$account"]}]}`,
	}},
	"POST /v1/profiles/{profile}/identities/{type}":                   {{target: "/v1/profiles/$profile/identities/serviceid", body: `{"identifier":"$serviceid","type":"serviceid","description":"d"}`}},
	"GET /v1/profiles/{profile}/identities/{type}/{identifier...}":    {{target: "/v1/profiles/$profile/identities/user/$user"}},
	"DELETE /v1/profiles/{profile}/identities/{type}/{identifier...}": {{target: "/v1/profiles/$profile/identities/user/$user"}},

	"POST /v1/serviceids": {{
		target: "/v1/serviceids",
		body: `{"name":"new","account_id":"$account","description":"d","group_id":"$idgroup","unique_instance_crns":["$instance_crn"],` +
			`"apikey":{"name":"k","description":"d","store_value":true,"expires_at":"2099-01-02T18:30+0000","action_when_leaked":"disable"}}`,
	}},
	"GET /v1/serviceids":                     {{target: "/v1/serviceids?account_id=$account", shows: "$serviceid"}},
	"GET /v1/serviceids/{serviceid}":         {{target: "/v1/serviceids/$serviceid?show_group_id=true"}},
	"PUT /v1/serviceids/{serviceid}":         {{target: "/v1/serviceids/$serviceid", body: `{"name":"renamed","description":"d","unique_instance_crns":["$instance_crn"]}`, header: anyTag, tagged: true}},
	"DELETE /v1/serviceids/{serviceid}":      {{target: "/v1/serviceids/$serviceid_keyless"}},
	"POST /v1/serviceids/{serviceid}/lock":   {{target: "/v1/serviceids/$serviceid/lock"}},
	"DELETE /v1/serviceids/{serviceid}/lock": {{target: "/v1/serviceids/$serviceid_locked/lock"}},
	"POST /v1/serviceid_groups":              {{target: "/v1/serviceid_groups", body: `{"name":"new","account_id":"$account","description":"d"}`}},
	"GET /v1/serviceid_groups":               {{target: "/v1/serviceid_groups?account_id=$account", shows: "$idgroup"}},
	"GET /v1/serviceid_groups/{group}":       {{target: "/v1/serviceid_groups/$idgroup"}},
	"PUT /v1/serviceid_groups/{group}":       {{target: "/v1/serviceid_groups/$idgroup", body: `{"name":"renamed","description":"d"}`, header: anyTag, tagged: true}},
	"DELETE /v1/serviceid_groups/{group}":    {{target: "/v1/serviceid_groups/$idgroup"}},
	"GET /v1/apikeys":                        {{target: "/v1/apikeys?account_id=$account&scope=account", shows: "$key"}},
	"GET /v1/apikeys/details":                {{target: "/v1/apikeys/details", header: []string{"IAM-ApiKey", "$key_value"}}},
	"GET /v1/apikeys/{apikey}":               {{target: "/v1/apikeys/$key"}},
	"POST /v1/apikeys": {
		{target: "/v1/apikeys", body: `{"name":"new","iam_id":"$caller","account_id":"$account","description":"d","support_sessions":true}`},
		{target: "/v1/apikeys", body: `{"name":"new","iam_id":"$serviceid_iam","account_id":"$account","store_value":true,"action_when_leaked":"delete","expires_at":"2099-01-02T18:30+0000"}`},
	},
	"POST /v1/apikeys/{apikey}/lock":      {{target: "/v1/apikeys/$user_key/lock"}, {target: "/v1/apikeys/$key/lock"}},
	"DELETE /v1/apikeys/{apikey}/lock":    {{target: "/v1/apikeys/$user_key_locked/lock"}, {target: "/v1/apikeys/$key_locked/lock"}},
	"POST /v1/apikeys/{apikey}/disable":   {{target: "/v1/apikeys/$user_key/disable"}, {target: "/v1/apikeys/$key/disable"}},
	"DELETE /v1/apikeys/{apikey}/disable": {{target: "/v1/apikeys/$user_key_disabled/disable"}, {target: "/v1/apikeys/$key_disabled/disable"}},
	"PUT /v1/apikeys/{apikey}": {
		{target: "/v1/apikeys/$user_key", body: `{"name":"renamed","description":"d","support_sessions":true,"action_when_leaked":"none","expires_at":""}`, header: anyTag, tagged: true},
		{target: "/v1/apikeys/$key", body: `{"name":"renamed","description":"d"}`, header: anyTag, tagged: true},
	},
	"DELETE /v1/apikeys/{apikey}":      {{target: "/v1/apikeys/$user_key"}, {target: "/v1/apikeys/$key"}},
	"POST /v1/apikeys/{apikey}/leaked": {{target: "/v1/apikeys/$user_key/leaked"}, {target: "/v1/apikeys/$key/leaked"}},
	"POST /v1/apikeys/leaked": {
		{target: "/v1/apikeys/leaked", header: []string{"IAM-ApiKey", "$user_key_value"}},
		{target: "/v1/apikeys/leaked", header: []string{"IAM-ApiKey", "$key_value"}},
	},

	"GET /v1/accounts/{account_id}/limits/identity": {{target: "/v1/accounts/$account/limits/identity?serviceids_per_group=$idgroup_full&apikeys_per_identity=$serviceid_iam&claim_rules_per_group=$group&claim_rules_per_profile=$profile&cr_links_per_profile=$profile"}},
	"POST /v1/accounts/{account_id}/limits/identity": {{
		target: "/v1/accounts/$account/limits/identity",
		body:   `{"profiles":true,"serviceids_per_group":["$idgroup_full"],"apikeys_per_identity":["$serviceid_iam"],"claim_rules_per_group":["$group"],"cr_links_per_profile":["$profile"],"cr_rules_per_profile":["$profile"]}`,
	}},
	"GET /v1/profile_templates":                       {{target: "/v1/profile_templates?account_id=$account", empty: true}},
	"GET /v1/account_settings_templates":              {{target: "/v1/account_settings_templates?account_id=$account", empty: true}},
	"GET /v1/accounts/{account_id}/settings/identity": {{target: "/v1/accounts/$account/settings/identity"}},
	"PUT /v1/accounts/{account_id}/settings/identity": {{
		target: "/v1/accounts/$account/settings/identity", header: anyTag, tagged: true,
		body: `{"mfa":"NONE","session_expiration_in_seconds":"3600","user_mfa":[{"iam_id":"$user","mfa":"TOTP"}],"allowed_ip_addresses":"192.0.2.0/24",` +
			`"restrict_user_domains":[{"realm_id":"IBMid","invitation_email_allow_patterns":["*@example.com"],"restrict_invitation":true}]}`,
	}},
	"GET /v1/accounts/{account_id}/effective_settings/identity":                                  {{target: "/v1/accounts/$account/effective_settings/identity"}},
	"POST /v1/activity/accounts/{account_id}/report":                                             {{target: "/v1/activity/accounts/$account/report?type=inactive&duration=720"}},
	"GET /v1/activity/accounts/{account_id}/report/{reference}":                                  {{target: "/v1/activity/accounts/$account/report/$report"}},
	"GET /v1/mfa/accounts/{account_id}/status":                                                   {{target: "/v1/mfa/accounts/$account/status?iam_id=$user"}},
	"POST /v1/mfa/accounts/{account_id}/report":                                                  {{target: "/v1/mfa/accounts/$account/report"}},
	"GET /v1/mfa/accounts/{account_id}/report/{reference}":                                       {{target: "/v1/mfa/accounts/$account/report/$mfa_report"}},
	"GET /v1/preferences/accounts/{account_id}/identities/{iam_id}":                              {{target: "/v1/preferences/accounts/$account/identities/$user"}},
	"GET /v1/preferences/accounts/{account_id}/identities/{iam_id}/{service}/{preference_id}":    {{target: "/v1/preferences/accounts/$account/identities/$user/console/theme"}},
	"PUT /v1/preferences/accounts/{account_id}/identities/{iam_id}/{service}/{preference_id}":    {{target: "/v1/preferences/accounts/$account/identities/$user/console/theme", body: `{"value_list_of_strings":["a","b"]}`}},
	"DELETE /v1/preferences/accounts/{account_id}/identities/{iam_id}/{service}/{preference_id}": {{target: "/v1/preferences/accounts/$account/identities/$user/console/theme"}},

	// Access management.
	"GET /v1/policies":         {{target: "/v1/policies?account_id=$account", on: "kms", shows: "$policy"}},
	"GET /v1/policies/{id}":    {{target: "/v1/policies/$policy", on: "kms"}},
	"POST /v1/policies":        {{target: "/v1/policies", body: policyV1("$serviceid_iam", "Reader", "kms"), on: "kms"}},
	"PUT /v1/policies/{id}":    {{target: "/v1/policies/$policy", body: policyV1("$user", "Writer", "kms"), header: anyTag, on: "kms", tagged: true}},
	"DELETE /v1/policies/{id}": {{target: "/v1/policies/$policy", on: "kms"}},
	"PATCH /v1/policies/{id}":  {{target: "/v1/policies/$policy_deleted", body: `{"state":"active"}`, header: anyTag, on: "kms", tagged: true}},
	"GET /v2/policies":         {{target: "/v2/policies?account_id=$account", on: "kms", shows: "$policy2"}},
	"GET /v2/policies/{id}":    {{target: "/v2/policies/$policy2?format=display", on: "kms"}},
	"POST /v2/policies": {{
		target: "/v2/policies", on: "kms",
		body: strings.TrimSuffix(policyV2("$serviceid_iam", "Reader", "kms"), "}") + `,"pattern":"time-based-conditions:weekly:all-day",` +
			`"rule":{"key":"{{environment.attributes.day_of_week}}","operator":"dayOfWeekAnyOf","value":["1+00:00","2+00:00"]}}`,
	}},
	"PUT /v2/policies/{id}":    {{target: "/v2/policies/$policy2", body: policyV2("$profile_iam", "Manager", "kms"), header: anyTag, on: "kms", tagged: true}},
	"DELETE /v2/policies/{id}": {{target: "/v2/policies/$policy2", on: "kms"}},
	"GET /v2/roles/{id}":       {{target: "/v2/roles/$role"}},
	"POST /v2/roles":           {{target: "/v2/roles", body: roleBody("Fresh", "kms", "kms.secrets.list", "kms.secrets.wrap")}},
	"PUT /v2/roles/{id}":       {{target: "/v2/roles/$role", body: `{"display_name":"Renamed","description":"d","actions":["kms.secrets.list","kms.secrets.unwrap"]}`, header: anyTag, tagged: true}},
	"DELETE /v2/roles/{id}":    {{target: "/v2/roles/$role"}},
	"GET /v1/accounts/{account_id}/settings/access_management": {{target: "/v1/accounts/$account/settings/access_management"}},
	"PATCH /v1/accounts/{account_id}/settings/access_management": {{
		target: "/v1/accounts/$account/settings/access_management", header: anyTag, tagged: true,
		body: `{"external_account_identity_interaction":{"identity_types":{"user":{"state":"monitor","external_allowed_accounts":["$account"]}}}}`,
	}},
	"GET /v1/services":           {{target: "/v1/services", shows: `"$service"`}},
	"GET /v1/services/{name}":    {{target: "/v1/services/$service"}},
	"POST /v1/services":          {{target: "/v1/services", body: serviceBody("journals")}},
	"PUT /v1/services/{name}":    {{target: "/v1/services/$service", body: serviceBody("$service"), header: anyTag, tagged: true}},
	"DELETE /v1/services/{name}": {{target: "/v1/services/$service"}},

	"POST /v2/groups":                               {{target: "/v2/groups?account_id=$account", body: `{"name":"new","description":"d"}`}},
	"GET /v2/groups":                                {{target: "/v2/groups?account_id=$account", shows: "$group"}},
	"GET /v2/groups/{id}":                           {{target: "/v2/groups/$group?show_federated=true&show_crn=true"}},
	"PATCH /v2/groups/{id}":                         {{target: "/v2/groups/$group", body: `{"name":"renamed","description":"d"}`, header: anyTag, tagged: true}},
	"DELETE /v2/groups/{id}":                        {{target: "/v2/groups/$group?force=true"}},
	"PUT /v2/groups/{id}/members":                   {{target: "/v2/groups/$group_empty/members", body: `{"members":[{"iam_id":"$user","type":"user"},{"iam_id":"$serviceid_iam","type":"service"},{"iam_id":"$profile_iam","type":"profile"}]}`}},
	"GET /v2/groups/{id}/members":                   {{target: "/v2/groups/$group/members?verbose=true"}},
	"HEAD /v2/groups/{id}/members/{iam_id}":         {{target: "/v2/groups/$group/members/$user"}},
	"DELETE /v2/groups/{id}/members/{iam_id}":       {{target: "/v2/groups/$group/members/$user"}},
	"POST /v2/groups/{id}/members/delete":           {{target: "/v2/groups/$group/members/delete", body: `{"members":["$user","$serviceid_iam"]}`}},
	"PUT /v2/groups/_allgroups/members/{iam_id}":    {{target: "/v2/groups/_allgroups/members/$profile_iam?account_id=$account", body: `{"type":"profile","groups":["$group","$group_empty"]}`}},
	"DELETE /v2/groups/_allgroups/members/{iam_id}": {{target: "/v2/groups/_allgroups/members/$user?account_id=$account"}},
	"POST /v2/groups/{id}/rules":                    {{target: "/v2/groups/$group/rules", body: groupRuleBody}},
	"GET /v2/groups/{id}/rules":                     {{target: "/v2/groups/$group/rules"}},
	"GET /v2/groups/{id}/rules/{rule}":              {{target: "/v2/groups/$group/rules/$group_rule"}},
	"PUT /v2/groups/{id}/rules/{rule}":              {{target: "/v2/groups/$group/rules/$group_rule", body: groupRuleBody, header: anyTag, tagged: true}},
	"DELETE /v2/groups/{id}/rules/{rule}":           {{target: "/v2/groups/$group/rules/$group_rule"}},
	"GET /v2/groups/settings":                       {{target: "/v2/groups/settings?account_id=$account"}},
	"PATCH /v2/groups/settings":                     {{target: "/v2/groups/settings?account_id=$account", body: `{"public_access_enabled":false}`, tagged: true}},

	"POST /access/v1/evaluation":     {{target: "/access/v1/evaluation", body: "{" + userKMS + "," + readSecret + "," + someKMS + "}", on: "kms"}},
	"POST /access/v1/evaluations":    {{target: "/access/v1/evaluations", body: "{" + userKMS + "," + readSecret + "," + someKMS + "}", on: "kms"}},
	"POST /access/v1/search/action":  {{target: "/access/v1/search/action", body: "{" + userKMS + "," + someKMS + `,"page":{"limit":10}}`, on: "kms"}},
	"POST /access/v1/search/subject": {{target: "/access/v1/search/subject", body: `{"subject":{"type":"user"},` + readSecret + "," + someKMS + "}", on: "kms"}},
	"POST /v2/authz":                 {{target: "/v2/authz", body: legacyKMS, on: "kms"}},
	"POST /v2/authz/roles":           {{target: "/v2/authz/roles", body: legacyKMS, on: "kms"}},

	// Resources.
	"GET /v2/resource_groups":         {{target: "/v2/resource_groups?account_id=$account", shows: "$rgroup"}},
	"POST /v2/resource_groups":        {{target: "/v2/resource_groups", body: `{"name":"new","account_id":"$account"}`}},
	"GET /v2/resource_groups/{id}":    {{target: "/v2/resource_groups/$rgroup"}},
	"PATCH /v2/resource_groups/{id}":  {{target: "/v2/resource_groups/$rgroup", body: `{"name":"renamed","state":"ACTIVE"}`, tagged: true}},
	"DELETE /v2/resource_groups/{id}": {{target: "/v2/resource_groups/$rgroup"}},
	"GET /v2/resource_instances":      {{target: "/v2/resource_instances", on: "kms", shows: "$instance"}},
	"POST /v2/resource_instances": {{
		target: "/v2/resource_instances", on: "kms", refused: "resource-controller.group.retrieve",
		body: `{"name":"new","target":"us-south","resource_group":"$group_default","resource_plan_id":"` + kmsPlan + `","tags":["a:b"],"parameters":{"a":1},"allow_cleanup":true}`,
	}},
	"GET /v2/resource_instances/{id}":                   {{target: "/v2/resource_instances/$instance", on: "kms"}},
	"PATCH /v2/resource_instances/{id}":                 {{target: "/v2/resource_instances/$instance", body: `{"name":"renamed","parameters":{"a":2},"allow_cleanup":false,"resource_plan_id":"` + kmsPlan + `"}`, on: "kms", tagged: true}},
	"DELETE /v2/resource_instances/{id}":                {{target: "/v2/resource_instances/$instance?recursive=true", on: "kms"}},
	"POST /v2/resource_instances/{id}/lock":             {{target: "/v2/resource_instances/$instance/lock", on: "kms"}},
	"DELETE /v2/resource_instances/{id}/lock":           {{target: "/v2/resource_instances/$instance_locked/lock", on: "kms"}},
	"DELETE /v2/resource_instances/{id}/last_operation": {{target: "/v2/resource_instances/$instance/last_operation", on: "kms", status: http.StatusUnprocessableEntity}},
	"GET /v2/resource_keys":                             {{target: "/v2/resource_keys", on: "kms", shows: "$resource_key"}},
	"POST /v2/resource_keys":                            {{target: "/v2/resource_keys", body: `{"name":"new","source":"$instance","role":"Reader","parameters":{"serviceid_crn":"$serviceid_crn"}}`, on: "kms"}},
	"GET /v2/resource_keys/{id}":                        {{target: "/v2/resource_keys/$resource_key", on: "kms"}},
	"PATCH /v2/resource_keys/{id}":                      {{target: "/v2/resource_keys/$resource_key", body: `{"name":"renamed"}`, on: "kms", tagged: true}},
	"DELETE /v2/resource_keys/{id}":                     {{target: "/v2/resource_keys/$resource_key", on: "kms"}},
	"GET /v2/resource_instances/{id}/resource_keys":     {{target: "/v2/resource_instances/$instance/resource_keys", on: "kms"}},
	"GET /v2/resource_instances/{id}/resource_aliases":  {{target: "/v2/resource_instances/$instance/resource_aliases", on: "kms"}},
	"GET /v2/resource_instances/{id}/resource_bindings": {{target: "/v2/resource_instances/$instance/resource_bindings", on: "kms"}},
	"GET /v1/reclamations":                              {{target: "/v1/reclamations", on: "kms", shows: "$reclamation"}},
	"POST /v1/reclamations/{id}/actions/reclaim":        {{target: "/v1/reclamations/$reclamation/actions/reclaim", body: `{"request_by":"$owner","comment":"c"}`, on: "kms"}},
	"POST /v1/reclamations/{id}/actions/restore":        {{target: "/v1/reclamations/$reclamation/actions/restore", body: `{"request_by":"$owner","comment":"c"}`, on: "kms"}},
	"GET /v1/clusters":                                  {{target: "/v1/clusters", shows: "$cluster"}},
	"POST /v1/clusters": {{
		target: "/v1/clusters",
		body: `{"name":"new","issuer":"https://127.0.0.1:1/new","jwks":$jwks,"ca":"","audience":"iam","type":"IKS_SA","location":"us-south","resource_group":"$rgroup",` +
			`"server":{"url":"https://127.0.0.1:1","ca":"","token":"first"},"review":false,"groups":["$cluster_group"],"test_token":""}`,
	}},
	"GET /v1/clusters/{id}": {{target: "/v1/clusters/$cluster"}},
	"PATCH /v1/clusters/{id}": {{
		target: "/v1/clusters/$cluster", tagged: true,
		body: `{"jwks":$jwks,"ca":null,"server":{"url":"https://127.0.0.1:1","ca":"","token":"second"},"review":false,"audience":"other","test_token":""}`,
	}},
	"POST /v1/clusters/{id}/refresh_keys":               {{target: "/v1/clusters/$cluster/refresh_keys", status: 409}},
	"GET /v1/cluster_groups":                            {{target: "/v1/cluster_groups", shows: "$cluster_group"}},
	"POST /v1/cluster_groups":                           {{target: "/v1/cluster_groups", body: `{"name":"new","description":"d"}`}},
	"GET /v1/cluster_groups/{id}":                       {{target: "/v1/cluster_groups/$cluster_group"}},
	"PATCH /v1/cluster_groups/{id}":                     {{target: "/v1/cluster_groups/$cluster_group", tagged: true, body: `{"name":"first","description":"d"}`}},
	"DELETE /v1/cluster_groups/{id}":                    {{target: "/v1/cluster_groups/$cluster_group"}},
	"PUT /v1/cluster_groups/{id}/clusters/{cluster}":    {{target: "/v1/cluster_groups/$cluster_group_empty/clusters/$cluster"}},
	"DELETE /v1/cluster_groups/{id}/clusters/{cluster}": {{target: "/v1/cluster_groups/$cluster_group/clusters/$cluster"}},
	"DELETE /v1/clusters/{id}":                          {{target: "/v1/clusters/$cluster"}},

	// Accounts and people.
	"GET /v1/accounts":                             {{target: "/v1/accounts", shows: "$operated"}},
	"GET /coe/v2/accounts":                         {{target: "/coe/v2/accounts", shows: "$operated"}},
	"POST /v1/accounts":                            {{target: "/v1/accounts", body: `{"name":"New","owner":{"email":"new@example.com","name":"N"}}`}},
	"DELETE /v1/accounts/{account_id}":             {{target: "/v1/accounts/$operated"}},
	"POST /v1/accounts/{account_id}/reopen":        {{target: "/v1/accounts/$closed/reopen"}},
	"GET /v2/accounts/{account_id}/users":          {{target: "/v2/accounts/$account/users", shows: "$user"}},
	"GET /v2/accounts/{account_id}/users/{iam_id}": {{target: "/v2/accounts/$account/users/$user", single: true}},
	"POST /v2/accounts/{account_id}/users":         {{target: "/v2/accounts/$account/users", body: `{"users":[{"email":"new@example.com","account_role":"Member"}],"access_groups":["$group"]}`}},
	"PATCH /v2/accounts/{account_id}/users/{iam_id}": {{
		target: "/v2/accounts/$account/users/$user", tagged: true,
		body: `{"firstname":"F","lastname":"L","state":"ACTIVE","phonenumber":"1"}`,
	}},
	"PUT /v2/accounts/{account_id}/users/{iam_id}":         {{target: "/v2/accounts/$account/users/$user", body: `{"state":"DISABLED"}`, tagged: true}},
	"DELETE /v2/accounts/{account_id}/users/{iam_id}":      {{target: "/v2/accounts/$account/users/$user"}},
	"DELETE /v3/accounts/{account_id}/users/{iam_id}":      {{target: "/v3/accounts/$account/users/$user"}},
	"POST /v2/accounts/{account_id}/users/{iam_id}/apikey": {{target: "/v2/accounts/$account/users/$invited/apikey", refused: "iam-identity.apikey.manage"}},
	"GET /v1/idps":         {{target: "/v1/idps?account_id=$account", shows: "$idp"}},
	"POST /v1/idps":        {{target: "/v1/idps", body: `{"account_id":"$account","name":"new","issuer":"https://127.0.0.1:1/new","audience":"tabard","jwks":$jwks,"enabled":true}`}},
	"GET /v1/idps/{id}":    {{target: "/v1/idps/$idp"}},
	"PUT /v1/idps/{id}":    {{target: "/v1/idps/$idp", body: `{"name":"renamed","audience":"other","enabled":false,"jwks":$jwks}`, header: anyTag, tagged: true}},
	"DELETE /v1/idps/{id}": {{target: "/v1/idps/$idp"}},

	"GET /v1/workload_issuers": {{target: "/v1/workload_issuers", shows: "$workload_issuer"}},
	"POST /v1/workload_issuers": {{
		target: "/v1/workload_issuers",
		body:   `{"name":"new","issuer":"https://127.0.0.1:1/new","audience":"tabard","jwks":$jwks,"mapping":{"claims":{"team":"org.team"},"pin":[["team"]],"form":{"team":"[a-z]+"}}}`,
	}},
	"GET /v1/workload_issuers/{id}": {{target: "/v1/workload_issuers/$workload_issuer"}},
	"PATCH /v1/workload_issuers/{id}": {{
		target: "/v1/workload_issuers/$workload_issuer", header: anyTag, tagged: true,
		body: `{"name":"renamed","audience":"other","jwks":$jwks,"preset":"gitlab"}`,
	}},
	"DELETE /v1/workload_issuers/{id}": {{target: "/v1/workload_issuers/$workload_issuer"}},

	"GET /v1/access_use":            {{target: "/v1/access_use"}},
	"GET /v1/access_recommendation": {{target: "/v1/access_recommendation?iam_id=iam-$profile"}},
	"POST /v1/simulate/token": {{
		target: "/v1/simulate/token",
		body:   `{"profile_id":"$profile","evidence":{"type":"kubernetes","cluster":"$cluster","namespace":"default","service_account":"app"}}`,
	}},
	"POST /v1/simulate/access": {{target: "/v1/simulate/access", body: `{"iam_id":"$user","action":"kms.secrets.read","resource":{"attributes":{"serviceName":"kms"}}}`}},

	"GET /v1/events": {{target: "/v1/events"}},
	"GET /v1/events/{correlation_id}/explanation": {{target: "/v1/events/$transaction/explanation"}},
	"GET /v1/events/stream":                       {{target: "/v1/events/stream?after=0&limit=1"}},
	"GET /v1/events/settings":                     {{target: "/v1/events/settings"}},
	"PATCH /v1/events/settings":                   {{target: "/v1/events/settings", body: `{"decisions":"all"}`, tagged: true}},
	"GET /v1/events/checkpoint":                   {{target: "/v1/events/checkpoint"}},
	"GET /v1/events/checkpoint/key":               {{target: "/v1/events/checkpoint/key"}},
	"GET /v1/events/{position}/proof":             {{target: "/v1/events/$event_position/proof"}},
	"GET /v1/events/consistency":                  {{target: "/v1/events/consistency?from=1"}},
	"GET /v1/events/log":                          {{target: "/v1/events/log?limit=2"}},
	"GET /v1/events/routes":                       {{target: "/v1/events/routes"}},
	"GET /v1/events/space":                        {{target: "/v1/events/space"}},
	"POST /v1/events/space/release":               {{target: "/v1/events/space/release"}},

	// Virtual servers.
	"GET /v1/images":                            {{target: "/v1/images" + vpcVersion, shows: "$image"}},
	"GET /v1/images/{id}":                       {{target: "/v1/images/$image" + vpcVersion}},
	"POST /v1/images":                           {{target: "/v1/images" + vpcVersion, body: `{"name":"new","resource_group":{"id":"$rgroup"},"operating_system":{"name":"debian-12-amd64"},"file":{"href":"https://127.0.0.1:1/x","checksums":{"sha256":"` + strings.Repeat("0", 64) + `"}}}`}},
	"PATCH /v1/images/{id}":                     {{target: "/v1/images/$image_own" + vpcVersion, body: `{"name":"renamed"}`}},
	"DELETE /v1/images/{id}":                    {{target: "/v1/images/$image_own" + vpcVersion}},
	"PUT /v1/images/{id}/file":                  {{target: "/v1/images/$image_own/file" + vpcVersion, body: rawDisk()}},
	"GET /v1/operating_systems":                 {{target: "/v1/operating_systems" + vpcVersion, shows: `"$system"`}},
	"GET /v1/operating_systems/{name}":          {{target: "/v1/operating_systems/$system" + vpcVersion}},
	"GET /v1/vpcs":                              {{target: "/v1/vpcs" + vpcVersion, shows: "$vpc"}},
	"GET /v1/vpcs/{id}":                         {{target: "/v1/vpcs/$vpc" + vpcVersion}},
	"GET /v1/vpcs/{id}/default_security_group":  {{target: "/v1/vpcs/$vpc/default_security_group" + vpcVersion}},
	"GET /v1/vpcs/{id}/address_prefixes":        {{target: "/v1/vpcs/$vpc/address_prefixes" + vpcVersion}},
	"POST /v1/vpcs":                             {{target: "/v1/vpcs" + vpcVersion, body: `{"name":"new","resource_group":{"id":"$rgroup"},"address_prefix_management":"auto","classic_access":false}`}},
	"PATCH /v1/vpcs/{id}":                       {{target: "/v1/vpcs/$vpc" + vpcVersion, body: `{"name":"renamed"}`}},
	"DELETE /v1/vpcs/{id}":                      {{target: "/v1/vpcs/$vpc_empty" + vpcVersion}},
	"GET /v1/security_groups":                   {{target: "/v1/security_groups" + vpcVersion, shows: "$security_group"}},
	"GET /v1/security_groups/{id}":              {{target: "/v1/security_groups/$security_group" + vpcVersion}},
	"POST /v1/security_groups":                  {{target: "/v1/security_groups" + vpcVersion, body: `{"name":"new","resource_group":{"id":"$rgroup"},"vpc":{"id":"$vpc"},"rules":[{"direction":"inbound","protocol":"icmp","type":8,"code":0,"remote":{"id":"$security_group"}}]}`}},
	"PATCH /v1/security_groups/{id}":            {{target: "/v1/security_groups/$security_group" + vpcVersion, body: `{"name":"renamed"}`}},
	"DELETE /v1/security_groups/{id}":           {{target: "/v1/security_groups/$group_free" + vpcVersion}},
	"GET /v1/security_groups/{id}/rules":        {{target: "/v1/security_groups/$group_free/rules" + vpcVersion}},
	"GET /v1/security_groups/{id}/rules/{rule}": {{target: "/v1/security_groups/$group_free/rules/$group_free_rule" + vpcVersion}},
	"POST /v1/security_groups/{id}/rules": {{
		target: "/v1/security_groups/$group_free/rules" + vpcVersion,
		body:   `{"name":"new","direction":"inbound","protocol":"tcp","ip_version":"ipv4","port_min":80,"port_max":90,"remote":{"cidr_block":"192.0.2.0/24"},"local":{"cidr_block":"0.0.0.0/0"}}`,
	}},
	"PATCH /v1/security_groups/{id}/rules/{rule}": {{
		target: "/v1/security_groups/$group_free/rules/$group_free_rule" + vpcVersion,
		body:   `{"name":"renamed","direction":"outbound","port_min":null,"port_max":null,"remote":{"id":"$security_group"}}`,
	}},
	"DELETE /v1/security_groups/{id}/rules/{rule}":     {{target: "/v1/security_groups/$group_free/rules/$group_free_rule" + vpcVersion}},
	"GET /v1/security_groups/{id}/targets":             {{target: "/v1/security_groups/$group_used/targets" + vpcVersion}},
	"GET /v1/security_groups/{id}/targets/{target}":    {{target: "/v1/security_groups/$group_used/targets/$nic" + vpcVersion}},
	"PUT /v1/security_groups/{id}/targets/{target}":    {{target: "/v1/security_groups/$group_free/targets/$nic" + vpcVersion}},
	"DELETE /v1/security_groups/{id}/targets/{target}": {{target: "/v1/security_groups/$group_used/targets/$nic" + vpcVersion}},
	"GET /v1/subnets/{id}/reserved_ips":                {{target: "/v1/subnets/$subnet/reserved_ips" + vpcVersion}},
	"GET /v1/subnets/{id}/reserved_ips/{ip}":           {{target: "/v1/subnets/$subnet/reserved_ips/$nic_ip" + vpcVersion}},
	"GET /v1/subnets":                                  {{target: "/v1/subnets" + vpcVersion, shows: "$subnet"}},
	"GET /v1/subnets/{id}":                             {{target: "/v1/subnets/$subnet" + vpcVersion}},
	"POST /v1/subnets":                                 {{target: "/v1/subnets" + vpcVersion, body: `{"name":"new","resource_group":{"id":"$rgroup"},"vpc":{"id":"$vpc"},"zone":{"name":"us-south-2"},"total_ipv4_address_count":32,"ip_version":"ipv4"}`}},
	"PATCH /v1/subnets/{id}":                           {{target: "/v1/subnets/$subnet" + vpcVersion, body: `{"name":"renamed"}`}},
	"DELETE /v1/subnets/{id}":                          {{target: "/v1/subnets/$subnet_empty" + vpcVersion}},
	"GET /v1/keys":                                     {{target: "/v1/keys" + vpcVersion, shows: "$sshkey"}},
	"GET /v1/keys/{id}":                                {{target: "/v1/keys/$sshkey" + vpcVersion}},
	"POST /v1/keys":                                    {{target: "/v1/keys" + vpcVersion, body: `{"name":"new","public_key":"$sshkey_new","type":"ed25519","resource_group":{"id":"$rgroup"}}`}},
	"PATCH /v1/keys/{id}":                              {{target: "/v1/keys/$sshkey" + vpcVersion, body: `{"name":"renamed"}`}},
	"DELETE /v1/keys/{id}":                             {{target: "/v1/keys/$sshkey" + vpcVersion}},
	"GET /v1/floating_ips":                             {{target: "/v1/floating_ips" + vpcVersion, shows: "$fip"}},
	"GET /v1/floating_ips/{id}":                        {{target: "/v1/floating_ips/$fip" + vpcVersion}},
	"POST /v1/floating_ips":                            {{target: "/v1/floating_ips" + vpcVersion, body: `{"name":"new","zone":{"name":"us-south-1"},"resource_group":{"id":"$rgroup"}}`}},
	"PATCH /v1/floating_ips/{id}":                      {{target: "/v1/floating_ips/$fip_bound" + vpcVersion, body: `{"name":"renamed","target":{"id":"$nic"}}`}},
	"DELETE /v1/floating_ips/{id}":                     {{target: "/v1/floating_ips/$fip" + vpcVersion}},
	"GET /v1/instances":                                {{target: "/v1/instances" + vpcVersion, shows: "$server"}},
	"GET /v1/instances/{id}":                           {{target: "/v1/instances/$server" + vpcVersion}},
	"GET /v1/instances/{id}/initialization":            {{target: "/v1/instances/$server/initialization" + vpcVersion}},
	"POST /v1/instances":                               {{target: "/v1/instances" + vpcVersion, body: serverBody("new")}},
	"PATCH /v1/instances/{id}":                         {{target: "/v1/instances/$server" + vpcVersion, body: `{"name":"renamed","metadata_service":{"enabled":false,"protocol":"http","response_hop_limit":2}}`, tagged: true}},
	"DELETE /v1/instances/{id}":                        {{target: "/v1/instances/$server" + vpcVersion}},
	"POST /v1/instances/{id}/actions":                  {{target: "/v1/instances/$server/actions" + vpcVersion, body: `{"type":"stop","force":true}`}},
	// Nothing runs here, so that who may enter is told just that.
	"GET /v1/instances/{id}/local_access":                                  {{target: "/v1/instances/$server/local_access" + vpcVersion, status: http.StatusConflict}},
	"GET /v1/instances/{id}/network_interfaces":                            {{target: "/v1/instances/$server/network_interfaces" + vpcVersion}},
	"GET /v1/instances/{id}/network_interfaces/{nic}":                      {{target: "/v1/instances/$server/network_interfaces/$nic" + vpcVersion}},
	"GET /v1/instances/{id}/network_interfaces/{nic}/floating_ips":         {{target: "/v1/instances/$server/network_interfaces/$nic/floating_ips" + vpcVersion}},
	"GET /v1/instances/{id}/network_interfaces/{nic}/floating_ips/{ip}":    {{target: "/v1/instances/$server/network_interfaces/$nic/floating_ips/$fip_bound" + vpcVersion}},
	"PUT /v1/instances/{id}/network_interfaces/{nic}/floating_ips/{ip}":    {{target: "/v1/instances/$server/network_interfaces/$nic/floating_ips/$fip" + vpcVersion}},
	"DELETE /v1/instances/{id}/network_interfaces/{nic}/floating_ips/{ip}": {{target: "/v1/instances/$server/network_interfaces/$nic/floating_ips/$fip_bound" + vpcVersion}},
	"GET /v1/instances/{id}/network_attachments":                           {{target: "/v1/instances/$server/network_attachments" + vpcVersion}},
	"GET /v1/instances/{id}/volume_attachments":                            {{target: "/v1/instances/$server/volume_attachments" + vpcVersion}},
	"GET /v1/instances/{id}/volume_attachments/{attachment}":               {{target: "/v1/instances/$server/volume_attachments/$attachment" + vpcVersion}},
	"PATCH /v1/instances/{id}/network_interfaces/{nic}":                    {{target: "/v1/instances/$server/network_interfaces/$nic" + vpcVersion, body: `{"name":"renamed","allow_ip_spoofing":false}`}},
	"GET /v1/instances/{id}/network_interfaces/{nic}/ips":                  {{target: "/v1/instances/$server/network_interfaces/$nic/ips" + vpcVersion}},
	"GET /v1/instances/{id}/network_interfaces/{nic}/ips/{ip}":             {{target: "/v1/instances/$server/network_interfaces/$nic/ips/$nic_ip" + vpcVersion}},
	"GET /v1/instances/{id}/network_attachments/{attachment}":              {{target: "/v1/instances/$server_attached/network_attachments/$nac" + vpcVersion}},
	"GET /v1/virtual_network_interfaces":                                   {{target: "/v1/virtual_network_interfaces" + vpcVersion, shows: "$vni"}},
	"GET /v1/virtual_network_interfaces/{id}":                              {{target: "/v1/virtual_network_interfaces/$vni" + vpcVersion}},
	"PATCH /v1/virtual_network_interfaces/{id}":                            {{target: "/v1/virtual_network_interfaces/$vni" + vpcVersion, body: `{"name":"renamed","auto_delete":true}`}},
	"GET /v1/virtual_network_interfaces/{id}/ips":                          {{target: "/v1/virtual_network_interfaces/$vni/ips" + vpcVersion}},
	"GET /v1/virtual_network_interfaces/{id}/ips/{ip}":                     {{target: "/v1/virtual_network_interfaces/$vni/ips/$vni_ip" + vpcVersion}},
	"GET /v1/virtual_network_interfaces/{id}/floating_ips":                 {{target: "/v1/virtual_network_interfaces/$vni_bound/floating_ips" + vpcVersion}},
	"GET /v1/virtual_network_interfaces/{id}/floating_ips/{ip}":            {{target: "/v1/virtual_network_interfaces/$vni_bound/floating_ips/$fip_virtual" + vpcVersion}},
	"PUT /v1/virtual_network_interfaces/{id}/floating_ips/{ip}":            {{target: "/v1/virtual_network_interfaces/$vni/floating_ips/$fip" + vpcVersion}},
	"DELETE /v1/virtual_network_interfaces/{id}/floating_ips/{ip}":         {{target: "/v1/virtual_network_interfaces/$vni_bound/floating_ips/$fip_virtual" + vpcVersion}},
	"GET /v1/volumes":        {{target: "/v1/volumes" + vpcVersion, shows: "$volume"}},
	"GET /v1/volumes/{id}":   {{target: "/v1/volumes/$volume" + vpcVersion}},
	"PATCH /v1/volumes/{id}": {{target: "/v1/volumes/$volume" + vpcVersion, body: `{"name":"renamed"}`}},
}

// step is a route with its call.
type step struct {
	api.Route
	call
}

// steps returns the whole route table with a call for each route.
func (r *running) steps() []step {
	r.t.Helper()
	seen := map[string]int{}
	var out []step
	for _, route := range r.s.routeTable.All {
		n := seen[route.Pattern]
		seen[route.Pattern]++
		if route.Kind == api.KindOpen {
			c, ok := openRoutes[route.Pattern]
			if !ok {
				r.t.Errorf("the route %s needs no action (%s); it must stand in openRoutes", route.Pattern, route.Reason)
				continue
			}
			out = append(out, step{route, c})
			continue
		}
		calls := callsOf(route.Pattern)
		if n >= len(calls) {
			r.t.Errorf("the route %s (%s) has no call in walk", route.Pattern, cmp.Or(route.Event, route.Action))
			continue
		}
		out = append(out, step{route, calls[n]})
	}
	for pattern := range openRoutes {
		if seen[pattern] == 0 {
			r.t.Errorf("openRoutes has %s, which is no route", pattern)
		}
	}
	for pattern, calls := range walk {
		if seen[pattern] != len(calls) {
			r.t.Errorf("walk has %d calls of %s, which is registered %d times", len(calls), pattern, seen[pattern])
		}
	}
	return out
}

func (s step) String() string {
	return s.Pattern + " (" + cmp.Or(s.Event, s.Action, "open") + ")"
}

// hasAction reports whether any role has the action on the service.
func hasAction(catalog *access.Catalog, service, action string) bool {
	found, ok := catalog.Service(service)
	return ok && found.HasAction(action)
}
