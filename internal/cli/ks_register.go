package cli

import (
	"cmp"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"tabard.dev/tabard/internal/kube"
)

// defaultIssuer is what clusters are set up with when nobody says otherwise.
const defaultIssuer = "https://kubernetes.default.svc.cluster.local"

// defaultAudience is what the server wants when nobody says otherwise.
const defaultAudience = "iam"

// testLife is how long the token lives that a registration is tried out with. No
// cluster gives less.
const testLife = 10 * time.Minute

// Fallible steps of a registration that the server has codes for.
const (
	codeKeysUnusable = "keys_unusable"
	codeReview       = "review_unusable"
	codeIssuerTaken  = "issuer_taken"
	codeTestRefused  = "test_token_refused"
)

// proofFlags say how a cluster's tokens are to be proved. They are those of
// registering a cluster and of changing one.
type proofFlags struct {
	kube                                        kubeFlags
	caFile, jwksFile, keys                      string
	tokenReview, force, untested                bool
	reviewerToken, apiServer, account, audience string
}

func (p *proofFlags) add(f *pflag.FlagSet) {
	p.kube.add(f)
	f.StringVar(&p.caFile, "ca-file", "", "PEM `FILE` of the CA of the issuer's server certificate")
	f.StringVar(&p.jwksFile, "jwks", "", "JSON `FILE` with the cluster's public keys")
	choice(f, &p.keys, "keys", "", "where the server gets the keys (default what works, in this order)", keysIssuer, keysServer, "upload")
	f.BoolVar(&p.tokenReview, "token-review", false, "have the cluster asked about each token; makes a service account for that in it")
	f.StringVar(&p.reviewerToken, "reviewer-token", "", "`FILE` with a token for the cluster's API server, instead of making a service account")
	f.StringVar(&p.apiServer, "api-server", "", "`URL` at which the server reaches the API server (default that of the kubeconfig)")
	f.StringVar(&p.account, "test-service-account", "default/default", "service account whose token is tried out, as `NAMESPACE/NAME`")
	f.BoolVar(&p.untested, "no-test", false, "do not try a token out")
	f.StringVar(&p.audience, "audience", "", "audience that tokens must be made for (default "+defaultAudience+")")
	forceFlag(f, &p.force)
}

// explored is a cluster's API server as the user reaches it.
type explored struct {
	cfg    kube.Config
	client *kube.Client
	found  kube.Discovery
	token  *kube.ServiceAccountToken // to try out; nil without a test
}

// explore reads what there is to know from the cluster.
func (p *proofFlags) explore(s *session, audience string) (*explored, error) {
	namespace, account, ok := strings.Cut(p.account, "/")
	if !ok || namespace == "" || account == "" {
		return nil, Usage("--test-service-account is NAMESPACE/NAME, such as default/default")
	}
	cfg, err := p.kube.config(s.cmd)
	if err != nil {
		return nil, err
	}
	if cfg.Insecure {
		// Whoever is on the way could name an issuer and keys of his own, and would
		// then be every pod of the cluster.
		return nil, &noted{error: errors.New("the kubeconfig takes any certificate of the API server (insecure-skip-tls-verify), so the keys could be anybody's"),
			note: "Put the cluster's certificate-authority into the kubeconfig instead, or give keys that came another way with --jwks."}
	}
	client, err := kube.New(cfg)
	if err != nil {
		return nil, during(err, "use the kubeconfig")
	}
	a := &explored{cfg: cfg, client: client}
	if a.found, err = kube.Discover(s.ctx(), client); err != nil {
		return nil, clusterError(cfg.URL, "read the cluster's issuer and keys", err)
	}
	if p.untested {
		return a, nil
	}
	t, err := kube.RequestToken(s.ctx(), client, namespace, account, audience, testLife)
	switch kube.Code(err) {
	case http.StatusNotFound:
		return nil, &noted{error: fmt.Errorf("make a token to try out: %w", err),
			note: "Name a service account that the cluster has: --test-service-account NAMESPACE/NAME."}
	case http.StatusForbidden:
		return nil, &noted{error: fmt.Errorf("make a token to try out: %w", err),
			note: "The kubeconfig's user needs the right to create serviceaccounts/token for " + p.account + ". Name another with --test-service-account, or do without with --no-test."}
	}
	if err != nil {
		return nil, clusterError(cfg.URL, "make a token to try out", err)
	}
	a.token = &t
	return a, nil
}

