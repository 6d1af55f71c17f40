package cli

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/crn"
)

func simulateCommands() *cobra.Command {
	return group("simulate", "Ask whether something would be allowed, without doing it",
		"The answers come from the checks that really decide. Nothing is issued, counted or recorded as a login.\n"+
			"Exit codes: 0 it would be allowed, 1 it would be refused (or the question failed), 2 wrong usage.",
		"tabard iam simulate token my-trusted-profile --cluster my-cluster --namespace default --service-account my-app\n"+
			"tabard iam simulate access my-trusted-profile is.instance.instance.list --service is",
		simulateTokenCommand(), simulateAccessCommand())
}

// simulated is what a question came to.
type simulated struct {
	Allowed  bool `json:"allowed"`
	Evidence *struct {
		Source string `json:"source"`
		Name   string `json:"name"`
		CRN    string `json:"crn"`
	} `json:"evidence"`
	ExpiresIn int64 `json:"expires_in"`
	Refusal   *struct {
		Status  int    `json:"status"`
		Code    string `json:"code"`
		Message string `json:"message"`
		Detail  string `json:"detail"`
	} `json:"refusal"`
	Subject string `json:"subject"`
	At      string `json:"at"`
	Policy  *struct {
		ID    string   `json:"id"`
		Roles []string `json:"roles"`
	} `json:"policy"`
	Trace activity.Trace `json:"trace"`
}

// simulate asks, prints the answer, and ends with code 1 when it is a no.
func (s *session) simulate(what string, body map[string]any, say func(w io.Writer, a *simulated)) error {
	o, err := s.send(request{method: http.MethodPost, path: "/v1/simulate/" + what, body: body})
	if err != nil {
		return err
	}
	var a simulated
	if err := json.Unmarshal(o.raw, &a); err != nil {
		return fmt.Errorf("read the answer: %w", err)
	}
	if s.json {
		if err := s.printJSON(o); err != nil {
			return err
		}
	} else {
		say(s.out, &a)
		fmt.Fprintln(s.out, "  checks:")
		printChecks(s.out, a.Trace)
	}
	if !a.Allowed {
		return childExit(exitFailed)
	}
	return nil
}

func simulateTokenCommand() *cobra.Command {
	var crToken, cluster, namespace, account, pod, instance, issuer, address string
	var claims []string
	c := spec{
		use: "token PROFILE", short: "Ask whether a workload would get a trusted profile's token", args: cobra.ExactArgs(1),
		more: "The profile is named by its name, ID or CRN. The workload shows a real token, or is described: a pod by its cluster, a\n" +
			"virtual server, or a job by the claims of its token. Only what the account itself has registered is looked at.\n" +
			"Without --address the account's allowed addresses are left out.",
		example: "tabard iam simulate token my-trusted-profile --cr-token @/var/run/secrets/tokens/sa-token\n" +
			"tabard iam simulate token my-trusted-profile --cluster my-cluster --namespace default --service-account my-app\n" +
			"tabard iam simulate token my-trusted-profile --instance my-server\n" +
			"tabard iam simulate token my-trusted-profile --issuer my-ci --claim sub=repo:acme/app --claim repository=acme/app",
		flags: func(f *pflag.FlagSet) {
			f.StringVar(&crToken, "cr-token", "", "real token of a compute resource, as text or `@FILE`")
			f.StringVar(&cluster, "cluster", "", "cluster of a pod: name, ID or CRN")
			f.StringVar(&namespace, "namespace", "", "namespace of the pod")
			f.StringVar(&account, "service-account", "", "service account of the pod")
			f.StringVar(&pod, "pod", "", "name of the pod")
			f.StringVar(&instance, "instance", "", "virtual server: name, ID or CRN")
			f.StringVar(&issuer, "issuer", "", "workload issuer of a job: name, ID or URL")
			f.StringArrayVar(&claims, "claim", nil, "claim of the job's token as `NAME=VALUE`, once for each; the value may be JSON")
			f.StringVar(&address, "address", "", "IP address that the workload would ask from")
		},
		run: func(s *session, args []string) error {
			body := map[string]any{"profile_" + selector(args[0]): args[0]}
			if address != "" {
				body["address"] = address
			}
			switch {
			case crToken != "":
				text, err := fileOrText(s.cmd, crToken)
				if err != nil {
					return during(err, "read --cr-token")
				}
				body["cr_token"] = strings.TrimSpace(text)
			case cluster != "":
				if namespace == "" || account == "" {
					return Usage("--cluster needs --namespace and --service-account")
				}
				body["evidence"] = filled("type", "kubernetes", "cluster", cluster, "namespace", namespace, "service_account", account, "pod", pod)
			case instance != "":
				body["evidence"] = map[string]string{"type": "instance", "instance": instance}
			case issuer != "":
				given, err := claimsIn(claims)
				if err != nil {
					return err
				}
				body["evidence"] = map[string]any{"type": "oidc", "issuer": issuer, "claims": given}
			default:
				return Usage("say which workload: --cr-token @FILE, --cluster, --instance or --issuer")
			}
			s.announce("Simulating a token of trusted profile %s", args[0])
			return s.simulate("token", body, func(w io.Writer, a *simulated) {
				if a.Allowed {
					fmt.Fprintf(w, "ALLOWED: a token for %d s\n", a.ExpiresIn)
				} else if r := a.Refusal; r != nil {
					fmt.Fprintf(w, "REFUSED: %d %s %s\n", r.Status, plain(r.Code), plain(strings.TrimSpace(r.Message+" "+r.Detail)))
				}
				if e := a.Evidence; e != nil {
					how := "as described, which nothing has proved"
					if e.Source == "token" {
						how = "proved by the token"
					}
					fmt.Fprintf(w, "  %-8s %s, %s\n", "who", plain(named(e.Name, e.CRN)), how)
				}
			})
		},
	}.command()
	c.MarkFlagsMutuallyExclusive("cr-token", "cluster", "instance", "issuer")
	return c
}

