package grant

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/attest"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/identity"
	"tabard.dev/tabard/internal/token"
	"tabard.dev/tabard/internal/trust"
)

// TypeJWTBearer is the grant of a federated user: the ID token of an identity
// provider for an access token (RFC 7523 section 2.1).
const TypeJWTBearer = "urn:ietf:params:oauth:grant-type:jwt-bearer"

// CheckUser asks whether the person is a user of the account.
const CheckUser = "account-user"

// FederatedRequest is the jwt-bearer grant. Account is needed when several
// accounts have registered the issuer; a profile, when one is named, is put on
// in the place of the user.
type FederatedRequest struct {
	Assertion string
	Account   string
	Profile   Selector
	Scope     string
}

// Federated exchanges an ID token for an access token. Without a profile the
// person must be a user of the account: known from an earlier login, or
// invited under an e-mail address that the provider has verified. The
// account's dynamic rules then decide anew which access groups he is in
// (reference/access-and-audit.md section 4). With a profile, one of its rules
// of type Profile-SAML must cover him.
func (s *Service) Federated(ctx context.Context, o Origin, r FederatedRequest) (Answer, error) {
	a := s.begin(TypeJWTBearer, "iam-identity.user-federated.login", "user-federated", o)
	a.event.Initiator.Credential.Type = "token"
	a.selected(r.Profile)
	rest := []string{CheckUser}
	if !r.Profile.empty() {
		a.event.Action, rest = "iam-identity.user-authcode.login", []string{CheckSelector, CheckProfile, CheckLink, CheckRule}
	}
	if r.Assertion == "" {
		a.trace.Fail(CheckCredential, "assertion", "(absent)", "send the identity provider's ID token as assertion")
		return Answer{}, a.refuse(ctx, missing("assertion"))
	}
	proofs, err := s.cfg.Users.Verify(ctx, r.Assertion)
	if err != nil {
		refusal := asRefusal(err)
		a.trace = refusal.Trace
		a.skip(rest...)
		for _, aimed := range refusal.Aimed {
			a.seenBy(aimed, rest...)
		}
		return Answer{}, a.refuse(ctx, refused(refusal))
	}
	if r.Account != "" {
		proofs = slices.DeleteFunc(proofs, func(p attest.UserProof) bool { return p.Provider.AccountID != r.Account })
	}
	if len(proofs) == 0 {
		if _, ok := s.cfg.Directory.Accounts.Get(r.Account); ok {
			a.event.AccountID, a.assigned = r.Account, true
		}
		a.trace.Fail(attest.CheckIssuer, "an identity provider of account "+activity.Clip(r.Account), "none", "register the issuer in the account, or name another account")
		a.skip(rest...)
		return Answer{}, a.refuse(ctx, fault.New(fault.Invalid, CodeUnsupported, "Provided token is not supported: unknown issuer").
			WithDetail("The account has no enabled identity provider with the assertion's issuer."))
	}
	if len(proofs) != 1 {
		a.trace.Fail(attest.CheckIssuer, "an identity provider of one account", "of several", "name the account")
		a.skip(rest...)
		return Answer{}, a.refuse(ctx, fault.New(fault.Invalid, CodeMissing, "Property missing or empty").
			WithDetail("Several accounts have an identity provider with the assertion's issuer; name one in 'account'."))
	}
	proof := proofs[0]
	a.trace = proof.Trace
	a.event.AccountID, a.assigned = proof.Provider.AccountID, true
	a.event.Initiator.Name, a.event.Initiator.TypeURI = proof.User.Name, activity.UserType
	if r.Profile.empty() {
		return a.enter(ctx, proof, r.Scope)
	}
	return a.putOnUser(ctx, proof, r)
}

// enter lets a user of the account in and settles his dynamic memberships.
func (a *attempt) enter(ctx context.Context, proof attest.UserProof, scope string) (Answer, error) {
	d := a.svc.cfg.Directory
	account := proof.Provider.AccountID
	// Who is not let in binds no invitation and joins no group.
	if f := a.admit(account); f != nil {
		a.skip(CheckUser)
		return Answer{}, a.refuse(ctx, f)
	}
	var user *identity.User
	hint := a.svc.whyUnknown(proof)
	err := d.Update(ctx, "federated login", func(tx *directory.Tx) error {
		found := a.svc.userOf(proof)
		if found == nil {
			return nil
		}
		if found.Disabled {
			hint = "user " + found.IAMID + " is disabled; enable him"
			return nil
		}
		user, tx.By = found, found.IAMID
		if found.Invited || found.Subject == "" {
			bound := *found
			bound.Issuer, bound.Subject, bound.Invited = proof.Provider.Issuer, proof.Subject, false
			d.Users.Put(tx, &bound)
			user = &bound
			tx.Record(a.svc.accepted(a, tx.Now, user))
		}
		a.svc.joinGroups(tx, a, user, proof.User)
		return nil
	})
	if err != nil {
		return Answer{}, a.refuse(ctx, fault.Of(err))
	}
	if user == nil {
		a.trace.Fail(CheckUser, "a user of account "+account, describe(proof), hint)
		return Answer{}, a.refuse(ctx, fault.New(fault.Invalid, CodeUserGone, "Provided user not found or active"))
	}
	a.trace.Pass(CheckUser, "a user of account "+account, user.IAMID)
	claims, err := a.svc.subject(account, user.IAMID)
	if err != nil {
		return Answer{}, a.refuse(ctx, fault.New(fault.Invalid, CodeUserGone, "Provided user not found or active"))
	}
	a.initiate(claims)
	a.event.Target.ID = a.svc.cfg.Names.Of("iam-identity", "", account, "", "user", user.IAMID).String()
	a.event.Target.Name = user.Name
	claims.Scope = scope
	return a.issue(ctx, claims, token.AccessLife)
}

