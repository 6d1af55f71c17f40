package identity

import (
	"encoding/json"
	"slices"
)

// Condition compares one proved claim with a value. Value is JSON in a string,
// as on the wire: "\"text\"" or, for IN, "[\"a\",\"b\"]".
type Condition struct {
	Claim    string   `json:"claim"`
	Operator Operator `json:"operator"`
	Value    string   `json:"value"`
}

// CanHold reports whether the condition could ever be true of a claim, as
// trust.Holds decides. Text that is not JSON stands for itself, because public
// Terraform writes it so.
func (c Condition) CanHold() bool {
	var v any
	if json.Unmarshal([]byte(c.Value), &v) != nil {
		return true
	}
	list, ok := v.([]any)
	if !ok {
		return scalar(v)
	}
	return c.Operator == In && len(list) > 0 && !slices.ContainsFunc(list, func(e any) bool { return !scalar(e) })
}

func scalar(v any) bool {
	switch v.(type) {
	case string, bool, float64:
		return true
	}
	return false
}

// Operator of a condition.
type Operator string

// The operators (reference/iam-identity.md section 6.2).
const (
	Equals              Operator = "EQUALS"
	NotEquals           Operator = "NOT_EQUALS"
	EqualsIgnoreCase    Operator = "EQUALS_IGNORE_CASE"
	NotEqualsIgnoreCase Operator = "NOT_EQUALS_IGNORE_CASE"
	Contains            Operator = "CONTAINS"
	In                  Operator = "IN"
)

// Valid reports whether o is one of the documented operators.
func (o Operator) Valid() bool {
	switch o {
	case Equals, NotEquals, EqualsIgnoreCase, NotEqualsIgnoreCase, Contains, In:
		return true
	}
	return false
}
