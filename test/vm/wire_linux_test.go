package vm

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

var (
	everybody = net.HardwareAddr{255, 255, 255, 255, 255, 255}
	metadata  = netip.MustParseAddr("169.254.169.254")
)

// ethernet is a frame.
func ethernet(to, from net.HardwareAddr, kind uint16, payload ...[]byte) []byte {
	return slices.Concat(to, from, binary.BigEndian.AppendUint16(nil, kind), slices.Concat(payload...))
}

// sum is the checksum of RFC 1071.
func sum(b []byte) uint16 {
	var s uint32
	for n, v := range b {
		if n%2 == 0 {
			s += uint32(v) << 8
		} else {
			s += uint32(v)
		}
	}
	for s > 0xffff {
		s = s&0xffff + s>>16
	}
	return ^uint16(s)
}

// ipv4 is a packet; options must be a multiple of 4 bytes long.
func ipv4(from, to netip.Addr, protocol byte, options, payload []byte) []byte {
	size := 20 + len(options)
	h := make([]byte, size)
	h[0] = 0x40 | byte(size/4)
	binary.BigEndian.PutUint16(h[2:], uint16(size+len(payload)))
	h[8], h[9] = 64, protocol
	copy(h[12:], from.AsSlice())
	copy(h[16:], to.AsSlice())
	copy(h[20:], options)
	binary.BigEndian.PutUint16(h[10:], sum(h))
	return append(h, payload...)
}

// opening is the packet that opens a TCP connection to port 80. By way of other
// addresses when those are given: a loose source route (RFC 791 section 3.1).
func opening(from, to netip.Addr, port uint16, by ...netip.Addr) []byte {
	h := make([]byte, 20)
	binary.BigEndian.PutUint16(h, port)
	binary.BigEndian.PutUint16(h[2:], 80)
	binary.BigEndian.PutUint32(h[4:], 1000)
	h[12], h[13] = 5<<4, 2 // no options; SYN
	binary.BigEndian.PutUint16(h[14:], 1024)
	end := to
	var options []byte
	if len(by) > 0 {
		// The packet is addressed to the first hop; the rest stands in the option.
		options = []byte{131, byte(3 + 4*len(by)), 4}
		for _, a := range append(slices.Clone(by[1:]), to) {
			options = append(options, a.AsSlice()...)
		}
		options = append(options, make([]byte, (4-len(options)%4)%4)...)
		to = by[0]
	}
	pseudo := slices.Concat(from.AsSlice(), end.AsSlice(), []byte{0, unix.IPPROTO_TCP, 0, 20}, h)
	binary.BigEndian.PutUint16(h[16:], sum(pseudo))
	return ipv4(from, to, unix.IPPROTO_TCP, options, h)
}

// isAnswer tells TCP packets of the metadata service, with a plain header.
func isAnswer(f []byte) bool {
	return len(f) >= 38 && binary.BigEndian.Uint16(f[12:]) == unix.ETH_P_IP && f[23] == unix.IPPROTO_TCP && bytes.Equal(f[26:30], metadata.AsSlice())
}

// datagram is a UDP packet without a checksum, as RFC 768 lets it be.
func datagram(from, to netip.AddrPort, payload []byte) []byte {
	h := binary.BigEndian.AppendUint16(nil, from.Port())
	h = binary.BigEndian.AppendUint16(h, to.Port())
	h = binary.BigEndian.AppendUint16(h, uint16(8+len(payload)))
	return ipv4(from.Addr(), to.Addr(), unix.IPPROTO_UDP, nil, slices.Concat(h, []byte{0, 0}, payload))
}

// discover is a DHCPDISCOVER (RFC 2131 section 3).
func discover(mac net.HardwareAddr) []byte {
	b := make([]byte, 236)
	copy(b, []byte{1, 1, 6, 0, 1, 2, 3, 4})
	copy(b[28:], mac)
	b = append(b, 0x63, 0x82, 0x53, 0x63, 53, 1, 1, 255)
	return datagram(netip.MustParseAddrPort("0.0.0.0:68"), netip.MustParseAddrPort("255.255.255.255:67"), b)
}

// arp is an ARP packet: 1 asks, 2 answers.
func arp(operation byte, fromMAC net.HardwareAddr, from netip.Addr, toMAC net.HardwareAddr, to netip.Addr) []byte {
	return slices.Concat([]byte{0, 1, 8, 0, 6, 4, 0, operation}, fromMAC, from.AsSlice(), toMAC, to.AsSlice())
}

// neighbours are the MACs that an instance, or a router, believes in.
func (s *site) neighbours(t *testing.T, space string) map[string]string {
	t.Helper()
	out, err := s.try(space, "ip", "-j", "-4", "neigh")
	if err != nil {
		t.Fatal(err)
	}
	var rows []struct{ Dst, LLAddr string }
	if strings.TrimSpace(out) != "" {
		if err := json.Unmarshal([]byte(out), &rows); err != nil {
			t.Fatal(err)
		}
	}
	m := map[string]string{}
	for _, r := range rows {
		if r.LLAddr != "" {
			m[r.Dst] = r.LLAddr
		}
	}
	return m
}
