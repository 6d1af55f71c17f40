// Package crn holds the names of things: cloud resource names (CRNs), IAM IDs
// and account ids. It parses and formats values and does nothing else: it does
// not know whether what a name denotes exists.
package crn

import (
	"errors"
	"fmt"
	"strings"
)

// MaxLength bounds a CRN on input, in bytes. Longer text is refused before it
// is split, so that a hostile token cannot make the parser work.
const MaxLength = 1024

// CRN is a parsed cloud resource name:
//
//	crn:version:cname:ctype:service-name:location:scope:service-instance:resource-type:resource
//
// Every segment may be empty except version, cname, ctype and service-name.
// The resource segment is the rest of the text and may contain colons.
type CRN struct {
	Version      string
	CName        string
	CType        string
	Service      string
	Location     string
	Scope        string
	Instance     string
	ResourceType string
	Resource     string
}

// ErrInvalid is wrapped by every error of [Parse].
var ErrInvalid = errors.New("not a CRN")

// Parse splits a CRN into its segments. It accepts any cname and ctype, because
// clients choose them from the issuer's URL (the Terraform provider writes
// "staging" for an issuer that is not IBM's).
func Parse(s string) (CRN, error) {
	if len(s) > MaxLength {
		return CRN{}, fmt.Errorf("%w: longer than %d bytes", ErrInvalid, MaxLength)
	}
	for i := 0; i < len(s); i++ {
		if s[i] <= ' ' || s[i] == 0x7f {
			return CRN{}, fmt.Errorf("%w: control character or space at byte %d", ErrInvalid, i)
		}
	}
	seg := strings.SplitN(s, ":", 10)
	if len(seg) != 10 || seg[0] != "crn" {
		return CRN{}, fmt.Errorf("%w: want crn:v1:cname:ctype:service:location:scope:instance:type:resource", ErrInvalid)
	}
	c := CRN{
		Version: seg[1], CName: seg[2], CType: seg[3], Service: seg[4], Location: seg[5],
		Scope: seg[6], Instance: seg[7], ResourceType: seg[8], Resource: seg[9],
	}
	if c.Version != "v1" {
		return CRN{}, fmt.Errorf("%w: version %q, want v1", ErrInvalid, c.Version)
	}
	if c.CName == "" || c.CType == "" || c.Service == "" {
		return CRN{}, fmt.Errorf("%w: cname, ctype and service-name must not be empty", ErrInvalid)
	}
	return c, nil
}

// String formats the CRN. Parse(c.String()) gives c back.
func (c CRN) String() string {
	return strings.Join([]string{
		"crn", c.Version, c.CName, c.CType, c.Service, c.Location,
		c.Scope, c.Instance, c.ResourceType, c.Resource,
	}, ":")
}

// AccountID returns the account in the scope segment, or "" when the scope is
// not an account.
func (c CRN) AccountID() string {
	id, ok := strings.CutPrefix(c.Scope, "a/")
	if !ok {
		return ""
	}
	return id
}

// Same reports whether two CRNs denote the same resource. The cname and ctype
// name the cloud that a client believes it talks to, not the resource, so they
// are left out of the comparison.
func (c CRN) Same(d CRN) bool {
	c.CName, c.CType = d.CName, d.CType
	return c == d
}

// Names builds the CRNs of one installation.
type Names struct {
	CName string // normally "bluemix", because clients have role CRNs of that form built in
	CType string // normally "public"
}

// DefaultNames is the form that published clients expect.
var DefaultNames = Names{CName: "bluemix", CType: "public"}

// Of returns a CRN of a resource in an account. An empty account gives an
// empty scope, as the stock images and the system roles have.
func (n Names) Of(service, location, accountID, instance, resourceType, resource string) CRN {
	c := CRN{
		Version: "v1", CName: n.CName, CType: n.CType, Service: service, Location: location,
		Instance: instance, ResourceType: resourceType, Resource: resource,
	}
	if accountID != "" {
		c.Scope = "a/" + accountID
	}
	return c
}
