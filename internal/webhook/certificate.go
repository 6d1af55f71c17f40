package webhook

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"slices"
	"sync/atomic"
	"time"

	"tabard.dev/tabard/internal/kube"
)

// keeper keeps the webhook's certificate: it makes it, shares it with the other
// replicas through a Secret, tells the API servers which authority to trust, and
// replaces it in time.
//
// Each certificate has an authority of its own, whose key is thrown away when
// the certificate has been signed. A change-over goes in steps, so that at any
// time every replica serves what every API server trusts:
//
//  1. at two thirds of its life a next certificate is made; its authority joins
//     the bundle, and nobody serves it yet;
//  2. once the bundle has been out for the change-over's time, the next
//     certificate is served;
//  3. after that time once more, the old authority leaves the bundle.
//
// Whichever replica comes first takes a step; the Secret's resourceVersion lets
// one of them win.
type keeper struct {
	kube          *kube.Client
	namespace     string
	secret        string
	configuration string
	names         []string // of the certificate: DNS names and addresses
	life          time.Duration
	now           func() time.Time
	log           *slog.Logger
	metrics       *metrics

	own     *material         // as last seen in the Secret; of the keeping goroutine
	drift   map[string]string // what was told of the configuration, by webhook; of the keeping goroutine
	serving atomic.Pointer[tls.Certificate]
	ready   atomic.Bool // the certificate is served and the bundle was in place
}

// MinCertificateLife is the shortest life that leaves time for a change-over.
const MinCertificateLife = 10 * time.Second

// interval is the time between looks at the Secret and at the configuration.
func (k *keeper) interval() time.Duration {
	return min(max(k.life/120, 250*time.Millisecond), time.Minute)
}

// changeover is the time of each step. It is several intervals, so that every
// replica has taken the step before the next one.
func (k *keeper) changeover() time.Duration {
	return min(k.life/12, 10*time.Minute)
}

// sayAgain is the time between two lines of the log on one failure.
const sayAgain = time.Minute

