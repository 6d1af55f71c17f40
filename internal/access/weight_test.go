package access

import (
	"fmt"
	"math/rand/v2"
	"reflect"
	"strings"
	"testing"
)

// heavy is a service with roles that have all of its actions, the most that
// there can be.
func heavy(n, roles int) *RegisteredService {
	s := &RegisteredService{AccountID: "a", Definition: Definition{Name: fmt.Sprintf("heavy%d", n), Kind: KindService}}
	var ids []string
	for i := range MaxActionsPerService {
		id := fmt.Sprintf("%s.a%d", s.Name, i)
		ids = append(ids, id)
		s.Actions = append(s.Actions, ActionDefinition{ID: id})
	}
	s.ServiceRoles = map[string]RoleDefinition{"Base": {Actions: ids}}
	for i := range roles - 1 {
		s.ServiceRoles[fmt.Sprintf("R%d", i)] = RoleDefinition{Extends: []string{"Base"}}
	}
	return s
}

func TestRolesThatMultiplyTheActionsOfAServiceAreRefused(t *testing.T) {
	builtin, err := ParseCatalog(Builtin())
	if err != nil {
		t.Fatal(err)
	}
	most := MaxGrantsPerService / MaxActionsPerService
	if err := heavy(0, most).Validate(builtin); err != nil {
		t.Error(err)
	}
	if err := heavy(0, most+1).Validate(builtin); err == nil || !strings.Contains(err.Error(), "together") {
		t.Errorf("error %v", err)
	}
}

func TestACatalogIsMadeAgainFromTheServicesThatStayed(t *testing.T) {
	builtin, err := ParseCatalog(Builtin())
	if err != nil {
		t.Fatal(err)
	}
	var services []*RegisteredService
	for n := range MaxServicesPerAccount {
		services = append(services, heavy(n, MaxGrantsPerService/MaxActionsPerService))
	}
	before := builtin.With(services, nil)
	changed := *services[7]
	changed.ServiceRoles = map[string]RoleDefinition{"Other": {Actions: []string{"heavy7.a0"}}}
	changed.PlanList = []Plan{{ID: "plan-7", Name: "seven"}}
	next := append([]*RegisteredService{&changed}, services[8:]...) // 0 to 6 are gone
	roles := []*CustomRole{{ID: "1", AccountID: "a", Name: "Mine", DisplayName: "Mine", Service: "heavy8", Actions: []string{"heavy8.a1"}}}
	again := builtin.WithAgain(before, next, roles)
	want := builtin.With(next, roles)
	for _, s := range want.Services() {
		got, ok := again.Service(s.Name)
		if !ok || !reflect.DeepEqual(got, s) {
			t.Errorf("service %s differs", s.Name)
		}
	}
	if len(again.Services()) != len(want.Services()) || !reflect.DeepEqual(again.roles, want.roles) || !reflect.DeepEqual(again.plans, want.plans) {
		t.Error("the catalogs differ")
	}
	// The one before is as it was.
	if before.Grants(roles[0].CRN(), "heavy8", "heavy8.a1") || !before.Grants(ServiceRoleCRN("heavy7", "Base"), "heavy7", "heavy7.a1") {
		t.Error("the catalog before has changed")
	}
}

// naive matches by trying everything; it remembers what it has tried.
func naive(p []token, text []rune) bool {
	tried := map[[2]int]bool{}
	var match func(i, j int) bool
	match = func(i, j int) bool {
		at := [2]int{i, j}
		if tried[at] {
			return false
		}
		tried[at] = true
		switch {
		case i == len(p):
			return j == len(text)
		case p[i] == anyRun:
			return match(i+1, j) || j < len(text) && match(i, j+1)
		}
		return j < len(text) && (p[i] == anyOne || p[i] == token(text[j])) && match(i+1, j+1)
	}
	return match(0, 0)
}

func TestBothWaysToMatchAWildcardAgree(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	matched := 0
	for range 20_000 {
		text := make([]rune, r.IntN(150))
		for i := range text {
			text[i] = rune("aabé"[r.IntN(4)])
		}
		var pattern []token
		for i := 0; i < len(text); i++ {
			switch r.IntN(8) {
			case 0:
				pattern = append(pattern, anyRun)
				i += r.IntN(20)
			case 1:
				pattern = append(pattern, anyOne)
			case 2:
				pattern = append(pattern, anyRun, anyRun)
			default:
				pattern = append(pattern, token(text[i]))
			}
			if r.IntN(400) == 0 {
				pattern = append(pattern, 'c')
			}
		}
		want := naive(pattern, text)
		if got := matchAll(pattern, text); got != want {
			t.Fatalf("%v on %q = %t", pattern, string(text), got)
		}
		if want {
			matched++
		}
	}
	if matched < 1000 || matched > 19_000 {
		t.Errorf("%d of 20000 match: the test proves little", matched)
	}
}

func TestAWildcardMadeToBeSlowIsStillDecidedRight(t *testing.T) {
	text := strings.Repeat("a", 2048)
	for _, p := range []string{"*" + strings.Repeat("?", 998) + "b", "*" + strings.Repeat("a", 998) + "b", strings.Repeat("*a", 499) + "*b"} {
		if Wildcard(p, text) {
			t.Errorf("%.20s matches", p)
		}
		if !Wildcard(p, text+"b") {
			t.Errorf("%.20s does not match", p)
		}
	}
}
