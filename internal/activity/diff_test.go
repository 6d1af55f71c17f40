package activity

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"tabard.dev/tabard/internal/object"
)

type thing struct {
	object.Meta
	ID      string            `json:"id"`
	Name    string            `json:"name"`
	Count   int               `json:"count,omitempty"`
	On      bool              `json:"on,omitempty"`
	Hash    string            `json:"hash"`
	Sealed  []byte            `json:"sealed,omitempty"`
	Doc     json.RawMessage   `json:"anything,omitempty"`
	Until   time.Time         `json:"until,omitzero"`
	Tags    []string          `json:"tags,omitempty"`
	Inner   *inner            `json:"inner,omitempty"`
	Labels  map[string]string `json:"labels,omitempty"`
	private string
}

type inner struct {
	URL      string `json:"url"`
	Password string `json:"password"`
}

func text(t *testing.T, v any) string {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestAChangeIsToldByTheFieldsThatDiffer(t *testing.T) {
	at := time.Date(2026, 7, 1, 9, 0, 0, 0, time.UTC)
	old := &thing{
		Meta: object.Meta{Revision: 1}, ID: "x", Name: "a", Count: 2, Hash: "h1", Sealed: []byte("one"), Doc: json.RawMessage(`{"pin":"1234"}`),
		Tags: []string{"a", "b", "b"}, Inner: &inner{URL: "https://x", Password: "p1"}, Labels: map[string]string{"k": "v", "token": "t1"}, private: "p",
	}
	next := &thing{
		Meta: object.Meta{Revision: 2}, ID: "x", Name: "b", On: true, Hash: "h2", Sealed: []byte("two"), Doc: json.RawMessage(`{"pin":"4321"}`), Until: at,
		Tags: []string{"b", "c", "a"}, Inner: &inner{URL: "https://x", Password: "p2"}, Labels: map[string]string{"k": "w", "token": "t2"},
	}
	want := `{"anything":{"new":"(hidden)","old":"(hidden)"},"count":{"new":0,"old":2},"hash":{"new":"(hidden)","old":"(hidden)"},` +
		`"inner.password":{"new":"(hidden)","old":"(hidden)"},"labels.k":{"new":"w","old":"v"},"labels.token":{"new":"(hidden)","old":"(hidden)"},` +
		`"name":{"new":"b","old":"a"},"on":{"new":true,"old":false},"sealed":{"new":"(hidden)","old":"(hidden)"},` +
		`"tags":{"added":["c"],"removed":["b"]},"until":{"new":"2026-07-01T09:00:00Z","old":null}}`
	if got := text(t, Diff(old, next)); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	if got := text(t, Diff(old, old)); got != "{}" {
		t.Errorf("no change is told as %s", got)
	}
	again := *old
	again.Tags = []string{"b", "b", "a"}
	if got := text(t, Diff(old, &again)); got != `{"tags":{"new":["b","b","a"],"old":["a","b","b"]}}` {
		t.Errorf("another order is told as %s", got)
	}
	again = *old
	again.Inner, again.Sealed = nil, nil
	if got := text(t, Diff(old, &again)); got != `{"inner":{"new":null,"old":{"password":"(hidden)","url":"https://x"}},"sealed":{"new":null,"old":"(hidden)"}}` {
		t.Errorf("what is gone is told as %s", got)
	}
}

func TestWhatIsMadeIsDescribedWithoutItsSecrets(t *testing.T) {
	made := &thing{ID: "x", Name: "a", Hash: "s3cret", Sealed: []byte("s3cret"), Doc: json.RawMessage(`"s3cret"`), Inner: &inner{Password: "s3cret"}}
	if got := text(t, Describe(made)); got != `{"anything":"(hidden)","hash":"(hidden)","id":"x","inner":{"password":"(hidden)"},"name":"a","sealed":"(hidden)"}` {
		t.Errorf("%s", got)
	}
}

func TestAChangeOfMuchStaysWithinTheBoundsOfAnEvent(t *testing.T) {
	big := &thing{ID: "x", Name: strings.Repeat("\u2028<", 5000), Labels: map[string]string{}}
	for i := range 2000 {
		big.Tags = append(big.Tags, strings.Repeat("t", 400)+fmt.Sprint(i))
		big.Labels[strings.Repeat("l", 300)+fmt.Sprint(i)] = strings.Repeat("v", 300)
	}
	changes := []Changed{{Kind: "thing", ID: "x", Old: &thing{ID: "x", Labels: map[string]string{"a": "b"}}, Next: big}}
	for i := range 1000 {
		changes = append(changes, Changed{Kind: "thing", ID: fmt.Sprint(i), Old: &thing{ID: fmt.Sprint(i), Name: strings.Repeat("<", 500)}})
	}
	body := map[string]any{}
	for i := range 500 {
		body[strings.Repeat("b", 200)+fmt.Sprint(i)] = strings.Repeat("v", 600)
	}
	for _, data := range []map[string]any{nil, body} {
		raw, err := ChangeData("PUT", strings.Repeat("/p", 1000), data, changes)
		if err != nil {
			t.Fatal(err)
		}
		if len(raw) > maxData {
			t.Errorf("the data has %d bytes", len(raw))
		}
		var back struct {
			Object string `json:"object"`
			ID     string `json:"id"`
			More   int    `json:"also_omitted"`
		}
		if err := json.Unmarshal(raw, &back); err != nil || back.Object != "thing" || back.ID != "x" || back.More < 900 {
			t.Errorf("%v %+v", err, back)
		}
	}
}
