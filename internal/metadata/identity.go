package metadata

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/attest"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/grant"
	"tabard.dev/tabard/internal/host/authority"
)

// tokenAnswer is the answer of both token calls; clients dereference all four
// fields.
type tokenAnswer struct {
	AccessToken string `json:"access_token"`
	CreatedAt   string `json:"created_at"`
	ExpiresAt   string `json:"expires_at"`
	ExpiresIn   int64  `json:"expires_in"`
	Nonce       string `json:"nonce,omitempty"`
}

// Bounds on an identity token (reference section 1.4).
const (
	minLife     = 5
	maxLife     = 3600
	defaultLife = 300
	maxNonce    = 512 // bytes; our choice
)

// identityToken answers PUT …/token.
func (s *Service) identityToken(r *request) (any, error) {
	if err := flavor(r); err != nil {
		return nil, err
	}
	life, nonce, err := identityBody(r)
	if err != nil {
		r.fail(checkBody, "a JSON object with expires_in from 5 to 3600 and nonce", fault.Of(err).Message, "")
		return nil, err
	}
	r.pass(checkBody, "a JSON object with expires_in from 5 to 3600 and nonce", fmt.Sprintf("expires_in %d", life))

	now := s.cfg.Now().UTC().Truncate(time.Second)
	claims := s.claims(r, now, life)
	claims.Nonce = nonce
	raw, err := s.cfg.Signer.Sign(wireClaims{claims, claims.Audience}, "")
	if err != nil {
		return nil, fmt.Errorf("sign the identity token: %w", err)
	}
	r.event.ResponseData = json.RawMessage(fmt.Sprintf(`{"jti":%q,"expires_in":%d}`, claims.JTI, life))
	return &tokenAnswer{
		AccessToken: raw, CreatedAt: stamp(now), ExpiresAt: stamp(now.Add(time.Duration(life) * time.Second)),
		ExpiresIn: life, Nonce: nonce,
	}, nil
}

// flavor demands the header that no browser sends to a page's order without
// asking first, and no form can send at all.
func flavor(r *request) error {
	const header, wanted, hint = "Metadata-Flavor", "ibm", "send the header Metadata-Flavor: ibm"
	switch given := strings.Join(r.Header.Values(header), ","); given {
	case wanted:
		r.pass(checkFlavor, wanted, given)
		return nil
	case "":
		r.fail(checkFlavor, wanted, "(absent)", hint)
		return fault.New(fault.Invalid, "missing_value", "The header Metadata-Flavor: ibm is required.").OnHeader(header)
	default:
		r.fail(checkFlavor, wanted, given, hint)
		return fault.New(fault.Invalid, "invalid_value", "The header Metadata-Flavor must be ibm.").OnHeader(header)
	}
}

func identityBody(r *request) (life int64, nonce string, err error) {
	life = defaultLife
	f, err := body(r)
	if err != nil {
		return 0, "", err
	}
	if err := cmp.Or(f.take("expires_in", &life), f.take("nonce", &nonce), f.end()); err != nil {
		return 0, "", err
	}
	if err := between("expires_in", life, minLife, maxLife); err != nil {
		return 0, "", err
	}
	if len(nonce) > maxNonce {
		return 0, "", fault.New(fault.Invalid, "invalid_value", "The property nonce must have at most %d bytes.", maxNonce).On("nonce")
	}
	return life, nonce, nil
}

// wireClaims writes aud as an array even when it has one element, as section
// 1.5 shows it.
type wireClaims struct {
	attest.IdentityClaims
	Audience []string `json:"aud"`
}

// claims describes the instance as it is now; only the signature makes them
// evidence.
func (s *Service) claims(r *request, now time.Time, life int64) attest.IdentityClaims {
	v := s.view(r)
	i := r.instance
	issuer := attest.IdentityIssuer(s.cfg.Region)
	id := uuid.NewString()
	c := attest.IdentityClaims{
		Issuer: issuer,
		// The second audience is opaque in section 1.5: a UUID and a number.
		Audience: []string{issuer, id + "_" + strconv.FormatInt(s.cfg.Now().UnixNano(), 10)},
		IssuedAt: now.Unix(), Expires: now.Unix() + life, JTI: id,
		IaaS: attest.IaaS{
			CRN: i.CRN, AccountID: i.AccountID, InstanceID: i.ID, Zone: i.Zone, Region: s.cfg.Region,
			Profile: i.Profile, ResourceGroup: i.ResourceGroupID,
		},
		Addresses: []attest.Address{}, Subnets: []attest.Named{}, VPC: v.vpcRef(),
	}
	for _, f := range r.placement.FloatingIPs {
		c.Addresses = append(c.Addresses, attest.Address{Address: f.Address.String()})
	}
	for _, nic := range i.Interfaces {
		c.Addresses = append(c.Addresses, attest.Address{Address: nic.Address.String()})
		if ref := v.subnetRef(nic.SubnetID); !slices.Contains(c.Subnets, ref) {
			c.Subnets = append(c.Subnets, ref)
		}
	}
	return c
}

