package test

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"fmt"
	"net/http"
	"net/http/httptest"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/IBM/go-sdk-core/v5/core"
	"github.com/IBM/vpc-go-sdk/vpcv1"
	"golang.org/x/crypto/ssh"

	"tabard.dev/tabard/test/harness"
)

// vpcUser uses the VPC API with the published SDK, unmodified.
type vpcUser struct {
	*vpcv1.VpcV1
	t *testing.T
}

func newVPCUser(t *testing.T, s *harness.Server) *vpcUser {
	t.Helper()
	a, err := core.NewIamAuthenticatorBuilder().SetApiKey(s.Owner.APIKey).SetURL(s.URL).Build()
	if err != nil {
		t.Fatal(err)
	}
	sdk, err := vpcv1.NewVpcV1(&vpcv1.VpcV1Options{URL: s.URL + "/v1", Authenticator: a})
	if err != nil {
		t.Fatal(err)
	}
	return &vpcUser{sdk, t}
}

// got checks the outcome of a call: its status, and that everything that the
// SDK says is always there is there.
func got[T any](u *vpcUser, status int) func(T, *core.DetailedResponse, error) T {
	return func(result T, r *core.DetailedResponse, err error) T {
		u.t.Helper()
		if err != nil {
			body := ""
			if r != nil {
				body = fmt.Sprint(r.Result)
			}
			u.t.Fatalf("%v %s", err, body)
		}
		if r.StatusCode != status {
			u.t.Errorf("status %d, want %d", r.StatusCode, status)
		}
		complete(u.t, reflect.TypeFor[T]().String(), reflect.ValueOf(result))
		return result
	}
}

// gone checks the outcome of a deletion.
func (u *vpcUser) gone(status int) func(*core.DetailedResponse, error) {
	return func(r *core.DetailedResponse, err error) {
		u.t.Helper()
		if err != nil || r.StatusCode != status {
			u.t.Fatalf("%v %v, want %d", r, err, status)
		}
	}
}

// refused checks the outcome of a call that must fail, as the SDK tells it.
func (u *vpcUser) refused(status int, code string, r *core.DetailedResponse, err error) {
	u.t.Helper()
	if err == nil || r == nil || r.StatusCode != status {
		u.t.Errorf("%v %v, want %d %s", r, err, status, code)
		return
	}
	m, _ := r.GetResultAsMap()
	errs, _ := m["errors"].([]any)
	if len(errs) != 1 || m["trace"] == "" {
		u.t.Errorf("error body %v", m)
		return
	}
	if e, _ := errs[0].(map[string]any); e["code"] != code || e["message"] == "" || e["more_info"] == "" {
		u.t.Errorf("error %v, want %s", e, code)
	}
	if !strings.Contains(err.Error(), errs[0].(map[string]any)["message"].(string)) {
		u.t.Errorf("the SDK does not understand the error: %v", err)
	}
}

// complete fails the test for each property that the SDK marks as required and
// that is not there.
func complete(t *testing.T, path string, v reflect.Value) {
	t.Helper()
	switch v.Kind() {
	case reflect.Pointer, reflect.Interface:
		if !v.IsNil() {
			complete(t, path, v.Elem())
		}
	case reflect.Slice:
		for i := range v.Len() {
			complete(t, fmt.Sprintf("%s[%d]", path, i), v.Index(i))
		}
	case reflect.Struct:
		for i := range v.NumField() {
			f, value := v.Type().Field(i), v.Field(i)
			if !f.IsExported() {
				continue
			}
			name := path + "." + f.Name
			nillable := slices.Contains([]reflect.Kind{reflect.Pointer, reflect.Interface, reflect.Slice, reflect.Map}, value.Kind())
			if strings.HasPrefix(f.Tag.Get("validate"), "required") && nillable && value.IsNil() {
				t.Errorf("%s is missing", name)
			}
			complete(t, name, value)
		}
	}
}

// all fetches every page and checks each item.
func all[T any](u *vpcUser, pager interface{ GetAll() ([]T, error) }) []T {
	u.t.Helper()
	items, err := pager.GetAll()
	if err != nil {
		u.t.Fatal(err)
	}
	complete(u.t, reflect.TypeFor[T]().String(), reflect.ValueOf(items))
	return items
}

