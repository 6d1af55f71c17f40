package activityapi_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/tlog"

	"tabard.dev/tabard/internal/api/apitest"
	"tabard.dev/tabard/internal/checkpoint"
)

func signed(e *apitest.Env) {
	e.T.Helper()
	if err := e.Signer.Sign(e.T.Context()); err != nil {
		e.T.Fatal(err)
	}
}

// newestOf returns the checkpoint that the API gives out.
func newestOf(e *apitest.Env, as, account string) *checkpoint.Checkpoint {
	e.T.Helper()
	m := e.Do(apitest.Request{Path: "/v1/events/checkpoint", As: as, Account: account}).Want(200)
	key := e.Do(apitest.Request{Path: "/v1/events/checkpoint/key", As: as, Account: account}).Want(200)["key"].(string)
	c, err := checkpoint.Parse([]byte(m["checkpoint"].(string)), key)
	if err != nil || m["key"] != key {
		e.T.Fatal(err)
	}
	return c
}

func decode(t *testing.T, r *apitest.Response, into any) {
	t.Helper()
	r.Want(200)
	if err := json.Unmarshal(r.Raw, into); err != nil {
		t.Fatal(err)
	}
}

func TestAnEventIsProvedToBeInTheCheckpoint(t *testing.T) {
	e := start(t)
	for n := range 9 {
		happened(e, e.Owner.AccountID, fmt.Sprint("a.b.", n), "t", time.Minute)
	}
	signed(e)
	c := newestOf(e, "", "")
	var list struct {
		Events    []json.RawMessage
		Positions []int64
	}
	decode(t, e.Do(apitest.Request{Path: "/v1/events"}), &list)
	if len(list.Events) != len(list.Positions) || len(list.Events) < 9 {
		t.Fatalf("%d events at %v", len(list.Events), list.Positions)
	}
	for n, position := range list.Positions {
		var p struct {
			Size     int64
			Proof    tlog.RecordProof
			Document []byte
		}
		decode(t, e.Do(apitest.Request{Path: fmt.Sprintf("/v1/events/%d/proof", position)}), &p)
		if !bytes.Equal(p.Document, list.Events[n]) {
			t.Errorf("position %d has another document than the list", position)
		}
		if err := tlog.CheckRecord(p.Proof, c.Size, c.Root, position, tlog.RecordHash(list.Events[n])); err != nil || p.Size != c.Size {
			t.Errorf("position %d in %d: %v", position, p.Size, err)
		}
	}
}

func TestAProofIsOfTheAccountsOwnEventsOnly(t *testing.T) {
	e := start(t)
	happened(e, e.Owner.AccountID, "a.b.mine", "t", time.Minute)
	happened(e, e.Other.AccountID, "a.b.theirs", "t", time.Minute)
	signed(e)
	size := newestOf(e, e.Other.IAMID, e.Other.AccountID).Size
	mine, theirs := fmt.Sprintf("/v1/events/%d/proof", size-2), fmt.Sprintf("/v1/events/%d/proof", size-1)
	e.Do(apitest.Request{Path: mine}).Want(200)
	e.Do(apitest.Request{Path: theirs, As: e.Other.IAMID, Account: e.Other.AccountID}).Want(200)
	refused := e.Do(apitest.Request{Path: theirs})
	wantError(t, refused, 404, "not_found")
	absent := e.Do(apitest.Request{Path: "/v1/events/123456/proof"})
	wantError(t, absent, 404, "not_found")
	message := func(r *apitest.Response) any {
		return r.Want(404)["errors"].([]any)[0].(map[string]any)["message"]
	}
	if message(refused) != message(absent) {
		t.Errorf("another's event is told from none: %v", message(refused))
	}
	for path, status := range map[string]int{
		"/v1/events/-1/proof": 400, "/v1/events/x/proof": 400, "/v1/events/0x1/proof": 400, "/v1/events/9223372036854775807/proof": 400,
		fmt.Sprintf("/v1/events/%d/proof?size=%d", size-2, size-2): 400, fmt.Sprintf("/v1/events/%d/proof?size=%d", size-2, size+100): 400,
		"/v1/events/consistency?from=0": 400, "/v1/events/consistency?from=x": 400, "/v1/events/consistency?from=3&to=2": 400,
		"/v1/events/consistency?from=1&to=99999": 400, "/v1/events/log?from=-1": 400, "/v1/events/log?limit=0": 400, "/v1/events/log?to=x": 400,
	} {
		wantError(t, e.Do(apitest.Request{Path: path}), status, "invalid_parameter")
	}
}

