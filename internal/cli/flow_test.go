package cli

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	tabardserver "tabard.dev/tabard/internal/server"
)

// installation is a real server in this process that the client is logged in to
// as the owner of its account. The other tests of this package show what the
// client sends and prints; these show that the API takes it.
type installation struct {
	t   *testing.T
	URL string
}

func newInstallation(t *testing.T) *installation {
	t.Helper()
	home := t.TempDir()
	data := filepath.Join(home, "data")
	s, err := tabardserver.Open(t.Context(), tabardserver.Config{
		DataDir: data, Listen: []string{"127.0.0.1:0"}, Driver: tabardserver.DriverNone, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil && !errors.Is(err, context.Canceled) {
			t.Errorf("the server ended with %v", err)
		}
	})
	t.Setenv("TABARD_HOME", filepath.Join(home, "state"))
	for _, name := range []string{"TABARD_API_KEY", "IBMCLOUD_API_KEY", "IBMCLOUD_CR_TOKEN", "IBMCLOUD_CR_PROFILE", "TABARD_SERVER"} {
		t.Setenv(name, "")
	}
	t.Chdir(home)
	run(t, "login", "-a", s.URL(), "--apikey", "@"+filepath.Join(data, "owner.json")).want(0)
	return &installation{t, s.URL()}
}

// do runs a command line of words without blanks; more are appended as they are.
func (i *installation) do(line string, more ...string) result {
	i.t.Helper()
	return run(i.t, append(strings.Fields(line), more...)...).want(0)
}

// id runs a command and returns the id that it prints.
func (i *installation) id(line string, more ...string) string {
	i.t.Helper()
	return strings.TrimSpace(i.do(line, append(more, "--id")...).stdout)
}

// read runs a command and decodes the JSON that it prints.
func (i *installation) read(into any, line string, more ...string) {
	i.t.Helper()
	out := i.do(line, append(more, "--output", "json")...).stdout
	if err := json.Unmarshal([]byte(out), into); err != nil {
		i.t.Fatalf("tabard %s prints no JSON: %v\n%s", line, err, out)
	}
}

// object runs a command and returns the object that it prints as JSON.
func (i *installation) object(line string, more ...string) object {
	i.t.Helper()
	var o object
	i.read(&o, line, more...)
	return o
}

func (i *installation) list(line string, more ...string) []object {
	i.t.Helper()
	var all []object
	i.read(&all, line, more...)
	return all
}

// refused runs a command that fails, and wants it to tell what to do.
func (i *installation) refused(line string, fragments ...string) {
	i.t.Helper()
	run(i.t, strings.Fields(line)...).want(1, fragments...)
}

func texts(all []object, path string) []string {
	out := make([]string, len(all))
	for i, o := range all {
		out[i] = o.text(path)
	}
	return out
}

