package bootstrap_test

import (
	"encoding/json"
	"errors"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/bootstrap"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/store"
	"tabard.dev/tabard/internal/store/sqlite"
	"tabard.dev/tabard/internal/token"
)

// install makes an account in a new store.
func install(t *testing.T) (*directory.Directory, store.Store, *token.Sealer, bootstrap.Owner) {
	t.Helper()
	s, err := sqlite.Open(t.Context(), filepath.Join(t.TempDir(), "tabard.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	catalog, err := access.ParseCatalog(access.Builtin())
	if err != nil {
		t.Fatal(err)
	}
	d, err := directory.Open(t.Context(), directory.Config{Store: s, Catalog: catalog, Now: time.Now})
	if err != nil {
		t.Fatal(err)
	}
	sealer, err := token.NewSealer(make([]byte, 32))
	if err != nil {
		t.Fatal(err)
	}
	o := bootstrap.NewOwner("My Company", "http://tabard.test")
	err = d.Update(t.Context(), "", func(tx *directory.Tx) error {
		bootstrap.Account(tx, d, crn.DefaultNames, o, sealer.Hash(o.APIKey))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return d, s, sealer, o
}

func TestNamesAndSecretsAreInventedInTheFormsThatClientsKnow(t *testing.T) {
	form := map[string]*regexp.Regexp{
		"account": regexp.MustCompile(`^[0-9a-f]{32}$`), "iam_id": regexp.MustCompile(`^IBMid-[0-9A-F]{10}$`), "apikey": regexp.MustCompile(`^[A-Za-z0-9_-]{44}$`),
	}
	seen := map[string]bool{}
	for range 1000 {
		o := bootstrap.NewOwner("n", "u")
		for name, value := range map[string]string{"account": o.AccountID, "iam_id": o.IAMID, "apikey": o.APIKey} {
			if !form[name].MatchString(value) || seen[value] {
				t.Fatalf("%s %q", name, value)
			}
			seen[value] = true
		}
		if !crn.ValidAccountID(o.AccountID) || crn.KindOf(o.IAMID) != crn.KindUser {
			t.Fatalf("owner %+v", o)
		}
	}
}

func TestTheOwnersFileHasTheDocumentedFields(t *testing.T) {
	b, err := json.Marshal(bootstrap.NewOwner("n", "u"))
	if err != nil {
		t.Fatal(err)
	}
	var m map[string]any
	if err := json.Unmarshal(b, &m); err != nil {
		t.Fatal(err)
	}
	var names []string
	for name, value := range m {
		names = append(names, name)
		if value == "" {
			t.Errorf("%s is empty", name)
		}
	}
	slices.Sort(names)
	if want := []string{"account_id", "apikey", "iam_id", "name", "url"}; !slices.Equal(names, want) {
		t.Errorf("fields %v, want %v", names, want)
	}
}

func TestAnAccountBeginsWithItsOwnerAKeyAndAResourceGroup(t *testing.T) {
	d, s, sealer, o := install(t)
	a, ok := d.Accounts.Get(o.AccountID)
	if !ok || a.Name != "My Company" || a.OwnerID != o.IAMID || a.CreatedBy != o.IAMID {
		t.Errorf("account %+v", a)
	}
	if u, ok := d.Users.Get(directory.UserKey(o.AccountID, o.IAMID)); !ok || u.Email == "" || u.Name == "" {
		t.Errorf("user %+v", u)
	}
	if k, ok := d.APIKeysByHash.One(sealer.Hash(o.APIKey)); !ok || k.IAMID != o.IAMID || k.AccountID != o.AccountID {
		t.Errorf("API key %+v", k)
	}
	groups := d.ResourceGroupsByAccount.Get(o.AccountID)
	if len(groups) != 1 || !groups[0].Default || groups[0].Name != "Default" {
		t.Errorf("resource groups %+v", groups)
	}
	err := s.Load(t.Context(), func(r store.Record) error {
		if strings.Contains(string(r.Doc), o.APIKey) {
			return errors.New("the API key stands in " + r.Kind)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

func TestTheCreationOfAnAccountIsRecorded(t *testing.T) {
	_, s, _, o := install(t)
	stored, err := s.Events(t.Context(), store.Query{AccountID: o.AccountID, Limit: 10})
	if err != nil || len(stored) != 1 {
		t.Fatalf("%d events, error %v", len(stored), err)
	}
	var e activity.Event
	if err := json.Unmarshal(stored[0].Doc, &e); err != nil {
		t.Fatal(err)
	}
	if e.Action != "iam-identity.account.create" || e.Outcome != activity.Success || e.Initiator.ID != o.IAMID || e.CorrelationID == "" || e.Reason.Code != 201 {
		t.Errorf("event %+v", e)
	}
	if strings.Contains(string(stored[0].Doc), o.APIKey) {
		t.Error("the API key stands in the event")
	}
}

func TestTheOwnerMayDoEverythingInHisAccountAndNothingElsewhere(t *testing.T) {
	d, _, _, o := install(t)
	catalog := d.Builtin()
	n := 0
	for _, service := range catalog.Services() {
		system, own := catalog.RolesOf(service.Name)
		for _, role := range append(system, own...) {
			for _, action := range catalog.Actions(role.CRN, service.Name) {
				n++
				q := access.Request{
					Subject: o.IAMID, AccountID: o.AccountID, Action: action,
					Resource: map[string]string{access.AccountID: o.AccountID, access.ServiceName: service.Name, access.ResourceType: "thing", access.Resource: "x"},
				}
				if decision := access.Decide(d, q); !decision.Allowed {
					t.Errorf("%s on %s (role %s) is refused: %+v", action, service.Name, role.DisplayName, decision.Explain())
				}
				q.Resource[access.AccountID] = bootstrap.NewAccountID()
				if access.Decide(d, q).Allowed {
					t.Errorf("%s on another account's %s is allowed", action, service.Name)
				}
				q.Resource[access.AccountID], q.Subject = o.AccountID, "IBMid-SOMEBODY"
				if access.Decide(d, q).Allowed {
					t.Errorf("%s on %s is allowed to anybody", action, service.Name)
				}
			}
		}
	}
	if n < 100 {
		t.Errorf("only %d actions", n)
	}
}