func TestOneCheckpointIsProvedToGoOnFromAnother(t *testing.T) {
	e := start(t)
	signed(e)
	old := newestOf(e, "", "")
	for range 5 {
		happened(e, e.Other.AccountID, "a.b.c", "t", time.Minute)
	}
	signed(e)
	c := newestOf(e, "", "")
	var p struct {
		To    int64
		Proof tlog.TreeProof
	}
	decode(t, e.Do(apitest.Request{Path: fmt.Sprintf("/v1/events/consistency?from=%d", old.Size)}), &p)
	if err := tlog.CheckTree(p.Proof, c.Size, c.Root, old.Size, old.Root); err != nil || p.To != c.Size {
		t.Errorf("from %d to %d: %v", old.Size, p.To, err)
	}
}

func TestWithoutACheckpointThereIsOneSoon(t *testing.T) {
	e := start(t)
	r := e.Do(apitest.Request{Path: "/v1/events/checkpoint"})
	if r.Want(503); r.Header.Get("Retry-After") == "" {
		t.Error("when to try again is not told")
	}
}

func TestTheWholeLogIsForTheOperatorsAdministrator(t *testing.T) {
	e := start(t)
	for n := range 7 {
		happened(e, e.Other.AccountID, fmt.Sprint("a.b.", n), "t", time.Minute)
	}
	signed(e)
	e.Grant("IBMid-VIEWER", "activity", "Viewer")
	e.Grant("IBMid-ADMIN", "activity", "Administrator")
	wantError(t, e.Do(apitest.Request{Path: "/v1/events/log", As: "IBMid-VIEWER"}), 403, "not_authorized")
	wantError(t, e.Do(apitest.Request{Path: "/v1/events/log", As: nobody}), 403, "not_authorized")
	wantError(t, e.Do(apitest.Request{Path: "/v1/events/log", As: e.Other.IAMID, Account: e.Other.AccountID}), 403, "not_authorized")
	signed(e)

	var text strings.Builder
	first := e.Do(apitest.Request{Path: "/v1/events/log?limit=4", As: "IBMid-ADMIN"})
	if first.Status != 200 || first.Header.Get("Content-Type") != "application/x-ndjson" {
		t.Fatalf("%d %s", first.Status, first.Raw)
	}
	var head struct{ Log struct{ Size int64 } }
	if err := json.Unmarshal(first.Raw[:bytes.IndexByte(first.Raw, '\n')], &head); err != nil {
		t.Fatal(err)
	}
	text.Write(first.Raw)
	happened(e, e.Owner.AccountID, "a.b.later", "t", time.Minute) // is in no page
	signed(e)
	for from := int64(4); from < head.Log.Size; from += 4 {
		text.Write(e.Do(apitest.Request{Path: fmt.Sprintf("/v1/events/log?limit=4&from=%d&to=%d", from, head.Log.Size), As: "IBMid-ADMIN"}).Raw)
	}
	r, err := checkpoint.Verify(checkpoint.Read(strings.NewReader(text.String())), checkpoint.Options{Key: e.Signer.Key()})
	if err != nil || r.Problem != nil || r.Events != head.Log.Size || r.Signed != head.Log.Size {
		t.Errorf("report %+v, %v", r, err)
	}
	if strings.Contains(text.String(), "a.b.later") {
		t.Error("the log grew from page to page")
	}
}