func (a *explored) close() {
	if a != nil {
		a.client.Close()
	}
}

// issuer is the iss of the cluster's tokens. A token's own counts: it is what
// the server will see.
func (a *explored) issuer(s *session) (string, error) {
	if a.token == nil {
		if a.found.Issuer == "" {
			return "", &noted{error: fmt.Errorf("the cluster does not tell its issuer: %w", a.found.Refused),
				note: "Leave out --no-test, so that a token tells it; or give --issuer."}
		}
		return a.found.Issuer, nil
	}
	if a.found.Issuer != "" && a.found.Issuer != a.token.Issuer {
		s.warn("the discovery document names the issuer %s, but the cluster's tokens name %s, which counts", a.found.Issuer, a.token.Issuer)
	}
	if a.found.OpenShiftIssuer != "" && a.found.OpenShiftIssuer != a.token.Issuer {
		s.warn("OpenShift is configured with the serviceAccountIssuer %s, but tokens still name %s. Once they have changed, register the cluster anew.",
			a.found.OpenShiftIssuer, a.token.Issuer)
	}
	return a.token.Issuer, nil
}

// keySet returns the keys to upload.
func (a *explored) keySet(s *session) (json.RawMessage, error) {
	if a.found.JWKS == nil {
		return nil, clusterError(a.cfg.URL, "read the cluster's keys", a.found.Refused)
	}
	if a.token != nil && !slices.Contains(a.found.KeyIDs, a.token.KeyID) {
		s.warn("the cluster signs tokens with key %s, which is not among those it publishes: %s", a.token.KeyID, strings.Join(a.found.KeyIDs, ", "))
	}
	return a.found.JWKS, nil
}

// server is how the Tabard server is to reach the API server: as the user does,
// but with a token of its own.
func (p *proofFlags) server(s *session, name string, a *explored) (map[string]any, error) {
	if p.tokenReview && p.reviewerToken == "" && a == nil {
		return nil, Usage("--token-review makes a service account in the cluster: give --kubeconfig; or give a token with --reviewer-token")
	}
	out := map[string]any{}
	address := p.apiServer
	if a != nil {
		address = cmp.Or(address, a.cfg.URL)
		if len(a.cfg.CA) > 0 {
			out["ca"] = string(a.cfg.CA)
		}
		if a.cfg.ServerName != "" {
			s.warn("the kubeconfig has the tls-server-name %s, which the server does not use: give --api-server with an address that the certificate is for", a.cfg.ServerName)
		}
	}
	if address == "" {
		return nil, Usage("give --api-server or --kubeconfig: the address of the cluster's API server")
	}
	if loopback(address) && !loopback(s.URL) {
		s.warn("%s is loopback: the server reaches what is on its own machine there. Give --api-server with an address that it reaches the cluster at.", address)
	}
	out["url"] = address
	switch {
	case p.reviewerToken != "":
		token, err := reviewerFile(p.reviewerToken)
		if err != nil {
			return nil, err
		}
		out["token"] = token
	case p.tokenReview:
		if err := s.confirmReviewer(a.cfg.URL, p.force); err != nil {
			return nil, err
		}
		token, err := s.reviewer(name, a.cfg.URL, a.client)
		if err != nil {
			return nil, err
		}
		out["token"] = token
	}
	return out, nil
}

func loopback(address string) bool {
	u, err := url.Parse(address)
	if err != nil {
		return false
	}
	ip, err := netip.ParseAddr(u.Hostname())
	return u.Hostname() == "localhost" || err == nil && ip.IsLoopback()
}

