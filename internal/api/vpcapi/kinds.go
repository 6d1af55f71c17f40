package vpcapi

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"maps"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/object"
	"tabard.dev/tabard/internal/vpc"
)

// noun is a kind of resource, by the word that stands in its CRN, its service
// name, its actions and its events.
type noun struct {
	word   string // floating-ip
	plural string // floating_ips, in paths and lists
	idAttr string // floatingIpId, in policies (section 3.4)
}

var (
	nounVPC           = noun{"vpc", "vpcs", "vpcId"}
	nounSubnet        = noun{"subnet", "subnets", "subnetId"}
	nounKey           = noun{"key", "keys", "keyId"}
	nounImage         = noun{"image", "images", "imageId"}
	nounInstance      = noun{"instance", "instances", "instanceId"}
	nounFloatingIP    = noun{"floating-ip", "floating_ips", "floatingIpId"}
	nounSecurityGroup = noun{"security-group", "security_groups", "securityGroupId"}
	nounVolume        = noun{"volume", "volumes", "volumeId"}
	nounVirtual       = noun{"virtual-network-interface", "virtual_network_interfaces", "virtualNetworkInterfaceId"}
)

// service is the child service that policies may name; a policy about its
// parent "is" covers it (reference/access-and-audit.md section 2.9).
func (n noun) service() string { return "is." + n.word }

func (n noun) action(verb string) string { return "is." + n.word + "." + n.word + "." + verb }

func (n noun) typeURI() string { return n.service() + "/" + n.word }

// newResource stands for the id of what is about to be created
// (reference/access-and-audit.md section 2.7).
const newResource = "NEWRESOURCE"

// attributes are what access to a resource is decided on. An empty id means
// one that is about to be created.
func (s *service) attributes(c *api.Call, n noun, id, groupID string) map[string]string {
	attr := id
	if id == "" {
		attr = newResource
	}
	return c.InAccount(n.service(),
		access.Region, s.region.Name, access.ResourceType, n.word, access.Resource, id,
		access.ResourceGroupID, groupID, n.idAttr, attr)
}

// crn names a resource. location is a zone or the region (section 3.2).
func (s *service) crn(n noun, location, accountID, id string) string {
	return s.Names.Of("is", location, accountID, "", n.word, id).String()
}

func (s *service) href(segments ...string) string {
	return s.URL + "/v1/" + strings.Join(segments, "/")
}

// kind is a noun whose resources the directory holds.
type kind[T any] struct {
	noun
	title     string // for messages
	taken     string // error code for a name that is not free
	table     *directory.Table[T]
	ofAccount *directory.Index[T]
	head      func(*T) head
}

// head is what all stored resources have.
type head struct {
	meta      *object.Meta
	id        string
	accountID string
	name      string
	groupID   string
	location  string // of the CRN
}

func (s *service) kinds() {
	const unique = "validation_unique_failed"
	d, region := s.d, s.region.Name
	s.vpcs = kind[vpc.VPC]{nounVPC, "VPC", unique, d.VPCs, d.VPCsByAccount,
		func(v *vpc.VPC) head { return head{&v.Meta, v.ID, v.AccountID, v.Name, v.ResourceGroupID, region} }}
	s.subnets = kind[vpc.Subnet]{nounSubnet, "subnet", unique, d.Subnets, d.SubnetsByAccount,
		func(n *vpc.Subnet) head { return head{&n.Meta, n.ID, n.AccountID, n.Name, n.ResourceGroupID, n.Zone} }}
	s.groups = kind[vpc.SecurityGroup]{nounSecurityGroup, "security group", unique, d.SecurityGroups, d.SecurityGroupsByAccount,
		func(g *vpc.SecurityGroup) head {
			return head{&g.Meta, g.ID, g.AccountID, g.Name, g.ResourceGroupID, region}
		}}
	s.images = kind[vpc.Image]{nounImage, "image", unique, d.Images, d.ImagesByAccount,
		func(i *vpc.Image) head { return head{&i.Meta, i.ID, i.AccountID, i.Name, i.ResourceGroupID, region} }}
	s.sshKeys = kind[vpc.Key]{nounKey, "key", "key_name_exists", d.Keys, d.KeysByAccount,
		func(k *vpc.Key) head { return head{&k.Meta, k.ID, k.AccountID, k.Name, k.ResourceGroupID, region} }}
	s.instances = kind[vpc.Instance]{nounInstance, "instance", "instance_name_exists", d.Instances, d.InstancesByAccount,
		func(i *vpc.Instance) head { return head{&i.Meta, i.ID, i.AccountID, i.Name, i.ResourceGroupID, i.Zone} }}
	s.floatingIPs = kind[vpc.FloatingIP]{nounFloatingIP, "floating IP", unique, d.FloatingIPs, d.FloatingIPsByAccount,
		func(f *vpc.FloatingIP) head {
			return head{&f.Meta, f.ID, f.AccountID, f.Name, f.ResourceGroupID, f.Zone}
		}}
}

