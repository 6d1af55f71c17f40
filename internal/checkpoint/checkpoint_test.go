package checkpoint_test

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/checkpoint"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/store"
	"tabard.dev/tabard/internal/store/sqlite"
	"tabard.dev/tabard/internal/token"
)

var midnight = time.Date(2026, 7, 2, 0, 0, 0, 0, time.UTC)

// installation is a store with a signer on it.
type installation struct {
	t      *testing.T
	file   string
	store  *sqlite.Store
	signer *checkpoint.Signer
	now    time.Time
	n      int
}

func install(t *testing.T) *installation {
	in := &installation{t: t, file: filepath.Join(t.TempDir(), "tabard.db"), now: midnight}
	in.open()
	t.Cleanup(func() {
		if in.store != nil {
			_ = in.store.Close()
		}
	})
	return in
}

func (in *installation) open() {
	in.t.Helper()
	if err := in.tryOpen(); err != nil {
		in.t.Fatal(err)
	}
}

func (in *installation) tryOpen() (err error) {
	ctx := context.Background()
	if in.store, err = sqlite.Open(ctx, in.file); err != nil {
		return err
	}
	catalog, err := access.ParseCatalog(access.Builtin())
	if err != nil {
		return err
	}
	d, err := directory.Open(ctx, directory.Config{Store: in.store, Catalog: catalog, Now: time.Now})
	if err != nil {
		return err
	}
	sealer, err := token.NewSealer(make([]byte, 32))
	if err != nil {
		return err
	}
	in.signer, err = checkpoint.Open(ctx, checkpoint.Config{
		Store: in.store, Directory: d, Sealer: sealer, Issuer: "https://tabard.test:8470/identity",
		Now: func() time.Time { return in.now }, Log: slog.New(slog.DiscardHandler),
	})
	return err
}

func (in *installation) close() {
	in.t.Helper()
	if err := in.store.Close(); err != nil {
		in.t.Fatal(err)
	}
}

// event returns a new event, so long after midnight.
func (in *installation) event(after time.Duration) *activity.Event {
	in.n++
	e := &activity.Event{
		ID: fmt.Sprint(in.n), Time: activity.Time{Time: midnight.Add(after)}, Action: "a.b.c", CorrelationID: fmt.Sprint("tx-", in.n), AccountID: "acme",
		Severity: activity.Normal, Initiator: activity.Initiator{ID: "IBMid-1", AuthnID: "IBMid-2"}, Target: activity.Target{ID: "crn:<x>&\u2028"},
	}
	e.SetReason(200, "")
	return e
}

// log commits events, so long after midnight, and signs.
func (in *installation) log(after ...time.Duration) {
	in.t.Helper()
	var b store.Batch
	for _, d := range after {
		e, err := store.NewEvent(in.event(d))
		if err != nil {
			in.t.Fatal(err)
		}
		b.Events = append(b.Events, e)
	}
	if err := in.store.Commit(context.Background(), b); err != nil {
		in.t.Fatal(err)
	}
	in.sign()
}

func (in *installation) sign() {
	in.t.Helper()
	in.now = in.now.Add(time.Second)
	if err := in.signer.Sign(context.Background()); err != nil {
		in.t.Fatal(err)
	}
}

// drop drops a day as whoever keeps the log short does.
func (in *installation) drop(day int, r checkpoint.DropRecord, after time.Duration) {
	in.t.Helper()
	ev := in.event(after)
	ev.Action = checkpoint.DropAction
	ev.ResponseData, _ = json.Marshal(r)
	e, err := store.NewEvent(ev)
	if err != nil {
		in.t.Fatal(err)
	}
	if err := in.store.DropDay(context.Background(), day, store.Batch{Events: []store.Event{e}}); err != nil {
		in.t.Fatal(err)
	}
	in.sign()
}

