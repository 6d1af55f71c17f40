package cli

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

func sessionCommands() []*cobra.Command {
	return []*cobra.Command{loginCommand(), logoutCommand(), targetCommand(), regionsCommand("tabard regions"), versionCommand()}
}

// loginOptions are what login was told. At most one of the credentials is used:
// a key, a compute resource's token, or the instance that the program runs on.
type loginOptions struct {
	url, apikey, crToken, idToken, profile string
	vpcInstance                            bool
	account, region, group                 string
	noRegion                               bool
}

func loginCommand() *cobra.Command {
	var o loginOptions
	c := spec{
		use: "login", short: "Log in to a server",
		more: "The credential is an API key, a service-account token with the trusted profile to put on, the ID token of the\n" +
			"account's identity provider (perhaps with a profile), or, on a virtual server, the server itself (--vpc-cri). An\n" +
			"ID token whose issuer several accounts have needs --account. A key file is the owner.json of a new\n" +
			"installation, the file of an api-key-create, or the bare key; @- reads standard input. The key itself is not\n" +
			"kept: the session has tokens that end.\n\n" +
			"Environment: TABARD_API_KEY or IBMCLOUD_API_KEY (a key or @FILE), IBMCLOUD_CR_TOKEN, IBMCLOUD_CR_PROFILE,\n" +
			"IBMCLOUD_CR_VPC_URL or TABARD_METADATA_URL (the metadata service, if not at " + metadataURL + "), TABARD_SERVER (the\n" +
			"server).",
		example: "tabard login -a http://127.0.0.1:8470 --apikey @data/owner.json\n" +
			"tabard login -a https://tabard.example.com --cr-token @/var/run/secrets/tokens/sa-token --profile my-trusted-profile\n" +
			"tabard login -a https://tabard.example.com --vpc-cri",
		flags: func(f *pflag.FlagSet) {
			f.StringVarP(&o.url, "api", "a", "", "`URL` of the server")
			f.StringVar(&o.apikey, "apikey", "", "API key, as `KEY` or @FILE")
			f.StringVar(&o.crToken, "cr-token", "", "token of a compute resource, as `TOKEN` or @FILE")
			f.StringVar(&o.idToken, "id-token", "", "ID token of the account's identity provider, as `TOKEN` or @FILE")
			f.BoolVar(&o.vpcInstance, "vpc-cri", false, "log in as the virtual server that this runs on")
			f.StringVar(&o.profile, "profile", "", "trusted profile to put on: name, ID or CRN")
			f.StringVarP(&o.account, "account", "c", "", "refuse to log in to another account than this `ID`; with --id-token the account to log in to")
			f.StringVarP(&o.region, "region", "r", "", "region to target")
			f.StringVarP(&o.group, "group", "g", "", "resource group to target: name or ID")
			f.BoolVar(&o.noRegion, "no-region", false, "target no region")
		},
	}.bare(func(cmd *cobra.Command, _ []string) error { return login(cmd, o) })
	c.MarkFlagsMutuallyExclusive("apikey", "cr-token", "id-token", "vpc-cri")
	c.MarkFlagsMutuallyExclusive("apikey", "profile")
	c.MarkFlagsMutuallyExclusive("region", "no-region")
	return c
}