// find returns a resource of the caller's account. field names where the id
// stood in the body; it is empty when it stood in the path.
func (k *kind[T]) find(c *api.Call, id, field string) (*T, error) {
	obj, ok := k.table.Get(id)
	if ok && k.head(obj).accountID == c.Account() {
		return obj, nil
	}
	f := api.NotFound(k.title, id)
	if field != "" {
		return nil, f.On(field)
	}
	return nil, f.OnParameter("id", id)
}

// target says what a request about a resource is about.
func target[T any](s *service, c *api.Call, k *kind[T], obj *T) api.Target {
	h := k.head(obj)
	return api.Target{
		Resource: s.attributes(c, k.noun, h.id, h.groupID),
		CRN:      s.crn(k.noun, h.location, h.accountID, h.id),
		Name:     h.name, TypeURI: k.typeURI(),
	}
}

// fromPath loads the resource whose id stands in the path.
func fromPath[T any](s *service, k *kind[T]) func(*api.Call) (*T, api.Target, error) {
	return func(c *api.Call) (*T, api.Target, error) {
		obj, err := k.find(c, c.R.PathValue("id"), "")
		if err != nil {
			return nil, api.Target{TypeURI: k.typeURI()}, err
		}
		return obj, target(s, c, k, obj), nil
	}
}

// forChange is fromPath for a route with a body.
func forChange[B, T any](s *service, k *kind[T]) func(*api.Call, *B) (*T, api.Target, error) {
	load := fromPath(s, k)
	return func(c *api.Call, _ *B) (*T, api.Target, error) { return load(c) }
}

// forCreate says what a request to create is about: only the account, the
// region and the resource group are known yet. It returns the group's id.
func forCreate[B any](s *service, n noun, in func(*B) (*identityRef, *string)) func(*api.Call, *B) (string, api.Target, error) {
	return func(c *api.Call, b *B) (string, api.Target, error) {
		given, name := in(b)
		groupID := s.groupID(c, given)
		t := api.Target{Resource: s.attributes(c, n, "", groupID), TypeURI: n.typeURI()}
		if name != nil {
			t.Name = *name
		}
		return groupID, t, nil
	}
}

// groupID returns the resource group that a body names, or the account's
// default one. Whether it exists is checked by checkGroup, once the caller is
// known to have the right.
func (s *service) groupID(c *api.Call, given *identityRef) string {
	if given != nil {
		return given.ID
	}
	for _, g := range s.d.ResourceGroupsByAccount.Get(c.Account()) {
		if g.Default {
			return g.ID
		}
	}
	return ""
}

func (s *service) checkGroup(c *api.Call, id string) error {
	const field = "resource_group.id"
	if id == "" {
		return missing(field)
	}
	if g, ok := s.d.ResourceGroups.Get(id); !ok || g.AccountID != c.Account() {
		return api.NotFound("resource group", id).On(field)
	}
	return nil
}

// newName checks the name for a new resource, or invents one. The directory
// holds names unique in the account; looking here first gives the caller the
// API's own code.
func (k *kind[T]) newName(c *api.Call, given *string) (string, error) {
	if given == nil {
		return randomName(k.word), nil
	}
	return *given, k.checkName(c, *given, "")
}

