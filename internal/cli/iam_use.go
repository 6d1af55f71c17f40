package cli

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"unicode/utf16"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

func useCommands() []*cobra.Command { return []*cobra.Command{accessUseCommand(), recommendCommand()} }

// identityRef is an identity that is named by a profile's name or ID, or by an
// IAM ID. word begins the names of the commands about its policies, and ref
// names it there.
type identityRef struct{ iamID, word, ref string }

func (s *session) identityNamed(args []string, iamID string) (identityRef, error) {
	switch {
	case len(args) > 0 && iamID != "":
		return identityRef{}, Usage("give a profile or --iam-id, not both")
	case len(args) > 0:
		id, err := profiles.find(s, args[0])
		return identityRef{"iam-" + id, "trusted-profile", id}, err
	}
	switch id := strings.TrimPrefix(iamID, "iam-"); {
	case strings.HasPrefix(id, "Profile-"):
		return identityRef{"iam-" + id, "trusted-profile", id}, nil
	case strings.HasPrefix(id, "ServiceId-"):
		return identityRef{"iam-" + id, "service", id}, nil
	}
	return identityRef{iamID, "user", iamID}, nil
}

var useColumns = columns("Identity", "iam_id", "Policy", "policy_id", "State", "policy_state", "Service", "service_name", "Action", "action",
	"Count", "count", "Days", "days", "Last", "last_at", "Every (days)", "period_days")

func accessUseCommand() *cobra.Command {
	var iamID, policy, action string
	var unused bool
	var limit int
	return spec{
		use: "access-use [PROFILE]", short: "Show which access was used: by whom, through which policy, how often and when last", args: cobra.MaximumNArgs(1),
		more: "A request counts once for each policy that permitted something in it, and each action. With --unused it shows the\n" +
			"actions that the policies of one identity, and of its access groups, allow and that were never used: those of the\n" +
			"services that the policy names or was used in.",
		example: "tabard iam access-use my-trusted-profile\n" +
			"tabard iam access-use my-trusted-profile --unused\n" +
			"tabard iam access-use --policy " + samplePolicy + "\n" +
			"tabard iam access-use --action is.instance.instance.delete",
		flags: func(f *pflag.FlagSet) {
			f.StringVar(&iamID, "iam-id", "", "of this identity instead of a profile: the IAM `ID` of a service ID or user")
			f.StringVar(&policy, "policy", "", "only through the policy with this `ID`")
			f.StringVar(&action, "action", "", "only this action")
			f.BoolVar(&unused, "unused", false, "what is allowed and was never used")
			f.IntVar(&limit, "limit", 0, "at most so many; 0 for all")
			idFlag(f)
		},
		run: func(s *session, args []string) error {
			who, err := s.identityNamed(args, iamID)
			if err != nil {
				return err
			}
			if unused && who.iamID == "" {
				return Usage("--unused needs a profile or --iam-id")
			}
			if limit < 0 {
				return Usage("--limit must not be negative")
			}
			s.announce("Listing the use of access")
			q := query("iam_id", who.iamID, "policy_id", policy, "action", action, "limit", "1000")
			cols := useColumns
			if unused {
				q.Set("unused", "true")
				cols = columns("Policy", "policy_id", "Service", "service_name", "Action", "action")
			}
			uses, err := s.client.list(s.ctx(), "/v1/access_use", q, "uses", limit)
			if err != nil {
				return err
			}
			return s.showAll(uses, "records of use", "policy_id", cols)
		},
	}.command()
}

// recommended is the part of a recommendation that is put into words.
type recommended struct {
	WindowDays int                 `json:"window_days"`
	Since      string              `json:"counted_since"`
	Missed     int64               `json:"missed"`
	Policies   []advised           `json:"policies"`
	Groups     []advised           `json:"group_policies"`
	Changes    []recommendedChange `json:"changes"`
}

type advised struct {
	PolicyID string          `json:"policy_id"`
	GroupID  string          `json:"access_group_id"`
	Verdict  string          `json:"verdict"`
	Since    string          `json:"observed_since"`
	Policy   policyText      `json:"policy"`
	Used     []usedAction    `json:"used"`
	Earlier  []usedAction    `json:"used_earlier"`
	Unused   []actionsOfOne  `json:"unused"`
	Wider    bool            `json:"other_services"`
	Smaller  []smallerPolicy `json:"smaller"`
	Instead  []string        `json:"covered_by"`
	Warnings []string        `json:"warnings"`
}