// insideOnly reports whether an issuer's address means something in a cluster
// only. Looked up elsewhere, it would be whatever that network calls so.
func insideOnly(issuer string) bool {
	u, err := url.Parse(issuer)
	if err != nil || u.Scheme != "https" {
		return true
	}
	host := u.Hostname()
	return host == "kubernetes" || strings.HasPrefix(host, "kubernetes.default") || strings.HasSuffix(host, ".svc") || strings.HasSuffix(host, ".cluster.local")
}

// sameHost reports whether two URLs are of one server.
func sameHost(a, b string) bool {
	host := func(raw string) string {
		u, err := url.Parse(raw)
		if err != nil {
			return raw
		}
		return net.JoinHostPort(strings.ToLower(u.Hostname()), cmp.Or(u.Port(), "443"))
	}
	return host(a) == host(b)
}

// uploaded reads the file of --jwks.
func uploaded(file string) (json.RawMessage, error) {
	text, err := readFile(file)
	if err != nil {
		return nil, during(err, "read the keys")
	}
	var keys map[string]json.RawMessage
	if json.Unmarshal([]byte(text), &keys) != nil || keys["keys"] == nil {
		return nil, Usage(`%s is not a JSON Web Key Set, an object with "keys"`, file)
	}
	return json.RawMessage(text), nil
}

// codeOf returns the server's code of a refusal, or "".
func codeOf(err error) string {
	var e *apiError
	if errors.As(err, &e) {
		return e.Code
	}
	return ""
}

// advise adds to a refusal of the server what to do about it.
func advise(err error) error {
	note := ""
	switch codeOf(err) {
	case codeKeysUnusable:
		note = "Where the server cannot get the keys from there, upload them: --keys upload with --kubeconfig, or --jwks FILE with what kubectl get --raw /openid/v1/jwks prints. " +
			"Where the issuer's certificate is of a private CA, give that with --ca-file FILE."
		if strings.Contains(err.Error(), "certificate") || strings.Contains(err.Error(), "x509") {
			note = "The issuer's certificate is not one that the server trusts: give the CA that it is of with --ca-file FILE. " +
				"Or upload the keys: --keys upload with --kubeconfig, or --jwks FILE with what kubectl get --raw /openid/v1/jwks prints."
		}
	case codeReview:
		note = "The server must reach the API server itself: give --api-server with an address that it reaches."
	case codeIssuerTaken:
		note = "See what is registered with: tabard ks clusters. A cluster that is registered already is changed with: tabard ks cluster-update NAME."
	case codeTestRefused:
		note = "The token came from the cluster just now, so what is registered does not fit it. Where the API server has several addresses or keys, try --keys upload."
	default:
		// The server speaks of the fields of its API.
		switch targetOf(err) {
		case "server.token":
			note = "Give a token for the API server: --token-review with --kubeconfig makes one, --reviewer-token FILE has one. Or upload the keys: --keys upload, or --jwks FILE."
		case "server.url":
			note = "The address is that of --api-server, or of the kubeconfig."
		case "server.ca":
			note = "The CA is that of the kubeconfig: its certificate-authority."
		case "review":
			note = "Give a token for the API server: --token-review with --kubeconfig makes one, --reviewer-token FILE has one."
		case "groups":
			note = "Make a cluster group with: tabard ks cluster-group-create NAME"
		default:
			return err
		}
	}
	return &noted{error: err, note: note}
}

// missingGroup adds to the failure to find a cluster group how one is made.
func missingGroup(err error, ref string) error {
	var n *noted
	if errors.As(err, &n) {
		n.note += ". Make one with: tabard ks cluster-group-create " + ref
	}
	return err
}

// targetOf returns the field that a refusal of the server is about, or "".
func targetOf(err error) string {
	var e *apiError
	if errors.As(err, &e) {
		return e.Target
	}
	return ""
}

// authorities reads the file of --ca-file.
func authorities(file string) (string, error) {
	text, err := readFile(file)
	if err != nil {
		return "", during(err, "read the CA")
	}
	if !x509.NewCertPool().AppendCertsFromPEM([]byte(text)) {
		return "", Usage("%s holds no certificate in PEM: --ca-file is the certificate of the authority that the issuer's is of", file)
	}
	return text, nil
}

