package hosts_test

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"

	"tabard.dev/tabard/internal/api/apitest"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/host/link"
	"tabard.dev/tabard/internal/placement"
	"tabard.dev/tabard/internal/vpc"
)

func TestAStreamBeginsWithAllAndGoesOnWithChanges(t *testing.T) {
	s := start(t)
	srv := s.serve()
	h, other := s.host("rack1"), s.host("rack2")
	mine, foreign := s.instance(h.id, vpc.Running), s.instance(other.id, vpc.Running)
	r := h.open(srv)
	var hello *link.Hello
	r.until(func(m link.Message) bool { hello = m.Hello; return true })
	if hello == nil || hello.Region != "us-south" || hello.Zone != zone {
		t.Errorf("the first message is %+v", hello)
	}
	r.synced()
	if len(r.holds) != 1 || r.holds[mine.ID] == nil || r.holds[mine.ID].Instance.UserData != "#cloud-config" {
		t.Errorf("it holds %v", r.holds)
	}
	if row := s.Do(apitest.Request{Path: "/v1/hosts/rack1"}).Want(200); row["status"] != "connected" || row["vcpus"] != 4.0 {
		t.Errorf("host %v", row)
	}
	later := s.instance(h.id, vpc.Pending)
	r.until(func(m link.Message) bool { return m.Placement != nil && m.Placement.Instance.ID == later.ID })
	s.change(mine.ID, func(i *vpc.Instance) { i.Status = vpc.Stopping })
	r.until(func(m link.Message) bool { return m.Placement != nil && m.Placement.Instance.Status == vpc.Stopping })
	s.change(mine.ID, func(i *vpc.Instance) { i.HostID = other.id })
	r.until(func(m link.Message) bool { return m.Gone == mine.ID })
	s.change(foreign.ID, func(i *vpc.Instance) { i.HostID = h.id })
	r.until(func(m link.Message) bool { return m.Placement != nil && m.Placement.Instance.ID == foreign.ID })
	r.cancel()
	r.ends()
	for end := time.Now().Add(patience); s.Do(apitest.Request{Path: "/v1/hosts/rack1"}).Want(200)["status"] != "away"; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the host is still there")
		}
	}
}

func TestAHostThatConnectsTwiceIsThereUntilTheNewerStreamEnds(t *testing.T) {
	s := start(t)
	srv := s.serve()
	h := s.host("rack1")
	a := h.open(srv)
	a.synced()
	b := h.open(srv)
	b.synced()
	i := s.instance(h.id, vpc.Pending)
	for _, r := range []*reader{a, b} {
		r.until(func(m link.Message) bool { return m.Placement != nil && m.Placement.Instance.ID == i.ID })
	}
	a.cancel()
	a.ends()
	time.Sleep(20 * time.Millisecond)
	if _, _, here := s.scheduler.Here(h.id); !here {
		t.Error("the end of the older stream takes the host away")
	}
}

func TestStreamsEndAtOnceWhenTheServerStops(t *testing.T) {
	s := start(t)
	srv := s.serve()
	h := s.host("rack1")
	reading := h.open(srv)
	reading.synced()
	// One that does not read, with more before it than the network holds.
	for range 60 {
		i := s.instance(h.id, vpc.Running)
		s.change(i.ID, func(i *vpc.Instance) { i.UserData = strings.Repeat("x", 600<<10) })
	}
	stuck := s.stuck(h, srv.Listener.Addr().String())
	defer stuck.Close()
	time.Sleep(200 * time.Millisecond)
	began := time.Now()
	close(s.stopping)
	reading.ends()
	must(t, srv.Config.Shutdown(t.Context()))
	if took := time.Since(began); took > 6*time.Second {
		t.Errorf("it takes %s", took)
	}
}

// stuck opens a stream and does not read it.
func (s *stack) stuck(h *host, address string) net.Conn {
	s.T.Helper()
	c, err := net.Dial("tcp", address)
	must(s.T, err)
	must(s.T, c.(*net.TCPConn).SetReadBuffer(4096))
	_, err = fmt.Fprintf(c, "GET %s?capacity=%s HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\n\r\n", link.PathStream, url.QueryEscape(`{"drivers":[]}`), h.token)
	must(s.T, err)
	return c
}

func TestACapacityThatIsNoneOpensNoStream(t *testing.T) {
	s := start(t)
	h := s.host("rack1")
	for _, c := range []string{
		"", "x", "[]", `{"vcpus":-1}`, `{"memory_mib":-1}`, `{"version":"a\nb"}`, `{"drivers":["\u001b[31m"]}`,
		`{"drivers":["` + strings.Repeat("x", 21) + `"]}`, `{"drivers":["a","a","a","a","a","a","a","a","a"]}`,
	} {
		if r := h.do("GET", link.PathStream+"?capacity="+url.QueryEscape(c), nil); r.Status != http.StatusBadRequest {
			t.Errorf("%q: %d %s", c, r.Status, r.Raw)
		}
	}
}