// run keeps the certificate until the context ends.
func (k *keeper) run(ctx context.Context) {
	failing := false
	said, saidAt := "", time.Time{} // what the log says already, and since when
	for {
		err := k.keep(ctx)
		wait := k.interval()
		switch {
		case ctx.Err() != nil:
			return
		case kube.Code(err) == http.StatusConflict:
			wait = min(wait, time.Second) // another replica was faster
		case err != nil:
			failing = true
			k.metrics.upkeepErrors.Inc()
			if now := k.now(); err.Error() != said || now.Sub(saidAt) >= sayAgain {
				said, saidAt = err.Error(), now
				k.log.Error("keep the webhook's certificate", "error", err)
			}
			wait = min(wait, 5*time.Second)
		case failing:
			failing, said = false, ""
			k.log.Info("the webhook's certificate is kept again")
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
	}
}

// keep does once what is to be done.
func (k *keeper) keep(ctx context.Context) error {
	stored, version, err := k.read(ctx)
	if err != nil {
		return err
	}
	hooks, err := k.hooks(ctx)
	if err != nil {
		return err
	}
	k.watch(hooks)
	now := k.now()
	base := stored
	if base == nil && k.own != nil && k.own.current.good(k.names, now) {
		// Whoever deletes the Secret wants another certificate; until the API
		// servers trust that one, the present one is served.
		base = &material{current: k.own.current, bundle: k.own.bundle, changed: now, replace: true}
	}
	m, err := k.step(base, published(hooks, base), now)
	if err != nil {
		return err
	}
	if m != stored {
		if err := k.write(ctx, m, version); err != nil {
			return err
		}
	}
	// What is served next must be trusted first.
	if err := k.publish(ctx, hooks, m); err != nil {
		return err
	}
	if k.own == nil || !bytes.Equal(k.own.current.certificate.Raw, m.current.certificate.Raw) {
		k.serving.Store(&tls.Certificate{
			Certificate: [][]byte{m.current.certificate.Raw}, PrivateKey: m.current.key, Leaf: m.current.certificate,
		})
		k.metrics.expires.Set(float64(m.current.certificate.NotAfter.Unix()))
		k.log.Info("serving a certificate", "expires", m.current.certificate.NotAfter, "names", k.names)
	}
	k.own = m
	k.ready.Store(true)
	return nil
}

// step returns the material that should be, which is m when nothing is due.
// published is whether every API server can know m's whole bundle.
func (k *keeper) step(m *material, published bool, now time.Time) (*material, error) {
	settled := m != nil && now.Sub(m.changed) >= k.changeover()
	switch {
	case m == nil:
		return k.first(nil, now)
	case !m.current.good(k.names, now) && m.next != nil && m.next.good(k.names, now):
		return &material{current: m.next, bundle: m.bundle, changed: now}, nil
	case !m.current.good(k.names, now):
		// Nothing can be kept alive: better a moment's failures than none after.
		return k.first(m.bundle, now)
	case m.next == nil && (m.replace || now.After(m.current.renewal()) && len(m.bundle) == 1):
		next, authority, err := k.make(now)
		if err != nil {
			return nil, err
		}
		return &material{current: m.current, next: next, bundle: append(m.trusted(now), authority), changed: now}, nil
	case m.next != nil && settled && published:
		return &material{current: m.next, bundle: m.bundle, changed: now}, nil
	case m.next == nil && len(m.bundle) > 1 && settled:
		return &material{current: m.current, bundle: m.trusted(now), changed: now}, nil
	}
	return m, nil
}

// first returns material with a new certificate that is served at once.
func (k *keeper) first(old []*x509.Certificate, now time.Time) (*material, error) {
	current, authority, err := k.make(now)
	if err != nil {
		return nil, err
	}
	bundle := slices.DeleteFunc(slices.Clone(old), func(c *x509.Certificate) bool { return now.After(c.NotAfter) })
	if len(bundle) > maxBundle {
		bundle = bundle[len(bundle)-maxBundle:]
	}
	return &material{current: current, bundle: append(bundle, authority), changed: now}, nil
}

// make makes a certificate and its authority.
func (k *keeper) make(now time.Time) (*pair, *x509.Certificate, error) {
	authorityKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("make the key of the certificate's authority: %w", err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("make the certificate's key: %w", err)
	}
	// Clocks of API servers may be behind.
	from, until := now.Add(-min(time.Hour, k.life/10)), now.Add(k.life)
	authority := &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{CommonName: "tabard-webhook authority"}, NotBefore: from, NotAfter: until,
		IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true, KeyUsage: x509.KeyUsageCertSign,
	}
	raw, err := x509.CreateCertificate(rand.Reader, authority, authority, authorityKey.Public(), authorityKey)
	if err != nil {
		return nil, nil, fmt.Errorf("make the certificate's authority: %w", err)
	}
	if authority, err = x509.ParseCertificate(raw); err != nil {
		return nil, nil, fmt.Errorf("make the certificate's authority: %w", err)
	}
	leaf := &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{CommonName: "tabard-webhook"}, NotBefore: from, NotAfter: until,
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	for _, name := range k.names {
		if ip := net.ParseIP(name); ip != nil {
			leaf.IPAddresses = append(leaf.IPAddresses, ip)
		} else {
			leaf.DNSNames = append(leaf.DNSNames, name)
		}
	}
	if raw, err = x509.CreateCertificate(rand.Reader, leaf, authority, key.Public(), authorityKey); err != nil {
		return nil, nil, fmt.Errorf("make the certificate: %w", err)
	}
	if leaf, err = x509.ParseCertificate(raw); err != nil {
		return nil, nil, fmt.Errorf("make the certificate: %w", err)
	}
	return &pair{leaf, key}, authority, nil
}

func serial() *big.Int {
	b := make([]byte, 16)
	rand.Read(b)
	b[0] &= 0x7f
	return new(big.Int).SetBytes(b)
}

// maxBundle bounds the authorities that are carried along: more than a
// change-over ever needs.
const maxBundle = 8

// pair is a certificate and its key.
type pair struct {
	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
}

// good reports whether a certificate can be served under the names.
func (p *pair) good(names []string, now time.Time) bool {
	if !now.Before(p.certificate.NotAfter) {
		return false
	}
	for _, name := range names {
		if p.certificate.VerifyHostname(name) != nil {
			return false
		}
	}
	return true
}

// renewal is when a next certificate is due.
func (p *pair) renewal() time.Time {
	life := p.certificate.NotAfter.Sub(p.certificate.NotBefore)
	return p.certificate.NotBefore.Add(life / 3 * 2)
}

// material is what the Secret holds.
type material struct {
	current *pair
	next    *pair // nil outside of a change-over's first step
	bundle  []*x509.Certificate
	changed time.Time // of the last step

	replace bool // the Secret was deleted; never stored
}

// trusted returns the authorities of the certificates in the material, without
// those of earlier ones.
func (m *material) trusted(now time.Time) []*x509.Certificate {
	var out []*x509.Certificate
	for _, c := range m.bundle {
		if now.Before(c.NotAfter) && (m.current.certificate.CheckSignatureFrom(c) == nil || m.next != nil && m.next.certificate.CheckSignatureFrom(c) == nil) {
			out = append(out, c)
		}
	}
	return out
}