// claimsIn reads NAME=VALUE. A value that is a JSON array, object or string
// stands for that.
func claimsIn(list []string) (map[string]json.RawMessage, error) {
	out := map[string]json.RawMessage{}
	for _, c := range list {
		name, value, ok := strings.Cut(c, "=")
		if !ok || name == "" {
			return nil, Usage("--claim %q is not of the form NAME=VALUE", c)
		}
		if value == "" || !strings.ContainsRune(`[{"`, rune(value[0])) || !json.Valid([]byte(value)) {
			value = quoteJSON(value)
		}
		out[name] = json.RawMessage(value)
	}
	return out, nil
}

func simulateAccessCommand() *cobra.Command {
	var name, service, at string
	var attributes, tags, inGroups []string
	return spec{
		use: "access IDENTITY ACTION", short: "Ask whether an identity may do something", args: cobra.ExactArgs(2),
		more: "The identity is a trusted profile (name or ID), an IAM ID, or the address of a user. What it would act on is given by\n" +
			"its CRN, or by --service and further attributes. tabard iam roles --service NAME lists the actions of a service.",
		example: "tabard iam simulate access my-trusted-profile is.instance.instance.list --service is\n" +
			"tabard iam simulate access ada@example.com resource-controller.instance.delete --resource crn:v1:... --at 2026-07-04T20:00:00Z",
		flags: func(f *pflag.FlagSet) {
			f.StringVar(&name, "resource", "", "`CRN` of the resource")
			f.StringVar(&service, "service", "", "service that the resource belongs to")
			f.StringArrayVar(&attributes, "attribute", nil, "attribute of the resource as `NAME=VALUE`, such as region=us-south, once for each")
			f.StringSliceVar(&tags, "tags", nil, "access tags of the resource as name:value, comma-separated")
			f.StringVar(&at, "at", "", "at this `TIME`, such as 2026-07-01T09:00:00Z, instead of now")
			f.StringArrayVar(&inGroups, "group", nil, "as if it were in this access `GROUP` too: name or ID, once for each")
		},
		run: func(s *session, args []string) error {
			given, err := pairs(attributes, "=")
			if err != nil {
				return err
			}
			if name == "" && service == "" && !slices.ContainsFunc(given, func(p [2]string) bool { return p[0] == "serviceName" }) {
				return Usage("say on what: --resource CRN, or --service with --attribute")
			}
			resource := map[string]any{}
			all := filled("serviceName", service)
			for _, p := range given {
				all[p[0]] = p[1]
			}
			if len(all) > 0 {
				resource["attributes"] = all
			}
			if name != "" {
				resource["crn"] = name
			}
			if len(tags) > 0 {
				resource["tags"] = tags
			}
			body := map[string]any{"action": args[1], "resource": resource}
			if at != "" {
				t, err := whenTime(at)
				if err != nil {
					return err
				}
				body["time"] = t
			}
			s.announce("Simulating %s by %s", args[1], args[0])
			if body["iam_id"], err = s.identity(args[0]); err != nil {
				return err
			}
			ids := make([]string, len(inGroups))
			for i, g := range inGroups {
				if ids[i], err = accessGroups.find(s, g); err != nil {
					return err
				}
			}
			if len(ids) > 0 {
				body["groups"] = ids
			}
			return s.simulate("access", body, func(w io.Writer, a *simulated) {
				switch {
				case a.Allowed && a.Policy != nil:
					fmt.Fprintf(w, "ALLOWED: by policy %s\n", plain(a.Policy.ID))
				case a.Allowed:
					fmt.Fprintln(w, "ALLOWED")
				default:
					failed, _ := a.Trace.Failed()
					fmt.Fprintf(w, "REFUSED: the check %s failed\n", plain(failed.Name))
				}
				fmt.Fprintf(w, "  %-8s %s\n  %-8s %s\n", "who", plain(a.Subject), "when", plain(a.At))
			})
		},
	}.command()
}

