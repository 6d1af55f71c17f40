package server

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/store"
)

// ofTransaction returns an account's events of the request behind an answer.
func (r *running) ofTransaction(account string, a answerOf) []activity.Event {
	r.t.Helper()
	return r.events(store.Query{AccountID: account, CorrelationID: a.header.Get(api.TransactionHeader)})
}

func TestEveryChangeHasOneEventThatIsInTheCatalogue(t *testing.T) {
	r := start(t)
	v, token := r.asOwner()
	seen := map[string]bool{}
	for _, account := range []string{r.home["account"], r.other["account"]} {
		for _, e := range r.all(account) {
			if _, ok := activity.EntryOf(e.Action); !ok {
				t.Errorf("%s is not in the catalogue", e.Action)
			}
		}
	}
	for i, s := range r.steps() {
		if s.Kind != api.KindChange || i%share != 0 || again(s) {
			continue
		}
		a := send(r.s, s.request(s.Route, v, token))
		events := r.ofTransaction(v["account"], a)
		// Showing the credentials of a resource key is an event of its own.
		events = slices.DeleteFunc(events, func(e activity.Event) bool { return strings.HasSuffix(e.Action, ".key.read") })
		if len(events) != 1 {
			t.Errorf("%s: %d events", s, len(events))
			continue
		}
		e := events[0]
		seen[e.Action] = true
		if err := r.wellMade(s, v, e, a); err != nil {
			t.Errorf("%s: %v\n%+v\n%s", s, err, e, e.RequestData)
		}
		if a.ok() {
			r.reset()
		}
	}
	for _, want := range []string{"kms.instance.create", "kms.instance.schedule_reclaim", "kms.key.create", "iam-groups.member.add", "is.instance.action.create"} {
		if !seen[want] && share == 1 {
			t.Errorf("no change of the walk is a %s", want)
		}
	}
	r.quiet()
}

// unchanging are the changes of the walk that leave everything as it is.
var unchanging = []string{"POST /v1/events/space/release", "PUT /v2/groups/{id}/rules/{rule}", "PUT /v1/services/{name}"}

// wellMade says what is wrong with the event of a change.
func (r *running) wellMade(s step, v vars, e activity.Event, a answerOf) error {
	entry, ok := activity.EntryOf(e.Action)
	if !ok {
		return fmt.Errorf("the action %s is not in the catalogue", e.Action)
	}
	target, err := crn.Parse(e.Target.ID)
	switch {
	case err != nil || target.AccountID() != v["account"]:
		return fmt.Errorf("the target is %q: %w", e.Target.ID, err)
	case e.Reason.Code != a.status || e.Reason.Type == "":
		return fmt.Errorf("the reason is %+v of an answer with %d", e.Reason, a.status)
	case e.DataEvent != entry.Data:
		return fmt.Errorf("data event: %v", e.DataEvent)
	case !strings.Contains(e.Target.TypeURI, "/"):
		return fmt.Errorf("the type of the target is %q", e.Target.TypeURI)
	case e.Initiator.Credential.Type != "token" || e.Initiator.TypeURI != activity.UserType || e.Initiator.ID != v["owner"]:
		return fmt.Errorf("the initiator is %+v", e.Initiator)
	case e.Initiator.Host != activity.Host{Address: "192.0.2.1", AddressType: "IPv4"}:
		return fmt.Errorf("the initiator's host is %+v", e.Initiator.Host)
	}
	grouped := target.Service == "is" || target.Service == "kms"
	if grouped && e.Target.ResourceGroupID == "" {
		return fmt.Errorf("the target is in no resource group")
	}
	if !a.ok() {
		if e.Outcome != activity.Failure || e.Reason.ForFailure == "" {
			return fmt.Errorf("the outcome is %s, because of %q", e.Outcome, e.Reason.ForFailure)
		}
		return nil
	}
	var data struct {
		Method, Path, Object      string
		Created, Changed, Deleted map[string]any
	}
	if err := json.Unmarshal(e.RequestData, &data); err != nil {
		return err
	}
	changed := len(data.Created)+len(data.Changed)+len(data.Deleted) > 0
	switch {
	case e.Outcome != activity.Success || e.Severity != entry.Severity:
		return fmt.Errorf("outcome %s, severity %s", e.Outcome, e.Severity)
	case data.Method == "" || data.Path == "" || changed && data.Object == "":
		return fmt.Errorf("the request data lacks something")
	case !changed && !slices.Contains(unchanging, s.Pattern):
		return fmt.Errorf("the request data has nothing that changed")
	}
	return nil
}

