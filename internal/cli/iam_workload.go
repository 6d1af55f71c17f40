package cli

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"

	"github.com/goccy/go-yaml"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"tabard.dev/tabard/internal/cluster"
)

var workloadIssuers = &kind{
	noun: "workload issuer", plural: "workload issuers", listed: "iam workload-issuers", path: "/v1/workload_issuers", array: "workload_issuers",
	id: "id", form: prefixed("WorkloadIssuer-"),
	columns: columns("Name", "name", "ID", "id", "Preset", "preset", "Issuer", "issuer", "Audience", "audience"),
	details: append(columns("Name", "name", "ID", "id", "CRN", "crn", "Issuer", "issuer", "Audience", "audience", "Preset", "preset",
		"Keys from", "keys_from", "Keys", "keys", "Created", "created_at", "Created by", "created_by"),
		column{title: "Claims", of: func(o object) string { return joinedKeys(at(o.fields, []string{"mapping", "claims"})) }},
		column{title: "Needed in rules", of: func(o object) string { return pinsOf(o, "mapping.pin") }}),
}

// pinsOf joins the sets of claims of which a rule must compare one.
func pinsOf(o object, path string) string {
	sets, ok := at(o.fields, strings.Split(path, ".")).([]any)
	if !ok || len(sets) == 0 {
		return "issuer"
	}
	out := make([]string, len(sets))
	for i, set := range sets {
		out[i] = strings.ReplaceAll(words(set), ", ", " and ")
	}
	return "issuer, and " + strings.Join(out, " or ")
}

func workloadCommands() []*cobra.Command {
	return []*cobra.Command{
		listCommand(workloadIssuers, "workload-issuers", "tabard iam workload-issuers"),
		getCommand(workloadIssuers, "workload-issuer (NAME|ID)", "tabard iam workload-issuer github"),
		workloadIssuerCreateCommand(), workloadIssuerUpdateCommand(),
		deleteCommand(workloadIssuers, "workload-issuer-delete (NAME|ID)...", "delete", "tabard iam workload-issuer-delete github -f", nil, nil),
		workloadPresetsCommand(),
	}
}

// mappingFile is shown as an example of a mapping.
const mappingFile = `claims:                # what rules compare, and where it is in the token
  team: org.team
  job: job_name
pin:                   # a rule must compare all claims of one of these sets
  - [team, job]
form:                  # optional: what a value must look like to count
  team: "[a-z]+"
`

// workloadFlags are what a workload issuer is made of.
type workloadFlags struct {
	name, audience, preset, mappingFile, caFile, jwksFile, token string
	set                                                          *pflag.FlagSet
}

func (w *workloadFlags) add(f *pflag.FlagSet) {
	f.StringVar(&w.audience, "audience", "", "audience that its tokens must be made for")
	f.StringVar(&w.preset, "preset", "", "`NAME` of the preset with its claims: see tabard iam workload-presets")
	f.StringVar(&w.mappingFile, "mapping", "", "YAML or JSON `FILE` with its claims, where there is no preset")
	f.StringVar(&w.caFile, "ca-file", "", "PEM `FILE` of the CA of the issuer's server certificate")
	f.StringVar(&w.jwksFile, "jwks", "", "JSON `FILE` with the issuer's public keys, where the server cannot reach it")
	f.StringVar(&w.token, "test-token", "", "a workload's token in @FILE or, with -, on standard input: verified first, and its claims shown")
	idFlag(f)
	w.set = f
}

// fill puts what was given into a body.
func (w *workloadFlags) fill(s *session, body map[string]any) error {
	for k, v := range filled("name", w.name, "audience", w.audience, "preset", w.preset) {
		body[k] = v
	}
	if w.mappingFile != "" {
		text, err := fileOrText(s.cmd, "@"+w.mappingFile)
		if err != nil {
			return during(err, "read the mapping")
		}
		if body["mapping"], err = parseMapping(text); err != nil {
			return fmt.Errorf("%s is not a mapping: %w", w.mappingFile, err)
		}
	}
	if w.set.Changed("ca-file") {
		ca, err := authorities(w.caFile)
		if err != nil {
			return err
		}
		body["ca"] = ca
	}
	if w.jwksFile != "" {
		text, err := readFile(w.jwksFile)
		if err != nil {
			return during(err, "read the keys")
		}
		if !json.Valid([]byte(text)) {
			return Usage("%s is not JSON", w.jwksFile)
		}
		body["jwks"] = json.RawMessage(text)
	}
	if w.token != "" {
		if w.token == "-" {
			w.token = "@-"
		}
		if !strings.HasPrefix(w.token, "@") {
			return Usage("--test-token takes @FILE, or - for standard input: other users of this machine can read the arguments of commands")
		}
		text, err := fileOrText(s.cmd, w.token)
		if err != nil {
			return during(err, "read the test token")
		}
		body["test_token"] = strings.TrimSpace(text)
	}
	return nil
}

