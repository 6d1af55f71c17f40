package vpcapi

import (
	"bytes"
	"crypto/rsa"
	"net/http"
	"strings"

	"golang.org/x/crypto/ssh"

	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/vpc"
)

func (s *service) keyRoutes() {
	keys := &s.sshKeys
	show := func(k *vpc.Key) any { return s.keyShape(k) }
	s.list(nounKey, []string{"resource_group.id"}, rowsOf(s, keys, nil, show))
	api.Read(s.Family, "GET /v1/keys/{id}", keys.action("read"), fromPath(s, keys), shown(show, nil))
	api.Change(s.Family, "POST /v1/keys", keys.action("create"), keys.action("create"),
		forCreate(s, nounKey, func(b *keyBody) (*identityRef, *string) { return b.ResourceGroup, b.Name }), s.createKey)
	api.Change(s.Family, "PATCH /v1/keys/{id}", keys.action("update"), keys.action("update"), forChange[namePatch](s, keys), s.updateKey)
	api.Change(s.Family, "DELETE /v1/keys/{id}", keys.action("delete"), keys.action("delete"), forChange[api.None](s, keys), s.deleteKey)
}

type keyBody struct {
	Name          *string      `json:"name"`
	ResourceGroup *identityRef `json:"resource_group"`
	PublicKey     string       `json:"public_key"`
	Type          string       `json:"type"`
}

// Key types and lengths that are accepted (section 3.6).
const (
	keyRSA     = "rsa"
	keyEd25519 = "ed25519"
)

// parseKey reads one line in the form of an authorized_keys file, without
// options. The kept form has no comment.
func parseKey(line string) (*vpc.Key, error) {
	refused := func(format string, args ...any) error {
		return fault.New(fault.Invalid, "key_parse_failure", format, args...).On("public_key")
	}
	if line == "" {
		return nil, missing("public_key")
	}
	public, _, options, rest, err := ssh.ParseAuthorizedKey([]byte(line))
	if err != nil || len(options) > 0 || len(bytes.TrimSpace(rest)) > 0 {
		return nil, refused("The property public_key must be one public key in OpenSSH form, such as: ssh-ed25519 AAAA… comment.")
	}
	k := &vpc.Key{
		PublicKey:   strings.TrimSpace(string(ssh.MarshalAuthorizedKey(public))),
		Fingerprint: ssh.FingerprintSHA256(public),
	}
	switch public.Type() {
	case ssh.KeyAlgoED25519:
		k.Type, k.Length = keyEd25519, 256
	case ssh.KeyAlgoRSA:
		crypto, ok := public.(ssh.CryptoPublicKey)
		if !ok {
			return nil, refused("The RSA key cannot be read.")
		}
		modulus, ok := crypto.CryptoPublicKey().(*rsa.PublicKey)
		if !ok {
			return nil, refused("The RSA key cannot be read.")
		}
		k.Type, k.Length = keyRSA, modulus.N.BitLen()
		if k.Length != 2048 && k.Length != 4096 {
			return nil, refused("An RSA key must have 2048 or 4096 bits; this one has %d.", k.Length)
		}
	default:
		return nil, refused("A key of type %s is not supported; use ssh-ed25519 or ssh-rsa.", public.Type())
	}
	return k, nil
}

func (s *service) createKey(c *api.Call, tx *directory.Tx, b *keyBody, groupID string) (api.Reply, api.Target, error) {
	k, err := s.newKey(c, b, groupID)
	if err != nil {
		return api.Reply{}, api.Target{}, err
	}
	s.d.Keys.Put(tx, k)
	r := api.Reply{Status: http.StatusCreated, Body: s.keyShape(k), ResponseData: map[string]any{"fingerprint": k.Fingerprint}}
	return r, target(s, c, &s.sshKeys, k), nil
}

func (s *service) newKey(c *api.Call, b *keyBody, groupID string) (*vpc.Key, error) {
	if err := s.checkGroup(c, groupID); err != nil {
		return nil, err
	}
	if err := quota(s.d.KeysByAccount.Len(c.Account()), vpc.MaxKeys, "The account", "keys"); err != nil {
		return nil, err
	}
	k, err := parseKey(b.PublicKey)
	if err != nil {
		return nil, err
	}
	if b.Type != "" && b.Type != k.Type {
		return nil, badField("type", "The property type says %q, and the key is of type %s.", b.Type, k.Type)
	}
	if k.Name, err = s.sshKeys.newName(c, b.Name); err != nil {
		return nil, err
	}
	for _, other := range s.d.KeysByAccount.Get(c.Account()) {
		if other.Fingerprint == k.Fingerprint {
			return nil, fault.New(fault.Conflict, "key_content_exists", "The key %q has the same content.", other.Name).On("public_key")
		}
	}
	k.ID, k.AccountID, k.ResourceGroupID = s.regionalID(), c.Account(), groupID
	return k, nil
}

func (s *service) updateKey(c *api.Call, tx *directory.Tx, b *namePatch, k *vpc.Key) (api.Reply, api.Target, error) {
	changed := *k
	if b.Name != nil {
		if err := s.sshKeys.checkName(c, *b.Name, k.ID); err != nil {
			return api.Reply{}, api.Target{}, err
		}
		changed.Name = *b.Name
	}
	s.d.Keys.Put(tx, &changed)
	return api.Reply{Body: s.keyShape(&changed)}, target(s, c, &s.sshKeys, &changed), nil
}

// deleteKey leaves instances that were given the key as they are.
func (s *service) deleteKey(c *api.Call, tx *directory.Tx, _ *api.None, k *vpc.Key) (api.Reply, api.Target, error) {
	s.d.Keys.Delete(tx, k)
	return api.Reply{Status: http.StatusNoContent}, target(s, c, &s.sshKeys, k), nil
}

func (s *service) keyShape(k *vpc.Key) keyShape {
	return keyShape{
		CreatedAt: stamp(k.CreatedAt), CRN: s.crn(nounKey, s.region.Name, k.AccountID, k.ID), Fingerprint: k.Fingerprint,
		Href: s.href("keys", k.ID), ID: k.ID, Length: k.Length, Name: k.Name, PublicKey: k.PublicKey,
		ResourceGroup: s.groupRef(k.ResourceGroupID), Type: k.Type,
	}
}
