package kube

import (
	"bytes"
	"cmp"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/lexer"
	"github.com/goccy/go-yaml/token"
)

// Bounds on what a kubeconfig file may be.
const (
	maxFile  = 1 << 20 // bytes, of it and of each file that it names
	maxDepth = 64      // of lists and maps in one another
)

// Kubeconfig is what kubeconfig files say about clusters, users and contexts,
// where of two with one name the first counts. Only what is needed to reach an
// API server is read.
type Kubeconfig struct {
	current  string
	contexts map[string]kubeContext
	clusters map[string]kubeCluster
	users    map[string]kubeUser
}

// The form of the file: https://kubernetes.io/docs/reference/config-api/kubeconfig.v1/
type kubeFile struct {
	Kind     string `json:"kind"`
	Current  string `json:"current-context"`
	Contexts []struct {
		Name    string      `json:"name"`
		Context kubeContext `json:"context"`
	} `json:"contexts"`
	Clusters []struct {
		Name    string      `json:"name"`
		Cluster kubeCluster `json:"cluster"`
	} `json:"clusters"`
	Users []struct {
		Name string   `json:"name"`
		User kubeUser `json:"user"`
	} `json:"users"`
}

type kubeContext struct {
	Cluster   string `json:"cluster"`
	User      string `json:"user"`
	Namespace string `json:"namespace"`
}

type kubeCluster struct {
	dir        string
	Server     string      `json:"server"`
	ServerName string      `json:"tls-server-name"`
	Insecure   bool        `json:"insecure-skip-tls-verify"`
	CAFile     string      `json:"certificate-authority"`
	CAData     string      `json:"certificate-authority-data"`
	ProxyURL   string      `json:"proxy-url"`
	Extensions []extension `json:"extensions"`
}

type extension struct {
	Name      string `json:"name"`
	Extension any    `json:"extension"`
}

type kubeUser struct {
	dir       string
	CertFile  string   `json:"client-certificate"`
	CertData  string   `json:"client-certificate-data"`
	KeyFile   string   `json:"client-key"`
	KeyData   string   `json:"client-key-data"`
	Token     string   `json:"token"`
	TokenFile string   `json:"tokenFile"`
	Username  string   `json:"username"`
	Password  string   `json:"password"`
	As        string   `json:"as"`
	AsUID     string   `json:"as-uid"`
	AsGroups  []string `json:"as-groups"`
	Provider  *struct {
		Name string `json:"name"`
	} `json:"auth-provider"`
	Exec *execPlugin `json:"exec"`
}

// ExecOptions say how the credential plugins that a kubeconfig names are run. A
// plugin is a program of the file's choice, so whoever got the file from
// elsewhere runs what its author wants.
type ExecOptions struct {
	// Tell is called with a plugin's command line before each run. Without it, no
	// plugin is run.
	Tell func(command string)

	Stdin  *os.File  // a terminal, for plugins that ask a person; may be nil
	Stderr io.Writer // for what a plugin has to say; nil keeps it for the error

	Timeout time.Duration    // of one run; default [DefaultExecTimeout]
	Now     func() time.Time // default time.Now
}

// FromKubeconfig returns how a context of a kubeconfig file says that the API
// server is reached; "" is the current context. A user with a credential plugin
// is refused: [Kubeconfig.Config] runs those.
func FromKubeconfig(file, context string) (Config, error) {
	k, err := ReadKubeconfig(file)
	if err != nil {
		return Config{}, err
	}
	return k.Config(context, ExecOptions{})
}

// ReadKubeconfig reads one or more files. With several, those that do not exist
// are passed over, as with the list in KUBECONFIG.
func ReadKubeconfig(files ...string) (*Kubeconfig, error) {
	k := &Kubeconfig{contexts: map[string]kubeContext{}, clusters: map[string]kubeCluster{}, users: map[string]kubeUser{}}
	found := false
	for _, name := range files {
		b, err := readBounded(name)
		if errors.Is(err, os.ErrNotExist) && len(files) > 1 {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read the kubeconfig: %w", err)
		}
		found = true
		abs, err := filepath.Abs(name)
		if err != nil {
			return nil, fmt.Errorf("find the kubeconfig's folder: %w", err)
		}
		if err := k.add(b, filepath.Dir(abs)); err != nil {
			return nil, fmt.Errorf("read the kubeconfig %s: %w", name, err)
		}
	}
	if !found {
		return nil, fmt.Errorf("there is no kubeconfig: none of %s exists", strings.Join(files, ", "))
	}
	return k, nil
}