func login(cmd *cobra.Command, o loginOptions) error {
	s, err := offline(cmd)
	if err != nil && !errors.Is(err, errDamaged) { // which this login replaces
		return err
	}
	if o.profile == "" && o.apikey == "" && o.idToken == "" {
		o.profile = os.Getenv("IBMCLOUD_CR_PROFILE")
	}
	if o.apikey == "" && o.crToken == "" && o.idToken == "" && !o.vpcInstance {
		o.apikey = cmp.Or(os.Getenv("TABARD_API_KEY"), os.Getenv("IBMCLOUD_API_KEY"))
		if o.apikey == "" {
			o.crToken = os.Getenv("IBMCLOUD_CR_TOKEN")
		}
	}
	old := *s.state
	*s.state = state{}
	switch {
	case o.apikey != "":
		err = s.loginKey(o, old.URL)
	case o.crToken != "":
		err = s.loginCRToken(o, old.URL)
	case o.idToken != "":
		err = s.loginUser(o, old.URL)
	case o.vpcInstance:
		err = s.loginInstance(o, old.URL)
	default:
		err = Usage("give a credential: --apikey, --cr-token, --id-token or --vpc-cri")
	}
	if err != nil {
		return err
	}
	if o.account != "" && o.account != s.AccountID {
		return fmt.Errorf("the credential belongs to account %s, not to %s", s.AccountID, o.account)
	}
	s.client = newClient(s.URL, s.AccessToken)
	if err := s.targetAfterLogin(o, old); err != nil {
		return err
	}
	if err := s.save(); err != nil {
		return err
	}
	if !s.json {
		s.ok("")
		fmt.Fprintln(s.out)
	}
	return s.showTarget()
}

// connect settles on the server: the first address that is not empty.
func (s *session) connect(candidates ...string) error {
	for _, c := range candidates {
		if c == "" {
			continue
		}
		u, err := serverURL(c)
		if err != nil {
			return err
		}
		s.URL = u
		s.warnPlain()
		if !s.json && !s.quiet {
			fmt.Fprintf(s.out, "API endpoint: %s\nAuthenticating...\n", s.URL)
		}
		return nil
	}
	return Usage("name the server with -a URL")
}

func (s *session) loginKey(o loginOptions, known string) error {
	text, err := fileOrText(s.cmd, o.apikey)
	if err != nil {
		return fmt.Errorf("read the API key: %w", err)
	}
	key, home, err := parseKey(text)
	if err != nil {
		return err
	}
	if err := s.connect(o.url, os.Getenv("TABARD_SERVER"), home, known); err != nil {
		return err
	}
	err = s.exchange(url.Values{
		"grant_type": {"urn:ibm:params:oauth:grant-type:apikey"}, "apikey": {key}, "response_type": {"cloud_iam"},
	})
	return during(err, "log in with the API key")
}

// parseKey reads a key file's text: JSON with the key, and perhaps the server
// that it is for, or the bare key.
func parseKey(text string) (key, server string, err error) {
	text = strings.TrimSpace(text)
	if !strings.HasPrefix(text, "{") {
		if text == "" || strings.ContainsAny(text, " \t\r\n") {
			return "", "", errors.New("the API key is empty or has spaces in it")
		}
		return text, "", nil
	}
	var file struct {
		APIKey string `json:"apikey"`
		URL    string `json:"url"`
	}
	if json.Unmarshal([]byte(text), &file) != nil || file.APIKey == "" {
		// The cause would quote the file.
		return "", "", errors.New(`the key file is not JSON with a text "apikey"`)
	}
	return file.APIKey, file.URL, nil
}

func (s *session) loginCRToken(o loginOptions, known string) error {
	if o.profile == "" {
		return Usage("--cr-token needs --profile: the trusted profile to put on")
	}
	raw, err := fileOrText(s.cmd, o.crToken)
	if err != nil {
		return fmt.Errorf("read the compute resource's token: %w", err)
	}
	if err := s.connect(o.url, os.Getenv("TABARD_SERVER"), known); err != nil {
		return err
	}
	form := url.Values{"grant_type": {"urn:ibm:params:oauth:grant-type:cr-token"}, "cr_token": {strings.TrimSpace(raw)}}
	form.Set("profile_"+selector(o.profile), o.profile)
	return during(s.exchange(form), "put on the trusted profile "+o.profile)
}