// checkName checks that a resource may take a name; except is its own id.
func (k *kind[T]) checkName(c *api.Call, name, except string) error {
	if err := validName("name", name); err != nil {
		return err
	}
	for _, obj := range k.ofAccount.Get(c.Account()) {
		if h := k.head(obj); h.name == name && h.id != except {
			return fault.New(fault.Conflict, k.taken, "A %s with the name %q already exists.", k.title, name).On("name")
		}
	}
	return nil
}

func validName(field, name string) error {
	if !vpc.ValidName(name) {
		return fault.New(fault.Invalid, "validation_invalid_name",
			"The property %s must have 1 to 63 lower-case letters, digits and hyphens, start with a letter and not end with a hyphen.", field).On(field)
	}
	return nil
}

// randomName invents a name for what was given none.
func randomName(prefix string) string {
	b := make([]byte, 6)
	rand.Read(b) // never fails, see crypto/rand
	return prefix + "-" + hex.EncodeToString(b)
}

// regionalID and zonalID are the ids of section 3.2. Only instances have an
// underscore.
func (s *service) regionalID() string { return s.region.Prefix + "-" + uuid.NewString() }

func zonalID(z vpc.Zone) string { return z.Prefix + "-" + uuid.NewString() }

func instanceID(z vpc.Zone) string { return z.Prefix + "_" + uuid.NewString() }

// identityRef refers to an existing resource in a body. Zones and profiles are
// referred to by name, keys by fingerprint too.
type identityRef struct {
	ID          string `json:"id"`
	CRN         string `json:"crn"`
	Href        string `json:"href"`
	Name        string `json:"name"`
	Fingerprint string `json:"fingerprint"`
}

// idOf returns the id that a reference in a body gives by id, CRN or href.
// The CRN and the href must be of the right kind; that the resource is the
// caller's is checked by whoever looks it up.
func (s *service) idOf(r *identityRef, n noun, field string) (string, error) {
	switch {
	case r == nil:
		return "", missing(field)
	case r.ID != "":
		return r.ID, nil
	case r.CRN != "":
		name, err := crn.Parse(r.CRN)
		if err != nil || name.Service != "is" || name.ResourceType != n.word || name.Resource == "" {
			return "", badField(field+".crn", "The property %s.crn must be the CRN of a resource of type %s.", field, n.word)
		}
		return name.Resource, nil
	case r.Href != "":
		if id, ok := lastSegment(r.Href, n.plural); ok {
			return id, nil
		}
		return "", badField(field+".href", "The property %s.href must end in /%s/ID.", field, n.plural)
	}
	return "", missing(field + ".id")
}

// nameOf returns the name that a reference to a zone or a hardware profile
// gives by name or href.
func nameOf(r *identityRef, collection, field string) (string, error) {
	if r != nil && r.Name != "" {
		return r.Name, nil
	}
	if r != nil && r.Href != "" {
		if name, ok := lastSegment(r.Href, collection); ok {
			return name, nil
		}
		return "", badField(field+".href", "The property %s.href must end in /%s/NAME.", field, collection)
	}
	return "", missing(field + ".name")
}

func lastSegment(href, collection string) (string, bool) {
	parts := strings.Split(href, "/")
	n := len(parts)
	if n < 2 || parts[n-2] != collection || parts[n-1] == "" {
		return "", false
	}
	return parts[n-1], true
}

// properties are the names that a body has at its top, with their values.
type properties map[string]json.RawMessage

// refuse rejects what this server does not do, so that nobody believes it was
// done. Empty values and those that say what is the case anyway are let pass.
func (p properties) refuse(unsupported map[string]string) error {
	for _, name := range slices.Sorted(maps.Keys(unsupported)) {
		var compact bytes.Buffer
		if raw := p[name]; len(raw) > 0 {
			if err := json.Compact(&compact, raw); err != nil {
				return badField(name, "The property %s is not valid JSON.", name)
			}
		}
		switch compact.String() {
		case "", "null", "[]", "{}", unsupported[name]:
		default:
			return badField(name, "The property %s is not supported by this server.", name)
		}
	}
	return nil
}

// row is a resource in a list.
type row struct {
	resource map[string]string // what access is decided on
	created  time.Time
	id       string
	filters  map[string]string // query parameters and the value that lets the row through
	body     func() any
}

// List limits (section 3.3).
const (
	defaultLimit = 50
	maxLimit     = 100
)