// add takes over what a file says that is not said yet. Paths in it are relative
// to its folder.
func (k *Kubeconfig) add(b []byte, dir string) error {
	f, err := parseKubeconfig(b)
	if err != nil {
		return err
	}
	k.current = cmp.Or(k.current, f.Current)
	for _, c := range f.Contexts {
		if _, ok := k.contexts[c.Name]; !ok {
			k.contexts[c.Name] = c.Context
		}
	}
	for _, c := range f.Clusters {
		if _, ok := k.clusters[c.Name]; !ok {
			c.Cluster.dir = dir
			k.clusters[c.Name] = c.Cluster
		}
	}
	for _, u := range f.Users {
		if _, ok := k.users[u.Name]; !ok {
			u.User.dir = dir
			k.users[u.Name] = u.User
		}
	}
	return nil
}

func parseKubeconfig(b []byte) (*kubeFile, error) {
	f := &kubeFile{}
	if b := bytes.TrimSpace(b); len(b) > 0 && b[0] == '{' {
		// JSON with tabs in it is no YAML, and JSON's decoder bounds its depth itself.
		if err := json.Unmarshal(b, f); err != nil {
			return nil, fmt.Errorf("it is not JSON: %w", err)
		}
	} else {
		if err := tame(string(b)); err != nil {
			return nil, err
		}
		if err := yaml.Unmarshal(b, f); err != nil {
			return nil, fmt.Errorf("it is not YAML of a kubeconfig: %s", yaml.FormatError(err, false, false)) // with source, it would show secrets
		}
	}
	if f.Kind != "" && f.Kind != "Config" {
		return nil, fmt.Errorf("it has the kind %q, a kubeconfig has Config", f.Kind)
	}
	return f, nil
}

// tame refuses YAML that would cost more than its size: aliases of aliases, and
// nesting that exhausts the parser's stack. No kubeconfig has either.
func tame(text string) error {
	depth := 0
	for _, t := range lexer.Tokenize(text) {
		switch t.Type {
		case token.AnchorType, token.AliasType:
			return errors.New("it has anchors or aliases, which are not supported in a kubeconfig")
		case token.SequenceStartType, token.MappingStartType:
			depth++
		case token.SequenceEndType, token.MappingEndType:
			depth--
		case token.SequenceEntryType, token.MappingKeyType:
			if t.Position != nil && t.Position.Column > 4*maxDepth {
				return errors.New("its lists are nested too deeply for a kubeconfig")
			}
		}
		if depth > maxDepth {
			return errors.New("it is nested too deeply for a kubeconfig")
		}
	}
	return nil
}

// Contexts returns the names of the contexts, sorted.
func (k *Kubeconfig) Contexts() []string {
	names := make([]string, 0, len(k.contexts))
	for n := range k.contexts {
		names = append(names, n)
	}
	slices.Sort(names)
	return names
}

// Config returns how a context says that the API server is reached; "" is the
// current context.
func (k *Kubeconfig) Config(context string, o ExecOptions) (Config, error) {
	name := cmp.Or(context, k.current)
	if name == "" && len(k.contexts) == 1 {
		name = k.Contexts()[0]
	}
	if len(k.contexts) == 0 {
		return Config{}, errors.New("the kubeconfig has no contexts, so it says nothing of how a cluster is reached: is it the right file?")
	}
	if name == "" {
		return Config{}, fmt.Errorf("the kubeconfig has no current context: name one of its contexts, which are %s", strings.Join(k.Contexts(), ", "))
	}
	kc, ok := k.contexts[name]
	if !ok {
		return Config{}, fmt.Errorf("the kubeconfig has no context %q, but %s", name, strings.Join(k.Contexts(), ", "))
	}
	c, ok := k.clusters[kc.Cluster]
	if !ok {
		return Config{}, fmt.Errorf("context %s of the kubeconfig is about cluster %q, which is not in it", name, kc.Cluster)
	}
	cfg, err := c.config()
	if err != nil {
		return Config{}, fmt.Errorf("cluster %s of the kubeconfig: %w", kc.Cluster, err)
	}
	u, ok := k.users[kc.User]
	if !ok {
		if kc.User == "" {
			return cfg, nil
		}
		return Config{}, fmt.Errorf("context %s of the kubeconfig is of user %q, who is not in it", name, kc.User)
	}
	if err := u.prove(&cfg, c, o); err != nil {
		return Config{}, fmt.Errorf("user %s of the kubeconfig: %w", kc.User, err)
	}
	return cfg, nil
}