// tamper changes the file of a store that is closed.
func (in *installation) tamper(statements ...string) {
	in.t.Helper()
	in.close()
	db, err := sql.Open("sqlite", in.file)
	if err != nil {
		in.t.Fatal(err)
	}
	defer db.Close()
	for _, s := range statements {
		if _, err := db.Exec(s); err != nil {
			in.t.Fatalf("%s: %v", s, err)
		}
	}
}

// verify verifies the closed file.
func (in *installation) verify(o checkpoint.Options) *checkpoint.Report {
	in.t.Helper()
	r, err := in.tryVerify(o)
	if err != nil {
		in.t.Fatal(err)
	}
	return r
}

func (in *installation) tryVerify(o checkpoint.Options) (*checkpoint.Report, error) {
	in.t.Helper()
	ctx := context.Background()
	s, err := sqlite.OpenReadOnly(ctx, in.file)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	header, err := checkpoint.ReadHeader(ctx, s, in.signer.Key())
	if err != nil {
		return nil, err
	}
	return checkpoint.Verify(checkpoint.WithHeader(header, checkpoint.Items(ctx, s, checkpoint.All())), o)
}

func (in *installation) newest() []byte {
	in.t.Helper()
	c, ok := in.signer.Newest()
	if !ok {
		in.t.Fatal("there is no checkpoint")
	}
	return c.Note
}

func wantProblem(t *testing.T, r *checkpoint.Report, kind string, first, last int64) {
	t.Helper()
	if kind == "" {
		if r.Problem != nil {
			t.Errorf("found %+v", *r.Problem)
		}
		return
	}
	if r.Problem == nil || r.Problem.Kind != kind || r.Problem.First != first || r.Problem.Last != last || r.Problem.What == "" {
		t.Errorf("found %+v, want %s from %d to %d", r.Problem, kind, first, last)
	}
}

// two days, eight events, a checkpoint after 2, 4, 5 and 8.
func twoDays(t *testing.T) *installation {
	in := install(t)
	in.log(-3, -2)
	in.log(1, -1)
	in.log(2)
	in.log(3, 4, 5)
	return in
}

func TestALogThatNobodyChangedIsWhole(t *testing.T) {
	in := twoDays(t)
	in.close()
	r := in.verify(checkpoint.Options{Trusted: in.newest(), Key: in.signer.Key()})
	wantProblem(t, r, "", 0, 0)
	if r.Events != 8 || r.Size != 8 || r.Signed != 8 || r.Checkpoints != 5 || r.Start != 0 {
		t.Errorf("report %+v", r)
	}
}