// iamTimeout bounds one exchange; the connection's own bound is above it.
const iamTimeout = 20 * time.Second

// iamToken answers POST …/iam_token(s).
func (s *Service) iamToken(r *request) (any, error) {
	raw, err := bearer(r)
	if err != nil {
		return nil, err
	}
	profile, err := selector(r)
	if err != nil {
		r.fail(checkProfile, "one profile, or a default one", fault.Of(err).Message, "name one trusted profile in the body, or give the instance a default one when it is made")
		return nil, err
	}
	if wait := s.limits.left(r.instance.ID, refusedBudget, s.cfg.Now()); wait > 0 {
		return nil, refusedTooOften(wait)
	}
	// IAM fills in the event that goes with the request; it stays as it is here
	// for the case that IAM cannot.
	with := *r.event
	with.Trace = slices.Clone(with.Trace)
	ctx, cancel := context.WithTimeout(r.Context(), iamTimeout)
	defer cancel()
	host := api.PeerHost(r.Request)
	answer, err := s.cfg.IAM.Instance(ctx, grant.Origin{
		TransactionID: api.TransactionID(ctx), Address: host.Address, Agent: host.Agent, ClientID: "default",
	}, grant.InstanceRequest{Token: raw, Instance: r.instance.ID, Profile: profile, With: &with})
	if err != nil {
		f := translate(fault.Of(err), profile)
		if f.Kind != fault.Unavailable {
			r.recorded = true
			return nil, f
		}
		r.pass(checkProfile, "one profile, or a default one", profile.String())
		r.fail(checkServer, "an answer of the IAM server", f.Error(), "see that the server runs and that the host reaches it")
		r.event.ID = uuid.NewString() // the server may have recorded the other one
		return nil, f
	}
	r.recorded = true
	created := time.Unix(answer.Claims.IssuedAt, 0).UTC()
	expires := time.Unix(answer.Claims.Expires, 0).UTC()
	return &tokenAnswer{
		AccessToken: answer.AccessToken, CreatedAt: stamp(created), ExpiresAt: stamp(expires),
		ExpiresIn: answer.Claims.Expires - answer.Claims.IssuedAt,
	}, nil
}

// selector reads which profile is wanted: the one in the body, else the
// instance's default one (reference section 1.6).
func selector(r *request) (grant.Selector, error) {
	f, err := body(r)
	if err != nil {
		return grant.Selector{}, err
	}
	profile, err := f.object("trusted_profile")
	if err := cmp.Or(err, f.end()); err != nil {
		return grant.Selector{}, err
	}
	if profile == nil {
		if d := r.instance.DefaultProfile; d != nil {
			return grant.Selector{ID: d.ID}, nil
		}
		return grant.Selector{}, fault.New(fault.Invalid, "missing_field",
			"The body names no trusted profile and the instance has no default one.").On("trusted_profile.id")
	}
	var s grant.Selector
	if err := cmp.Or(profile.take("id", &s.ID), profile.take("crn", &s.CRN), profile.take("name", &s.Name), profile.end()); err != nil {
		return grant.Selector{}, err
	}
	switch len(slices.DeleteFunc([]string{s.ID, s.CRN, s.Name}, func(v string) bool { return v == "" })) {
	case 1:
		return s, nil
	case 0:
		return s, fault.New(fault.Invalid, "missing_field", "The property trusted_profile needs one of id, crn and name.").On("trusted_profile.id")
	}
	return s, fault.New(fault.Invalid, "invalid_value", "Give only one of the profile's id, crn and name.").On("trusted_profile")
}

// translate turns IAM's refusal into this service's error.
func translate(f *fault.Error, wanted grant.Selector) *fault.Error {
	field := "trusted_profile.id"
	if wanted.Name != "" {
		field = "trusted_profile.name"
	} else if wanted.CRN != "" {
		field = "trusted_profile.crn"
	}
	switch {
	case f.Code == CodeServerAway, errors.Is(f, context.DeadlineExceeded):
		e := fault.New(fault.Unavailable, CodeServerAway,
			"An IAM token needs the IAM server, which does not answer now. Identity tokens and metadata still work. Try again.").Because(f)
		e.RetryAfter = cmp.Or(f.RetryAfter, 5*time.Second)
		return e
	case f.Code == grant.CodeNotEligible:
		return fault.New(fault.Invalid, "profile_not_linked", "No link or rule of the trusted profile covers this instance.").
			On(field).Because(f)
	case f.Code == grant.CodeNotFound:
		return fault.New(fault.Invalid, "not_found", "The trusted profile with %s was not found.", wanted).On(field).Because(f)
	case f.Kind == fault.Unauthenticated:
		return fault.New(fault.Unauthenticated, "unauthenticated", "The identity token is expired, malformed or not valid for this instance.").Because(f)
	}
	return f
}