func (m *material) bundlePEM() []byte {
	var b []byte
	for _, c := range m.bundle {
		b = append(b, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return b
}

// Keys of the Secret and its annotation.
const (
	keyBundle         = "ca.crt"
	keyCertificate    = "tls.crt"
	keyKey            = "tls.key"
	keyNext           = "next.crt"
	keyNextKey        = "next.key"
	annotationChanged = "iam.tabard.dev/changed-at"
)

// object is what the keeper knows of a Secret.
type object struct {
	APIVersion string            `json:"apiVersion"`
	Kind       string            `json:"kind"`
	Metadata   metadata          `json:"metadata"`
	Type       string            `json:"type"`
	Data       map[string][]byte `json:"data"`
}

type metadata struct {
	Name            string            `json:"name"`
	Namespace       string            `json:"namespace,omitempty"`
	ResourceVersion string            `json:"resourceVersion,omitempty"`
	Labels          map[string]string `json:"labels,omitempty"`
	Annotations     map[string]string `json:"annotations,omitempty"`
}

func (k *keeper) secrets() string {
	return "/api/v1/namespaces/" + url.PathEscape(k.namespace) + "/secrets"
}

// read returns the Secret's material and the object itself. The material is nil
// when there is no Secret or nothing usable in it; the object is nil when there
// is no Secret.
func (k *keeper) read(ctx context.Context) (*material, *object, error) {
	var o object
	err := k.kube.Do(ctx, http.MethodGet, k.secrets()+"/"+url.PathEscape(k.secret), nil, &o)
	if kube.Code(err) == http.StatusNotFound {
		return nil, nil, nil
	}
	if err != nil {
		return nil, nil, fmt.Errorf("read the certificate's Secret: %w", err)
	}
	if len(o.Data[keyCertificate]) == 0 {
		return nil, &o, nil
	}
	m, err := parse(&o)
	if err != nil {
		k.log.Warn("what the certificate's Secret holds cannot be used and is made anew", "error", err)
		return nil, &o, nil
	}
	return m, &o, nil
}

// parse reads the material in a Secret.
func parse(o *object) (*material, error) {
	current, err := parsePair(o.Data[keyCertificate], o.Data[keyKey])
	if err != nil {
		return nil, err
	}
	m := &material{current: current}
	for rest := o.Data[keyBundle]; len(m.bundle) < 2*maxBundle; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", keyBundle, err)
		}
		m.bundle = append(m.bundle, c)
	}
	vouched := func(p *pair) bool {
		return slices.ContainsFunc(m.bundle, func(c *x509.Certificate) bool { return p.certificate.CheckSignatureFrom(c) == nil })
	}
	if !vouched(current) {
		return nil, fmt.Errorf("%s is not from an authority in %s", keyCertificate, keyBundle)
	}
	if len(o.Data[keyNext]) > 0 {
		if m.next, err = parsePair(o.Data[keyNext], o.Data[keyNextKey]); err != nil {
			return nil, err
		}
		if !vouched(m.next) {
			return nil, fmt.Errorf("%s is not from an authority in %s", keyNext, keyBundle)
		}
	}
	// Without a readable time the step counts as long past: steps that follow
	// check for themselves that the bundle is out.
	m.changed, _ = time.Parse(time.RFC3339Nano, o.Metadata.Annotations[annotationChanged])
	return m, nil
}

func parsePair(certificate, key []byte) (*pair, error) {
	both, err := tls.X509KeyPair(certificate, key)
	if err != nil {
		return nil, err
	}
	private, ok := both.PrivateKey.(*ecdsa.PrivateKey)
	if !ok {
		return nil, errors.New("the certificate's key is not of ECDSA")
	}
	return &pair{both.Leaf, private}, nil
}

// encode returns the Secret that holds material: the one that was read,
// changed, or a new one.
func (k *keeper) encode(m *material, was *object) (*object, error) {
	o := &object{APIVersion: "v1", Kind: "Secret", Type: "Opaque", Metadata: metadata{Name: k.secret, Namespace: k.namespace}}
	if was != nil {
		o.Type = was.Type
		o.Metadata.ResourceVersion = was.Metadata.ResourceVersion
		o.Metadata.Labels, o.Metadata.Annotations = was.Metadata.Labels, was.Metadata.Annotations
	}
	if o.Metadata.Annotations == nil {
		o.Metadata.Annotations = map[string]string{}
	}
	o.Metadata.Annotations[annotationChanged] = m.changed.UTC().Format(time.RFC3339Nano)
	o.Data = map[string][]byte{keyBundle: m.bundlePEM()}
	for _, p := range []struct {
		pair *pair
		crt  string
		key  string
	}{{m.current, keyCertificate, keyKey}, {m.next, keyNext, keyNextKey}} {
		if p.pair == nil {
			continue
		}
		der, err := x509.MarshalPKCS8PrivateKey(p.pair.key)
		if err != nil {
			return nil, fmt.Errorf("encode the certificate's key: %w", err)
		}
		o.Data[p.crt] = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: p.pair.certificate.Raw})
		o.Data[p.key] = pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	}
	return o, nil
}