func TestAnAddressOfTheNewerKindIsToldAsSuch(t *testing.T) {
	for address, want := range map[string]string{"192.0.2.7": "IPv4", "2001:db8::7": "IPv6"} {
		if got := activity.AddressType(address); got != want {
			t.Errorf("%s is %s", address, got)
		}
	}
}

// planted is what no event may hold, in no encoding that leaves it readable.
func planted(n int) string { return fmt.Sprintf("PLANTED%04dsecret", n) }

func TestNoSecretGetsIntoAnEventOrALog(t *testing.T) {
	in, err := installed()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for name, content := range in.files {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cfg, _ := walkConfig(dir)
	var log bytes.Buffer
	cfg.Log = slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	s := open(t, cfg)
	v := in.home.with("caller", in.home["owner"])
	n := 0
	secret := func() string { n++; return planted(n) }
	do := func(method, target, body string, header ...string) answerOf {
		t.Helper()
		q := request{method: method, target: expandTarget(target, v), token: v["owner_token"], header: map[string]string{}, body: []byte(expand(body, v))}
		for i := 0; i < len(header); i += 2 {
			q.header[header[i]] = header[i+1]
		}
		if auth := q.header["Authorization"]; auth != "" {
			q.token = strings.TrimPrefix(auth, "Bearer ")
		}
		return send(s, q)
	}
	ok := func(a answerOf) answerOf {
		t.Helper()
		if !a.ok() {
			t.Fatalf("%d %s", a.status, a.body)
		}
		return a
	}
	ok(do("PATCH", "/v1/events/settings", `{"decisions":"all"}`))

	// Given out, and nowhere kept in the clear.
	var given []string
	for _, made := range []struct{ target, body, field string }{
		{"/v1/apikeys", `{"name":"new","iam_id":"$serviceid_iam","store_value":true}`, "apikey"},
		{"/v1/apikeys", `{"name":"own","iam_id":"$owner"}`, "apikey"},
		{"/v2/accounts/$account/users/$invited/apikey", "", "apikey"},
		{"/v1/hosts/join_tokens", `{"name":"another"}`, "join_token"},
	} {
		var m map[string]any
		if err := json.Unmarshal(ok(do("POST", made.target, made.body)).body, &m); err != nil {
			t.Fatal(err)
		}
		given = append(given, m[made.field].(string))
	}
	var key struct {
		Credentials struct {
			APIKey string `json:"apikey"`
		} `json:"credentials"`
		GUID string `json:"guid"`
	}
	created := ok(do("POST", "/v2/resource_keys", `{"name":"new","source":"$instance","role":"Reader"}`))
	if err := json.Unmarshal(created.body, &key); err != nil || key.Credentials.APIKey == "" {
		t.Fatalf("%v %s", err, created.body)
	}
	given = append(given, key.Credentials.APIKey)
	ok(do("GET", "/v2/resource_keys/"+key.GUID, ""))
	given = append(given, v["key_value"], v["user_key_value"], v["owner_token"])
	for _, apikey := range given[:2] {
		form := url.Values{"grant_type": {"urn:ibm:params:oauth:grant-type:apikey"}, "apikey": {apikey}}
		a := ok(do("POST", "/identity/token", form.Encode(), "Content-Type", "application/x-www-form-urlencoded", "Authorization", "Basic Yng6Yng="))
		var tokens struct {
			Access  string `json:"access_token"`
			Refresh string `json:"refresh_token"`
		}
		if err := json.Unmarshal(a.body, &tokens); err != nil {
			t.Fatal(err)
		}
		given = append(given, tokens.Access)
		if len(tokens.Refresh) > 20 {
			given = append(given, tokens.Refresh)
		}
		ok(do("POST", "/identity/introspect", url.Values{"apikey": {apikey}}.Encode(), "Content-Type", "application/x-www-form-urlencoded", "Authorization", "Basic Yng6Yng="))
		ok(do("GET", "/v1/apikeys/details", "", "IAM-ApiKey", apikey))
	}

	// Taken in, whether or not the request is a good one.
	ok(do("PATCH", "/v1/clusters/$cluster", `{"jwks":$jwks,"server":{"url":"https://127.0.0.1:1","ca":"","token":"`+secret()+`"},"review":false,"test_token":""}`))
	do("PATCH", "/v1/clusters/$cluster", `{"jwks":$jwks,"test_token":"`+secret()+`"}`)
	do("POST", "/v1/clusters", `{"name":"x","issuer":"https://127.0.0.1:1/x","jwks":$jwks,"test_token":"`+secret()+`","password":"`+secret()+`"}`)
	ok(do("POST", "/v1/instances"+vpcVersion, strings.Replace(serverBody("new"), `"#!"`, `"#cloud-config `+secret()+`"`, 1)))
	ok(do("POST", "/v2/resource_instances", `{"name":"new","target":"us-south","resource_group":"$group_default","resource_plan_id":"`+kmsPlan+`","parameters":{"anything":"`+secret()+`"}}`))
	ok(do("PATCH", "/v2/resource_instances/$instance", `{"parameters":{"anything":"`+secret()+`"}}`))
	do("POST", "/v2/resource_keys", `{"name":"new","source":"$instance","role":"Reader","parameters":{"password":"`+secret()+`"}}`)
	ok(do("POST", "/v1/images"+vpcVersion, `{"name":"new","operating_system":{"name":"debian-12-amd64"},"file":{"href":"https://127.0.0.1:1/x?signature=`+secret()+`"}}`))
	ok(do("PUT", "/v1/preferences/accounts/$account/identities/$user/console/theme", `{"value_string":"`+secret()+`"}`))
	do("POST", "/v1/keys"+vpcVersion, `{"name":"private","public_key":"-----BEGIN OPENSSH PRIVATE KEY-----`+secret()+`"}`)
	do("POST", "/v1/idps", `{"account_id":"$account","name":"x","issuer":"https://127.0.0.1:1/x","audience":"a","jwks":$jwks,"client_secret":"`+secret()+`"}`)
	do("POST", "/v1/agent/join", `{"join_token":"`+secret()+`","jwk":{"d":"`+secret()+`"},"proof":"`+secret()+`"}`)
	do("POST", "/access/v1/evaluation", `{"subject":{"type":"user","id":"$user","properties":{"access_token":"`+secret()+`"}},`+readSecret+","+someKMS+`,"context":{"password":"`+secret()+`"}}`)
	for _, field := range []string{"apikey", "cr_token", "access_token", "assertion", "refresh_token", "client_assertion", "password", "passcode"} {
		for _, grant := range []string{
			"urn:ibm:params:oauth:grant-type:apikey", "urn:ibm:params:oauth:grant-type:cr-token", "urn:ibm:params:oauth:grant-type:assume",
			"urn:ietf:params:oauth:grant-type:jwt-bearer", "refresh_token", "client_credentials", "password",
		} {
			form := url.Values{"grant_type": {grant}, field: {secret()}, "profile_id": {v["profile"]}, "client_assertion_type": {"urn:ietf:params:oauth:client-assertion-type:jwt-bearer"}}
			do("POST", "/identity/token", form.Encode(), "Content-Type", "application/x-www-form-urlencoded", "Authorization", "Basic Yng6Yng=")
		}
	}
	do("GET", "/v1/profiles/$profile", "", "Authorization", "Bearer "+secret())
	do("GET", "/v1/profiles/$profile", "", "Authorization", "Basic "+secret(), "Cookie", secret(), "X-Api-Key", secret())
	do("GET", "/v1/apikeys/details", "", "IAM-ApiKey", secret())
	do("POST", "/v1/apikeys/leaked", "", "IAM-ApiKey", secret())

	entries, err := s.store.Entries(t.Context(), 0, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if i := bytes.Index(e.Doc, []byte("PLANTED")); i >= 0 {
			t.Errorf("the event %s holds %q", e.Action, e.Doc[max(0, i-80):min(len(e.Doc), i+40)])
		}
	}
	if i := strings.Index(log.String(), "PLANTED"); i >= 0 {
		t.Errorf("the log holds %q", log.String()[max(0, i-200):i+20])
	}
	closed(t, s)
	files, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		content, err := os.ReadFile(file)
		if err != nil {
			continue // a directory
		}
		for i, s := range given {
			if bytes.Contains(content, []byte(s)) || strings.Contains(log.String(), s) {
				t.Errorf("%s, or the log, holds secret %d that was given out", filepath.Base(file), i)
			}
		}
		if i := bytes.Index(content, []byte(planted(1))); i >= 0 {
			t.Errorf("%s holds a cluster's token", filepath.Base(file))
		}
	}
}