func TestWhatWasDoneToTheFileIsFoundWithTheFirstBadPosition(t *testing.T) {
	const day1, day2 = "events_20260701", "events_20260702" // indexes 0 1 3, and 2 4 5 6 7
	columns := "seq, time, account, correlation, action, outcome, severity, initiator, authn, target, doc, changed"
	for name, tt := range map[string]struct {
		sql         []string
		kind        string
		first, last int64
	}{
		"an event deleted":                    {[]string{"DELETE FROM " + day2 + " WHERE seq = 5"}, checkpoint.Missing, 4, 4},
		"the first events deleted":            {[]string{"DELETE FROM " + day1 + " WHERE seq <= 2"}, checkpoint.Missing, 0, 1},
		"the last events deleted":             {[]string{"DELETE FROM " + day2 + " WHERE seq > 6"}, checkpoint.Missing, 6, 7},
		"a document changed":                  {[]string{"UPDATE " + day2 + " SET doc = replace(doc, 'IBMid-1', 'IBMid-9') WHERE seq = 5"}, checkpoint.Changed, 4, 4},
		"a document made no JSON":             {[]string{"UPDATE " + day2 + " SET doc = 'nothing' WHERE seq = 3"}, checkpoint.Changed, 2, 2},
		"the initiator's column changed":      {[]string{"UPDATE " + day2 + " SET initiator = 'IBMid-9' WHERE seq = 7"}, checkpoint.Column, 6, 6},
		"the account's column changed":        {[]string{"UPDATE " + day1 + " SET account = 'other' WHERE seq = 1"}, checkpoint.Column, 0, 0},
		"the outcome's column changed":        {[]string{"UPDATE " + day1 + " SET outcome = 'failure' WHERE seq = 4"}, checkpoint.Column, 3, 3},
		"the time's column changed":           {[]string{"UPDATE " + day2 + " SET time = time + 60000000000 WHERE seq = 6"}, checkpoint.Column, 5, 5},
		"an event moved to another day":       {[]string{"INSERT INTO " + day2 + " SELECT * FROM " + day1 + " WHERE seq = 2", "DELETE FROM " + day1 + " WHERE seq = 2"}, checkpoint.Column, 1, 1},
		"two events exchanged":                {[]string{"UPDATE " + day2 + " SET seq = 100 WHERE seq = 5", "UPDATE " + day2 + " SET seq = 5 WHERE seq = 7", "UPDATE " + day2 + " SET seq = 7 WHERE seq = 100"}, checkpoint.Reordered, 4, 4},
		"one put in, the others moved up":     {[]string{"UPDATE " + day2 + " SET seq = 200 - seq WHERE seq > 4", "UPDATE " + day2 + " SET seq = 200 - seq + 1 WHERE seq > 100", "INSERT INTO " + day2 + " SELECT 5, time, account, correlation, action, outcome, severity, initiator, authn, target, doc || ' ', changed FROM " + day2 + " WHERE seq = 3"}, checkpoint.Inserted, 4, 4},
		"one deleted, the others moved":       {[]string{"DELETE FROM " + day2 + " WHERE seq = 5", "UPDATE " + day2 + " SET seq = seq - 1 WHERE seq = 6", "UPDATE " + day2 + " SET seq = seq - 1 WHERE seq = 7", "UPDATE " + day2 + " SET seq = seq - 1 WHERE seq = 8"}, checkpoint.Missing, 4, 4},
		"one put in at a place that is taken": {[]string{"INSERT INTO " + day1 + " (" + columns + ") SELECT " + columns + " FROM " + day2 + " WHERE seq = 5"}, checkpoint.Column, 4, 4},
		"one put in before the beginning":     {[]string{"INSERT INTO " + day1 + " SELECT -7, time, account, correlation, action, outcome, severity, initiator, authn, target, doc, changed FROM " + day1 + " WHERE seq = 1"}, checkpoint.Inserted, -8, -8},
		"one put in behind the end":           {[]string{"INSERT INTO " + day2 + " SELECT 9, time, account, correlation, action, outcome, severity, initiator, authn, target, doc, changed FROM " + day2 + " WHERE seq = 8"}, checkpoint.Inserted, 8, 8},
		"a day's table dropped":               {[]string{"DROP TABLE " + day1}, checkpoint.Missing, 0, 1},
		"a day's table dropped and called dropped": {[]string{"DROP TABLE " + day1, "INSERT INTO dropped_days (day, first, last, count, at, rest, holes) VALUES (20260701, 0, 3, 3, 0, 2, '[3]')",
			"INSERT INTO merkle_edge SELECT 2, substr(hashes, 65, 32) FROM merkle WHERE first = 0"}, checkpoint.Missing, 0, 3},
		"the hash of an event replaced":  {[]string{"UPDATE merkle SET hashes = CAST(zeroblob(32) || substr(hashes, 33) AS BLOB) WHERE first = (SELECT min(first) FROM merkle WHERE first > 0)"}, checkpoint.Changed, 2, 2},
		"a hash above an event replaced": {[]string{"UPDATE merkle SET hashes = CAST(substr(hashes, 1, 64) || zeroblob(32) AS BLOB) WHERE first = 0"}, checkpoint.Tree, 1, 1},
		"the tree's last row removed":    {[]string{"DELETE FROM merkle WHERE first = (SELECT max(first) FROM merkle)"}, checkpoint.Inserted, 5, 5},
		"the whole tree removed":         {[]string{"DELETE FROM merkle"}, checkpoint.Inserted, 0, 0},
		"a checkpoint garbled":           {[]string{"UPDATE checkpoints SET note = replace(note, '5', '6') WHERE size = 5"}, checkpoint.Signature, 5, 5},
		"a checkpoint filed elsewhere":   {[]string{"UPDATE checkpoints SET size = 6 WHERE size = 5"}, checkpoint.Signature, 5, 5},
	} {
		t.Run(name, func(t *testing.T) {
			in := twoDays(t)
			in.tamper(tt.sql...)
			wantProblem(t, in.verify(checkpoint.Options{}), tt.kind, tt.first, tt.last)
		})
	}
}

