package vpcapi_test

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/api/apitest"
	"tabard.dev/tabard/internal/api/vpcapi"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/host/link"
	"tabard.dev/tabard/internal/placement"
	"tabard.dev/tabard/internal/vpc"
)

// put stores many objects at once.
func (w *world) put(f func(tx *directory.Tx)) {
	w.t.Helper()
	if err := w.d.Update(w.t.Context(), w.Owner.IAMID, func(tx *directory.Tx) error { f(tx); return nil }); err != nil {
		w.t.Fatal(err)
	}
}

// address returns the n-th address of a range that nothing else is in.
func address(n int) netip.Addr { return netip.AddrFrom4([4]byte{10, 1, byte(n >> 8), byte(n)}) }

func TestAnAccountHasItsQuotaAndNoMore(t *testing.T) {
	w := newLibrary(t).world
	account := w.Owner.AccountID
	vpcID, subnetID := w.network(16)
	name := func(n int) string { return fmt.Sprintf("filler-%d", n) }
	id := func() string { return "r006-" + uuid.NewString() }
	inVPC := object{"id": vpcID}
	for _, test := range []struct {
		what string
		most int
		have int // already
		fill func(tx *directory.Tx, n int)
		path string
		body object
	}{
		{"VPCs", vpc.MaxVPCs, 1, func(tx *directory.Tx, n int) {
			w.d.VPCs.Put(tx, &vpc.VPC{ID: id(), AccountID: account, Name: name(n)})
		}, "/vpcs", object{}},
		{"subnets", vpc.MaxSubnets, 1, func(tx *directory.Tx, n int) {
			w.d.Subnets.Put(tx, &vpc.Subnet{ID: id(), AccountID: account, VPCID: vpcID, Name: name(n), CIDR: netip.PrefixFrom(address(8*n), 29)})
		}, "/subnets", object{"vpc": inVPC, "zone": object{"name": "us-south-3"}, "total_ipv4_address_count": 8}},
		{"security groups", vpc.MaxSecurityGroups, 1, func(tx *directory.Tx, n int) {
			w.d.SecurityGroups.Put(tx, &vpc.SecurityGroup{ID: id(), AccountID: account, VPCID: vpcID, Name: name(n)})
		}, "/security_groups", object{"vpc": inVPC}},
		{"keys", vpc.MaxKeys, 0, func(tx *directory.Tx, n int) {
			w.d.Keys.Put(tx, &vpc.Key{ID: id(), AccountID: account, Name: name(n), Fingerprint: name(n)})
		}, "/keys", object{"public_key": ed25519Key}},
		{"floating IPs", vpc.MaxFloatingIPs, 0, func(tx *directory.Tx, n int) {
			w.d.FloatingIPs.Put(tx, &vpc.FloatingIP{ID: id(), AccountID: account, Name: name(n), Address: address(n)})
		}, "/floating_ips", object{"zone": object{"name": "us-south-3"}}},
		{"images", vpc.MaxImages, 0, func(tx *directory.Tx, n int) {
			w.d.Images.Put(tx, &vpc.Image{ID: id(), AccountID: account, Name: name(n)})
		}, "/images", object{}},
		{"instances", vpc.MaxInstances, 0, func(tx *directory.Tx, n int) {
			w.d.Instances.Put(tx, &vpc.Instance{ID: "0737_" + uuid.NewString(), AccountID: account, Name: name(n), Status: vpc.Stopped})
		}, "/instances", instanceIn(subnetID, nil)},
	} {
		t.Run(test.what, func(t *testing.T) {
			w.put(func(tx *directory.Tx) {
				for n := range test.most - test.have - 1 {
					test.fill(tx, n)
				}
			})
			w.post(test.path, test.body)
			r := w.call("", "POST", test.path, test.body)
			wantError(t, r, 400, "over_quota")
			if said := text(r.Want(400), "errors", 0, "message"); !strings.Contains(said, fmt.Sprintf("%d %s", test.most, test.what)) || !strings.Contains(said, "delete") {
				t.Errorf("said: %s", said)
			}
		})
	}
	// They are the account's own.
	w.Do(apitest.Request{Method: "POST", Path: path("/vpcs"), Body: object{}, As: w.Other.IAMID}).Want(201)
}