func clusterRegisterCommand() *cobra.Command {
	var p proofFlags
	var issuer, crType, location, group string
	var inGroups []string
	c := spec{
		use: "cluster-register NAME (--kubeconfig FILE | --issuer URL [--ca-file FILE] | --jwks FILE [--issuer ISSUER])", short: "Register a Kubernetes cluster", args: cobra.ExactArgs(1),
		more: "With --kubeconfig, issuer and keys are read from the cluster, and a token is made and tried out before anything is\n" +
			"registered. The server then gets the keys from the issuer if it can; else they are uploaded, and must be uploaded\n" +
			"again when the cluster changes them. With --token-review it gets them from the API server, which it also asks about\n" +
			"each token, so that those of deleted pods and service accounts are refused. For that a service account is made in\n" +
			"the cluster that may ask about tokens and do nothing else; you are asked before.\n\n" +
			"Without a kubeconfig, --issuer is the iss claim of the cluster's service-account tokens: kubectl get --raw\n" +
			"/.well-known/openid-configuration tells it. Where the server cannot reach the issuer, give it the keys: kubectl get\n" +
			"--raw /openid/v1/jwks writes the file.",
		example: "tabard ks cluster-register my-cluster --kubeconfig ~/.kube/config --context my-cluster\n" +
			"tabard ks cluster-register my-cluster --kubeconfig ~/.kube/config --token-review --cluster-group production\n" +
			"tabard ks cluster-register my-cluster --issuer https://kubernetes.example.com:6443 --ca-file ca.crt\n" +
			"tabard ks cluster-register my-cluster --jwks jwks.json --issuer https://kubernetes.default.svc",
		flags: func(f *pflag.FlagSet) {
			p.add(f)
			f.StringVar(&issuer, "issuer", "", "`URL` of the tokens' issuer, exactly as in their iss claim")
			choice(f, &crType, "type", "", "type of compute resource that its pods are (default what the cluster is)", "IKS_SA", "ROKS_SA")
			f.StringVar(&location, "location", "", "location in the cluster's CRN")
			f.StringVarP(&group, "group", "g", "", "resource group: name or ID")
			f.StringArrayVar(&inGroups, "cluster-group", nil, "cluster group that it is in: `NAME` or ID; may be repeated")
			idFlag(f)
		},
		run: func(s *session, args []string) error {
			name := args[0]
			body := map[string]any{"name": name}
			for _, ref := range inGroups {
				if _, err := clusterGroups.find(s, ref); err != nil {
					return missingGroup(err, ref)
				}
			}
			var a *explored
			switch {
			case p.kube.file != "" || p.kube.context != "" || issuer == "" && p.jwksFile == "" && p.kube.given():
				s.announce("Registering cluster %s", name)
				var err error
				if a, err = p.explore(s, cmp.Or(p.audience, defaultAudience)); err != nil {
					return err
				}
				defer a.close()
				told, err := a.issuer(s)
				if err != nil && issuer == "" {
					return err
				}
				if issuer != "" && told != "" && issuer != told {
					return fmt.Errorf("--issuer is %s, but the cluster's tokens name %s: leave --issuer out, or name the right --context", issuer, told)
				}
				issuer = cmp.Or(issuer, told)
				if a.found.OpenShift {
					crType = cmp.Or(crType, "ROKS_SA")
				}
				if a.token != nil {
					body["test_token"] = a.token.Token
				}
			case issuer == "" && p.jwksFile != "":
				issuer = defaultIssuer
				s.warn("--issuer was not given; taking %s, the default of kubeadm. Tokens with another iss claim will be refused.", issuer)
				s.announce("Registering cluster %s", name)
			case issuer == "":
				return Usage("give --issuer or --kubeconfig, and --jwks as well where the server cannot reach the cluster")
			default:
				s.announce("Registering cluster %s", name)
			}
			body["issuer"] = issuer
			for k, v := range filled("audience", p.audience, "type", crType, "location", location) {
				body[k] = v
			}
			if len(inGroups) > 0 {
				body["groups"] = inGroups
			}
			if group != "" {
				id, err := groups.find(s, group)
				if err != nil {
					return err
				}
				body["resource_group"] = id
			}
			if s.cmd.Flags().Changed("ca-file") {
				ca, err := authorities(p.caFile)
				if err != nil {
					return err
				}
				body["ca"] = ca
			}
			o, err := p.register(s, a, body, issuer)
			if err != nil {
				return advise(err)
			}
			return s.registered(a, o, "The cluster %s was registered.", name)
		},
	}.command()
	c.MarkFlagsMutuallyExclusive("jwks", "ca-file")
	c.MarkFlagsMutuallyExclusive("jwks", "kubeconfig")
	c.MarkFlagsMutuallyExclusive("jwks", "keys")
	c.MarkFlagsMutuallyExclusive("test-service-account", "no-test")
	return c
}