// loginUser logs in a user whom an identity provider of the account vouches
// for.
func (s *session) loginUser(o loginOptions, known string) error {
	raw, err := fileOrText(s.cmd, o.idToken)
	if err != nil {
		return fmt.Errorf("read the ID token: %w", err)
	}
	if err := s.connect(o.url, os.Getenv("TABARD_SERVER"), known); err != nil {
		return err
	}
	form := url.Values{"grant_type": {"urn:ietf:params:oauth:grant-type:jwt-bearer"}, "assertion": {strings.TrimSpace(raw)}}
	if o.account != "" {
		form.Set("account", o.account)
	}
	if o.profile != "" {
		form.Set("profile_"+selector(o.profile), o.profile)
	}
	return during(s.exchange(form), "log in with the ID token")
}

// selector says how a trusted profile is named: by crn, id or name.
func selector(profile string) string {
	switch _, isID := profiles.asID(profile); {
	case strings.HasPrefix(profile, "crn:"):
		return "crn"
	case isID:
		return "id"
	}
	return "name"
}

// metadataURL is where a virtual server finds the metadata service, and
// metadataVersion the date of the paths used here
// (reference/instance-metadata-and-vpc.md sections 1.1 and 1.2).
const (
	metadataURL     = "http://169.254.169.254"
	metadataVersion = "2025-08-26"
)

// loginInstance gets the token of the virtual server that the program runs on.
// Without -a the server is the one that issued it.
func (s *session) loginInstance(o loginOptions, known string) error {
	base := strings.TrimRight(cmp.Or(os.Getenv("IBMCLOUD_CR_VPC_URL"), os.Getenv("TABARD_METADATA_URL"), metadataURL), "/")
	type answer struct {
		AccessToken string    `json:"access_token"`
		ExpiresAt   time.Time `json:"expires_at"`
	}
	var identity, iam answer
	metadata := newClient(base, "")
	metadata.metadata = true
	_, err := metadata.do(s.ctx(), request{
		method: http.MethodPut, path: "/identity/v1/token", query: query("version", metadataVersion),
		header: map[string]string{"Metadata-Flavor": "ibm"}, body: map[string]int{"expires_in": 300},
	}, &identity)
	if err != nil {
		return during(err, "ask the metadata service for the instance's identity")
	}
	r := request{
		method: http.MethodPost, path: "/identity/v1/iam_tokens", query: query("version", metadataVersion),
		header: map[string]string{"Metadata-Flavor": "ibm"},
	}
	if o.profile != "" {
		r.body = map[string]any{"trusted_profile": map[string]string{selector(o.profile): o.profile}}
	}
	metadata.token = identity.AccessToken
	if _, err := metadata.do(s.ctx(), r, &iam); err != nil {
		return during(err, "exchange the instance's identity for an access token")
	}
	if err := s.adopt(iam.AccessToken, "", iam.ExpiresAt); err != nil {
		return err
	}
	return s.connect(o.url, os.Getenv("TABARD_SERVER"), issuerOf(iam.AccessToken), known)
}

// targetAfterLogin targets what login was told to, else what was targeted
// before on the same server and account, else the only region there is.
func (s *session) targetAfterLogin(o loginOptions, old state) error {
	s.Region = o.region
	if old.URL == s.URL && old.AccountID == s.AccountID {
		s.ResourceGroupID, s.ResourceGroupName = old.ResourceGroupID, old.ResourceGroupName
		if s.Region == "" && !o.noRegion {
			s.Region = old.Region
		}
	}
	if s.Region == "" && !o.noRegion {
		// Who may not see the regions, or talks to a server without them, is
		// logged in all the same.
		if found, err := regions.list(s); err == nil && len(found) == 1 {
			s.Region = found[0].text("name")
		}
	}
	if err := s.checkRegion(o.region); err != nil {
		s.warn("%v", err) // the session itself is good
	}
	if o.group != "" {
		return s.targetGroup(o.group)
	}
	return nil
}

// checkRegion refuses a region that the server does not have. A server that
// does not tell its regions is not argued with.
func (s *session) checkRegion(name string) error {
	if name == "" {
		return nil
	}
	found, err := regions.list(s)
	if err != nil || len(found) == 0 {
		return nil //nolint:nilerr // see above
	}
	names := make([]string, len(found))
	for i, r := range found {
		names[i] = r.text("name")
	}
	if slices.Contains(names, name) {
		return nil
	}
	return Usage("there is no region %q; the server has %s", name, strings.Join(names, ", "))
}