func TestAnInstanceHasNoMoreOfAnythingThanItsLimits(t *testing.T) {
	w := newWorld(t)
	vpcID, subnetID := w.network(16)
	var groups, keys []object
	for range vpc.MaxInterfaceGroups + 1 {
		groups = append(groups, object{"id": text(w.post("/security_groups", object{"vpc": object{"id": vpcID}}), "id")})
	}
	key := text(w.post("/keys", object{"public_key": ed25519Key}), "id")
	for range vpc.MaxInstanceKeys + 1 {
		keys = append(keys, object{"id": key})
	}
	nic := func(groups []object) object {
		return object{"subnet": object{"id": subnetID}, "security_groups": groups}
	}
	for what, more := range map[string]object{
		"security groups": {"primary_network_interface": nic(groups)},
		"interfaces":      {"network_interfaces": slices.Repeat([]object{nic(nil)}, vpc.MaxInterfaces)},
		"keys":            {"keys": keys},
	} {
		t.Run(what, func(t *testing.T) {
			wantError(t, w.call("", "POST", "/instances", instanceIn(subnetID, more)), 400, "over_quota")
		})
	}
	made := w.post("/instances", instanceIn(subnetID, object{
		"primary_network_interface": nic(groups[1:]), "network_interfaces": slices.Repeat([]object{nic(nil)}, vpc.MaxInterfaces-1), "keys": keys[1:],
	}))
	wantError(t, w.call("", "PUT", fmt.Sprintf("/security_groups/%s/targets/%s", groups[0]["id"], text(made, "primary_network_interface", "id")), nil), 400, "over_quota")

	rules := slices.Repeat([]object{{"direction": "inbound", "protocol": "any"}}, vpc.MaxRules)
	full := text(w.post("/security_groups", object{"vpc": object{"id": vpcID}, "rules": rules}), "id")
	wantError(t, w.call("", "POST", "/security_groups/"+full+"/rules", rules[0]), 400, "over_quota")
}

func TestAnInstanceIsNotMadeLargerThanItsHost(t *testing.T) {
	w := &world{Env: apitest.New(t), t: t}
	w.d = w.Config.Directory
	room := 8
	var asked []string
	vpcapi.Register(w.Mux, w.Config, vpcapi.Options{
		Place: func(string, vpc.InstanceProfile, vpc.Image) (string, string) { return "host-1", "" },
		Fits: func(hostID string, i *vpc.Instance, p vpc.InstanceProfile) string {
			asked = append(asked, hostID+" "+i.Name+" of "+i.Profile+" as "+p.Name)
			if p.MemoryGiB > room {
				return fmt.Sprintf("it has %d GiB left", room)
			}
			return ""
		},
	})
	_, subnetID := w.network(16)
	id := text(w.post("/instances", instanceIn(subnetID, object{"name": "one"})), "id")
	resize := func(profile string) *apitest.Response {
		return w.call("", "PATCH", "/instances/"+id, object{"profile": object{"name": profile}})
	}
	w.setStatus(id, vpc.Stopped)
	r := resize("bx2-4x16")
	wantError(t, r, 409, "invalid_state")
	if said := text(r.Want(409), "errors", 0, "message"); !strings.Contains(said, "it has 8 GiB left") {
		t.Errorf("said: %s", said)
	}
	if got := w.get("/instances/" + id); text(got, "profile", "name") != "bx2-2x8" {
		t.Errorf("profile %v", got["profile"])
	}
	resize("bx2-2x8").Want(200) // as it is
	resize("cx2-2x4").Want(200)

	room = 2 // others have taken the rest
	start := func() *apitest.Response {
		return w.call("", "POST", "/instances/"+id+"/actions", object{"type": "start"})
	}
	wantError(t, start(), 409, "invalid_state")
	if i, _ := w.d.Instances.Get(id); i.Status != vpc.Stopped {
		t.Errorf("status %s", i.Status)
	}
	room = 4
	start().Want(201)
	want := []string{"host-1 one of bx2-2x8 as bx2-4x16", "host-1 one of bx2-2x8 as cx2-2x4", "host-1 one of cx2-2x4 as cx2-2x4", "host-1 one of cx2-2x4 as cx2-2x4"}
	if !slices.Equal(asked, want) {
		t.Errorf("asked %q", asked)
	}
}