// parseMapping reads a mapping. A key that it does not have is an error, as it
// is for the server: a pin that was meant and not made would go unnoticed.
func parseMapping(text string) (cluster.Mapping, error) {
	var m cluster.Mapping
	if len(text) > cluster.MaxMapping {
		return m, fmt.Errorf("it is longer than %d bytes", cluster.MaxMapping)
	}
	dec := yaml.NewDecoder(bytes.NewReader([]byte(text)), yaml.Strict())
	if err := dec.Decode(&m); err != nil {
		if errors.Is(err, io.EOF) {
			return m, errors.New("it is empty")
		}
		return m, err
	}
	if err := dec.Decode(new(any)); !errors.Is(err, io.EOF) {
		return m, errors.New("there is more than one document in it")
	}
	return m, nil
}

// adviseIssuer adds to a refusal of the server what to do about it.
func adviseIssuer(err error) error {
	if codeOf(err) != codeKeysUnusable {
		return err
	}
	return &noted{error: err, note: "Where the server cannot reach the issuer, give it the keys with --jwks FILE: what the issuer's jwks_uri shows. " +
		"Where the issuer's certificate is of a private CA, give that with --ca-file FILE."}
}

func workloadIssuerCreateCommand() *cobra.Command {
	var flags workloadFlags
	var issuer string
	c := spec{
		use: "workload-issuer-create NAME [--preset NAME | --mapping FILE] [--issuer URL]", short: "Let workloads of an OpenID Connect issuer put on trusted profiles", args: cobra.ExactArgs(1),
		example: "tabard iam workload-issuer-create github --preset github-actions\n" +
			"tabard iam workload-issuer-create gitlab --preset gitlab --issuer https://gitlab.example.com --ca-file ca.pem\n" +
			"tabard iam workload-issuer-create batch --issuer https://batch.example.com --mapping mapping.yaml --test-token @token",
		more: "Such workloads are the jobs of a CI service, which has the job's claims signed. A claim rule of a trusted profile\n" +
			"then says which of them may put it on. The server gets the issuer's keys from its discovery document, now and from\n" +
			"time to time; where it cannot reach the issuer, give it the keys with --jwks. Without --audience, tokens must be made\n" +
			"for this installation: an audience that others use, too, would let their tokens in here.\n\n" +
			"A mapping says which claims rules compare, and which they have to compare so as to admit no strangers:\n\n" +
			indent(strings.TrimSuffix(mappingFile, "\n")) + "\n\n" +
			"An empty pin says that every workload of the issuer is your own. Without preset and mapping, rules compare sub.",
		flags: func(f *pflag.FlagSet) {
			f.StringVar(&issuer, "issuer", "", "`URL` of the issuer, exactly as in the iss claim of its tokens (default the preset's)")
			flags.add(f)
		},
		run: func(s *session, args []string) error {
			if issuer == "" && flags.preset == "" {
				return Usage("give --issuer, or --preset")
			}
			s.announce("Creating workload issuer %s", args[0])
			body := map[string]any{"name": args[0]}
			if issuer != "" {
				body["issuer"] = issuer
			}
			if err := flags.fill(s, body); err != nil {
				return err
			}
			o, err := s.send(request{method: http.MethodPost, path: workloadIssuers.path, body: body})
			if err != nil {
				return adviseIssuer(err)
			}
			if err := s.made(workloadIssuers, o, "The workload issuer %s was created.", args[0]); err != nil {
				return err
			}
			s.showTested(o)
			return s.showNext(o)
		},
	}.command()
	c.MarkFlagsMutuallyExclusive("preset", "mapping")
	c.MarkFlagsMutuallyExclusive("jwks", "ca-file")
	return c
}

// showTested shows what a test token proved, so that a rule can be written from
// it.
func (s *session) showTested(o object) {
	proved, ok := at(o.fields, []string{"tested", "claims"}).(map[string]any)
	if !ok || s.json || s.idOnly {
		return
	}
	fmt.Fprintln(s.out, "\nThe test token is good. Its claims, as rules compare them:")
	w := table(s.out)
	for _, name := range slices.Sorted(maps.Keys(proved)) {
		fmt.Fprintf(w, "  %s\t%s\n", plain(name), cell(words(proved[name])))
	}
	_ = w.Flush() // as all of the output
}

// showNext shows what is to be done with a new workload issuer.
func (s *session) showNext(o object) error {
	if s.json || s.idOnly || s.quiet {
		return nil
	}
	example := []map[string]string{{"claim": "sub", "operator": "EQUALS", "value": "SUBJECT"}}
	notes := ""
	if name := o.text("preset"); name != "" {
		all, err := s.presets()
		if err != nil {
			return err
		}
		for _, p := range all {
			if p.text("name") == name {
				example, notes = conditionsOf(p), p.text("notes")
			}
		}
	} else if o.text("mapping.pin") != "sub" {
		example = nil
	}
	fmt.Fprintf(s.out, "\nNext: say which workloads may put on a profile%s.\n", map[bool]string{true: ", for example", false: ""}[len(example) > 0])
	fmt.Fprintln(s.out, ruleCommand("PROFILE", o.text("issuer"), example))
	if notes != "" {
		fmt.Fprintf(s.out, "\nIn the job:\n  %s\n", plainLines(strings.ReplaceAll(notes, "AUDIENCE", o.text("audience"))))
	}
	return nil
}