func same(t *testing.T, want, got any) {
	t.Helper()
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func privateFile(t *testing.T, name string) object {
	t.Helper()
	info, err := os.Stat(name)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode().Perm() != 0o600 {
		t.Errorf("%s has mode %v", name, info.Mode())
	}
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	var o object
	if err := json.Unmarshal(b, &o); err != nil {
		t.Fatal(err)
	}
	return o
}

func TestATrustedProfileIsManagedFromBeginningToEnd(t *testing.T) {
	i := newInstallation(t)
	id := i.id("iam trusted-profile-create shop --email shop@example.com --description", "The shop's pods")
	same(t, []string{"shop"}, texts(i.list("iam trusted-profiles -n shop"), "name"))
	same(t, []string{"shop"}, texts(i.list("iam trusted-profiles --description", "shop's"), "name"))
	same(t, []string{}, texts(i.list("iam trusted-profiles -d", `"quoted" \`), "name"))
	i.do("iam trusted-profile-update shop -n store --description", "")
	same(t, "", i.object("iam trusted-profile store").text("description"))
	i.refused("iam trusted-profile shop", "no trusted profile has the name", "Transaction ID: ")
	i.refused("iam trusted-profile-create store", "Transaction ID: ")

	crn := "crn:v1:bluemix:public:containers-kubernetes:us-south:a/" + i.object("account show").text("metadata.guid") + ":c1::"
	link := i.id("iam trusted-profile-link-create store --name web --cr-type IKS_SA --link-namespace shop --link-name web --link-crn", crn)
	same(t, link, i.object("iam trusted-profile-link store web").text("id"))
	same(t, []string{"web"}, texts(i.list("iam trusted-profile-links "+id), "name"))
	i.do("iam trusted-profile-link-delete store web -f")
	foreign := "crn:v1:bluemix:public:is:us-south-1:a/" + strings.Repeat("a", 32) + "::instance:0717_1"
	i.refused("iam trusted-profile-link-create store --cr-type VSI --link-crn "+foreign, "Transaction ID: ")
	same(t, "true", i.object("iam trusted-profile-link-create store --cr-type VSI --cross-account --link-crn "+foreign).text("is_cross_account"))

	i.do("iam trusted-profile-rule-create store --name batch --type Profile-CR --cr-type IKS_SA --conditions claim:namespace,operator:EQUALS,value:batch")
	i.do("iam trusted-profile-rule-update store batch --type Profile-CR --cr-type IKS_SA --conditions claim:namespace,operator:EQUALS,value:jobs")
	same(t, `"jobs"`, i.object("iam trusted-profile-rule store batch").text("conditions.value"))
	same(t, []string{"batch"}, texts(i.list("iam trusted-profile-rules store"), "name"))
	i.do("iam trusted-profile-rule-delete store batch -f")

	service := i.id("iam service-id-create ci")
	i.do("iam trusted-profile-identity-create store --id ci --id-type SERVICEID --description", "CI")
	same(t, service, i.object("iam trusted-profile-identity store ci --id-type SERVICEID").text("identifier"))
	same(t, []string{service}, texts(i.list("iam trusted-profile-identities store --id-type serviceid"), "identifier"))
	i.do("iam trusted-profile-identity-delete store ci --id-type SERVICEID -f")
	i.do("iam trusted-profile-delete store -f")
	same(t, []string{}, texts(i.list("iam trusted-profiles"), "name"))
}

func TestAProfileIsPutOnAndTakenOff(t *testing.T) {
	i := newInstallation(t)
	me := i.object("target")
	id := i.id("iam trusted-profile-create auditor")
	i.refused("iam trusted-profile-assume auditor", "assume trusted profile auditor", "Transaction ID: ")
	i.do("iam trusted-profile-identity-create auditor --id-type USER --id " + me.text("iam_id"))
	i.do("iam trusted-profile-policy-create auditor --roles Viewer --service-name iam-identity")
	i.do("iam trusted-profile-assume auditor").want(0, "You act as auditor now")
	same(t, "iam-"+id, i.object("target").text("iam_id"))
	same(t, []string{"auditor"}, texts(i.list("iam trusted-profiles"), "name"))
	i.refused("iam trusted-profile-create x", "Status: 403")
	i.refused("iam trusted-profile-assume auditor", "trusted-profile-leave")
	i.do("iam trusted-profile-leave")
	same(t, me.text("iam_id"), i.object("target").text("iam_id"))
	i.refused("iam trusted-profile-leave", "do not act as")
	i.do("iam trusted-profile-assume " + id)
	i.do("logout")
	if b, err := os.ReadFile(filepath.Join(os.Getenv("TABARD_HOME"), "config.json")); err != nil || strings.Contains(string(b), "token") {
		t.Errorf("tokens outlive the logout: %s %v", b, err)
	}
}

func TestServiceIDsAreGroupedLockedAndDeleted(t *testing.T) {
	i := newInstallation(t)
	group := i.id("iam service-id-group-create web --description", "Of the web team")
	i.do("iam service-id-group-update web --name front")
	same(t, "Of the web team", i.object("iam service-id-group front").text("description"))
	i.do("iam service-id-create backup --group front --lock")
	i.do("iam service-id-create other")
	same(t, []string{"backup"}, texts(i.list("iam service-ids --group "+group), "name"))
	same(t, []string{"front"}, texts(i.list("iam service-id-groups"), "name"))
	i.refused("iam service-id-update backup --name x", "locked", "Transaction ID: ")
	i.do("iam service-id-unlock backup")
	i.refused("iam service-id-unlock backup", "not locked already")
	i.do("iam service-id-update backup --name nightly")
	same(t, "true", i.object("iam service-id-lock nightly").text("locked"))
	i.refused("iam service-id-delete nightly -f", "locked")
	i.do("iam service-id-unlock nightly")
	i.refused("iam service-id-group-delete front -f", "1 service IDs")
	i.do("iam service-id-delete nightly other -f")
	i.do("iam service-id-group-delete front -f")
}

func TestAPIKeysAreMadeChangedSwitchedOffAndDeleted(t *testing.T) {
	i := newInstallation(t)
	i.do("iam service-id-create ci")
	i.do("iam service-id-create other")
	for _, c := range []struct{ word, of string }{{"api-key", ""}, {"service-api-key", " ci"}} {
		t.Run(c.word, func(t *testing.T) {
			out := i.do("iam " + c.word + "-create k" + c.of + " --file " + c.word + ".json --expires-at 90d --action-if-leaked delete --description first")
			value := privateFile(t, c.word+".json").text("apikey")
			if value == "" || strings.Contains(out.stdout+out.stderr, value) {
				t.Errorf("the key %q is printed or not in the file: %s", value, out.stdout)
			}
			k := i.object("iam " + c.word + " k" + c.of)
			same(t, []string{"delete", "first"}, []string{k.text("action_when_leaked"), k.text("description")})
			if end, err := time.Parse("2006-01-02T15:04-0700", k.text("expires_at")); err != nil || time.Until(end) < 89*24*time.Hour {
				t.Errorf("the key ends at %s: %v", k.text("expires_at"), err)
			}
			i.do("iam " + c.word + "-disable k" + c.of)
			i.refused("login -a "+i.URL+" --apikey @"+c.word+".json", "Transaction ID: ")
			i.do("iam " + c.word + "-enable k" + c.of)
			i.do("iam " + c.word + "-lock k" + c.of)
			i.refused("iam "+c.word+"-delete k"+c.of+" -f", "locked")
			same(t, "false", i.object("iam "+c.word+"-unlock k"+c.of).text("locked"))
			i.do("iam "+c.word+"-update k"+c.of+" --name k2 --expires-at", "")
			same(t, "", i.object("iam "+c.word+" k2"+c.of).text("expires_at"))
			if c.of != "" {
				i.refused("iam "+c.word+" "+k.text("id")+" other", "no API key has the name or ID")
				same(t, []string{"k2"}, texts(i.list("iam service-api-keys ci"), "name"))
				same(t, []string{"k2"}, texts(i.list("iam service-api-keys --all -n k2"), "name"))
			} else {
				same(t, []string{"k2"}, texts(i.list("iam api-keys --name k2"), "name"))
			}
			i.do("iam " + c.word + "-delete k2" + c.of + " -f")
			run(t, strings.Fields("iam "+c.word+"-create k"+c.of+" --expires-at soon")...).want(2, "90d")
		})
	}
}

func TestPoliciesOfEveryKindOfIdentityAreWrittenAndRestored(t *testing.T) {
	i := newInstallation(t)
	i.do("iam trusted-profile-create p")
	i.do("iam service-id-create s")
	i.do("iam access-group-create g")
	i.do("account user-invite ada@example.com")
	group := i.id("resource group-create web")
	for word, who := range map[string]string{"trusted-profile": "p", "service": "s", "user": "ada@example.com", "access-group": "g"} {
		t.Run(word, func(t *testing.T) {
			policy := i.id("iam " + word + "-policy-create " + who + " --roles Viewer,Writer --service-name cloud-object-storage --resource-group-name web --tags env:prod")
			i.do("iam " + word + "-policy-update " + who + " " + policy + " --roles Reader")
			got := i.object("iam " + word + "-policy " + who + " " + policy)
			same(t, []string{"Reader", "serviceName=cloud-object-storage, resourceGroupId=" + group, "prod"},
				[]string{got.text("roles.display_name"), policyResources(got), got.text("resources.tags.value")})
			i.do("iam " + word + "-policy-update " + who + " " + policy + " --service-name kms --tags env:test")
			same(t, "serviceName=kms", policyResources(i.object("iam "+word+"-policy "+who+" "+policy)))
			run(t, strings.Fields("iam "+word+"-policy-update "+who+" "+policy)...).want(2, "nothing to change")
			same(t, []string{policy}, texts(i.list("iam "+word+"-policies "+who), "id"))
			i.do("iam " + word + "-policy-delete " + who + " " + policy + " -f")
			same(t, []string{}, texts(i.list("iam "+word+"-policies "+who), "id"))
			i.do("iam policy-restore " + policy)
			kind := map[string]string{"trusted-profile": "trusted_profile", "service": "service_id", "user": "user", "access-group": "access_group"}[word]
			// The owner of the account has policies of his own.
			same(t, policy, i.list("iam access-policies --sort-by -created_at --service-name kms --type " + kind)[0].text("id"))
			i.do("iam access-policy-delete " + policy + " -f")
			same(t, "deleted", i.object("iam access-policy "+policy).text("state"))
		})
	}
	same(t, 4, len(i.list("iam access-policies --state deleted")))
}

func TestAPolicyWithConditionsKeepsThemWhenItsRolesChange(t *testing.T) {
	i := newInstallation(t)
	account := i.object("account show").text("metadata.guid")
	i.do("iam trusted-profile-create p")
	writeFile(t, "policy.json", `{
		"resource": {"attributes": [{"key":"accountId","operator":"stringEquals","value":"`+account+`"}, {"key":"serviceName","operator":"stringEquals","value":"kms"}]},
		"control": {"grant": {"roles": [{"role_id":"crn:v1:bluemix:public:iam::::role:Viewer"}]}},
		"pattern": "time-based-conditions:weekly:all-day",
		"rule": {"key":"{{environment.attributes.day_of_week}}","operator":"dayOfWeekAnyOf","value":["1+00:00","2+00:00"]}}`)
	for _, file := range []string{"policy.json", "@policy.json"} {
		policy := i.id("iam trusted-profile-policy-create p --file " + file)
		i.do("iam trusted-profile-policy-update p " + policy + " --roles Operator")
		got := i.object("iam trusted-profile-policy p " + policy + " --api-version v2")
		same(t, []string{"time-based-conditions:weekly:all-day", "dayOfWeekAnyOf", "crn:v1:bluemix:public:iam::::role:Operator"},
			[]string{got.text("pattern"), got.text("rule.operator"), got.text("control.grant.roles.role_id")})
		i.do("iam trusted-profile-policy p "+policy+" --api-version v2").want(0, "Operator", "weekly")
		i.do("iam trusted-profile-policy-update p " + policy + " --file policy.json")
		i.do("iam trusted-profile-policy-delete p " + policy + " -f")
	}
	i.refused("iam trusted-profile-policy-create p --file absent.json", "absent.json")
	writeFile(t, "policy.json", `[]`)
	i.refused("iam trusted-profile-policy-create p --file policy.json", "not a JSON object")
}

func TestAuthorizationsAreBetweenServices(t *testing.T) {
	i := newInstallation(t)
	i.do("resource service-instance-create bucket cloud-object-storage lite us-south")
	instance := i.object("resource service-instance bucket").text("guid")
	i.do("iam roles --source-service cloud-object-storage --service kms").want(0, "Reader")
	policy := i.id("iam authorization-policy-create cloud-object-storage kms Reader --source-service-instance-name bucket")
	got := i.object("iam authorization-policy " + policy)
	same(t, "serviceName=cloud-object-storage, serviceInstance="+instance, strings.TrimSuffix(authorizationSource(got), ", accountId="+i.object("account show").text("metadata.guid")))
	i.do("iam authorization-policies").want(0, "serviceName=kms", "Reader")
	same(t, []string{policy}, texts(i.list("iam account-policies -t auth"), "id"))
	i.do("iam authorization-policy-delete " + policy + " -f")
	same(t, []string{}, texts(i.list("iam authorization-policies"), "id"))
	i.do("iam policy-restore " + policy)
	i.refused("iam authorization-policy-create cloud-object-storage kms Emperor", `no role "Emperor"`)
	run(t, "iam", "authorization-policy-create", "cloud-object-storage").want(2, "missing TARGET_SERVICE_NAME, ROLE_NAME")
	run(t, "iam", "authorization-policy-create", "a", "b", "c", "--file", "f").want(2, "beside it")
}

func TestAnAccessGroupHasMembersRulesAndPolicies(t *testing.T) {
	i := newInstallation(t)
	i.do("iam access-group-create ops -d", "On call")
	i.do("iam access-group-update ops --name operators")
	i.do("iam trusted-profile-create p")
	i.do("iam service-id-create s")
	i.do("account user-invite ada@example.com")
	ada := i.object("account user ada@example.com").text("iam_id")
	for word, who := range map[string]string{"trusted-profile": "p", "service-id": "s", "user": "ada@example.com"} {
		i.do("iam access-group-" + word + "-add operators " + who)
		same(t, 1, len(i.list("iam access-group-"+word+"s operators")))
	}
	same(t, []string{"operators"}, texts(i.list("iam access-groups -p p"), "name")[:1])
	i.refused("iam access-group-delete operators -f", "3 members")
	i.do("iam access-group-user-remove operators " + ada)
	i.do("iam access-group-service-id-purge s -f").want(0, "from 1 access groups")
	i.refused("iam access-group-service-id-purge s -f", "is not a member")
	same(t, 1, len(i.list("iam access-group-trusted-profile-purge p -f")))

	rule := i.id("iam access-group-rule-create operators --name on-call --realm-name https://corp.test --expiration 12 --conditions claim:groups,operator:CONTAINS,value:on-call")
	i.do("iam access-group-rule-update operators on-call --realm-name https://corp.test --expiration 1 --conditions claim:groups,operator:IN,value:[\"a\",\"b\"]")
	same(t, []string{rule, "1", `["a","b"]`}, func() []string {
		r := i.object("iam access-group-rule operators on-call")
		return []string{r.text("id"), r.text("expiration"), r.text("conditions.value")}
	}())
	same(t, []string{"on-call"}, texts(i.list("iam access-group-rules operators"), "name"))
	run(t, "iam", "access-group-rule-create", "operators", "--name", "x").want(2, "missing --realm-name, --expiration, --conditions")
	i.do("iam access-group-rule-delete operators on-call -f")
	i.do("iam access-group-delete operators -f")

	same(t, "false", i.object("iam access-group-settings-update --public-access-enabled false").text("public_access_enabled"))
	same(t, "false", i.object("iam access-group-settings").text("public_access_enabled"))
}

func TestACustomRoleIsMadeOfActions(t *testing.T) {
	i := newInstallation(t)
	roles := i.list("iam roles --service kms --roles Reader,Viewer")
	same(t, []string{"Reader", "Viewer"}, texts(roles, "display_name"))
	actions := splitList(roles[0].text("actions"))
	action := actions[slices.IndexFunc(actions, func(a string) bool { return strings.HasPrefix(a, "kms.") })]
	create := []string{"--display-name", "Key lister", "--actions", action, "-d", "Lists keys"}
	i.do("iam role-create KeyLister --service-name kms", create...)
	i.do("iam role-update KeyLister --display-name", "Lister")
	got := i.object("iam role KeyLister")
	same(t, []string{"Lister", "Lists keys", action}, []string{got.text("display_name"), got.text("description"), got.text("actions")})
	i.do("iam trusted-profile-create p")
	i.do("iam trusted-profile-policy-create p --service-name kms --roles Lister,Viewer")
	i.do("iam trusted-profile-policies p").want(0, "Lister")
	i.refused("iam roles --service kms --roles Emperor", `no role "Emperor"`)
	run(t, "iam", "roles", "--resource-type", "x").want(2, "need --service")
	run(t, "iam", "role-create", "KeyLister").want(2, "required flag")
	i.do("iam role-delete KeyLister -f")
	i.refused("iam role KeyLister", "no custom role", "tabard iam roles")
}

func TestTheAccountsSettingsAreShownAndChanged(t *testing.T) {
	i := newInstallation(t)
	i.do("iam account-settings-update --restrict-create-service-id restricted --system-access-token-expiration-in-seconds 900 --mfa TOTP")
	got := i.object("iam account-settings")
	same(t, []string{"RESTRICTED", "900", "TOTP", "NOT_SET"}, []string{
		got.text("restrict_create_service_id"), got.text("system_access_token_expiration_in_seconds"), got.text("mfa"), got.text("restrict_create_platform_apikey"),
	})
	i.do("iam account-settings").want(0, "Access token expiration (s)")
	ada := i.list("account user-invite ada@example.com")[0].text("id")
	i.do("iam account-settings-update --user-mfa", `[{"iam_id":"`+ada+`","mfa":"NONE"}]`)
	same(t, ada, i.object("iam account-settings").text("user_mfa.iam_id"))
	i.refused("iam account-settings-update --allowed-ip-addresses nowhere", "Transaction ID: ")
	run(t, "iam", "account-settings-update").want(2, "nothing to change")
	run(t, "iam", "account-settings-update", "--mfa", "MAYBE").want(2, "TOTP4ALL")

	other := strings.Repeat("a", 32)
	i.do("iam access-management-settings-update --identity-type user --state limited --external-allowed-accounts " + other)
	got = i.object("iam access-management-settings")
	types := "external_account_identity_interaction.identity_types."
	same(t, []string{"limited", other, "enabled"}, []string{got.text(types + "user.state"), got.text(types + "user.external_allowed_accounts"), got.text(types + "service.state")})
	i.do("iam access-management-settings-update --identity-type user --state monitor")
	same(t, other, i.object("iam access-management-settings").text(types+"user.external_allowed_accounts"))
	i.do("iam access-management-settings-update --identity-type user --state enabled")
	run(t, "iam", "access-management-settings-update", "--state", "limited").want(2, "missing --identity-type")

	report := i.object("iam inactivity-report --hours 1")
	same(t, "1", report.text("report_duration"))
	i.do("iam inactivity-report latest").want(0, "Report "+report.text("reference"))
	run(t, "iam", "inactivity-report", "latest", "--hours", "1").want(2, "--hours is for a new report")
	i.refused("iam inactivity-report absent", "not found")
}

func TestServiceInstancesWithTheirKeysAndReclamations(t *testing.T) {
	i := newInstallation(t)
	web := i.id("resource group-create web")
	i.do("resource group-update web --name front")
	same(t, web, i.object("resource group front").text("id"))
	same(t, []string{"true"}, texts(i.list("resource groups --default"), "default"))

	plans := i.list("resource plans --service cloud-object-storage")
	var waits, ends object
	for _, p := range append(plans, i.list("resource plans")...) {
		if p.text("reclamation") == "true" {
			waits = p
		} else {
			ends = p
		}
	}
	create := func(name string, plan object, more string) string {
		t.Helper()
		return i.id("resource service-instance-create " + name + " " + plan.text("service_name") + " " + plan.text("id") + " us-south " + more)
	}
	bucket := create("bucket", waits, `-g front --lock --tags a,b -p {"size":1}`)
	i.do("resource service-instance bucket").want(0, `{"size":1}`, "a, b")
	same(t, []string{bucket}, texts(i.list("resource service-instances -g front --location us-south --service-name "+waits.text("service_name")), "guid"))
	same(t, []string{}, texts(i.list("resource service-instances --location eu-de"), "guid"))
	i.do("resource service-instances --long").want(0, "crn:v1:")
	i.refused("resource service-instance-update bucket --name pail", "locked")
	i.do("resource service-instance-unlock bucket")
	i.do("resource service-instance-update bucket --name pail --allow-cleanup -p", `{"size":2}`)
	same(t, []string{"pail", "true", "2"}, func() []string {
		o := i.object("resource service-instance " + bucket)
		return []string{o.text("name"), o.text("allow_cleanup"), o.text("parameters.size")}
	}())

	out := i.do("resource service-key-create k Viewer --instance-name pail --file k.json")
	secret := privateFile(t, "k.json").text("apikey")
	if secret == "" || strings.Contains(out.stdout, secret) {
		t.Errorf("the credentials are printed or not in the file: %s", out.stdout)
	}
	i.do("iam service-id-create ci")
	i.do("resource service-key-create of-ci --service-id ci --instance-id " + bucket)
	run(t, strings.Fields("resource service-key-create x Viewer --service-id ci --instance-name pail")...).want(2, "no role beside it")
	run(t, strings.Fields("resource service-key-create x Viewer")...).want(2, "instance-id")
	i.do("resource service-key-update k --name k2")
	same(t, secret, i.object("resource service-key k2").text("credentials.apikey"))
	same(t, 2, len(i.list("resource service-keys --instance-name pail")))
	same(t, 2, len(i.list("resource service-keys")))
	i.do("resource service-key-delete k2 -f")
	i.refused("resource service-instance-delete pail -f", "1 resource keys")

	i.do("resource service-instance-delete pail -f --recursive")
	same(t, []string{bucket}, texts(i.list("resource service-instances --state pending_reclamation"), "guid"))
	reclamation := i.list("resource reclamations --resource-instance-id " + bucket)[0].text("id")
	same(t, reclamation, i.object("resource reclamation "+bucket).text("id"))
	i.do("resource reclamation-restore "+bucket+" --comment", "needed after all")
	i.do("resource service-instance-delete pail -f")
	i.refused("resource reclamation-delete "+bucket, "needs a confirmation")
	i.do("resource reclamation-delete " + bucket + " -f")
	i.refused("resource reclamation "+bucket, "no reclamation")

	if ends.raw != nil {
		create("short", ends, "")
		i.do("resource service-instance-delete short -f")
	}
	same(t, "Unlimited", i.object("resource quota Unlimited").text("name"))
	same(t, 1, len(i.list("resource quotas")))
	i.do("resource group-update front --state suspended")
	i.do("resource group-delete front -f")
}