// become waits until an instance has a status.
func (u *vpcUser) become(id *string, status string) {
	u.t.Helper()
	giveUp := time.Now().Add(time.Minute)
	for {
		i, r, err := u.GetInstance(u.NewGetInstanceOptions(*id))
		switch {
		case err != nil && r != nil && r.StatusCode == http.StatusNotFound && status == "":
			return
		case err != nil:
			u.t.Fatal(err)
		case *i.Status == status:
			return
		case time.Now().After(giveUp):
			u.t.Fatalf("the instance is %s, not %q, after a minute", *i.Status, status)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func TestThePublishedVPCSDKWorksUnmodified(t *testing.T) {
	s := harness.Start(t, "--driver", "local")
	u := newVPCUser(t, s)
	s.Login()
	s.CLI("iam", "trusted-profile-create", "worn")
	var profile struct{ ID string }
	s.JSON(&profile, "iam", "trusted-profile", "worn")

	// The catalog.
	got[*vpcv1.RegionCollection](u, 200)(u.ListRegions(u.NewListRegionsOptions()))
	got[*vpcv1.Region](u, 200)(u.GetRegion(u.NewGetRegionOptions("us-south")))
	zones := got[*vpcv1.ZoneCollection](u, 200)(u.ListRegionZones(u.NewListRegionZonesOptions("us-south")))
	got[*vpcv1.Zone](u, 200)(u.GetRegionZone(u.NewGetRegionZoneOptions("us-south", *zones.Zones[0].Name)))
	profiles := got[*vpcv1.InstanceProfileCollection](u, 200)(u.ListInstanceProfiles(u.NewListInstanceProfilesOptions()))
	got[*vpcv1.InstanceProfile](u, 200)(u.GetInstanceProfile(u.NewGetInstanceProfileOptions(*profiles.Profiles[0].Name)))
	systems := got[*vpcv1.OperatingSystemCollection](u, 200)(u.ListOperatingSystems(u.NewListOperatingSystemsOptions()))
	got[*vpcv1.OperatingSystem](u, 200)(u.GetOperatingSystem(u.NewGetOperatingSystemOptions(*systems.OperatingSystems[0].Name)))
	volumeProfiles := got[*vpcv1.VolumeProfileCollection](u, 200)(u.ListVolumeProfiles(u.NewListVolumeProfilesOptions()))
	got[*vpcv1.VolumeProfile](u, 200)(u.GetVolumeProfile(u.NewGetVolumeProfileOptions(*volumeProfiles.Profiles[0].Name)))

	// The network.
	v := got[*vpcv1.VPC](u, 201)(u.CreateVPC(u.NewCreateVPCOptions().SetName("my-vpc")))
	got[*vpcv1.VPC](u, 200)(u.GetVPC(u.NewGetVPCOptions(*v.ID)))
	v = got[*vpcv1.VPC](u, 200)(u.UpdateVPC(u.NewUpdateVPCOptions(*v.ID, map[string]any{"name": "renamed"})))
	if *v.Name != "renamed" {
		t.Errorf("the VPC is named %s", *v.Name)
	}
	byDefault := got[*vpcv1.DefaultSecurityGroup](u, 200)(u.GetVPCDefaultSecurityGroup(u.NewGetVPCDefaultSecurityGroupOptions(*v.ID)))
	got[*vpcv1.AddressPrefixCollection](u, 200)(u.ListVPCAddressPrefixes(u.NewListVPCAddressPrefixesOptions(*v.ID)))
	inVPC := &vpcv1.VPCIdentityByID{ID: v.ID}
	subnet := got[*vpcv1.Subnet](u, 201)(u.CreateSubnet(u.NewCreateSubnetOptions(&vpcv1.SubnetPrototypeSubnetByTotalCount{
		Name: core.StringPtr("my-subnet"), VPC: inVPC, Zone: &vpcv1.ZoneIdentityByName{Name: zones.Zones[0].Name}, TotalIpv4AddressCount: core.Int64Ptr(64),
	})))
	got[*vpcv1.Subnet](u, 201)(u.CreateSubnet(u.NewCreateSubnetOptions(&vpcv1.SubnetPrototypeSubnetByCIDR{VPC: inVPC, Ipv4CIDRBlock: core.StringPtr("10.240.64.0/24")})))
	got[*vpcv1.Subnet](u, 200)(u.GetSubnet(u.NewGetSubnetOptions(*subnet.ID)))
	got[*vpcv1.Subnet](u, 200)(u.UpdateSubnet(u.NewUpdateSubnetOptions(*subnet.ID, map[string]any{"name": "renamed"})))

	// Security groups.
	web := got[*vpcv1.SecurityGroup](u, 201)(u.CreateSecurityGroup(u.NewCreateSecurityGroupOptions(inVPC).SetName("web").SetRules([]vpcv1.SecurityGroupRulePrototypeIntf{
		&vpcv1.SecurityGroupRulePrototypeSecurityGroupRuleProtocolTcpudp{
			Direction: core.StringPtr("inbound"), Protocol: core.StringPtr("tcp"), PortMin: core.Int64Ptr(80), PortMax: core.Int64Ptr(443),
			Remote: &vpcv1.SecurityGroupRuleRemotePrototypeCIDR{CIDRBlock: core.StringPtr("192.0.2.0/24")},
		},
		&vpcv1.SecurityGroupRulePrototype{Direction: core.StringPtr("inbound"), Protocol: core.StringPtr("icmp_tcp_udp")},
		&vpcv1.SecurityGroupRulePrototype{Direction: core.StringPtr("outbound"), Protocol: core.StringPtr("any")},
	})))
	if len(web.Rules) != 3 {
		t.Errorf("rules of the new group: %v", web.Rules)
	}
	if r, ok := web.Rules[0].(*vpcv1.SecurityGroupRuleSecurityGroupRuleProtocolTcpudp); !ok || *r.PortMax != 443 {
		t.Errorf("a rule for tcp is a %T", web.Rules[0])
	}
	if r, ok := web.Rules[1].(*vpcv1.SecurityGroupRuleProtocolIcmptcpudp); !ok || *r.Protocol != "icmp_tcp_udp" {
		t.Errorf("a rule for three protocols is a %T", web.Rules[1])
	}
	if _, ok := web.Rules[2].(*vpcv1.SecurityGroupRuleProtocolAny); !ok {
		t.Errorf("a rule for any protocol is a %T", web.Rules[2])
	}
	ping := got[vpcv1.SecurityGroupRuleIntf](u, 201)(u.CreateSecurityGroupRule(u.NewCreateSecurityGroupRuleOptions(*web.ID, &vpcv1.SecurityGroupRulePrototypeSecurityGroupRuleProtocolIcmp{
		Direction: core.StringPtr("inbound"), Protocol: core.StringPtr("icmp"), Type: core.Int64Ptr(8), Code: core.Int64Ptr(0),
		Remote: &vpcv1.SecurityGroupRuleRemotePrototypeSecurityGroupIdentitySecurityGroupIdentityByID{ID: byDefault.ID},
	})))
	icmp, ok := ping.(*vpcv1.SecurityGroupRuleSecurityGroupRuleProtocolIcmp)
	if !ok || *icmp.Type != 8 {
		t.Fatalf("a rule for icmp is a %T", ping)
	}
	got[vpcv1.SecurityGroupRuleIntf](u, 200)(u.GetSecurityGroupRule(u.NewGetSecurityGroupRuleOptions(*web.ID, *icmp.ID)))
	got[*vpcv1.SecurityGroupRuleCollection](u, 200)(u.ListSecurityGroupRules(u.NewListSecurityGroupRulesOptions(*web.ID)))
	patch, err := (&vpcv1.SecurityGroupRulePatch{
		Name: core.StringPtr("ping"), Remote: &vpcv1.SecurityGroupRuleRemotePatchIP{Address: core.StringPtr("192.0.2.7")},
	}).AsPatch()
	if err != nil {
		t.Fatal(err)
	}
	patch["code"] = nil
	ping = got[vpcv1.SecurityGroupRuleIntf](u, 200)(u.UpdateSecurityGroupRule(u.NewUpdateSecurityGroupRuleOptions(*web.ID, *icmp.ID, patch)))
	if r := ping.(*vpcv1.SecurityGroupRuleSecurityGroupRuleProtocolIcmp); *r.Name != "ping" || r.Code != nil {
		t.Errorf("the patched rule is %v", r)
	}
	got[*vpcv1.SecurityGroup](u, 200)(u.GetSecurityGroup(u.NewGetSecurityGroupOptions(*web.ID)))
	got[*vpcv1.SecurityGroup](u, 200)(u.UpdateSecurityGroup(u.NewUpdateSecurityGroupOptions(*web.ID, map[string]any{"name": "www"})))

	// Keys and images.
	public, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	sshKey, err := ssh.NewPublicKey(public)
	if err != nil {
		t.Fatal(err)
	}
	key := got[*vpcv1.Key](u, 201)(u.CreateKey(u.NewCreateKeyOptions(string(ssh.MarshalAuthorizedKey(sshKey))).SetName("my-key").SetType("ed25519")))
	got[*vpcv1.Key](u, 200)(u.GetKey(u.NewGetKeyOptions(*key.ID)))
	got[*vpcv1.Key](u, 200)(u.UpdateKey(u.NewUpdateKeyOptions(*key.ID, map[string]any{"name": "renamed"})))
	disk := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(bytes.Repeat([]byte{0}, 1<<20)) }))
	defer disk.Close()
	image := got[*vpcv1.Image](u, 201)(u.CreateImage(u.NewCreateImageOptions(&vpcv1.ImagePrototypeImageByFile{
		Name: core.StringPtr("my-image"), File: &vpcv1.ImageFilePrototype{Href: core.StringPtr(disk.URL)},
		OperatingSystem: &vpcv1.OperatingSystemIdentityByName{Name: core.StringPtr("debian-12-amd64")},
	})))
	for giveUp := time.Now().Add(time.Minute); *image.Status != "available"; time.Sleep(50 * time.Millisecond) {
		image = got[*vpcv1.Image](u, 200)(u.GetImage(u.NewGetImageOptions(*image.ID)))
		if *image.Status == "failed" || time.Now().After(giveUp) {
			t.Fatalf("the image is %s: %v", *image.Status, image.StatusReasons)
		}
	}
	got[*vpcv1.Image](u, 200)(u.UpdateImage(u.NewUpdateImageOptions(*image.ID, map[string]any{"name": "renamed"})))
	stock := got[*vpcv1.ImageCollection](u, 200)(u.ListImages(u.NewListImagesOptions().SetVisibility("public"))).Images[0]
	u.gone(202)(u.DeleteImage(u.NewDeleteImageOptions(*image.ID)))
	_, r, err := u.GetImage(u.NewGetImageOptions(*image.ID))
	u.refused(404, "not_found", r, err)

	// Instances, in the older and the newer form.
	plain := got[*vpcv1.Instance](u, 201)(u.CreateInstance(u.NewCreateInstanceOptions(&vpcv1.InstancePrototypeInstanceByImageInstanceByImageInstanceByNetworkInterface{
		Name: core.StringPtr("my-instance"), Zone: &vpcv1.ZoneIdentityByName{Name: zones.Zones[0].Name}, VPC: inVPC,
		Profile: &vpcv1.InstanceProfileIdentityByName{Name: core.StringPtr("bx2-2x8")}, Image: &vpcv1.ImageIdentityByID{ID: stock.ID},
		Keys: []vpcv1.KeyIdentityIntf{&vpcv1.KeyIdentityByID{ID: key.ID}}, UserData: core.StringPtr("#!/bin/sh"),
		PrimaryNetworkInterface: &vpcv1.NetworkInterfacePrototype{Name: core.StringPtr("primary"), Subnet: &vpcv1.SubnetIdentityByID{ID: subnet.ID}},
		MetadataService:         &vpcv1.InstanceMetadataServicePrototype{Enabled: core.BoolPtr(true), Protocol: core.StringPtr("http"), ResponseHopLimit: core.Int64Ptr(2)},
		DefaultTrustedProfile: &vpcv1.InstanceDefaultTrustedProfilePrototype{
			AutoLink: core.BoolPtr(true), Target: &vpcv1.TrustedProfileIdentityByID{ID: core.StringPtr(profile.ID)},
		},
	})))
	attached := got[*vpcv1.Instance](u, 201)(u.CreateInstance(u.NewCreateInstanceOptions(&vpcv1.InstancePrototypeInstanceByImageInstanceByImageInstanceByNetworkAttachment{
		Name: core.StringPtr("attached"), Zone: &vpcv1.ZoneIdentityByName{Name: zones.Zones[0].Name},
		Profile: &vpcv1.InstanceProfileIdentityByName{Name: core.StringPtr("bx2-2x8")}, Image: &vpcv1.ImageIdentityByID{ID: stock.ID},
		PrimaryNetworkAttachment: &vpcv1.InstanceNetworkAttachmentPrototype{
			Name: core.StringPtr("nac"),
			VirtualNetworkInterface: &vpcv1.InstanceNetworkAttachmentPrototypeVirtualNetworkInterfaceVirtualNetworkInterfacePrototypeInstanceNetworkAttachmentContext{
				Name: core.StringPtr("vni"), Subnet: &vpcv1.SubnetIdentityByID{ID: subnet.ID}, AllowIPSpoofing: core.BoolPtr(false), AutoDelete: core.BoolPtr(true),
				EnableInfrastructureNat: core.BoolPtr(true), SecurityGroups: []vpcv1.SecurityGroupIdentityIntf{&vpcv1.SecurityGroupIdentityByID{ID: web.ID}},
			},
		},
	})))
	for _, i := range []*vpcv1.Instance{plain, attached} {
		u.become(i.ID, "running")
		got[*vpcv1.Instance](u, 200)(u.GetInstance(u.NewGetInstanceOptions(*i.ID)))
		got[*vpcv1.NetworkInterfaceUnpaginatedCollection](u, 200)(u.ListInstanceNetworkInterfaces(u.NewListInstanceNetworkInterfacesOptions(*i.ID)))
		got[*vpcv1.InstanceNetworkAttachmentCollection](u, 200)(u.ListInstanceNetworkAttachments(u.NewListInstanceNetworkAttachmentsOptions(*i.ID)))
		volumes := got[*vpcv1.VolumeAttachmentCollection](u, 200)(u.ListInstanceVolumeAttachments(u.NewListInstanceVolumeAttachmentsOptions(*i.ID)))
		got[*vpcv1.VolumeAttachment](u, 200)(u.GetInstanceVolumeAttachment(u.NewGetInstanceVolumeAttachmentOptions(*i.ID, *volumes.VolumeAttachments[0].ID)))
		got[*vpcv1.Volume](u, 200)(u.GetVolume(u.NewGetVolumeOptions(*volumes.VolumeAttachments[0].Volume.ID)))
		got[*vpcv1.Volume](u, 200)(u.UpdateVolume(u.NewUpdateVolumeOptions(*volumes.VolumeAttachments[0].Volume.ID, map[string]any{"name": "of-" + *i.Name})))
	}
	start := got[*vpcv1.InstanceInitialization](u, 200)(u.GetInstanceInitialization(u.NewGetInstanceInitializationOptions(*plain.ID)))
	if *start.DefaultTrustedProfile.Target.ID != profile.ID || *start.Keys[0].ID != *key.ID {
		t.Errorf("initialization: %v", start)
	}
	nic := plain.PrimaryNetworkInterface
	got[*vpcv1.NetworkInterface](u, 200)(u.GetInstanceNetworkInterface(u.NewGetInstanceNetworkInterfaceOptions(*plain.ID, *nic.ID)))
	got[*vpcv1.NetworkInterface](u, 200)(u.UpdateInstanceNetworkInterface(u.NewUpdateInstanceNetworkInterfaceOptions(*plain.ID, *nic.ID, map[string]any{"name": "renamed"})))
	got[*vpcv1.ReservedIP](u, 200)(u.GetInstanceNetworkInterfaceIP(u.NewGetInstanceNetworkInterfaceIPOptions(*plain.ID, *nic.ID, *nic.PrimaryIP.ID)))
	got[*vpcv1.ReservedIP](u, 200)(u.GetSubnetReservedIP(u.NewGetSubnetReservedIPOptions(*subnet.ID, *nic.PrimaryIP.ID)))
	got[*vpcv1.InstanceNetworkAttachment](u, 200)(u.GetInstanceNetworkAttachment(u.NewGetInstanceNetworkAttachmentOptions(*attached.ID, *attached.PrimaryNetworkAttachment.ID)))
	vni := *attached.PrimaryNetworkAttachment.VirtualNetworkInterface.ID
	got[*vpcv1.VirtualNetworkInterface](u, 200)(u.GetVirtualNetworkInterface(u.NewGetVirtualNetworkInterfaceOptions(vni)))
	got[*vpcv1.VirtualNetworkInterface](u, 200)(u.UpdateVirtualNetworkInterface(u.NewUpdateVirtualNetworkInterfaceOptions(vni, map[string]any{"name": "renamed"})))
	got[*vpcv1.ReservedIPReference](u, 200)(u.GetVirtualNetworkInterfaceIP(u.NewGetVirtualNetworkInterfaceIPOptions(vni, *attached.PrimaryNetworkAttachment.PrimaryIP.ID)))

	// Security groups' targets, of both forms.
	got[vpcv1.SecurityGroupTargetReferenceIntf](u, 200)(u.CreateSecurityGroupTargetBinding(u.NewCreateSecurityGroupTargetBindingOptions(*web.ID, *nic.ID)))
	for _, target := range []string{*nic.ID, vni} {
		got[vpcv1.SecurityGroupTargetReferenceIntf](u, 200)(u.GetSecurityGroupTarget(u.NewGetSecurityGroupTargetOptions(*web.ID, target)))
	}
	r, err = u.DeleteSecurityGroup(u.NewDeleteSecurityGroupOptions(*web.ID))
	u.refused(409, "security_group_in_use", r, err)
	u.gone(204)(u.DeleteSecurityGroupTargetBinding(u.NewDeleteSecurityGroupTargetBindingOptions(*web.ID, *nic.ID)))

	// Floating IPs, on both forms.
	zone := &vpcv1.ZoneIdentityByName{Name: zones.Zones[0].Name}
	fip := got[*vpcv1.FloatingIP](u, 201)(u.CreateFloatingIP(u.NewCreateFloatingIPOptions(&vpcv1.FloatingIPPrototypeFloatingIPByZone{Name: core.StringPtr("my-fip"), Zone: zone})))
	got[*vpcv1.FloatingIP](u, 201)(u.AddInstanceNetworkInterfaceFloatingIP(u.NewAddInstanceNetworkInterfaceFloatingIPOptions(*plain.ID, *nic.ID, *fip.ID)))
	got[*vpcv1.FloatingIP](u, 200)(u.GetFloatingIP(u.NewGetFloatingIPOptions(*fip.ID)))
	got[*vpcv1.FloatingIPUnpaginatedCollection](u, 200)(u.ListInstanceNetworkInterfaceFloatingIps(u.NewListInstanceNetworkInterfaceFloatingIpsOptions(*plain.ID, *nic.ID)))
	got[*vpcv1.FloatingIP](u, 200)(u.GetInstanceNetworkInterfaceFloatingIP(u.NewGetInstanceNetworkInterfaceFloatingIPOptions(*plain.ID, *nic.ID, *fip.ID)))
	u.gone(204)(u.RemoveInstanceNetworkInterfaceFloatingIP(u.NewRemoveInstanceNetworkInterfaceFloatingIPOptions(*plain.ID, *nic.ID, *fip.ID)))
	got[*vpcv1.FloatingIPReference](u, 200)(u.AddNetworkInterfaceFloatingIP(u.NewAddNetworkInterfaceFloatingIPOptions(vni, *fip.ID)))
	got[*vpcv1.FloatingIPReference](u, 200)(u.GetNetworkInterfaceFloatingIP(u.NewGetNetworkInterfaceFloatingIPOptions(vni, *fip.ID)))
	bound := got[*vpcv1.FloatingIP](u, 200)(u.GetFloatingIP(u.NewGetFloatingIPOptions(*fip.ID)))
	if *bound.Target.(*vpcv1.FloatingIPTarget).ID != vni {
		t.Errorf("the floating IP is bound to %v", bound.Target)
	}
	u.gone(204)(u.RemoveNetworkInterfaceFloatingIP(u.NewRemoveNetworkInterfaceFloatingIPOptions(vni, *fip.ID)))
	got[*vpcv1.FloatingIP](u, 200)(u.UpdateFloatingIP(u.NewUpdateFloatingIPOptions(*fip.ID, map[string]any{"name": "renamed", "target": map[string]any{"id": *nic.ID}})))
	other := got[*vpcv1.FloatingIP](u, 201)(u.CreateFloatingIP(u.NewCreateFloatingIPOptions(&vpcv1.FloatingIPPrototypeFloatingIPByTarget{
		Target: &vpcv1.FloatingIPTargetPrototypeVirtualNetworkInterfaceIdentityVirtualNetworkInterfaceIdentityByID{ID: &vni},
	})))

	// Every pager, a few items on a page.
	const few = 1
	mine := all[vpcv1.Instance](u, must(u.NewInstancesPager(u.NewListInstancesOptions().SetLimit(few).SetVPCID(*v.ID))))
	if len(mine) != 2 {
		t.Errorf("%d instances of the VPC", len(mine))
	}
	for what, n := range map[string]int{
		"VPCs":      len(all[vpcv1.VPC](u, must(u.NewVpcsPager(u.NewListVpcsOptions().SetLimit(few))))),
		"groups":    len(all[vpcv1.SecurityGroup](u, must(u.NewSecurityGroupsPager(u.NewListSecurityGroupsOptions().SetLimit(few).SetVPCID(*v.ID))))),
		"targets":   len(all[vpcv1.SecurityGroupTargetReferenceIntf](u, must(u.NewSecurityGroupTargetsPager(u.NewListSecurityGroupTargetsOptions(*byDefault.ID).SetLimit(few))))),
		"subnets":   len(all[vpcv1.Subnet](u, must(u.NewSubnetsPager(u.NewListSubnetsOptions().SetLimit(few))))),
		"addresses": len(all[vpcv1.ReservedIP](u, must(u.NewSubnetReservedIpsPager(u.NewListSubnetReservedIpsOptions(*subnet.ID).SetLimit(few))))),
		"prefixes":  len(all[vpcv1.AddressPrefix](u, must(u.NewVPCAddressPrefixesPager(u.NewListVPCAddressPrefixesOptions(*v.ID).SetLimit(few))))),
		"keys":      len(all[vpcv1.Key](u, must(u.NewKeysPager(u.NewListKeysOptions().SetLimit(few))))),
		"images":    len(all[vpcv1.Image](u, must(u.NewImagesPager(u.NewListImagesOptions().SetLimit(few))))),
		"systems":   len(all[vpcv1.OperatingSystem](u, must(u.NewOperatingSystemsPager(u.NewListOperatingSystemsOptions().SetLimit(few))))),
		"volumes":   len(all[vpcv1.Volume](u, must(u.NewVolumesPager(u.NewListVolumesOptions().SetLimit(few))))),
		"profiles":  len(all[vpcv1.VolumeProfile](u, must(u.NewVolumeProfilesPager(u.NewListVolumeProfilesOptions().SetLimit(few))))),
		"virtual":   len(all[vpcv1.VirtualNetworkInterface](u, must(u.NewVirtualNetworkInterfacesPager(u.NewListVirtualNetworkInterfacesOptions().SetLimit(few))))),
		"ips":       len(all[vpcv1.ReservedIPReference](u, must(u.NewVirtualNetworkInterfaceIpsPager(u.NewListVirtualNetworkInterfaceIpsOptions(vni).SetLimit(few))))),
		"nic ips":   len(all[vpcv1.ReservedIP](u, must(u.NewInstanceNetworkInterfaceIpsPager(u.NewListInstanceNetworkInterfaceIpsOptions(*plain.ID, *nic.ID).SetLimit(few))))),
		"floating":  len(all[vpcv1.FloatingIP](u, must(u.NewFloatingIpsPager(u.NewListFloatingIpsOptions().SetLimit(few))))),
		"bound":     len(all[vpcv1.FloatingIPReference](u, must(u.NewNetworkInterfaceFloatingIpsPager(u.NewListNetworkInterfaceFloatingIpsOptions(vni).SetLimit(few))))),
	} {
		if n == 0 {
			t.Errorf("there are no %s", what)
		}
	}

	// Changes and actions.
	i := got[*vpcv1.Instance](u, 200)(u.UpdateInstance(u.NewUpdateInstanceOptions(*plain.ID, map[string]any{
		"name": "renamed", "metadata_service": map[string]any{"protocol": "https", "response_hop_limit": 1},
	})))
	if *i.MetadataService.Protocol != "https" || !*i.MetadataService.Enabled || *i.Name != "renamed" {
		t.Errorf("updated to %s, %v", *i.Name, i.MetadataService)
	}
	resize := u.NewUpdateInstanceOptions(*plain.ID, map[string]any{"profile": map[string]any{"name": "bx2-4x16"}})
	_, r, err = u.UpdateInstance(resize)
	u.refused(409, "invalid_state", r, err)
	act := func(kind string, force bool) {
		t.Helper()
		got[*vpcv1.InstanceAction](u, 201)(u.CreateInstanceAction(u.NewCreateInstanceActionOptions(*plain.ID, kind).SetForce(force)))
	}
	act("reboot", false)
	u.become(plain.ID, "running")
	act("stop", true)
	u.become(plain.ID, "stopped")
	if i := got[*vpcv1.Instance](u, 200)(u.UpdateInstance(resize)); *i.Vcpu.Count != 4 {
		t.Errorf("resized to %d processors", *i.Vcpu.Count)
	}
	act("start", false)
	u.become(plain.ID, "running")
	_, r, err = u.CreateInstanceAction(u.NewCreateInstanceActionOptions(*plain.ID, "start"))
	u.refused(409, "invalid_state", r, err)

	// What is in use stays, and the rest goes.
	r, err = u.DeleteSubnet(u.NewDeleteSubnetOptions(*subnet.ID))
	u.refused(409, "subnet_not_empty", r, err)
	r, err = u.DeleteVPC(u.NewDeleteVPCOptions(*v.ID))
	u.refused(409, "vpc_not_empty", r, err)
	for _, i := range []*vpcv1.Instance{plain, attached} {
		u.gone(204)(u.DeleteInstance(u.NewDeleteInstanceOptions(*i.ID)))
		u.become(i.ID, "")
	}
	for _, f := range []*vpcv1.FloatingIP{fip, other} {
		u.gone(204)(u.DeleteFloatingIP(u.NewDeleteFloatingIPOptions(*f.ID)))
	}
	u.gone(204)(u.DeleteSecurityGroupRule(u.NewDeleteSecurityGroupRuleOptions(*web.ID, *icmp.ID)))
	u.gone(204)(u.DeleteSecurityGroup(u.NewDeleteSecurityGroupOptions(*web.ID)))
	u.gone(204)(u.DeleteKey(u.NewDeleteKeyOptions(*key.ID)))
	for _, n := range all[vpcv1.Subnet](u, must(u.NewSubnetsPager(u.NewListSubnetsOptions()))) {
		u.gone(204)(u.DeleteSubnet(u.NewDeleteSubnetOptions(*n.ID)))
	}
	u.gone(204)(u.DeleteVPC(u.NewDeleteVPCOptions(*v.ID)))
	_, r, err = u.GetVPC(u.NewGetVPCOptions(*v.ID))
	u.refused(404, "not_found", r, err)
	_, r, err = u.GetInstance(u.NewGetInstanceOptions(*plain.ID))
	u.refused(404, "not_found", r, err)

	// The answers of a server that refuses.
	stranger, err := vpcv1.NewVpcV1(&vpcv1.VpcV1Options{URL: s.URL + "/v1", Authenticator: &core.BearerTokenAuthenticator{BearerToken: "none"}})
	if err != nil {
		t.Fatal(err)
	}
	_, r, err = stranger.ListInstances(stranger.NewListInstancesOptions())
	u.refused(401, "token_invalid", r, err)
	early, err := vpcv1.NewVpcV1(&vpcv1.VpcV1Options{URL: s.URL + "/v1", Authenticator: u.Service.Options.Authenticator, Version: core.StringPtr("2018-01-01")})
	if err != nil {
		t.Fatal(err)
	}
	_, r, err = early.ListInstances(early.NewListInstancesOptions())
	u.refused(400, "invalid_version_range", r, err)
}

// must returns a pager; making one cannot fail with these options.
func must[T any](pager T, err error) T {
	if err != nil {
		panic(err)
	}
	return pager
}