func TestAttemptsOnAnotherAccountAreInItsLogAndHoldNothingOfTheStrangers(t *testing.T) {
	r := start(t)
	mine, theirs := r.other, r.home // strangers to the operator's account
	mine = mine.with("caller", mine["owner"])
	before := len(r.all(theirs["account"]))
	seen := map[string]bool{}
	tried := 0
	for _, s := range r.steps() {
		if s.Kind != api.KindChange && s.Kind != api.KindRead || again(s) {
			continue
		}
		foreign := mine.with()
		for _, name := range s.names() {
			if theirs[name] != "" && theirs[name] != mine[name] && name != "jwks" && name != "caller" {
				foreign[name] = theirs[name]
			}
		}
		q := s.request(s.Route, foreign, mine["owner_token"])
		q.header["User-Agent"], q.header[api.TransactionHeader] = "EVIL-agent", "EVIL-transaction"
		if a := send(r.s, q); s.Kind == api.KindChange && a.ok() {
			continue
		}
		tried++
	}
	r.s.attempts.Flush(t.Context(), true)
	events := r.all(theirs["account"])
	events = events[:len(events)-before]
	if len(events) == 0 || len(events) > 21 {
		t.Errorf("%d attempts have left %d events in the other account's log", tried, len(events))
	}
	for _, e := range events {
		seen[e.Action] = true
		doc, err := json.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		switch {
		case e.Outcome != activity.Failure || e.Severity != activity.Critical || e.AccountID != theirs["account"]:
			t.Errorf("event %s", doc)
		case e.Initiator.ID != mine["owner"] || e.Initiator.Name != "" || e.Initiator.Host.Address == "" || e.Trace != nil:
			t.Errorf("it does not tell who it was, or more than that: %s", doc)
		case bytes.Contains(doc, []byte("EVIL")):
			t.Errorf("it holds what the stranger wrote: %s", doc)
		case e.Target.ID == "":
			t.Errorf("it does not tell what was aimed at: %s", doc)
		}
	}
	last := events[0]
	if !strings.Contains(string(last.ResponseData), `"attempts":`) {
		t.Errorf("what was beyond the bound is not counted: %+v %s", last, last.ResponseData)
	}
	r.quiet()
}