func TestAServerDoesNotGoOnWithEventsBehindTheTree(t *testing.T) {
	in := twoDays(t)
	in.tamper("DELETE FROM merkle WHERE first = (SELECT max(first) FROM merkle)")
	if err := in.tryOpen(); err == nil || !strings.Contains(err.Error(), "tabard activity verify --data-dir") {
		t.Errorf("error %v", err)
	}
}

func TestALogWithoutItsKeyDoesNotPassForASignedOne(t *testing.T) {
	in := twoDays(t)
	in.tamper("DELETE FROM objects WHERE kind = 'signing-key'")
	in.open()
	e, err := store.NewEvent(in.event(9))
	if err == nil {
		err = in.store.Commit(context.Background(), store.Batch{Events: []store.Event{e}})
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := in.signer.Sign(context.Background()); err == nil {
		t.Error("a new key signed after checkpoints of another")
	}
	in.close()
	wantProblem(t, in.verify(checkpoint.Options{}), checkpoint.Signature, 2, 2)
}

func TestAnEventThatWasChangedTogetherWithTheTreeIsBetweenTwoCheckpoints(t *testing.T) {
	in := twoDays(t)
	entries, err := in.store.Entries(context.Background(), 2, 1)
	if err != nil {
		t.Fatal(err)
	}
	doc := strings.Replace(string(entries[0].Doc), "tx-3", "tx-0", 1)
	hash := tlog.RecordHash([]byte(doc))
	// Event 2 is stored alone at position 3; 3, 4 and 5 are event 3 and what it completes.
	in.tamper(fmt.Sprintf("UPDATE events_20260702 SET correlation = 'tx-0', doc = CAST('%s' AS BLOB) WHERE seq = 3", doc),
		fmt.Sprintf("UPDATE merkle SET hashes = CAST(x'%x' || substr(hashes, 33) AS BLOB) WHERE first = 3", hash[:]))
	r := in.verify(checkpoint.Options{})
	wantProblem(t, r, checkpoint.Tree, 3, 3) // the hash above both gives it away

	fourth, err := in.storedAt(3)
	if err != nil {
		t.Fatal(err)
	}
	pair := tlog.NodeHash(hash, fourth[1])
	all := tlog.NodeHash(fourth[0], pair)
	in.rehash(hash, fourth[1], pair, all)
	wantProblem(t, in.verify(checkpoint.Options{}), checkpoint.Root, 2, 3)
}

func TestALogThatDoesNotFollowFromItsLastCheckpointIsNotSigned(t *testing.T) {
	in := twoDays(t)
	in.tamper("UPDATE merkle SET hashes = CAST(substr(hashes, 1, length(hashes) - 32) || zeroblob(32) AS BLOB) WHERE first = (SELECT max(first) FROM merkle)")
	in.open()
	e, err := store.NewEvent(in.event(9))
	if err != nil {
		t.Fatal(err)
	}
	if err := in.store.Commit(context.Background(), store.Batch{Events: []store.Event{e}}); err != nil {
		t.Fatal(err)
	}
	before := string(in.newest())
	if err := in.signer.Sign(context.Background()); err == nil || !strings.Contains(err.Error(), "not the one") {
		t.Errorf("error %v", err)
	}
	if string(in.newest()) != before {
		t.Error("a checkpoint was signed")
	}
}

// storedAt returns the root of events 0 and 1, and the hash of one event.
func (in *installation) storedAt(n int64) ([2]tlog.Hash, error) {
	s, err := sqlite.OpenReadOnly(context.Background(), in.file)
	if err != nil {
		return [2]tlog.Hash{}, err
	}
	defer s.Close()
	h, err := s.ReadHashes([]int64{tlog.StoredHashIndex(1, 0), tlog.StoredHashIndex(0, n)})
	if err != nil {
		return [2]tlog.Hash{}, err
	}
	return [2]tlog.Hash{h[0], h[1]}, nil
}

// rehash writes the hashes that are stored for events 2 and 3.
func (in *installation) rehash(hashes ...tlog.Hash) {
	in.t.Helper()
	db, err := sql.Open("sqlite", in.file)
	if err != nil {
		in.t.Fatal(err)
	}
	defer db.Close()
	var blob []byte
	for _, h := range hashes {
		blob = append(blob, h[:]...)
	}
	if _, err := db.Exec("UPDATE merkle SET hashes = ? WHERE first = 3", blob); err != nil {
		in.t.Fatal(err)
	}
}

func TestACheckpointOfAnotherKeyIsFound(t *testing.T) {
	in := twoDays(t)
	secret, public, err := note.GenerateKey(nil, "tabard.test:8470/identity")
	if err != nil {
		t.Fatal(err)
	}
	signer, err := note.NewSigner(secret)
	if err != nil {
		t.Fatal(err)
	}
	root, err := tlog.TreeHash(8, in.store)
	if err != nil {
		t.Fatal(err)
	}
	forged, err := note.Sign(&note.Note{Text: fmt.Sprintf("tabard.test:8470/identity\n8\n%s\n", root)}, signer)
	if err != nil {
		t.Fatal(err)
	}
	in.tamper(fmt.Sprintf("UPDATE checkpoints SET note = CAST('%s' AS BLOB) WHERE size = 8", forged))
	wantProblem(t, in.verify(checkpoint.Options{}), checkpoint.Signature, 8, 8)
	if _, err := in.tryVerify(checkpoint.Options{Trusted: forged}); err == nil {
		t.Error("a forged checkpoint was held against the log")
	}
	// Whoever changes the public key of the data as well is found out by the key that was kept elsewhere.
	in.tamper(fmt.Sprintf("UPDATE objects SET doc = json_set(doc, '$.pub', '%s') WHERE kind = 'signing-key'", public))
	if err := in.tryOpen(); err == nil {
		t.Error("a server took another's public key for its own")
	}
}

func TestACopyPutBackIsFoundByANewerCheckpoint(t *testing.T) {
	in := install(t)
	in.log(1, 2)
	in.close()
	old, err := os.ReadFile(in.file)
	if err != nil {
		t.Fatal(err)
	}
	in.open()
	in.log(3, 4, 5)
	kept := in.newest()
	in.close()
	for _, f := range []string{in.file + "-wal", in.file + "-shm"} {
		_ = os.Remove(f)
	}
	if err := os.WriteFile(in.file, old, 0o600); err != nil {
		t.Fatal(err)
	}
	wantProblem(t, in.verify(checkpoint.Options{}), "", 0, 0) // by itself it is whole
	wantProblem(t, in.verify(checkpoint.Options{Trusted: kept}), checkpoint.Missing, 2, 4)
	// And so it is when the log went on differently.
	in.n = 100
	in.open()
	in.log(6, 7, 8, 9)
	in.close()
	wantProblem(t, in.verify(checkpoint.Options{Trusted: kept}), checkpoint.Root, 2, 4)
}

func TestDaysThatWereDroppedWithARecordAreNotMissing(t *testing.T) {
	in := install(t)
	in.log(-3, -2)
	in.log(1, -1) // 3 is of the first day
	in.log(2, -1) // and 5
	in.log(3, 4, 5)
	in.drop(20260701, checkpoint.DropRecord{Day: 20260701, First: 0, Last: 5}, 25*time.Hour)
	in.log(26 * time.Hour)
	in.close()
	r := in.verify(checkpoint.Options{Trusted: in.newest()})
	wantProblem(t, r, "", 0, 0)
	if r.Start != 2 || r.Size != 11 || r.Signed != 11 {
		t.Errorf("report %+v", r)
	}
	// More is gone than the record says.
	in.open()
	in.tamper("DELETE FROM events_20260702 WHERE seq = 3")
	wantProblem(t, in.verify(checkpoint.Options{}), checkpoint.Missing, 2, 2)
	in.open()
	// The record of the first day goes with the third; that of the second stays.
	in.tamper("UPDATE dropped_days SET rest = 7, last = 8, holes = '[]'")
	r, err := in.tryVerify(checkpoint.Options{})
	if err == nil && r.Problem == nil {
		t.Error("a record that was stretched was believed")
	}
}

func TestARecordOfALaterDayStandsForEarlierOnes(t *testing.T) {
	in := install(t)
	in.log(1, 2)
	in.log(25*time.Hour, 26*time.Hour)
	in.drop(20260702, checkpoint.DropRecord{Day: 20260702, First: 0, Last: 1}, 27*time.Hour)
	in.drop(20260703, checkpoint.DropRecord{Day: 20260703, First: 2, Last: 4}, 49*time.Hour)
	in.log(50 * time.Hour)
	in.close()
	r := in.verify(checkpoint.Options{})
	wantProblem(t, r, "", 0, 0)
	if r.Start != 5 || r.Size != 7 {
		t.Errorf("report %+v", r)
	}
}

func TestAnExportedLogIsVerifiedAsTheStoreIs(t *testing.T) {
	in := twoDays(t)
	ctx := context.Background()
	header, err := checkpoint.ReadHeader(ctx, in.store, in.signer.Key())
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	// In pages, as over the network.
	if err := checkpoint.Write(&out, checkpoint.Item{Header: header}); err != nil {
		t.Fatal(err)
	}
	for from := int64(0); from < header.Size; from += 3 {
		for item, err := range checkpoint.Items(ctx, in.store, checkpoint.Range{From: from, To: header.Size, Limit: 3}) {
			if err == nil {
				err = checkpoint.Write(&out, item)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	whole := out.String()
	check := func(text string) (*checkpoint.Report, error) {
		return checkpoint.Verify(checkpoint.Read(strings.NewReader(text)), checkpoint.Options{Trusted: in.newest(), Key: in.signer.Key()})
	}
	r, err := check(whole)
	if err != nil {
		t.Fatal(err)
	}
	wantProblem(t, r, "", 0, 0)
	if r.Events != 8 || r.Signed != 8 {
		t.Errorf("report %+v", r)
	}
	for name, tt := range map[string]struct {
		text  string
		kind  string
		first int64
		last  int64
	}{
		"a changed word":  {strings.Replace(whole, `"correlationId":"tx-4"`, `"correlationId":"tx-X"`, 1), checkpoint.Changed, 3, 3},
		"a changed field": {strings.Replace(whole, `"correlation":"tx-4"`, `"correlation":"tx-X"`, 1), checkpoint.Column, 3, 3},
		"a line left out": {without(whole, `"index":5`), checkpoint.Missing, 5, 5},
		"the end cut off": {whole[:strings.Index(whole, `{"index":6`)], checkpoint.Missing, 6, 7},
	} {
		t.Run(name, func(t *testing.T) {
			r, err := check(tt.text)
			if err != nil {
				t.Fatal(err)
			}
			wantProblem(t, r, tt.kind, tt.first, tt.last)
		})
	}
	for name, text := range map[string]string{
		"nothing": "", "no header": whole[strings.Index(whole, "\n")+1:], "not JSON": "x", "two headers": whole + whole,
		"half a line": whole[:len(whole)-20], "a header that contradicts itself": `{"log":{"start":3,"size":9}}`,
	} {
		if r, err := check(text); err == nil {
			t.Errorf("%s passes for an exported log: %+v", name, r)
		}
	}
}

func without(text, mark string) string {
	var kept []string
	for _, l := range strings.SplitAfter(text, "\n") {
		if !strings.Contains(l, mark) {
			kept = append(kept, l)
		}
	}
	return strings.Join(kept, "")
}

func TestReadingAFileLeavesItAsItIs(t *testing.T) {
	in := twoDays(t) // still open: its write-ahead log is there, as after a kill
	dir := t.TempDir()
	killed := filepath.Join(dir, "tabard.db")
	for _, end := range []string{"", "-wal"} {
		copyFile(t, in.file+end, killed+end)
	}
	in.file = killed
	before := contents(t, dir)
	wantProblem(t, in.verify(checkpoint.Options{Trusted: in.newest()}), "", 0, 0)
	after := contents(t, dir)
	for _, name := range []string{"tabard.db", "tabard.db-wal"} {
		if before[name] != after[name] {
			t.Errorf("%s was changed", name)
		}
	}
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err == nil {
		err = os.WriteFile(to, b, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func contents(t *testing.T, dir string) map[string]string {
	t.Helper()
	files, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for _, f := range files {
		b, err := os.ReadFile(filepath.Join(dir, f.Name()))
		if err != nil {
			t.Fatal(err)
		}
		out[f.Name()] = string(b)
	}
	return out
}

func TestACheckpointIsANoteThatOthersCanRead(t *testing.T) {
	in := twoDays(t)
	v, err := note.NewVerifier(in.signer.Key())
	if err != nil {
		t.Fatal(err)
	}
	n, err := note.Open(in.newest(), note.VerifierList(v))
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(n.Text, "\n")
	root, err := tlog.TreeHash(8, in.store)
	if err != nil {
		t.Fatal(err)
	}
	if len(lines) != 5 || lines[0] != "tabard.test:8470/identity" || lines[1] != "8" || lines[2] != root.String() || !strings.HasPrefix(lines[3], "time 2026-07-02T") {
		t.Errorf("the note says %q", lines)
	}
	for _, text := range []string{"", "x\n", "o\n-1\n" + root.String() + "\n", "o\n1\nshort\n", "o\n1\n" + root.String() + "\ntime never\n", fmt.Sprintf("o\n%d\n%s\n", uint64(math.MaxUint64), root)} {
		if c, err := checkpoint.Parse([]byte(text+"\n— o AAAA\n"), in.signer.Key()); err == nil {
			t.Errorf("%q was read as %+v", text, c)
		}
	}
}

func TestTheKeyStaysWhenTheServerStartsAgain(t *testing.T) {
	in := twoDays(t)
	key, newest := in.signer.Key(), string(in.newest())
	in.close()
	in.open()
	if in.signer.Key() != key || string(in.newest()) != newest {
		t.Error("the key or the newest checkpoint is another")
	}
	in.sign() // nothing has come
	if string(in.newest()) != newest {
		t.Error("a log that did not grow was signed again")
	}
}

func TestARunningSignerFollowsTheLog(t *testing.T) {
	in := install(t)
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); in.signer.Run(ctx) }()
	e, err := store.NewEvent(in.event(1))
	if err != nil {
		t.Fatal(err)
	}
	if err := in.store.Commit(ctx, store.Batch{Events: []store.Event{e}}); err != nil {
		t.Fatal(err)
	}
	for {
		if c, ok := in.signer.Newest(); ok && c.Size == 1 {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	stop()
	<-ended
}