func TestWhatAHostHoldsIsWhatIsPlacedOnItWhateverChanges(t *testing.T) {
	s := start(t)
	srv := s.serve()
	h, other := s.host("rack1"), s.host("rack2")
	reader := h.open(srv)
	reader.synced()
	r := rand.New(rand.NewPCG(1, 2))
	ids := []string{}
	pick := func() string { return ids[r.IntN(len(ids))] }
	for round := range 15 {
		for range 1 + r.IntN(10) {
			if len(ids) < 3 {
				ids = append(ids, s.instance([]string{h.id, other.id, ""}[r.IntN(3)], vpc.Pending).ID)
				continue
			}
			switch r.IntN(9) {
			case 0:
				ids = append(ids, s.instance(h.id, vpc.Pending).ID)
			case 1:
				s.change(pick(), func(i *vpc.Instance) { i.HostID = []string{h.id, other.id}[r.IntN(2)] })
			case 2:
				s.change(pick(), func(i *vpc.Instance) { i.Status = vpc.Running })
			case 3: // deleted
				n := r.IntN(len(ids))
				i, _ := s.d.Instances.Get(ids[n])
				s.update(func(tx *directory.Tx) { s.d.Instances.Delete(tx, i) })
				ids = append(ids[:n], ids[n+1:]...)
			case 4: // a floating IP comes or goes
				i, _ := s.d.Instances.Get(pick())
				s.update(func(tx *directory.Tx) {
					if f := s.d.FloatingIPsByInstance.Get(i.ID); len(f) > 0 {
						s.d.FloatingIPs.Delete(tx, f[0])
						return
					}
					s.d.FloatingIPs.Put(tx, &vpc.FloatingIP{
						ID: uuid.NewString(), AccountID: i.AccountID, Name: uuid.NewString(), Address: s.floating(),
						InstanceID: i.ID, InterfaceID: i.Interfaces[0].ID,
					})
				})
			case 5:
				s.update(func(tx *directory.Tx) {
					v, _ := s.d.VPCs.Get(s.vpc.ID)
					next := *v
					next.Name = fmt.Sprint("v", round)
					s.d.VPCs.Put(tx, &next)
				})
			case 6:
				s.update(func(tx *directory.Tx) {
					g, _ := s.d.SecurityGroups.Get(s.vpc.SecurityGroup.ID)
					next := *g
					next.Name = fmt.Sprint("g", round)
					s.d.SecurityGroups.Put(tx, &next)
				})
			case 7:
				s.update(func(tx *directory.Tx) {
					x, _ := s.d.Subnets.Get(s.subnet.ID)
					next := *x
					next.Name = fmt.Sprint("s", round)
					s.d.Subnets.Put(tx, &next)
				})
			case 8: // nothing that this host hears of
				s.update(func(tx *directory.Tx) {
					s.d.FloatingIPs.Put(tx, &vpc.FloatingIP{ID: uuid.NewString(), AccountID: s.Owner.AccountID, Name: uuid.NewString(), Address: s.floating()})
				})
			}
		}
		// The last change of a round is one that comes through the stream.
		mark := s.instance(h.id, vpc.Pending)
		ids = append(ids, mark.ID)
		reader.until(func(m link.Message) bool { return m.Placement != nil && m.Placement.Instance.ID == mark.ID })
		s.settle(reader, h)
	}
}

// floating returns an address that nothing has.
func (s *stack) floating() netip.Addr {
	s.addresses++
	return netip.AddrFrom4([4]byte{198, 51, byte(s.addresses >> 8), byte(s.addresses)})
}

// settle waits until the stream has said all there is, and compares.
func (s *stack) settle(r *reader, h *host) {
	s.T.Helper()
	diff := ""
	for end := time.Now().Add(patience); time.Now().Before(end); {
		select {
		case m := <-r.lines:
			if m.Placement != nil {
				r.holds[m.Placement.Instance.ID] = m.Placement
			}
			delete(r.holds, m.Gone)
			continue
		case <-time.After(20 * time.Millisecond):
		}
		if diff = cmp.Diff(encoded(s.T, placement.OnHost(s.d, h.id)), encoded(s.T, r.holds)); diff == "" {
			return
		}
	}
	s.T.Fatalf("the host holds something else (-placed +held):\n%s", diff)
}

func encoded(t testing.TB, m map[string]*vpc.Placement) map[string]string {
	out := map[string]string{}
	for id, p := range m {
		b, err := json.Marshal(p)
		must(t, err)
		out[id] = string(b)
	}
	return out
}

func TestAChangeElsewhereSendsNothing(t *testing.T) {
	s := start(t)
	srv := s.serve()
	h := s.host("rack1")
	s.instance(h.id, vpc.Running)
	r := h.open(srv)
	r.synced()
	for range 5 {
		s.update(func(tx *directory.Tx) {
			s.d.FloatingIPs.Put(tx, &vpc.FloatingIP{ID: uuid.NewString(), AccountID: s.Owner.AccountID, Name: uuid.NewString(), Address: s.floating()})
		})
		time.Sleep(10 * time.Millisecond)
	}
	select {
	case m := <-r.lines:
		if !m.Ping {
			t.Errorf("message %+v", m)
		}
	case <-time.After(100 * time.Millisecond):
	}
}