// all returns an account's events, newest first.
func (r *running) all(account string) []activity.Event {
	r.t.Helper()
	stored, err := r.s.store.Events(r.t.Context(), store.Query{AccountID: account, Limit: 100_000})
	if err != nil {
		r.t.Fatal(err)
	}
	out := make([]activity.Event, len(stored))
	for i, e := range stored {
		if err := json.Unmarshal(e.Doc, &out[i]); err != nil {
			r.t.Fatal(err)
		}
	}
	return out
}

func TestWhereTheAccountAsksForItEveryDecisionHasItsEvent(t *testing.T) {
	r := start(t)
	v, token := r.asOwner()
	ask := func(mode string) {
		if a := send(r.s, request{method: "PATCH", target: "/v1/events/settings", body: []byte(`{"decisions":"` + mode + `"}`), token: token}); !a.ok() {
			t.Fatalf("%d %s", a.status, a.body)
		}
	}
	ask("all")
	for i, s := range r.steps() {
		if i%share != 0 || s.Kind == api.KindOpen || strings.HasSuffix(s.Pattern, "/events/settings") || again(s) {
			continue
		}
		a := send(r.s, s.request(s.Route, v, token))
		decisions := 0
		for _, e := range r.ofTransaction(v["account"], a) {
			if e.Action != activity.ActionEvaluated {
				continue
			}
			decisions++
			if !e.DataEvent || !strings.Contains(string(e.RequestData), `"subject.attributes"`) || !strings.Contains(string(e.ResponseData), `"decision"`) {
				t.Errorf("%s: %+v %s %s", s, e, e.RequestData, e.ResponseData)
			}
		}
		owned := strings.Contains(s.Pattern, "/preferences/") || a.status == 409 || s.empty
		if decisions == 0 && !owned && s.Kind != api.KindList {
			t.Errorf("%s (%d): no decision is recorded", s, a.status)
		}
		if decisions > 60 {
			t.Errorf("%s: %d events of decisions", s, decisions)
		}
		if s.Kind == api.KindChange && a.ok() {
			r.reset()
			ask("all")
		}
	}
	ask("off")
	a := send(r.s, request{method: "GET", target: expandTarget("/v1/profiles/$profile", v), token: token})
	if events := r.ofTransaction(v["account"], a); !a.ok() || len(events) != 0 {
		t.Errorf("%d: %d events with decisions off", a.status, len(events))
	}
	r.quiet()
}