// register sends a registration, with the keys from the first place that works.
func (p *proofFlags) register(s *session, a *explored, body map[string]any, issuer string) (object, error) {
	post := func() (object, error) {
		return s.send(request{method: http.MethodPost, path: clusters.path, body: body})
	}
	asks := p.tokenReview || p.reviewerToken != ""
	if asks || p.keys == keysServer {
		if p.keys == keysIssuer {
			return object{}, Usage("with --token-review and --reviewer-token the keys come from the API server: leave out --keys %s", keysIssuer)
		}
		if !asks {
			return object{}, Usage("--keys %s needs --token-review or --reviewer-token: API servers tell their keys to nobody without a token", keysServer)
		}
		name, _ := body["name"].(string)
		server, err := p.server(s, name, a)
		if err != nil {
			return object{}, err
		}
		body["server"], body["review"] = server, true
	}
	switch {
	case p.jwksFile != "":
		keys, err := uploaded(p.jwksFile)
		if err != nil {
			return object{}, err
		}
		body["jwks"] = keys
		return post()
	case a == nil && p.keys == "upload":
		return object{}, Usage("--keys upload reads the keys from the cluster: give --kubeconfig, or a file with --jwks")
	case asks && p.keys != "upload", a == nil:
		return post()
	}
	if p.keys == keysIssuer || p.keys == "" && !insideOnly(issuer) {
		if !has(body, "ca") && len(a.cfg.CA) > 0 && sameHost(issuer, a.cfg.URL) {
			body["ca"] = string(a.cfg.CA)
		}
		o, err := post()
		if p.keys == keysIssuer || codeOf(err) != codeKeysUnusable {
			return o, err
		}
		s.note("The server cannot get the keys from the issuer, so they are uploaded: %s", err)
		delete(body, "ca")
	}
	keys, err := a.keySet(s)
	if err != nil {
		return object{}, err
	}
	body["jwks"] = keys
	return post()
}

// note tells of progress that people want to know of.
func (s *session) note(format string, args ...any) {
	if !s.json && !s.idOnly && !s.quiet {
		fmt.Fprintln(s.cmd.ErrOrStderr(), plain(fmt.Sprintf(format, args...)))
	}
}

// registered shows a cluster with what was found out about it.
func (s *session) registered(a *explored, o object, sentence string, args ...any) error {
	s.ok(sentence, args...)
	found := func(title, text string) column { return column{title: title, of: func(object) string { return text }} }
	cols := append(clusters.details[:len(clusters.details):len(clusters.details)], column{title: "Key IDs", path: "key_ids"})
	if a != nil {
		about := a.cfg.URL
		if a.found.Version != "" {
			about += " (Kubernetes " + strings.TrimPrefix(a.found.Version, "v") + ")"
		}
		if a.found.OpenShift {
			about += ", OpenShift"
		}
		cols = append(cols, found("Explored at", about))
		if !sameHost(o.text("issuer"), a.cfg.URL) {
			cols = append(cols, found("Note", "the issuer is not the API server's address, as usual where somebody else runs it"))
		}
	}
	tested := "no token was tried out"
	if subject := o.text("tested.subject"); subject != "" {
		tested = "as " + subject
		if id := o.text("tested.key_id"); id != "" {
			tested += ", signed with key " + id
		}
	}
	return s.show(o, clusters.id, append(cols, found("Token tested", tested)))
}