type usedAction struct {
	Service string `json:"service_name"`
	Action  string `json:"action"`
	Count   int64  `json:"count"`
	LastAt  string `json:"last_at"`
	Days    int    `json:"days"`
	Pattern string `json:"pattern"`
	Period  int    `json:"period_days"`
}

type actionsOfOne struct {
	Service string   `json:"service_name"`
	Actions []string `json:"actions"`
}

type smallerPolicy struct {
	Policy policyText       `json:"policy"`
	Role   *recommendedRole `json:"custom_role"`
	Beyond []actionsOfOne   `json:"beyond_use"`
}

// policyText is what is told of a policy in a line.
type policyText struct {
	Resource struct {
		Attributes []attributeText `json:"attributes"`
		Tags       []attributeText `json:"tags"`
	} `json:"resource"`
	Control struct {
		Grant struct {
			Roles []struct {
				ID string `json:"role_id"`
			} `json:"roles"`
		} `json:"grant"`
	} `json:"control"`
	Pattern string `json:"pattern"`
}

type attributeText struct {
	Key      string `json:"key"`
	Operator string `json:"operator"`
	Value    any    `json:"value"`
}

type recommendedChange struct {
	Change    string           `json:"change"`
	Undecided bool             `json:"undecided"`
	PolicyID  string           `json:"policy_id"`
	Policy    json.RawMessage  `json:"policy"`
	Role      *recommendedRole `json:"role"`
}

type recommendedRole struct {
	Name        string   `json:"name"`
	DisplayName string   `json:"display_name"`
	ServiceName string   `json:"service_name"`
	Actions     []string `json:"actions"`
}

func recommendCommand() *cobra.Command {
	var iamID, window string
	var customRole bool
	return spec{
		use: "recommend [PROFILE]", short: "Recommend the smaller policies that the observed use of a profile needs", args: cobra.MaximumNArgs(1),
		more: "Shows for each policy what was used of it, how often and when last, and what was not; then the smaller policy, and\n" +
			"the commands that put it into effect. What was used in the window stays allowed, and so does what comes at regular\n" +
			"distances, as once a month, and is not overdue. Nothing is allowed that was not before. Roles are chosen among those\n" +
			"that there are; with --custom-role, roles are made of exactly what was used.\n\n" +
			"Until a policy has been observed for 30 days, or for the window when that is shorter, nothing is said to be unused.\n" +
			"Nothing is changed: run the commands that it prints, or get the policies with --output json.",
		example: "tabard iam recommend my-trusted-profile\n" +
			"tabard iam recommend my-trusted-profile --window 180d --custom-role\n" +
			"tabard iam recommend --iam-id iam-ServiceId-0f3b1c2d-1111-4222-8333-444455556666 --output json",
		flags: func(f *pflag.FlagSet) {
			f.StringVar(&iamID, "iam-id", "", "for this identity instead of a profile: the IAM `ID` of a service ID or user")
			f.StringVar(&window, "window", "90d", "use of so many `DAYS` back counts, such as 30d")
			f.BoolVar(&customRole, "custom-role", false, "make roles of exactly what was used")
		},
		run: func(s *session, args []string) error {
			days, err := strconv.ParseUint(strings.TrimSuffix(window, "d"), 10, 15)
			if err != nil || days == 0 {
				return Usage("--window %q is not a number of days, such as 30d", window)
			}
			who, err := s.identityNamed(args, iamID)
			if err != nil {
				return err
			}
			if who.iamID == "" {
				return Usage("give a profile, or another identity with --iam-id")
			}
			s.announce("Recommending smaller policies for %s", who.ref)
			q := query("iam_id", who.iamID, "window_days", strconv.FormatUint(days, 10))
			if customRole {
				q.Set("custom_role", "true")
			}
			o, _, err := s.get("/v1/access_recommendation", q)
			if err != nil {
				return err
			}
			if s.json {
				return s.printJSON(o)
			}
			var r recommended
			if err := json.Unmarshal(o.raw, &r); err != nil {
				return fmt.Errorf("read the recommendation: %w", err)
			}
			s.ok("")
			return r.print(s.out, who)
		},
	}.command()
}

