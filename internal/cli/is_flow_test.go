package cli

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"os"
	"strings"
	"testing"
)

func TestSecurityGroupsFromTheCommandLine(t *testing.T) {
	i := newInstallation(t)
	vpc := i.id("is vpc-create my-vpc")
	i.do("is subnet-create my-subnet my-vpc --zone us-south-3 --ipv4-address-count 16")
	group := i.id("is security-group-create web my-vpc")
	i.do("is security-group-rule-add web inbound tcp --port-min 443 --remote 192.0.2.0/24 --name https").want(0, "443", "192.0.2.0/24", "was added")
	i.do("is security-group-rule-add web inbound icmp --icmp-type 8 --icmp-code 0 --remote 192.0.2.1").want(0, "8/0", "192.0.2.1")
	i.do("is security-group-rule-add web inbound any --remote web").want(0, "web")
	i.do("is security-group-rule-add web outbound udp --port-min 5000 --port-max 5010").want(0, "5000-5010")
	i.do("is security-group-rule-update web https --port-min 80 --port-max 90 --remote 192.0.2.7").want(0, "80-90", "192.0.2.7")
	i.do("is security-group-rule-update web https --port-min null --port-max null")
	same(t, "", i.object("is security-group-rule web https").text("port_min"))
	same(t, 4, len(i.list("is security-group-rules web")))
	i.do("is security-group-rule-delete web https -f")
	same(t, 3, len(i.list("is security-group-rules web")))
	i.refused("is security-group-rule-add web inbound gre", "protocol")
	i.refused("is security-group-rule-update web none --name x", `no rule has the name or ID "none"`)

	i.do("is instance-create vm my-vpc us-south-3 tabard-1x1 my-subnet --image tabard-local-1 --sgs web")
	same(t, "web", i.object("is instance-network-interface vm eth0").text("security_groups.name"))
	i.do("is security-group-create db my-vpc")
	i.do("is security-group-target-add db eth0 --in vm").want(0, "eth0 is in the security group db")
	same(t, []string{"eth0"}, texts(i.list("is security-group-targets db"), "name"))
	i.do("is security-group-target-remove web eth0 -f").want(0, "removed")
	i.refused("is security-group-target-remove db eth0 --in vm -f", "must be in a security group")
	i.refused("is security-group-delete db -f", "targets")
	i.do("is security-group-update web --name www")
	same(t, group, i.object("is security-group www").text("id"))
	same(t, 3, len(i.list("is security-groups --vpc my-vpc")))
	i.do("is security-group-delete www -f")
	run(t, "is", "security-group-target-add", "db", "eth0").want(2, "--in")
	same(t, vpc, i.object("is vpc my-vpc").text("id"))
	same(t, 3, len(i.list("is vpc-address-prefixes my-vpc")))
}

func TestImagesFromTheCommandLine(t *testing.T) {
	i := newInstallation(t)
	disk := bytes.Repeat([]byte{0}, 1<<20)
	sum := sha256.Sum256(disk)
	if err := os.WriteFile("disk.raw", disk, 0o600); err != nil {
		t.Fatal(err)
	}
	i.do("is image-create my-debian --file disk.raw --os-name debian-12-amd64 --checksum "+hex.EncodeToString(sum[:])).want(0, "available", hex.EncodeToString(sum[:]))
	i.do("is image-create other --file @disk.raw").want(0, "linux-amd64")
	i.refused("is image-create wrong --file disk.raw --checksum "+strings.Repeat("0", 64), "SHA256")
	i.refused("is image-create wrong --file none.raw", "none.raw")
	i.refused("is image-create wrong --file disk.raw --os-name none", "none")
	if err := os.WriteFile("text", []byte("hello"), 0o600); err != nil {
		t.Fatal(err)
	}
	i.refused("is image-create wrong --file text", "neither qcow2 nor a raw disk")
	same(t, []string{"my-debian", "other"}, texts(i.list("is images --visibility private"), "name"))
	run(t, "is", "image-create", "wrong").want(2, "--file")

	i.do("is image-update other --name renamed")
	i.do("is image-delete renamed -f")
	same(t, []string{"available"}, texts(i.list("is images --visibility private --status available"), "status"))
	i.refused("is image-create far --file http://example.com/disk.raw", "checksum")
	i.refused("is image-create near --file http://127.0.0.1:1/disk.raw", "image near is failed", "could not be fetched")
	i.do("is image-create later --file http://127.0.0.1:1/disk.raw --no-wait").want(0, "being fetched")
	i.do("is operating-systems").want(0, "debian-12-amd64", "ubuntu-24-04-amd64")
	i.do("is operating-system debian-12-amd64").want(0, "Debian")
}

func TestNetworkAttachmentsAndVolumesFromTheCommandLine(t *testing.T) {
	i := newInstallation(t)
	i.do("is vpc-create my-vpc")
	i.do("is subnet-create my-subnet my-vpc --zone us-south-3 --ipv4-address-count 16")
	i.do("is security-group-create web my-vpc")
	i.do("is instance-create vm my-vpc us-south-3 tabard-1x1 my-subnet --image tabard-local-1 --pnac-name nac --pnac-vni-name vni " +
		"--pnac-vni-rip-address 10.240.128.9 --pnac-vni-sgs web --metadata-service true --metadata-service-protocol https")
	same(t, "10.240.128.9", i.object("is instance-network-attachment vm nac").text("primary_ip.address"))
	same(t, []string{"vni"}, texts(i.list("is instance-network-attachments vm"), "virtual_network_interface.name"))
	same(t, "web", i.object("is virtual-network-interface vni").text("security_groups.name"))
	i.do("is virtual-network-interface-update vni --name vni2")
	i.do("is floating-ip-reserve fip --zone us-south-3")
	i.do("is virtual-network-interface-floating-ip-add vni2 fip").want(0, "is bound to vni2")
	same(t, 1, len(i.list("is virtual-network-interface-floating-ips vni2")))
	same(t, "vni2", i.object("is floating-ip fip").text("target.name"))
	i.do("is virtual-network-interface-floating-ip-remove vni2 fip -f")
	i.do("is floating-ip-update fip --vni vni2")
	i.do("is floating-ip-update fip --reset-target")
	same(t, 1, len(i.list("is virtual-network-interfaces")))
	run(t, strings.Fields("is instance-create x my-vpc us-south-3 tabard-1x1 my-subnet --pnac-name n --sgs web")...).want(2, "either")

	name := texts(i.list("is volumes --zone us-south-3"), "name")[0]
	i.do("is volume-update " + name + " --name boot")
	same(t, "vm", i.object("is volume boot").text("volume_attachments.instance.name"))

	changed := i.object("is instance-update vm --name vm2 --ms false --msp http --msrhl 3")
	same(t, "vm2 false http 3", changed.text("name")+" "+changed.text("metadata_service.enabled")+" "+changed.text("metadata_service.protocol")+" "+changed.text("metadata_service.response_hop_limit"))
	i.refused("is instance-update vm2 --profile bx2-2x8", "stopped")
	run(t, "is", "instance-update", "vm2").want(2, "nothing to change")
	i.do("is vpc-update my-vpc --name vpc2")
	i.do("is subnet-update my-subnet --name subnet2")
	i.do("is instance-profile tabard-1x1").want(0, "tabard-1x1")
}