// list registers the route of a collection. filters are the query parameters
// that narrow it; a row without a value for one that is given is left out.
func (s *service) list(n noun, filters []string, rows func(*api.Call) []row) {
	pattern := "GET /v1/" + n.plural
	api.List(s.Family, pattern, n.action("list"), func(c *api.Call, may func(map[string]string) bool) (api.Reply, error) {
		return s.page(c, n.plural, filters, rows(c), may)
	})
}

// page answers one page of a collection of its own.
func (s *service) page(c *api.Call, plural string, filters []string, rows []row, may func(map[string]string) bool) (api.Reply, error) {
	return s.pageAt(c, s.href(plural), plural, filters, rows, may)
}

// pageAt answers one page of a collection that is at an address. start carries
// the filters of the first request, so that a page is never of another list
// than the one before.
func (s *service) pageAt(c *api.Call, href, plural string, filters []string, rows []row, may func(map[string]string) bool) (api.Reply, error) {
	cursor, err := s.cursor(c, filters)
	if err != nil {
		return api.Reply{}, err
	}
	rows = slices.DeleteFunc(rows, func(r row) bool { return !r.passes(cursor.Query) || !may(r.resource) })
	total := len(rows)
	shown, next := api.Page(rows, cursor, cursor.Limit, func(r row) string { return api.SortKey(r.created, r.id) })

	items := make([]any, len(shown))
	for i, r := range shown {
		items[i] = r.body()
	}
	first := url.Values{"limit": {itoa(cursor.Limit)}}
	for name, values := range cursor.Query {
		first[name] = values
	}
	body := map[string]any{
		"first": pageLink{href + "?" + first.Encode()},
		"limit": cursor.Limit, "total_count": total, plural: items,
	}
	if next != nil {
		q := url.Values{"limit": {itoa(cursor.Limit)}, "start": {next.String()}}
		body["next"] = pageLink{href + "?" + q.Encode()}
	}
	return api.Reply{Body: body}, nil
}

// cursor returns where in the list the request is, with its limit and filters.
func (s *service) cursor(c *api.Call, filters []string) (api.Cursor, error) {
	q := c.R.URL.Query()
	cursor := api.Cursor{Query: url.Values{}}
	if start := q.Get("start"); start != "" {
		var err error
		if cursor, err = api.ParseCursor("start", start); err != nil {
			return api.Cursor{}, err
		}
	} else {
		for _, name := range filters {
			if v := q.Get(name); v != "" {
				cursor.Query.Set(name, v)
			}
		}
	}
	fallback := defaultLimit
	if cursor.Limit >= 1 && cursor.Limit <= maxLimit {
		fallback = cursor.Limit
	}
	limit, err := c.IntParameter("limit", fallback, 1, maxLimit)
	cursor.Limit = limit
	return cursor, err
}

// passes reports whether a row meets all filters. A filter may give several
// values with commas between them.
func (r row) passes(filters url.Values) bool {
	for name := range filters {
		value, ok := r.filters[name]
		if !ok || !slices.Contains(strings.Split(filters.Get(name), ","), value) {
			return false
		}
	}
	return true
}

// rowsOf lists the stored resources of the caller's account.
func rowsOf[T any](s *service, k *kind[T], filters func(*T) map[string]string, show func(*T) any) func(*api.Call) []row {
	return func(c *api.Call) []row {
		objects := k.ofAccount.Get(c.Account())
		rows := make([]row, len(objects))
		for i, obj := range objects {
			h := k.head(obj)
			m := map[string]string{"resource_group.id": h.groupID, "name": h.name}
			if filters != nil {
				for name, value := range filters(obj) {
					m[name] = value
				}
			}
			rows[i] = row{s.attributes(c, k.noun, h.id, h.groupID), h.meta.CreatedAt, h.id, m, func() any { return show(obj) }}
		}
		return rows
	}
}

// vpcFilters are the parameters by which VPCs are picked in other lists.
func (s *service) vpcFilters(m map[string]string, v *vpc.VPC) map[string]string {
	m["vpc.id"], m["vpc.name"], m["vpc.crn"] = v.ID, v.Name, s.crn(nounVPC, s.region.Name, v.AccountID, v.ID)
	return m
}