func TestATokenRequestThatNamesAnotherAccountsProfileIsInItsLog(t *testing.T) {
	r := start(t)
	profile := r.home["profile"]
	wantCRN := "crn:v1:bluemix:public:iam-identity::a/" + r.home["account"] + "::profile:" + profile
	for how, form := range map[string]url.Values{
		"nobody's cr_token": {"grant_type": {"urn:ibm:params:oauth:grant-type:cr-token"}, "cr_token": {"x"}, "profile_id": {profile}},
		"by its CRN":        {"grant_type": {"urn:ibm:params:oauth:grant-type:cr-token"}, "cr_token": {"x"}, "profile_crn": {wantCRN}},
		"a token of another account": {
			"grant_type": {"urn:ibm:params:oauth:grant-type:assume"}, "access_token": {r.other["owner_token"]}, "profile_id": {profile},
		},
	} {
		r.s.attempts.Flush(t.Context(), true)
		before := len(r.all(r.home["account"]))
		a := send(r.s, request{
			method: "POST", target: "/identity/token", body: []byte(form.Encode()), header: map[string]string{"Content-Type": "application/x-www-form-urlencoded"},
		})
		if a.ok() {
			t.Fatalf("%s: %d %s", how, a.status, a.body)
		}
		r.s.attempts.Flush(t.Context(), true)
		events := r.all(r.home["account"])
		events = events[:len(events)-before]
		// Of whom nobody knows the attempt is in the operator's log, which is this one.
		if len(events) != 1 {
			t.Errorf("%s: %d events", how, len(events))
			continue
		}
		e := events[0]
		if how != "a token of another account" {
			continue
		}
		if e.Target.ID != wantCRN || e.Initiator.ID != r.other["owner"] || e.Outcome != activity.Failure || !strings.HasSuffix(e.Action, ".login") {
			t.Errorf("%s: %+v", how, e)
		}
	}
	// The other way round the account is not the operator's.
	profile = r.other["profile"]
	form := url.Values{"grant_type": {"urn:ibm:params:oauth:grant-type:cr-token"}, "cr_token": {"x"}, "profile_id": {profile}}
	before := len(r.all(r.other["account"]))
	send(r.s, request{method: "POST", target: "/identity/token", body: []byte(form.Encode()), header: map[string]string{"Content-Type": "application/x-www-form-urlencoded"}})
	r.s.attempts.Flush(t.Context(), true)
	events := r.all(r.other["account"])
	if len(events) != before+1 || !strings.HasSuffix(events[0].Target.ID, profile) || events[0].Initiator.ID != "" {
		t.Errorf("%d events, the newest %+v", len(events)-before, events[0])
	}
}