// whyUnknown says what would make somebody a user who is none.
func (s *Service) whyUnknown(proof attest.UserProof) string {
	said, _ := proof.User.Claims["email"].(string)
	for _, u := range s.cfg.Directory.UsersByAccount.Get(proof.Provider.AccountID) {
		switch {
		case said == "" || !sameAddress(u.Email, said):
		case u.Subject != "":
			return "the address belongs to user " + u.IAMID + ", who is bound to another subject; remove that user and invite the person again"
		case proof.Email == "":
			return "the person is invited, but the provider does not say that it has verified the address (email_verified)"
		}
	}
	return "invite the person under an e-mail address that the provider has verified"
}

// describe names a person to the administrator who is to invite him.
func describe(proof attest.UserProof) string {
	said, _ := proof.User.Claims["email"].(string)
	if said == "" || said == proof.User.Name {
		return proof.User.Name
	}
	return proof.User.Name + " <" + activity.Clip(said) + ">"
}

// userOf finds the account's user that a proof is about: the one it was bound
// to, or one whose invitation has the verified e-mail address.
func (s *Service) userOf(proof attest.UserProof) *identity.User {
	var invited *identity.User
	for _, u := range s.cfg.Directory.UsersByAccount.Get(proof.Provider.AccountID) {
		if u.Subject != "" {
			if u.Issuer == proof.Provider.Issuer && u.Subject == proof.Subject {
				return u
			}
			continue
		}
		if u.Invited && proof.Email != "" && sameAddress(u.Email, proof.Email) {
			invited = u
		}
	}
	return invited
}

// sameAddress compares e-mail addresses without regard to the case of ASCII
// letters alone: other letters fold onto them (ſ is an s, the Kelvin sign a k),
// and whoever has an address with one of those is somebody else.
func sameAddress(a, b string) bool {
	fold := func(s string) string {
		return strings.Map(func(r rune) rune {
			if 'A' <= r && r <= 'Z' {
				r += 'a' - 'A'
			}
			return r
		}, s)
	}
	return fold(a) == fold(b)
}

// accepted is the event of an invitation that is taken up: the user is bound to
// a person of the identity provider from here on.
func (s *Service) accepted(a *attempt, now time.Time, user *identity.User) *activity.Event {
	e := &activity.Event{
		ID: uuid.NewString(), Time: activity.Time{Time: now}, Action: "user-management.user.update", AccountID: user.AccountID,
		Message: "User Management: update user " + user.Name, Severity: activity.Warning, CorrelationID: a.origin.TransactionID,
		LogSourceCRN: s.cfg.Names.Of("user-management", "global", user.AccountID, "", "", "").String(),
		Initiator:    a.event.Initiator,
		Target: activity.Target{
			ID:   s.cfg.Names.Of("user-management", "", user.AccountID, "", "user", user.IAMID).String(),
			Name: user.Name, TypeURI: "user-management/user",
		},
		Observer:     activity.Observer{Name: "ActivityTracker"},
		ResponseData: object(map[string]string{"iam_id": user.IAMID, "state": "ACTIVE", "issuer": user.Issuer, "subject": activity.Clip(user.Subject)}),
	}
	e.Initiator.ID, e.Initiator.AuthnID = user.IAMID, user.IAMID
	e.SetReason(200, "")
	return e
}

// joinGroups replaces the user's dynamic memberships by those that the
// account's rules give him now.
func (s *Service) joinGroups(tx *directory.Tx, a *attempt, user *identity.User, person trust.User) {
	d := s.cfg.Directory
	next := access.Membership{AccountID: user.AccountID, IAMID: user.IAMID}
	old, had := d.Memberships.Get(directory.UserKey(user.AccountID, user.IAMID))
	if had {
		next.Meta = old.Meta
	}
	rules := d.GroupRulesByAccount.Get(user.AccountID)
	slices.SortFunc(rules, func(x, y *access.GroupRule) int { return x.CreatedAt.Compare(y.CreatedAt) })
	for _, r := range rules {
		if r.RealmName != person.Realm || !trust.HoldAll(r.Conditions, person.Claims) {
			continue
		}
		m := access.DynamicMember{
			GroupID: r.GroupID, RuleID: r.ID, Revision: r.Revision,
			Since: tx.Now, Until: tx.Now.Add(time.Duration(r.Expiration) * time.Hour),
		}
		twice := slices.ContainsFunc(next.Groups, func(x access.DynamicMember) bool { return x.GroupID == m.GroupID })
		next.Groups = append(next.Groups, m)
		if !twice && (!had || !s.isIn(old, m.GroupID, tx.Now)) {
			tx.Record(s.joined(a, tx.Now, user, r))
		}
	}
	switch {
	case len(next.Groups) > 0:
		d.Memberships.Put(tx, &next)
	case had:
		d.Memberships.Delete(tx, old)
	}
}