func (s *session) targetGroup(ref string) error {
	id, err := groups.find(s, ref)
	if err != nil {
		return err
	}
	o, _, err := s.get(groups.at(id), nil)
	if err != nil {
		return during(err, "get resource group "+ref)
	}
	s.ResourceGroupID, s.ResourceGroupName = id, o.text("name")
	return nil
}

func (s *session) showTarget() error {
	o := object{fields: map[string]any{
		"api_endpoint": s.URL, "user": s.who(), "iam_id": s.IAMID, "account_id": s.AccountID, "region": s.Region,
		"resource_group": map[string]any{"id": s.ResourceGroupID, "name": s.ResourceGroupName},
	}}
	if s.json {
		return s.printJSON(o)
	}
	w := table(s.out)
	for _, c := range columns("API endpoint", "api_endpoint", "User", "user", "IAM ID", "iam_id", "Account", "account_id",
		"Region", "region", "Resource group", "resource_group.name") {
		value := cell(o.text(c.path))
		if value == "-" {
			value = "(none targeted)"
		}
		fmt.Fprintf(w, "%s:\t%s\n", c.title, value)
	}
	return w.Flush()
}

func logoutCommand() *cobra.Command {
	return spec{
		use: "logout", short: "Forget the session's tokens", example: "tabard logout",
		more: "The server's address and the targets stay, so that the next login is short.",
	}.bare(func(cmd *cobra.Command, _ []string) error {
		s, err := offline(cmd)
		if err != nil {
			return err
		}
		if s.AccessToken != "" {
			s.AccessToken, s.RefreshToken, s.Expires, s.Own = "", "", time.Time{}, nil
			if err := s.save(); err != nil {
				return err
			}
		}
		s.ok("You are logged out.")
		return nil
	})
}

func targetCommand() *cobra.Command {
	var region, group, account string
	var noRegion, noGroup bool
	c := spec{
		use: "target", short: "Show or change what commands are about",
		more:    "Without flags it shows the server, who is logged in, and the region and resource group that new objects go to.",
		example: "tabard target -r us-south -g Default",
		flags: func(f *pflag.FlagSet) {
			f.StringVarP(&region, "region", "r", "", "region to target")
			f.StringVarP(&group, "group", "g", "", "resource group to target: name or ID")
			f.StringVarP(&account, "account", "c", "", "check that the session is in the account with this `ID`")
			f.BoolVar(&noRegion, "unset-region", false, "target no region")
			f.BoolVar(&noGroup, "unset-resource-group", false, "target no resource group")
		},
		run: func(s *session, _ []string) error {
			if account != "" && account != s.AccountID {
				return fmt.Errorf("the session is in account %s: log in with a credential of %s to change that", s.AccountID, account)
			}
			if region != "" || noRegion {
				if err := s.checkRegion(region); err != nil {
					return err
				}
				s.Region = region
			}
			if noGroup {
				s.ResourceGroupID, s.ResourceGroupName = "", ""
			}
			if group != "" {
				if err := s.targetGroup(group); err != nil {
					return err
				}
			}
			if err := s.save(); err != nil {
				return err
			}
			return s.showTarget()
		},
	}.command()
	c.MarkFlagsMutuallyExclusive("region", "unset-region")
	c.MarkFlagsMutuallyExclusive("group", "unset-resource-group")
	return c
}

func versionCommand() *cobra.Command {
	return spec{use: "version", short: "Print the program's version", example: "tabard version"}.bare(func(cmd *cobra.Command, _ []string) error {
		s := &session{cmd: cmd, out: cmd.OutOrStdout()}
		if cmd.Flag("output").Changed {
			return s.printJSON(map[string]string{"version": version()})
		}
		fmt.Fprintln(s.out, "tabard", version())
		return nil
	})
}

// during says what an error came in the way of.
func during(err error, what string) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", what, err)
}