// identity returns the IAM ID of who is named: a profile, an IAM ID, or a user.
func (s *session) identity(ref string) (string, error) {
	switch kind := crn.KindOf(ref); {
	case kind != crn.KindUnknown && kind != crn.KindUser:
		return ref, nil
	case strings.HasPrefix(ref, crn.ServiceIDPrefix):
		return crn.IAMID(ref), nil
	case strings.Contains(ref, "@"), ref == s.User && ref != "":
		sub, err := userSubject(s, ref)
		return sub.value, err
	default:
		id, err := profiles.find(s, ref)
		if err != nil && kind == crn.KindUser {
			return ref, nil // what is no profile's name can be a user's IAM ID
		}
		return crn.IAMID(id), err
	}
}

// whenTime reads a time as tables show it, or as the API writes it.
func whenTime(text string) (string, error) {
	for _, form := range []string{time.RFC3339, timeForm, time.DateOnly} {
		if t, err := time.Parse(form, text); err == nil {
			return t.UTC().Format(time.RFC3339), nil
		}
	}
	return "", Usage("--at %q is not a time such as 2026-07-01T09:00:00Z", text)
}

// marks begin the lines of checks.
var marks = map[activity.Outcome]string{activity.Pass: "  ok   ", activity.Fail: "  FAIL ", activity.Skip: "  --   "}

// printChecks writes the checks of a decision in their order. The points in
// which the nearest object differs are listed when there are several; the one
// that there always is stands in wanted and found.
func printChecks(w io.Writer, t activity.Trace) {
	for _, c := range t {
		fmt.Fprintf(w, "%s%s", cmp.Or(marks[c.Outcome], "  ?    "), plain(c.Name))
		if c.Outcome == activity.Skip {
			fmt.Fprint(w, " (not reached)")
		}
		fmt.Fprintln(w)
		line := func(label, value string) {
			if value != "" {
				fmt.Fprintf(w, "           %-7s %s\n", label, plain(value))
			}
		}
		line("wanted", c.Wanted)
		line("found", c.Found)
		line("hint", c.Hint)
		if c.Nearest != nil && len(c.Nearest.Differs) > 1 {
			for _, d := range c.Nearest.Differs {
				line("differs", d.Attribute+": "+cmp.Or(d.Wanted, "(nothing)")+", not "+cmp.Or(d.Found, "(nothing)"))
			}
		}
		if c.Change != nil {
			line("command", c.Change.Command)
		}
	}
}