func (r *recommended) print(w io.Writer, who identityRef) error {
	fmt.Fprintf(w, "Use of the last %d days, counted since %s.\n", r.WindowDays, plain(clock(r.Since)))
	if len(r.Policies) == 0 {
		fmt.Fprintln(w, "It has no policies of its own.")
	}
	for _, a := range r.Policies {
		a.print(w)
	}
	for _, a := range r.Groups {
		a.print(w)
	}
	for _, undecided := range []bool{false, true} {
		if !slices.ContainsFunc(r.Changes, func(c recommendedChange) bool { return c.Undecided == undecided }) {
			continue
		}
		if undecided {
			fmt.Fprint(w, "\nNot observed for long enough. To apply it all the same:\n\n")
		} else {
			fmt.Fprint(w, "\nTo apply it:\n\n")
		}
		for i, c := range r.Changes {
			if c.Undecided != undecided {
				continue
			}
			if err := c.print(w, i+1, who); err != nil {
				return err
			}
		}
	}
	return nil
}

// verdicts say in words what a verdict means.
var verdicts = map[string]string{
	"keep": "keep it", "narrow": "a smaller one is enough", "remove": "it can go", "undecided": "not observed for long enough",
}

func (a *advised) print(w io.Writer) {
	head := "Policy " + a.PolicyID
	if a.GroupID != "" {
		head += " of access group " + a.GroupID + ", which others may be in"
	} else if text := verdicts[a.Verdict]; text != "" {
		head += ": " + text
	}
	fmt.Fprintf(w, "\n%s\n  %s\n  observed since %s\n", plain(head), plain(a.Policy.String()), plain(clock(a.Since)))
	if len(a.Used) == 0 {
		fmt.Fprintln(w, "  used: nothing")
	} else {
		fmt.Fprintln(w, "  used:")
		t := table(w)
		for _, u := range a.Used {
			fmt.Fprintf(t, "    %s\n", plain(u.text()))
		}
		_ = t.Flush() // nothing is held back: there are no columns
	}
	for _, u := range a.Earlier {
		fmt.Fprintf(w, "  used earlier: %s\n", plain(u.text()))
	}
	for _, s := range a.Unused {
		some(w, fmt.Sprintf("  not used of %s: ", plain(s.Service)), s.Actions)
	}
	switch {
	case a.Wider && len(a.Used) == 0:
		fmt.Fprintln(w, "  not used: all that it allows")
	case a.Wider:
		fmt.Fprintln(w, "  not used: whatever it allows in other services")
	}
	for _, s := range a.Smaller {
		fmt.Fprintf(w, "  smaller: %s\n", plain(s.Policy.String()))
		if s.Role != nil {
			wrapped(w, fmt.Sprintf("    with a new role %s: ", plain(s.Role.Name)), s.Role.Actions)
		}
		for _, b := range s.Beyond {
			some(w, fmt.Sprintf("    still allows what was not used of %s: ", plain(b.Service)), b.Actions)
		}
	}
	if len(a.Instead) > 0 {
		fmt.Fprintf(w, "  allowed as well by: %s\n", plain(strings.Join(a.Instead, ", ")))
	}
	for _, text := range a.Warnings {
		fmt.Fprintf(w, "  warning: %s\n", plain(text))
	}
}

func (u *usedAction) text() string {
	times, days := "times", "days"
	if u.Count == 1 {
		times = "time"
	}
	if u.Days == 1 {
		days = "day"
	}
	s := fmt.Sprintf("%s: %d %s on %d %s, last %s", u.Action, u.Count, times, u.Days, days, clock(u.LastAt))
	switch {
	case u.Period > 0:
		s += fmt.Sprintf("; comes about every %d days", u.Period)
	case u.Pattern != "":
		s += "; rare"
	}
	return s
}

// listed is how many actions are shown of a long list.
const listed = 10

// some prints the first of many words, and how many there are.
func some(w io.Writer, label string, words []string) {
	if more := len(words) - listed; more > 1 {
		words = append(slices.Clone(words[:listed]), fmt.Sprintf("and %d more (tabard iam access-use --unused lists all)", more))
	}
	wrapped(w, label, words)
}