func (c kubeCluster) config() (Config, error) {
	if c.Server == "" {
		return Config{}, errors.New("it has no server")
	}
	ca, err := content(c.dir, c.CAData, c.CAFile)
	if err != nil {
		return Config{}, fmt.Errorf("read its certificate-authority: %w", err)
	}
	if c.Insecure && len(ca) > 0 {
		return Config{}, errors.New("it has both insecure-skip-tls-verify and a certificate-authority: remove one of them")
	}
	cfg := Config{URL: strings.TrimSuffix(c.Server, "/"), CA: ca, ServerName: c.ServerName, Insecure: c.Insecure}
	if c.ProxyURL != "" {
		u, err := url.Parse(c.ProxyURL)
		if err != nil || u.Host == "" || !slices.Contains([]string{"http", "https", "socks5"}, u.Scheme) {
			return Config{}, errors.New("its proxy-url is not an http, https or socks5 URL")
		}
		cfg.Proxy = u
	}
	return cfg, nil
}

// prove puts the user's credentials into a Config.
func (u kubeUser) prove(cfg *Config, c kubeCluster, o ExecOptions) error {
	switch {
	case u.As != "" || u.AsUID != "" || len(u.AsGroups) > 0:
		// Without it, more would be done in the cluster than the file lets its user do.
		return errors.New("it impersonates another user (as), which is not supported: use another context")
	case u.Provider != nil:
		return fmt.Errorf("it has the auth-provider %s, a form that kubectl 1.26 dropped: use one with exec, a token or a certificate", u.Provider.Name)
	}
	cert, err := content(u.dir, u.CertData, u.CertFile)
	if err != nil {
		return fmt.Errorf("read its client-certificate: %w", err)
	}
	key, err := content(u.dir, u.KeyData, u.KeyFile)
	if err != nil {
		return fmt.Errorf("read its client-key: %w", err)
	}
	if len(cert) > 0 || len(key) > 0 {
		pair, err := tls.X509KeyPair(cert, key)
		if err != nil {
			return fmt.Errorf("its client certificate and key: %w", err)
		}
		cfg.Certificate = &pair
	}
	switch {
	case u.TokenFile != "":
		cfg.Token = tokenFile(resolve(u.dir, u.TokenFile), u.Token)
	case u.Token != "":
		cfg.Token = StaticToken(u.Token)
	case u.Username != "":
		cfg.Basic = url.UserPassword(u.Username, u.Password)
	case u.Exec != nil:
		e, err := newExecCredential(*u.Exec, u.dir, c, cfg.CA, o)
		if err != nil {
			return err
		}
		cfg.Token = e.token
		if cfg.Certificate == nil {
			cfg.ClientCertificate = e.certificate
		}
	}
	return nil
}

// content returns data in base64, or else what is in a file.
func content(dir, data, file string) ([]byte, error) {
	if data != "" {
		return base64.StdEncoding.DecodeString(strings.Join(strings.Fields(data), ""))
	}
	if file == "" {
		return nil, nil
	}
	return readBounded(resolve(dir, file))
}

func resolve(dir, file string) string {
	if filepath.IsAbs(file) {
		return file
	}
	return filepath.Join(dir, file)
}

func readBounded(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, err
	}
	if len(b) > maxFile {
		return nil, fmt.Errorf("%s is longer than %d bytes", name, maxFile)
	}
	return b, nil
}
