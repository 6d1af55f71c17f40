package conformance

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
)

func TestARunIsGoodOnlyWhenItIsExactlyAsTheListSays(t *testing.T) {
	specs := func(states ...string) []outcome {
		var all []outcome
		for _, s := range states {
			spec, state, _ := strings.Cut(s, " ")
			all = append(all, outcome{spec: spec, state: state})
		}
		return all
	}
	list := []exclusion{{spec: "template", reason: "r"}, {spec: "list", reason: "r", answered: true}}
	for name, c := range map[string]struct {
		outcomes []outcome
		required int
		failing  []string
		problem  string
	}{
		"as it should be":              {specs("a passed", "b passed", "template failed", "list passed"), 2, nil, ""},
		"a required spec fails":        {specs("a passed", "b failed", "template failed", "list passed"), 2, []string{"b"}, ""},
		"a required spec is skipped":   {specs("a passed", "b skipped", "template failed", "list passed"), 2, []string{"b"}, ""},
		"the suite's clean-up fails":   {specs("a passed", "template failed", "list passed", "AfterSuite failed"), 1, []string{"AfterSuite"}, ""},
		"an answered spec fails":       {specs("a passed", "template failed", "list failed"), 1, []string{"list"}, ""},
		"an excluded spec passes":      {specs("a passed", "template passed", "list passed"), 1, nil, "passes now: template"},
		"an excluded spec is skipped":  {specs("a passed", "template skipped", "list passed"), 1, nil, "did not run: template"},
		"an excluded spec is no more":  {specs("a passed", "list passed"), 1, nil, "not in the suite: template"},
		"a spec is missing":            {specs("a passed", "template failed", "list passed"), 2, nil, "1 specs are not excluded; there should be 2"},
		"the suite has one more":       {specs("a passed", "b passed", "template failed", "list passed"), 1, nil, "2 specs are not excluded"},
		"two specs have the same name": {specs("a passed", "a passed", "template failed", "list passed"), 2, nil, "two specs have the name a"},
	} {
		v := judge(c.required, c.outcomes, list)
		var failing []string
		for _, o := range v.failing {
			failing = append(failing, o.spec)
		}
		problems := strings.Join(v.problems, "\n")
		if !slices.Equal(failing, c.failing) || (c.problem == "") != (problems == "") || !strings.Contains(problems, c.problem) {
			t.Errorf("%s: failing %v, problems %q", name, failing, problems)
		}
	}
}

func TestAnExclusionNeedsASuiteAndAReason(t *testing.T) {
	list, err := parseExclusions("# why\nsuite s\n\nbecause it is theirs\nat /v1/a /v1/b\n- one (x *X) two\n+ three\nsuite other\nbecause of that\n- one\n")
	if err != nil {
		t.Fatal(err)
	}
	if got := list["s"]; len(got) != 2 || got[0].spec != "one (x *X) two" || got[0].reason != "it is theirs" || got[0].answered ||
		!slices.Equal(got[0].at, []string{"/v1/a", "/v1/b"}) || !got[1].answered {
		t.Errorf("%+v", got)
	}
	if got := list["other"]; len(got) != 1 || got[0].at != nil {
		t.Errorf("%+v", got)
	}
	for _, text := range []string{"- one\n", "suite s\n- one\n", "because x\n- one\n", "suite s\nbecause x\n-\n", "suite s\nbecause x\nsuite t\n- one\n", "one\n"} {
		if _, err := parseExclusions(text); err == nil {
			t.Errorf("accepted %q", text)
		}
	}
}