// isIn reports whether one of the memberships puts its owner into a group now:
// a rule that has changed or is gone has ended it.
func (s *Service) isIn(m *access.Membership, group string, now time.Time) bool {
	return slices.ContainsFunc(m.Groups, func(x access.DynamicMember) bool {
		rule, ok := s.cfg.Directory.GroupRules.Get(x.RuleID)
		return x.GroupID == group && now.Before(x.Until) && ok && rule.Revision == x.Revision && rule.GroupID == group
	})
}

// joined is the event of a membership that begins.
func (s *Service) joined(a *attempt, now time.Time, user *identity.User, r *access.GroupRule) *activity.Event {
	name := r.GroupID
	if g, ok := s.cfg.Directory.Groups.Get(r.GroupID); ok {
		name = g.Name
	}
	e := &activity.Event{
		ID: uuid.NewString(), Time: activity.Time{Time: now}, Action: "iam-groups.federated-member.add", AccountID: user.AccountID,
		Message: "IAM Access Groups: add federated-member " + name, Severity: activity.Warning, CorrelationID: a.origin.TransactionID,
		LogSourceCRN: s.cfg.Names.Of("iam-groups", "global", user.AccountID, "", "", "").String(),
		Initiator:    a.event.Initiator,
		Target: activity.Target{
			ID:   s.cfg.Names.Of("iam-groups", "", user.AccountID, "", "access-group", r.GroupID).String(),
			Name: name, TypeURI: "iam-groups/federated-member",
		},
		Observer:     activity.Observer{Name: "ActivityTracker"},
		ResponseData: object(map[string]string{"iam_id": user.IAMID, "rule_id": r.ID, "access_group_id": r.GroupID}),
	}
	e.Initiator.ID, e.Initiator.AuthnID = user.IAMID, user.IAMID
	e.SetReason(200, "")
	return e
}

// putOnUser lets a federated user put on a profile. He need not be a user of
// the account: the profile's rules name whom they trust.
func (a *attempt) putOnUser(ctx context.Context, proof attest.UserProof, r FederatedRequest) (Answer, error) {
	account := proof.Provider.AccountID
	a.trace.Pass(CheckSelector, "one profile", r.Profile.String())
	p := a.svc.find(account, r.Profile)
	if p == nil || p.AccountID != account {
		a.trace.Fail(CheckProfile, r.Profile.String(), "no such profile in the account", "create the profile in the account of the identity provider, or correct its name")
		a.skip(CheckLink, CheckRule)
		return Answer{}, a.refuse(ctx, fault.New(fault.Invalid, CodeNotFound, "Unable to find Object.").
			WithDetail("Object Type: 'Profile' with %s.", r.Profile))
	}
	a.trace.Pass(CheckProfile, r.Profile.String(), p.ID+" ("+p.Name+")")
	a.event.Target.ID = a.svc.cfg.Names.Of("iam-identity", "", account, "", "profile", p.ID).String()
	a.event.Target.Name = p.Name
	a.request["profile_id"] = p.ID
	v := trust.MatchUser(trust.Candidate{Profile: p, Rules: a.svc.cfg.Directory.RulesByProfile.Get(p.ID)}, proof.User)
	a.trace = append(a.trace, v.Explain()...)
	if !v.Matched {
		return Answer{}, a.refuse(ctx, fault.New(fault.Invalid, CodeNotEligible, "Selected trusted profile not eligible.").
			WithDetail("The user '%s' is not permitted to assume the indicated trusted profile; profile ID '%s'", proof.User.Name, crn.IAMID(p.ID)))
	}
	// What stands behind the profile is the person as the provider knows him.
	authn := token.Authn{Subject: proof.Subject, IAMID: federatedID(proof), Name: proof.User.Name, Email: proof.Email}
	i := &a.event.Initiator
	i.ID, i.Name, i.TypeURI, i.Credential.Type = crn.IAMID(p.ID), p.Name, activity.ProfileType, "profile"
	i.AuthnID, i.AuthnName = authn.IAMID, authn.Name
	life := token.AccessLife
	if v.Rule.Expiration > 0 {
		life = min(life, time.Duration(v.Rule.Expiration)*time.Second)
	}
	return a.issue(ctx, token.Claims{
		IAMID: crn.IAMID(p.ID), SubType: token.SubProfile, Name: p.Name, Scope: r.Scope,
		Authn: &authn, Account: token.Account{BSS: account},
	}, life)
}

// federatedID names a person in logs and tokens who is no user of the account.
func federatedID(proof attest.UserProof) string {
	return proof.Provider.ID + "-" + proof.Subject
}