// bearer returns the identity token of a request.
func bearer(r *request) (string, error) {
	const header, wanted, hint = "Authorization", "Authorization: Bearer TOKEN", "send the identity token"
	refuse := func(found string) (string, error) {
		r.fail(checkBearer, wanted, found, hint)
		return "", fault.New(fault.Unauthenticated, "unauthenticated", "Send the identity token as Authorization: Bearer TOKEN.").OnHeader(header)
	}
	given := r.Header.Values(header)
	switch len(given) {
	case 0:
		return refuse("(absent)")
	case 1:
	default:
		return refuse(fmt.Sprintf("%d such headers", len(given)))
	}
	scheme, raw, ok := strings.Cut(strings.TrimSpace(given[0]), " ")
	if raw = strings.TrimSpace(raw); !ok || !strings.EqualFold(scheme, "Bearer") || raw == "" {
		return refuse("another form")
	}
	r.pass(checkBearer, wanted, "a token")
	return raw, nil
}

// own lets a request on only with this instance's own identity token.
func (s *Service) own(r *request) error {
	refused := func(because error) error {
		return fault.New(fault.Unauthenticated, "unauthenticated", "The identity token is expired, malformed or not valid for this instance.").Because(because)
	}
	raw, err := bearer(r)
	if err != nil {
		return err
	}
	proof, claims, err := s.cfg.Tokens.Verify(raw)
	if err != nil {
		var refusal *attest.Refusal
		if errors.As(err, &refusal) {
			r.event.Trace = append(r.event.Trace, refusal.Trace...)
		} else {
			r.fail(attest.CheckForm, "an identity token that can be checked", "", "")
		}
		return refused(err)
	}
	r.event.Trace = append(r.event.Trace, proof.Trace...)
	if claims.IaaS.InstanceID != r.instance.ID {
		r.fail(checkCaller, "identity token of instance "+r.instance.ID, claims.IaaS.InstanceID, "the token belongs to another instance")
		return refused(errors.New("the token belongs to another instance"))
	}
	r.pass(checkCaller, "identity token of instance "+r.instance.ID, claims.IaaS.InstanceID)
	return nil
}

// Bounds on an identity certificate, in seconds (reference section 1.7).
const (
	minCertificateLife = 300
	maxCertificateLife = int64(authority.MaxIdentityLife / time.Second)
)

// certificateAnswer is the answer of POST …/certificates.
type certificateAnswer struct {
	Certificates []string `json:"certificates"` // PEM: leaf, intermediate
	CreatedAt    string   `json:"created_at"`
	ExpiresAt    string   `json:"expires_at"`
	ExpiresIn    int64    `json:"expires_in"`
	ID           string   `json:"id"`
}

// certificate answers POST …/certificates.
func (s *Service) certificate(r *request) (any, error) {
	if err := s.own(r); err != nil {
		return nil, err
	}
	const wanted = "a JSON object with csr and expires_in from 300 to 3600"
	text, life, err := certificateBody(r)
	if err != nil {
		r.fail(checkBody, wanted, fault.Of(err).Message, "")
		return nil, err
	}
	r.pass(checkBody, wanted, fmt.Sprintf("expires_in %d", life))
	parsed, err := authority.ParseRequest(text)
	if err != nil {
		r.fail(checkRequest, "a certificate request with C, ST, L, O and OU only", err.Error(), "make another certificate request")
		return nil, fault.New(fault.Invalid, "invalid_value", "The certificate request cannot be taken: %s.", err).On("csr")
	}
	r.pass(checkRequest, "a certificate request with C, ST, L, O and OU only", "taken")
	c, err := s.cfg.Certificates.Certify(parsed, authority.Instance{ID: r.instance.ID, CRN: r.instance.CRN}, time.Duration(life)*time.Second)
	if err != nil {
		return nil, fmt.Errorf("certify the instance's key: %w", err)
	}
	r.event.ResponseData = json.RawMessage(fmt.Sprintf(`{"id":%q,"expires_in":%d}`, c.ID, life))
	return &certificateAnswer{
		Certificates: c.Chain, CreatedAt: stamp(c.Created), ExpiresAt: stamp(c.Expires), ExpiresIn: life, ID: c.ID,
	}, nil
}

func certificateBody(r *request) (text string, life int64, err error) {
	life = maxCertificateLife
	f, err := body(r)
	if err != nil {
		return "", 0, err
	}
	if err := cmp.Or(f.take("csr", &text), f.take("expires_in", &life), f.end()); err != nil {
		return "", 0, err
	}
	if err := between("expires_in", life, minCertificateLife, maxCertificateLife); err != nil {
		return "", 0, err
	}
	if text == "" {
		return "", 0, fault.New(fault.Invalid, "missing_field", "The property csr is required: a certificate request in PEM.").On("csr")
	}
	return text, life, nil
}
