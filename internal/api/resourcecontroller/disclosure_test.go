package resourcecontroller_test

import (
	"strings"
	"testing"

	"tabard.dev/tabard/internal/api/apitest"
)

func TestEveryAnswerThatShowsCredentialsStandsInTheLog(t *testing.T) {
	e := start(t)
	k := newKey(e, newInstance(e, "cloud-object-storage", "store"), "backup", "Writer")
	path := "/v2/resource_keys/" + k["guid"].(string)
	for _, r := range []apitest.Request{
		{Path: path}, {Path: "/v2/resource_keys"},
		{Path: "/v2/resource_instances/" + k["resource_instance_url"].(string)[len("/v2/resource_instances/"):] + "/resource_keys"},
		{Method: "PATCH", Path: path, Body: map[string]string{"name": "renamed"}},
	} {
		answer := e.Do(r)
		answer.Want(200)
		secret := creds(k)["apikey"].(string)
		if !strings.Contains(string(answer.Raw), secret) {
			continue
		}
		told := false
		for _, event := range e.Events(2) {
			told = told || event.CorrelationID == answer.Header.Get("Transaction-Id") && event.Action == "cloud-object-storage.key.read"
			if strings.Contains(string(event.ResponseData)+string(event.RequestData), secret) {
				t.Errorf("the event %s has the secret in it", event.Action)
			}
		}
		if !told {
			t.Errorf("%s %s shows the API key and no event tells of it", r.Method, r.Path)
		}
	}
}
