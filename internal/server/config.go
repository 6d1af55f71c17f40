// Package server puts the rooms together: it opens the store, makes the first
// account, wires every component to its collaborators in reading order, and
// serves until it is told to stop.
package server

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"

	"tabard.dev/tabard/internal/attest"
	"tabard.dev/tabard/internal/token"
	"tabard.dev/tabard/internal/vpc"
)

// Config is everything that an installation can set. The zero value of a field
// means its default; Complete fills them in.
type Config struct {
	DataDir  string
	Listen   []string // addresses; port 0 takes a free one
	URL      string   // under which clients reach the server
	Issuer   string   // the iss of tokens
	Store    string
	Region   string
	CName    string
	CType    string
	Account  string // name of the first account
	TLSCert  string
	TLSKey   string
	Insecure bool // plain HTTP on addresses that are not loopback

	Alg         string // of new signing keys
	KeyRotation time.Duration
	Master      token.MasterKey

	// ClusterKeysMaxAge bounds how long a key counts that its cluster has
	// withdrawn, see attest.Keys.
	ClusterKeysMaxAge time.Duration

	Driver string // of instances: auto, netns, local or none

	// ActivityRoutes is the file that says where events go; "" is none.
	ActivityRoutes string
	// What is kept of the activity log, see retention.Log, and the sizes of
	// diskwatch.Config: as 20GiB; "" means the default.
	ActivityMaxDays int // 0 keeps all
	ActivityMaxSize string
	DiskAlarm       string
	DiskStop        string
	DiskReserve     string

	Version string // of the program, for those who are sent events

	// Treeless leaves out the Merkle tree of the activity log and its
	// checkpoints, for a benchmark of what they cost. No setting reaches it.
	Treeless bool

	Now func() time.Time
	Log *slog.Logger
}

// Drivers of instances.
const (
	DriverAuto  = "auto"
	DriverNetns = "netns"
	DriverLocal = "local"
	DriverNone  = "none"
)

// keyLead is how long before its use a signing key is published: longer than
// any verifier keeps an old key set.
const keyLead = 24 * time.Hour

// Complete fills in defaults and reports what cannot work.
func (c *Config) Complete() error {
	def := func(field *string, value string) {
		if *field == "" {
			*field = value
		}
	}
	def(&c.DataDir, "tabard-data")
	def(&c.Store, "sqlite")
	def(&c.Region, "us-south")
	def(&c.CName, "bluemix")
	def(&c.CType, "public")
	def(&c.Account, "Tabard")
	def(&c.Alg, "ES256")
	def(&c.Driver, DriverAuto)
	if len(c.Listen) == 0 {
		c.Listen = []string{"127.0.0.1:8470"}
	}
	if c.KeyRotation == 0 {
		c.KeyRotation = 30 * 24 * time.Hour
	}
	if c.ClusterKeysMaxAge == 0 {
		c.ClusterKeysMaxAge = attest.DefaultKeysMaxAge
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
	return c.validate()
}

func (c *Config) validate() error {
	var errs []error
	refuse := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if c.Store != "sqlite" {
		refuse("store %q is not supported; the embedded store is 'sqlite'", c.Store)
	}
	if _, ok := vpc.RegionNamed(c.Region); !ok {
		refuse("region %q is not known; choose one of %s", c.Region, regions())
	}
	if !slices.Contains([]string{DriverAuto, DriverNetns, DriverLocal, DriverNone}, c.Driver) {
		refuse("driver %q is not one of auto, netns, local, none", c.Driver)
	}
	if c.Alg != "ES256" && c.Alg != "RS256" {
		refuse("signing-alg %q is not one of ES256, RS256", c.Alg)
	}
	if c.KeyRotation <= 2*keyLead {
		refuse("key-rotation %s is too short: a key is published %s before it signs; want more than %s", c.KeyRotation, keyLead, 2*keyLead)
	}
	if c.ClusterKeysMaxAge < time.Second || c.ClusterKeysMaxAge > time.Hour {
		refuse("cluster-keys-max-age %s is not between 1s and 1h", c.ClusterKeysMaxAge)
	}
	if c.ActivityMaxDays < 0 {
		refuse("activity-max-days %d is negative; 0 keeps all", c.ActivityMaxDays)
	}
	if _, err := c.sizes(); err != nil {
		errs = append(errs, err)
	}
	if (c.TLSCert == "") != (c.TLSKey == "") {
		refuse("tls-cert and tls-key go together")
	}
	for _, segment := range []struct{ name, value string }{{"cname", c.CName}, {"ctype", c.CType}} {
		if strings.ContainsAny(segment.value, ": \t\n") {
			refuse("%s %q must not contain colons or spaces", segment.name, segment.value)
		}
	}
	for _, u := range []struct{ name, value string }{{"url", c.URL}, {"issuer", c.Issuer}} {
		if u.value == "" {
			continue
		}
		parsed, err := url.Parse(u.value)
		if err != nil || parsed.Host == "" || parsed.Scheme != "http" && parsed.Scheme != "https" || parsed.RawQuery != "" || parsed.Fragment != "" {
			refuse("%s %q is not an http or https URL", u.name, u.value)
		}
	}
	for _, addr := range c.Listen {
		host, _, err := net.SplitHostPort(addr)
		if err != nil {
			refuse("listen address %q: want HOST:PORT", addr)
			continue
		}
		if c.TLSCert == "" && !c.Insecure && !loopback(host) {
			refuse("listen address %q would serve plain HTTP beyond this machine; give --tls-cert and --tls-key, or say --insecure-http", addr)
		}
	}
	return errors.Join(errs...)
}

func loopback(host string) bool {
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.IsLoopback()
}

func regions() string {
	names := make([]string, len(vpc.Regions))
	for i, r := range vpc.Regions {
		names[i] = r.Name
	}
	return strings.Join(names, ", ")
}