func conditionsOf(preset object) []map[string]string {
	var out []map[string]string
	for _, c := range preset.objects("example_rule") {
		out = append(out, map[string]string{"claim": c.text("claim"), "operator": c.text("operator"), "value": c.text("value")})
	}
	return out
}

// ruleCommand is the command that creates a rule with these conditions.
func ruleCommand(profile, issuer string, conditions []map[string]string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "  tabard iam trusted-profile-rule-create %s --type Profile-CR --cr-type OIDC", profile)
	for _, c := range append([]map[string]string{{"claim": "issuer", "operator": "EQUALS", "value": issuer}}, conditions...) {
		fmt.Fprintf(&b, " \\\n    --conditions '%s'", plain(fmt.Sprintf("claim:%s,operator:%s,value:%s", c["claim"], c["operator"], c["value"])))
	}
	return b.String()
}

func workloadIssuerUpdateCommand() *cobra.Command {
	var flags workloadFlags
	c := spec{
		use: "workload-issuer-update (NAME|ID)", short: "Change a workload issuer", args: cobra.ExactArgs(1),
		example: "tabard iam workload-issuer-update gitlab --ca-file new-ca.pem\n" +
			"tabard iam workload-issuer-update batch --mapping mapping.yaml --test-token @token",
		more: "What no flag names keeps its value. The issuer stays: rules name it. A mapping with which rules that stand already\n" +
			"would admit strangers is refused.",
		flags: func(f *pflag.FlagSet) {
			f.StringVarP(&flags.name, "name", "n", "", "new name")
			flags.add(f)
		},
		run: func(s *session, args []string) error {
			given := []string{"name", "audience", "preset", "mapping", "ca-file", "jwks", "test-token"}
			if !slices.ContainsFunc(given, flags.set.Changed) {
				return Usage("nothing to change: give a flag such as --audience or --mapping")
			}
			body := map[string]any{}
			if err := flags.fill(s, body); err != nil {
				return err
			}
			s.announce("Updating workload issuer %s", args[0])
			o, header, err := workloadIssuers.load(s, args[0])
			if err != nil {
				return err
			}
			o, err = s.send(request{
				method: http.MethodPatch, path: workloadIssuers.at(o.text("id")), body: body, header: map[string]string{"If-Match": entityTag(o, header)},
			})
			if err != nil {
				return adviseIssuer(err)
			}
			if err := s.made(workloadIssuers, o, "The workload issuer %s was updated.", args[0]); err != nil {
				return err
			}
			s.showTested(o)
			return nil
		},
	}.command()
	c.MarkFlagsMutuallyExclusive("preset", "mapping")
	return c
}

const presetsPath = "/v1/workload_presets"

func (s *session) presets() ([]object, error) {
	items, err := s.client.list(s.ctx(), presetsPath, nil, "workload_presets", 0)
	return items, during(err, "list presets")
}

func workloadPresetsCommand() *cobra.Command {
	return spec{
		use: "workload-presets [NAME]", short: "List what is known of CI services, or show how a job of one gets its token", args: cobra.MaximumNArgs(1),
		example: "tabard iam workload-presets\ntabard iam workload-presets github-actions",
		more:    "A preset has the claims of a service's tokens, and says which of them a rule has to compare.",
		flags:   idFlag,
		run: func(s *session, args []string) error {
			s.announce("Listing presets for workload issuers")
			all, err := s.presets()
			if err != nil {
				return err
			}
			if len(args) == 0 {
				return s.showAll(all, "presets", "name", columns("Name", "name", "Title", "title", "Issuer", "issuer"))
			}
			i := slices.IndexFunc(all, func(p object) bool { return p.text("name") == args[0] })
			if i < 0 {
				var names []string
				for _, p := range all {
					names = append(names, p.text("name"))
				}
				return fmt.Errorf("there is no preset %q; there are %s", args[0], strings.Join(names, ", "))
			}
			p := all[i]
			s.ok("")
			err = s.show(p, "name", append(columns("Name", "name", "Title", "title", "Issuer", "issuer"),
				column{title: "Claims", of: func(o object) string { return joinedKeys(at(o.fields, []string{"mapping", "claims"})) }},
				column{title: "Needed in rules", of: func(o object) string { return pinsOf(o, "mapping.pin") }}))
			if err != nil || s.json || s.idOnly {
				return err
			}
			if others := p.text("other_issuers"); others != "" {
				fmt.Fprintf(s.out, "\nOther issuers:\n  %s\n", plainLines(others))
			}
			fmt.Fprintf(s.out, "\nIn the job (AUDIENCE is that of the registration):\n  %s\n", plainLines(p.text("notes")))
			fmt.Fprintf(s.out, "\nA rule:\n%s\n", ruleCommand("PROFILE", p.text("issuer"), conditionsOf(p)))
			return nil
		},
	}.command()
}