func TestATokenOfSomebodyWhoIsGoneIsInTheLogOfHisAccount(t *testing.T) {
	r := start(t)
	v := r.other
	owner := &builder{s: r.s, token: v["owner_token"], v: v.with()}
	iamID, token, _ := owner.invite("leaver@other.example.com")
	if a := send(r.s, request{method: "DELETE", target: "/v2/accounts/" + v["account"] + "/users/" + iamID, token: v["owner_token"]}); !a.ok() {
		t.Fatalf("%d %s", a.status, a.body)
	}
	a := send(r.s, request{method: "GET", target: expandTarget("/v1/profiles/$profile", v), token: token})
	events := r.ofTransaction(v["account"], a)
	if a.status != 401 || len(events) != 1 || events[0].Initiator.ID != iamID || events[0].Reason.Code != 401 {
		t.Errorf("%d: %+v", a.status, events)
	}
	// One that is forged tells of nobody.
	a = send(r.s, request{method: "GET", target: expandTarget("/v1/profiles/$profile", v), token: token[:strings.LastIndexByte(token, '.')+1] + strings.Repeat("A", 86)})
	if events := r.ofTransaction(v["account"], a); a.status != 401 || len(events) != 0 {
		t.Errorf("%d: %+v", a.status, events)
	}
}

func TestTheEndOfALinkToAnotherAccountsResourceIsInBothLogs(t *testing.T) {
	r := start(t)
	theirs := &builder{s: r.s, token: r.other["owner_token"], v: r.other.with("foreign_crn", r.home["server_crn"])}
	theirs.make("linked", "id", "/v1/profiles/$profile/links", `{"cr_type":"VSI","is_cross_account":true,"name":"theirs","link":{"crn":"$foreign_crn"}}`)
	a := send(r.s, request{method: "DELETE", target: expandTarget("/v1/instances/$server"+vpcVersion, r.home), token: r.home["owner_token"]})
	if !a.ok() {
		t.Fatalf("%d %s", a.status, a.body)
	}
	for _, e := range r.ofTransaction(r.home["account"], a) {
		doc := string(e.RequestData) + string(e.ResponseData)
		for _, id := range []string{r.other["profile"], theirs.v["linked"], r.other["account"], "theirs"} {
			if strings.Contains(doc, id) {
				t.Errorf("the log of the instance's account tells of another's: %s", doc)
			}
		}
	}
	e := r.all(r.other["account"])[0]
	if e.Action != "iam-identity.account-profile.update" || !strings.HasSuffix(e.Target.ID, r.other["profile"]) ||
		!strings.Contains(string(e.RequestData), `"deleted":`) || !strings.Contains(string(e.RequestData), theirs.v["linked"]) {
		t.Errorf("%+v %s", e, e.RequestData)
	}
	if doc, err := json.Marshal(e); err != nil || bytes.Contains(doc, []byte(r.home["owner"])) {
		t.Errorf("the log of the profile's account tells who deleted the instance: %s", doc)
	}
	r.quiet()
}