func clusterUpdateCommand() *cobra.Command {
	var p proofFlags
	var rotate, noReview bool
	c := spec{
		use: "cluster-update (NAME|ID)", short: "Change how a cluster's tokens are proved", args: cobra.ExactArgs(1),
		more: "What no flag names keeps its value. Each change is tried out before it counts, with --kubeconfig with a token too.\n" +
			"--rotate-keys brings in the cluster's present keys: uploaded ones are read from the cluster (--kubeconfig) or a file\n" +
			"(--jwks), others are fetched by the server at once, which it does by itself when it sees an unknown key.\n" +
			"Name, issuer and location of a cluster stay: links and rules are about them. Its groups are changed with\n" +
			"cluster-group-add and cluster-group-remove. Where many clusters have the issuer, and the keys or another API server\n" +
			"come in without a key in common with those that were there, you are asked whether it is the same cluster.",
		example: "tabard ks cluster-update my-cluster --rotate-keys --kubeconfig ~/.kube/config\n" +
			"tabard ks cluster-update my-cluster --token-review --kubeconfig ~/.kube/config\n" +
			"tabard ks cluster-update my-cluster --no-token-review\n" +
			"tabard ks cluster-update my-cluster --jwks jwks.json",
		flags: func(f *pflag.FlagSet) {
			p.add(f)
			f.BoolVar(&rotate, "rotate-keys", false, "take over the cluster's present keys")
			f.BoolVar(&noReview, "no-token-review", false, "do not have the cluster asked about each token")
			idFlag(f)
		},
		run: func(s *session, args []string) error {
			named := func(flag string) bool { return s.cmd.Flags().Changed(flag) }
			if !rotate && !noReview && !p.tokenReview && p.reviewerToken == "" && p.apiServer == "" && p.keys == "" && p.jwksFile == "" && !named("ca-file") && !named("audience") {
				return Usage("nothing to change: give --rotate-keys, --jwks, --keys, --token-review, --no-token-review, --reviewer-token, --api-server, --ca-file or --audience")
			}
			s.announce("Updating cluster %s", args[0])
			old, header, err := clusters.load(s, args[0])
			if err != nil {
				return err
			}
			if rotate && p.keys == "" && p.jwksFile == "" && old.text("keys_from") != keysUploaded {
				o, err := s.send(request{method: http.MethodPost, path: clusters.at(old.text("id"), "refresh_keys")})
				if err != nil {
					return advise(err)
				}
				return s.registered(nil, o, "The server fetched the keys of cluster %s.", old.text("name"))
			}
			body, a, err := p.change(s, old, rotate)
			defer a.close()
			if err != nil {
				return err
			}
			if noReview {
				body["review"] = false
			}
			if named("audience") {
				body["audience"] = p.audience
			}
			if s.cmd.Flags().Changed("ca-file") {
				ca, err := authorities(p.caFile)
				if err != nil {
					return err
				}
				body["ca"] = ca
			}
			o, err := s.send(request{
				method: http.MethodPatch, path: clusters.at(old.text("id")), body: body, header: map[string]string{"If-Match": entityTag(old, header)},
			})
			if err != nil {
				return advise(err)
			}
			if p.tokenReview && o.text("keys_from") == keysUploaded {
				s.note("The keys are still the uploaded ones; with --keys %s the server reads them from the API server from now on.", keysServer)
			}
			if named("audience") && a == nil {
				s.warn("the audience was not tried out: give --kubeconfig to have a token for it made and tried")
			}
			return s.registered(a, o, "The cluster %s was updated.", old.text("name"))
		},
	}.command()
	c.MarkFlagsMutuallyExclusive("token-review", "no-token-review")
	c.MarkFlagsMutuallyExclusive("jwks", "keys")
	c.MarkFlagsMutuallyExclusive("jwks", "kubeconfig")
	c.MarkFlagsMutuallyExclusive("test-service-account", "no-test")
	return c
}