// TestTheLargestPlacementFitsIntoAMessage builds what the limits let an account
// build, with every name and number as long as it can be.
func TestTheLargestPlacementFitsIntoAMessage(t *testing.T) {
	w := newWorld(t)
	account, long := w.Owner.AccountID, strings.Repeat("n", 63)
	name := func(n int) string { return fmt.Sprintf("%s%05d", long[:58], n) }
	id := func() string { return "r006-" + uuid.NewString() }
	v := &vpc.VPC{
		ID: id(), AccountID: account, Name: long, ResourceGroupID: id(),
		SecurityGroup: vpc.Ref{ID: id(), Name: long}, NetworkACL: vpc.Ref{ID: id(), Name: long}, RoutingTable: vpc.Ref{ID: id(), Name: long},
	}
	groups := make([]string, vpc.MaxSecurityGroups)
	for n := range groups {
		groups[n] = id()
	}
	// An instance is in as many groups as it can, all of them as full as they can be.
	const own = vpc.MaxInterfaces * vpc.MaxInterfaceGroups
	instances := make([]*vpc.Instance, vpc.MaxInstances)
	for n := range instances {
		i := &vpc.Instance{
			ID: "0737_" + uuid.NewString(), AccountID: account, Name: name(n), VPCID: v.ID, Zone: "us-south-3", Profile: "bx2-4x16", Status: vpc.Restarting,
			StatusReason: strings.Repeat("\x01", vpc.MaxReason), UserData: strings.Repeat("\x01", vpc.MaxUserData), // six bytes each in JSON
			ResourceGroupID: id(), HostID: id(), ImageID: id(),
		}
		i.CRN = "crn:v1:bluemix:public:is:us-south-3:a/" + account + "::instance:" + i.ID
		if n > 0 {
			i.UserData = ""
		}
		for m := range vpc.MaxInterfaces {
			i.Interfaces = append(i.Interfaces, vpc.Interface{
				ID: id(), Name: name(m), SubnetID: id(), Address: address(5*n + m), IPID: id(), IPName: long, MAC: "02:00:00:00:00:00",
				SecurityGroupIDs: groups[m*vpc.MaxInterfaceGroups:][:vpc.MaxInterfaceGroups], AttachmentID: id(), VirtualID: id(), VirtualName: name(5*n + m),
			})
		}
		instances[n] = i
	}
	largest := instances[0]
	for range vpc.MaxInstanceKeys {
		largest.KeyIDs = append(largest.KeyIDs, id())
	}
	w.put(func(tx *directory.Tx) {
		w.d.VPCs.Put(tx, v)
		w.d.Images.Put(tx, &vpc.Image{
			ID: largest.ImageID, AccountID: account, Name: long, Source: strings.Repeat("&", 2048), Reason: strings.Repeat("\x01", 300), SHA256: long, Expect: long,
		})
		for n, g := range groups {
			group := &vpc.SecurityGroup{ID: g, AccountID: account, VPCID: v.ID, Name: name(n), ResourceGroupID: id()}
			for m := range vpc.MaxRules {
				group.Rules = append(group.Rules, vpc.SecurityGroupRule{
					ID: id(), Name: name(m), Direction: vpc.Outbound, Protocol: vpc.ProtocolTCP, PortMin: 65535, PortMax: 65535,
					RemoteGroup: groups[(n+m)%own],
				})
			}
			w.d.SecurityGroups.Put(tx, group)
		}
		for n, k := range largest.KeyIDs {
			w.d.Keys.Put(tx, &vpc.Key{
				ID: k, AccountID: account, Name: name(n), Type: "rsa", Length: 4096, ResourceGroupID: id(),
				Fingerprint: name(n), PublicKey: "ssh-rsa " + strings.Repeat("+", 720),
			})
		}
		for n, nic := range largest.Interfaces {
			w.d.Subnets.Put(tx, &vpc.Subnet{ID: nic.SubnetID, AccountID: account, VPCID: v.ID, Zone: "us-south-3", CIDR: netip.PrefixFrom(address(8*n), 29), Name: name(n), ResourceGroupID: id()})
			w.d.FloatingIPs.Put(tx, &vpc.FloatingIP{ID: id(), AccountID: account, Name: name(n), Address: address(n), Zone: "us-south-3", ResourceGroupID: id(), InstanceID: largest.ID, InterfaceID: nic.ID})
		}
		for _, i := range instances {
			w.d.Instances.Put(tx, i)
		}
	})
	p := placement.Of(w.d, largest)
	b, err := json.Marshal(link.Message{Placement: p})
	if err != nil {
		t.Fatal(err)
	}
	members := 0
	for _, m := range p.Members {
		members += len(m)
	}
	if len(p.SecurityGroups) != own || members != vpc.MaxInstances*own || len(p.Keys) != vpc.MaxInstanceKeys {
		t.Fatalf("%d groups, %d members, %d keys: this is not the largest placement", len(p.SecurityGroups), members, len(p.Keys))
	}
	t.Logf("%d bytes, %d%% of a message", len(b), 100*len(b)/link.MaxMessage)
	if len(b) > link.MaxMessage*4/5 {
		t.Errorf("the largest placement has %d bytes, which is too near to the %d of a message", len(b), link.MaxMessage)
	}
}
