package access

import (
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"
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
	began := time.Now()
	again := builtin.WithAgain(before, next, roles)
	if took := time.Since(began); took > time.Second {
		t.Errorf("one change took %s", took)
	}
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
