package identity_test

import (
	"math"
	"math/rand/v2"
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"time"

	"tabard.dev/tabard/internal/identity"
)

func TestAnAddressIsAdmittedWhenTheListCoversIt(t *testing.T) {
	for _, tt := range []struct {
		list    string
		address string
		want    bool
	}{
		{"", "192.0.2.1", true},
		{"", "2001:db8::1", true},
		{"", "not an address", true},
		{"", "", true},
		{" , ,", "192.0.2.1", true},
		{"192.0.2.1", "192.0.2.1", true},
		{"192.0.2.1", "192.0.2.2", false},
		{"192.0.2.1", "", false},
		{"192.0.2.1", "@", false},
		{"192.0.2.1", "192.0.2.1:80", false},
		{"192.0.2.1", "::ffff:192.0.2.1", true},
		{"::ffff:192.0.2.1", "192.0.2.1", true},
		{"192.0.2.0/24", "192.0.2.0", true},
		{"192.0.2.0/24", "192.0.2.255", true},
		{"192.0.2.0/24", "192.0.3.0", false},
		{"192.0.2.77/24", "192.0.2.1", true},
		{"192.0.2.4/30", "192.0.2.8", false},
		{"192.0.2.1/32", "192.0.2.1", true},
		{"192.0.2.1/32", "192.0.2.0", false},
		{"0.0.0.0/0", "203.0.113.9", true},
		{"0.0.0.0/0", "2001:db8::1", false},
		{"::/0", "2001:db8::1", true},
		{"::/0", "192.0.2.1", false},
		{"2001:db8::/33", "2001:db8:7fff::1", true},
		{"2001:db8::/33", "2001:db8:8000::1", false},
		{"192.0.2.10-192.0.2.20", "192.0.2.10", true},
		{"192.0.2.10-192.0.2.20", "192.0.2.20", true},
		{"192.0.2.10-192.0.2.20", "192.0.2.9", false},
		{"192.0.2.10-192.0.2.20", "192.0.2.21", false},
		{"192.0.2.10 - 192.0.2.20", "192.0.2.15", true},
		{"192.0.2.9-192.0.3.1", "192.0.2.200", true},
		{"2001:db8::1-2001:db8::ff", "2001:db8::80", true},
		{"10.0.0.1, 192.0.2.0/24 ,2001:db8::1", "2001:db8::1", true},
		{"10.0.0.1, 192.0.2.0/24 ,2001:db8::1", "192.0.2.9", true},
		{"10.0.0.1, 192.0.2.0/24 ,2001:db8::1", "10.0.0.2", false},
		{"fe80::/10", "fe80::1%eth0", true},
		// A list that cannot be read admits nobody, also not by its good parts.
		{"192.0.2.1, everywhere", "192.0.2.1", false},
	} {
		s := identity.DefaultSettings("a")
		s.AllowedAddresses = tt.list
		if got := s.Admits(tt.address); got != tt.want {
			t.Errorf("%q admits %q: %t, want %t", tt.list, tt.address, got, tt.want)
		}
	}
}

func TestAListOfAddressesThatCannotBeMeantIsRefused(t *testing.T) {
	for _, list := range []string{
		"everywhere", "192.0.2", "192.0.2.256", "192.0.2.0/33", "192.0.2.0/-1", "192.0.2.0/", "/24", "192.0.2.1:80", "192.0.2.20-192.0.2.10", "192.0.2.1-", "-192.0.2.1", "-",
		"192.0.2.1-2001:db8::1", "192.0.2.1-192.0.2.2-192.0.2.3", "192.0.2.0/24-192.0.3.0/24", "192.0.2.1;192.0.2.2", "192.0.2.1 192.0.2.2", "*", "fe80::1%eth0", "fe80::1%eth0-fe80::2", "fe80::/10%eth0",
		"::ffff:192.0.2.0/120", "[2001:db8::1]", "192.0.2.1,,x", "012.0.0.1",
	} {
		if ranges, err := identity.ParseAddresses(list); err == nil {
			t.Errorf("%q reads as %v", list, ranges)
		}
	}
}