// write stores material, unless the Secret has changed since it was read.
func (k *keeper) write(ctx context.Context, m *material, was *object) error {
	o, err := k.encode(m, was)
	if err != nil {
		return err
	}
	if was == nil {
		err = k.kube.Do(ctx, http.MethodPost, k.secrets(), o, nil)
	} else {
		err = k.kube.Do(ctx, http.MethodPut, k.secrets()+"/"+url.PathEscape(k.secret), o, nil)
	}
	switch {
	case err != nil && was == nil && kube.Code(err) == http.StatusForbidden:
		return fmt.Errorf("the Secret %s/%s is not there, and the webhook may not make one; apply its manifests again: %w", k.namespace, k.secret, err)
	case err != nil:
		return fmt.Errorf("store the certificate: %w", err)
	}
	return nil
}

func (k *keeper) configurationPath() string {
	return "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations/" + url.PathEscape(k.configuration)
}

func (k *keeper) hooks(ctx context.Context) ([]hook, error) {
	var c struct {
		Webhooks []hook `json:"webhooks"`
	}
	err := k.kube.Do(ctx, http.MethodGet, k.configurationPath(), nil, &c)
	if kube.Code(err) == http.StatusNotFound {
		k.watch(nil)
		return nil, fmt.Errorf("there is no MutatingWebhookConfiguration %s, so that no pod comes here; apply the webhook's manifests: %w", k.configuration, err)
	}
	if err != nil {
		return nil, fmt.Errorf("read the MutatingWebhookConfiguration: %w", err)
	}
	return c.Webhooks, nil
}

// watch tells of what stands otherwise in the configuration than it should; once,
// as long as that stays the same.
func (k *keeper) watch(hooks []hook) {
	for name, fields := range drift(hooks) {
		value := 0.0
		if fields != "" {
			value = 1
		}
		k.metrics.drift.WithLabelValues(name).Set(value)
		if was := k.drift[name]; fields == was {
			continue
		}
		if k.drift == nil {
			k.drift = map[string]string{}
		}
		k.drift[name] = fields
		if fields == "" {
			k.log.Info("the MutatingWebhookConfiguration is as it should be again", "webhook", name)
		} else {
			k.log.Error("the MutatingWebhookConfiguration was changed, so that pods may get past the webhook; make it again as its manifests have it", "webhook", name, "changed", fields)
		}
	}
}

// published reports whether the configuration has the material's bundle.
func published(hooks []hook, m *material) bool {
	if m == nil {
		return false
	}
	bundle := m.bundlePEM()
	return !slices.ContainsFunc(hooks, func(h hook) bool { return !bytes.Equal(h.ClientConfig.CABundle, bundle) })
}

// publish puts the bundle into the configuration where it is not. The webhooks'
// names are tested in the same patch, as their places may have changed.
func (k *keeper) publish(ctx context.Context, hooks []hook, m *material) error {
	bundle := m.bundlePEM()
	var ops []operation
	for i, h := range hooks {
		if bytes.Equal(h.ClientConfig.CABundle, bundle) {
			continue
		}
		at := fmt.Sprintf("/webhooks/%d/", i)
		ops = append(ops, operation{"test", at + "name", h.Name}, operation{"add", at + "clientConfig/caBundle", bundle})
	}
	if len(ops) == 0 {
		return nil
	}
	if err := k.kube.Patch(ctx, k.configurationPath(), kube.JSONPatch, ops, nil); err != nil {
		return fmt.Errorf("put the authorities into the MutatingWebhookConfiguration: %w", err)
	}
	k.metrics.bundles.Inc()
	k.log.Info("told the API servers which authorities to trust", "configuration", k.configuration, "authorities", len(m.bundle))
	return nil
}

// certificate is for tls.Config.
func (k *keeper) certificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	c := k.serving.Load()
	if c == nil {
		return nil, errors.New("the certificate is not made yet")
	}
	return c, nil
}