// lineWidth is how long lines of many words get.
const lineWidth = 110

// wrapped prints words after a label, in as many lines as they take.
func wrapped(w io.Writer, label string, words []string) {
	fmt.Fprint(w, label)
	at := len(label)
	for i, word := range words {
		word = plain(word)
		if i < len(words)-1 {
			word += ","
		}
		if i > 0 && at+len(word) >= lineWidth {
			fmt.Fprint(w, "\n      ")
			at = 6
		} else if i > 0 {
			fmt.Fprint(w, " ")
			at++
		}
		fmt.Fprint(w, word)
		at += len(word)
	}
	fmt.Fprintln(w)
}

// String tells the roles and the resource of a policy.
func (p policyText) String() string {
	var roles, about []string
	for _, r := range p.Control.Grant.Roles {
		roles = append(roles, r.ID[strings.LastIndexByte(r.ID, ':')+1:])
	}
	for _, a := range p.Resource.Attributes {
		if a.Key != "accountId" {
			about = append(about, a.String())
		}
	}
	for _, t := range p.Resource.Tags {
		about = append(about, "tag "+t.String())
	}
	text := strings.Join(roles, ", ") + " on " + strings.Join(about, ", ")
	if p.Pattern != "" {
		text += ", with conditions"
	}
	return text
}

func (a attributeText) String() string {
	operator := "="
	switch a.Operator {
	case "stringEquals":
	case "stringMatch", "stringMatchAnyOf":
		operator = " like "
	case "stringExists":
		if a.Value == false {
			return "no " + a.Key
		}
		return "any " + a.Key
	default:
		operator = " in "
	}
	return a.Key + operator + words(a.Value)
}

// print prints the commands of one step. Only IDs stand in the commands
// themselves; the rest is in a file, which the shell does not look into.
func (c *recommendedChange) print(w io.Writer, n int, who identityRef) error {
	command := "tabard iam " + who.word + "-policy-"
	switch c.Change {
	case "delete_policy":
		fmt.Fprintf(w, "%sdelete %s %s -f\n", command, quoted(who.ref), quoted(c.PolicyID))
		return nil
	case "create_role":
		if c.Role == nil {
			break
		}
		fmt.Fprintf(w, "tabard iam role-create %s --display-name %s --service-name %s --actions %s\n",
			quoted(c.Role.Name), quoted(c.Role.DisplayName), quoted(c.Role.ServiceName), quoted(strings.Join(c.Role.Actions, ",")))
		return nil
	case "replace_policy", "create_policy":
		text, err := asciiJSON(c.Policy)
		if err != nil {
			return fmt.Errorf("read the recommended policy: %w", err)
		}
		file := fmt.Sprintf("policy-%d.json", n)
		fmt.Fprintf(w, "cat > %s <<'EOF'\n%s\nEOF\n", file, text)
		if c.Change == "create_policy" {
			fmt.Fprintf(w, "%screate %s --file %s\n", command, quoted(who.ref), file)
		} else {
			fmt.Fprintf(w, "%supdate %s %s --file %s\n", command, quoted(who.ref), quoted(c.PolicyID), file)
		}
		return nil
	}
	return fmt.Errorf("the server recommends a change %q, which this program does not know; get a newer one", c.Change)
}

// quoted writes a word for a shell.
func quoted(s string) string {
	s = plain(s)
	if s != "" && strings.IndexFunc(s, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && !strings.ContainsRune("-_.,:@/", r)
	}) < 0 && s[0] != '-' {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

// asciiJSON indents JSON and writes every character that is not plain ASCII as
// an escape: it is made of what other people wrote, and neither the terminal
// nor the shell is to be led by it.
func asciiJSON(raw json.RawMessage) (string, error) {
	var b bytes.Buffer
	if err := json.Indent(&b, raw, "", "  "); err != nil {
		return "", err
	}
	var out strings.Builder
	for _, r := range b.String() {
		switch {
		case r < 0x7f:
			out.WriteRune(r)
		case r <= 0xffff:
			fmt.Fprintf(&out, `\u%04x`, r)
		default:
			high, low := utf16.EncodeRune(r)
			fmt.Fprintf(&out, `\u%04x\u%04x`, high, low)
		}
	}
	return out.String(), nil
}