func TestASettingInSecondsThatIsNoneLeavesTheDefault(t *testing.T) {
	for text, want := range map[string]time.Duration{
		"3600": time.Hour, "1": time.Second, "0900": 15 * time.Minute,
		identity.NotSet: time.Minute, "": time.Minute, "0": time.Minute, "-5": time.Minute, "1.5": time.Minute, "1h": time.Minute, " 1": time.Minute,
		strconv.Itoa(math.MaxInt64): time.Minute, "9223372036": 9223372036 * time.Second, "9223372037": time.Minute, "99999999999999999999": time.Minute,
	} {
		if got := identity.Seconds(text, time.Minute); got != want {
			t.Errorf("%q is %s, want %s", text, got, want)
		}
	}
}

// covers is Admits for one item a second time, on the library's own prefixes
// and, for ranges, on the bytes.
func covers(item string, a netip.Addr) bool {
	item = strings.TrimSpace(item)
	if strings.Contains(item, "/") {
		p, err := netip.ParsePrefix(item)
		return err == nil && p.Contains(a)
	}
	from, to, _ := strings.Cut(item+"-"+item, "-")
	if strings.Contains(item, "-") {
		from, to, _ = strings.Cut(item, "-")
	}
	x, err := netip.ParseAddr(strings.TrimSpace(from))
	y, err2 := netip.ParseAddr(strings.TrimSpace(to))
	if err != nil || err2 != nil || x.Unmap().Is4() != a.Is4() {
		return false
	}
	low, high, mid := x.As16(), y.As16(), a.As16()
	return string(low[:]) <= string(mid[:]) && string(mid[:]) <= string(high[:])
}

// FuzzAdmits demands of every list that is accepted that it admits what a
// second implementation does.
func FuzzAdmits(f *testing.F) {
	for _, seed := range []string{
		"192.0.2.1", "192.0.2.0/24, 10.0.0.0/8", "192.0.2.10-192.0.2.20", "2001:db8::/32", "::ffff:192.0.2.1-192.0.2.9", "::/0,0.0.0.0/0", "fe80::1%eth0", " , ",
	} {
		for _, address := range []string{"192.0.2.1", "::ffff:192.0.2.15", "2001:db8::1", "fe80::1%eth0", "", "x"} {
			f.Add(seed, address)
		}
	}
	f.Fuzz(func(t *testing.T, list, address string) {
		s := identity.DefaultSettings("a")
		s.AllowedAddresses = list
		got := s.Admits(address)
		ranges, err := identity.ParseAddresses(list)
		if err != nil {
			if got {
				t.Errorf("%q cannot be read and admits %q", list, address)
			}
			return
		}
		for _, r := range ranges {
			if r.From.Is4() != r.To.Is4() || r.To.Less(r.From) || !r.From.IsValid() || r.From.Zone() != "" {
				t.Errorf("%q has the range %v", list, r)
			}
		}
		a, err := netip.ParseAddr(address)
		want := len(ranges) == 0
		for item := range strings.SplitSeq(list, ",") {
			want = want || err == nil && strings.TrimSpace(item) != "" && covers(item, a.Unmap().WithZone(""))
		}
		if got != want {
			t.Errorf("%q admits %q: %t, want %t", list, address, got, want)
		}
	})
}

func TestRandomPrefixesAndRangesAdmitWhatTheyCover(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	draw := func() netip.Addr {
		if r.IntN(2) == 0 {
			return netip.AddrFrom4([4]byte{10, 0, byte(r.IntN(4)), byte(r.IntN(8))})
		}
		return netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 14: byte(r.IntN(4)), 15: byte(r.IntN(8))})
	}
	yes := 0
	for range 50_000 {
		a, b, c := draw(), draw(), draw()
		item := a.String()
		switch r.IntN(3) {
		case 0:
			item += "/" + strconv.Itoa(r.IntN(a.BitLen()+1))
		case 1:
			item += "-" + b.String()
		}
		s := identity.DefaultSettings("a")
		s.AllowedAddresses = item
		_, err := identity.ParseAddresses(item)
		want := err == nil && covers(item, c)
		if got := s.Admits(c.String()); got != want {
			t.Fatalf("%q admits %s: %t, want %t", item, c, got, want)
		}
		if want {
			yes++
		}
	}
	if yes < 5000 {
		t.Errorf("only %d were admitted: the cases prove little", yes)
	}
}