func TestTheSpecUnderWayIsReadFromTheOutputHoweverItArrives(t *testing.T) {
	const delimiter = "------------------------------\n"
	steps := []struct{ written, running string }{
		{"Running Suite: S\n====\nRandom Seed: 1\nWill run 3 of 3 specs\n\n", ""},
		{"Top Around it \n  does this\n  /p/x_integration_test.go:12\n", "Top Around it does this"},
		{"talk\n/p/x_integration_test.go:99\nno newline", "Top Around it does this"},
		{"•\n" + delimiter, ""},
		{"Top \n  loose\n  x_test.go:20\n", "Top loose"},
		{delimiter + "• Failure [0.1 seconds]\nTop\n/p/x_test.go:3\n  loose [It]\n  /p/x_test.go:20\n", ""},
		{delimiter + "Top \n  last\n  x_test.go:30\n", "Top last"},
		{"\n" + delimiter + "•! Panic [0.1 seconds]\nTop\n", ""},
		{delimiter + "\nBeginning teardown.\n", ""},
	}
	var whole progress
	for _, s := range steps {
		whole.read([]byte(s.written))
		if whole.spec != s.running {
			t.Errorf("after %q: %q", s.written, whole.spec)
		}
	}
	var bytewise progress
	for _, s := range steps {
		for i := range len(s.written) {
			bytewise.read([]byte(s.written[i : i+1]))
		}
		if bytewise.spec != s.running {
			t.Errorf("byte by byte after %q: %q", s.written, bytewise.spec)
		}
	}
}

func TestAReportTellsHowEachSpecEnded(t *testing.T) {
	got, err := readReport([]byte(`<?xml version="1.0"?><testsuite name="S">
		<testcase name="a" classname="S" time="1"></testcase>
		<testcase name="b" classname="S"><failure type="Failure">x.go:1&#xA;Expected</failure><system-out>said</system-out></testcase>
		<testcase name="c" classname="S"><skipped>no file</skipped></testcase></testsuite>`))
	if err != nil {
		t.Fatal(err)
	}
	want := []outcome{{spec: "a", state: passed}, {spec: "b", state: failed, message: "x.go:1\nExpected", output: "said"}, {spec: "c", state: skipped, message: "no file"}}
	if !slices.Equal(got, want) {
		t.Errorf("%+v", got)
	}
	if _, err := readReport([]byte("<testsuite>")); err == nil {
		t.Error("accepted half a report")
	}
}

func TestARequestIsTheOperationThatLeavesTheLeastOpen(t *testing.T) {
	ops := parseOperations("builder := core.NewRequestBuilder(core.GET)\n_, err = builder.ResolveRequestURL(a.b, `/v1/keys/{id}`, nil)\n" +
		"builder := core.NewRequestBuilder(core.GET)\n_, err = builder.ResolveRequestURL(a.b, `/v1/keys/details`, nil)\n" +
		"builder := core.NewRequestBuilder(core.POST)\n_, err = builder.ResolveRequestURL(a.b, `/v1/keys/`, nil)\n")
	for request, want := range map[string]string{
		"GET /v1/keys/details":     "GET /v1/keys/details",
		"GET /v1/keys/crn%3Av1%2F": "GET /v1/keys/{id}",
		"POST /v1/keys":            "POST /v1/keys",
		"POST /v1/keys/":           "POST /v1/keys",
		"GET /v1/keys":             " ",
		"DELETE /v1/keys/x":        " ",
		"GET /v1/keys/x/lock":      " ",
	} {
		method, path, _ := strings.Cut(request, " ")
		op, ok := matchOperation(ops, method, path)
		if got := op.method + " " + op.pattern; got != want || ok != (want != " ") {
			t.Errorf("%s: %q", request, got)
		}
	}
}