// change makes the body of a change of where keys come from and who is asked.
func (p *proofFlags) change(s *session, old object, rotate bool) (map[string]any, *explored, error) {
	body := map[string]any{}
	asks := p.tokenReview || p.reviewerToken != ""
	upload := p.keys == "upload" || rotate && p.jwksFile == "" && p.keys == ""
	if p.keys == keysIssuer && asks {
		return nil, nil, Usage("with --token-review and --reviewer-token the keys come from the API server: leave out --keys %s", keysIssuer)
	}
	if p.keys == keysServer && !asks && old.text("server.url") == "" {
		return nil, nil, Usage("--keys %s needs --token-review or --reviewer-token: API servers tell their keys to nobody without a token", keysServer)
	}
	var a *explored
	switch {
	case p.kube.file != "" || p.kube.context != "" || (upload || p.tokenReview && p.reviewerToken == "") && p.kube.given():
		var err error
		if a, err = p.explore(s, cmp.Or(p.audience, old.text("audience"), defaultAudience)); err != nil {
			return nil, nil, err
		}
		// Keys of another cluster would make its pods those of this one.
		told, err := a.issuer(s)
		if err != nil {
			return nil, a, err
		}
		if told != old.text("issuer") {
			return nil, a, fmt.Errorf("the kubeconfig is of another cluster: its tokens name the issuer %s, those of cluster %s name %s. Name the right --context",
				told, old.text("name"), old.text("issuer"))
		}
		if a.token != nil {
			body["test_token"] = a.token.Token
		}
	case upload:
		return nil, nil, Usage("the keys of cluster %s are uploaded: give --kubeconfig to read the present ones, or a file with --jwks", old.text("name"))
	}
	switch {
	case p.jwksFile != "":
		keys, err := uploaded(p.jwksFile)
		if err != nil {
			return nil, a, err
		}
		body["jwks"] = keys
	case upload:
		keys, err := a.keySet(s)
		if err != nil {
			return nil, a, err
		}
		body["jwks"] = keys
	case p.keys == keysServer:
		body["jwks"] = nil
	case p.keys == keysIssuer:
		body["jwks"], body["server"], body["review"] = nil, nil, false
		if a != nil && p.caFile == "" && len(a.cfg.CA) > 0 && sameHost(old.text("issuer"), a.cfg.URL) {
			body["ca"] = string(a.cfg.CA)
		}
	}
	calls := asks || p.apiServer != ""
	if upload && p.jwksFile == "" || calls && p.calls(a) != old.text("server.url") {
		if err := p.sameCluster(s, a, old); err != nil {
			return nil, a, err
		}
	}
	if calls {
		server, err := p.server(s, old.text("name"), a)
		if err != nil {
			return nil, a, err
		}
		body["server"] = server
		if asks {
			body["review"] = true
		}
	}
	return body, a, nil
}

// calls is the URL of the API server that is named, or "".
func (p *proofFlags) calls(a *explored) string {
	if p.apiServer == "" && a != nil {
		return a.cfg.URL
	}
	return p.apiServer
}

// sameCluster asks before keys are replaced by entirely different ones of an
// issuer that many clusters have, or by such that cannot be compared: those of
// another cluster would make its pods those of this one, and only a person can
// tell.
func (p *proofFlags) sameCluster(s *session, a *explored, old object) error {
	if !insideOnly(old.text("issuer")) {
		return nil
	}
	had, _ := old.fields["key_ids"].([]any)
	if a != nil {
		for _, id := range had {
			if text, ok := id.(string); ok && slices.Contains(a.found.KeyIDs, text) {
				return nil
			}
		}
	}
	why := "none is the same"
	if a == nil || len(had) == 0 {
		why = "they cannot be compared"
	}
	return s.confirm(p.force, "replace all keys of cluster %s by those of the API server at %s (%s, and many clusters have the issuer %s)",
		old.text("name"), p.calls(a), why, old.text("issuer"))
}
