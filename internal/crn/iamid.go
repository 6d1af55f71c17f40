package crn

import "strings"

// Prefixes of IAM IDs and of the bare ids inside them
// (reference/iam-identity.md section 5).
const (
	ProfilePrefix   = "Profile-"
	ServiceIDPrefix = "ServiceId-"
	HostPrefix      = "Host-" // ours: a hypervisor host's agent
	iamRealm        = "iam-"
	crnRealm        = "crn-"
)

// Kind says what sort of identity an IAM ID denotes.
type Kind string

// The kinds of identity.
const (
	KindUser      Kind = "user"
	KindServiceID Kind = "serviceid"
	KindProfile   Kind = "profile"
	KindHost      Kind = "host"
	KindCRN       Kind = "crn"
	KindUnknown   Kind = ""
)

// KindOf classifies an IAM ID by its form alone.
func KindOf(iamID string) Kind {
	switch {
	case strings.HasPrefix(iamID, iamRealm+ProfilePrefix):
		return KindProfile
	case strings.HasPrefix(iamID, iamRealm+ServiceIDPrefix):
		return KindServiceID
	case strings.HasPrefix(iamID, iamRealm+HostPrefix):
		return KindHost
	case strings.HasPrefix(iamID, crnRealm+"crn:"):
		return KindCRN
	case !strings.Contains(iamID, "-") || reservedRealms[Realm(iamID)]:
		return KindUnknown
	}
	return KindUser
}

// reservedRealms begin the ids of things that are no users, so that an id of
// one kind never passes for another.
var reservedRealms = map[string]bool{
	"": true, "iam": true, "crn": true,
	"Profile": true, "ServiceId": true, "AccessGroupId": true, "ApiKey": true, "ClaimRule": true, "Link": true, "Idp": true, "Host": true,
}

// IAMID returns the IAM ID of a profile or service ID from its bare id.
func IAMID(id string) string { return iamRealm + id }

// IAMIDOfCRN returns the IAM ID of a compute resource or service: "crn-" and
// its CRN.
func IAMIDOfCRN(c string) string { return crnRealm + c }

// Realm returns the part of an IAM ID before its first hyphen ("IBMid", "iam",
// "crn").
func Realm(iamID string) string {
	realm, _, _ := strings.Cut(iamID, "-")
	return realm
}

// Identifier returns an IAM ID without its realm.
func Identifier(iamID string) string {
	_, id, _ := strings.Cut(iamID, "-")
	return id
}

// BareID strips the realm from the IAM ID of a profile or service ID and
// returns anything else unchanged, so that an API accepts both forms
// (reference/iam-identity.md section 1.2).
func BareID(id string) string {
	if k := KindOf(id); k == KindProfile || k == KindServiceID {
		return Identifier(id)
	}
	return id
}

// ValidAccountID reports whether s has the form of an account id: 32 lower-case
// hexadecimal digits.
func ValidAccountID(s string) bool {
	if len(s) != 32 {
		return false
	}
	for i := 0; i < len(s); i++ {
		if c := s[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}