func TestTheTableSaysWhatWasUsedByWhatPassed(t *testing.T) {
	op := func(s string) operation {
		method, pattern, _ := strings.Cut(s, " ")
		return operation{method, pattern}
	}
	var ops []operation
	for _, s := range []string{"GET /used", "GET /broken", "GET /refused", "GET /there", "GET /gone", "GET /told", "GET /none", "GET /missing", "GET /empty", "DELETE /cleaned"} {
		ops = append(ops, op(s))
	}
	r := &result{
		outcomes:   []outcome{{spec: "good", state: passed}, {spec: "bad", state: failed}, {spec: "lists", state: passed}},
		operations: ops,
		routes: map[operation]bool{
			op("GET /used"): true, op("GET /broken"): true, op("GET /refused"): true, op("GET /there"): true, op("GET /told"): true,
			op("GET /empty"): true, op("DELETE /cleaned"): true,
		},
		exchanges: []exchange{
			{spec: "good", method: "GET", path: "/used", status: 200},
			{spec: "bad", method: "GET", path: "/broken", status: 200},
			{spec: "good", method: "GET", path: "/refused", status: 422},
			{spec: "good", method: "GET", path: "/empty", status: 200},
			{spec: "lists", method: "GET", path: "/empty", status: 200},
			{spec: "bad", method: "GET", path: "/told", status: 404},
			{spec: "bad", method: "GET", path: "/none", status: 200},
			{spec: "", method: "GET", path: "/there", status: 404},
			{spec: "", method: "DELETE", path: "/cleaned/", status: 204},
			{spec: "good", method: "POST", path: "/identity/token", status: 200},
		},
	}
	rows, beside := tabulate(r, []exclusion{
		{spec: "lists", reason: "They are theirs.", at: []string{"/empty"}, answered: true},
		{spec: "bad", reason: "Not ours.", at: []string{"/gone", "/told", "/none"}},
	})
	want := []row{
		{"GET /used", "yes", ""},
		{"GET /broken", "yes", "The suite does not call it."},
		{"GET /refused", "yes", "The suite checks its refusal (422) only."},
		{"GET /there", "yes", "The suite does not call it."},
		{"GET /gone", "no", "Not ours."},
		{"GET /told", "no", "Not ours."},
		{"GET /none", "empty", "Answers that there are none. Not ours."},
		{"GET /missing", "no", ""},
		{"GET /empty", "empty", "Answers that there are none. They are theirs."},
		{"DELETE /cleaned", "yes", ""},
	}
	if !slices.Equal(rows, want) || !slices.Equal(beside, []string{"POST /identity/token"}) {
		t.Errorf("%v\n%v", rows, beside)
	}
}

func TestTheStandInMakesAKeyForAnAliasAKeyOfItsInstance(t *testing.T) {
	var source string
	server := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.Method + " " + r.URL.Path {
		case "GET /v2/resource_instances/guid":
			fmt.Fprint(w, `{"id":"crn:instance","account_id":"a","resource_group_id":"g"}`)
		case "POST /v2/resource_keys":
			var body struct{ Source string }
			if err := json.NewDecoder(r.Body).Decode(&body); err != nil {
				t.Error(err)
			}
			source = body.Source
			w.WriteHeader(http.StatusCreated)
			fmt.Fprintf(w, `{"id":"k","source_crn":"crn:instance"}`)
		default:
			w.WriteHeader(http.StatusTeapot)
		}
	})
	h := withAliases(server)
	post := func(path, body string) (int, map[string]any) {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest(http.MethodPost, path, strings.NewReader(body)))
		var answer map[string]any
		_ = json.Unmarshal(w.Body.Bytes(), &answer)
		return w.Code, answer
	}
	status, alias := post("/v2/resource_aliases", `{"name":"n","source":"guid","target":"crn:v1:bluemix:public:bluemix:us-south:o/org::cf-space:space"}`)
	if status != http.StatusCreated || alias["resource_instance_id"] != "crn:instance" || alias["target_crn"] != "crn:v1:bluemix:public:cf:us-south:o/org::cf-space:space" {
		t.Fatalf("%d %v", status, alias)
	}
	if status, key := post("/v2/resource_keys", fmt.Sprintf(`{"name":"n","source":%q}`, alias["id"])); status != http.StatusCreated || source != "guid" || key["source_crn"] != alias["id"] {
		t.Errorf("%d %v of %s", status, key, source)
	}
	if status, key := post("/v2/resource_keys", `{"name":"n","source":"guid"}`); status != http.StatusCreated || source != "guid" || key["source_crn"] != "crn:instance" {
		t.Errorf("%d %v of %s", status, key, source)
	}
	if status, _ := post("/v2/resource_instances", `{}`); status != http.StatusTeapot {
		t.Errorf("other requests are the server's: %d", status)
	}
}
