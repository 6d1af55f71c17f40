package cli

import (
	"bufio"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/mattn/go-isatty"
	"github.com/spf13/cobra"
)

// state is what stays between two runs of the program. It holds tokens that
// end, never the API key that they were got with.
type state struct {
	URL               string    `json:"url"`
	AccountID         string    `json:"account_id,omitempty"`
	IAMID             string    `json:"iam_id,omitempty"`
	User              string    `json:"user,omitempty"`
	Email             string    `json:"email,omitempty"`
	Region            string    `json:"region,omitempty"`
	ResourceGroupID   string    `json:"resource_group_id,omitempty"`
	ResourceGroupName string    `json:"resource_group_name,omitempty"`
	AccessToken       string    `json:"access_token,omitempty"`
	RefreshToken      string    `json:"refresh_token,omitempty"`
	Expires           time.Time `json:"expires,omitzero"` // of the access token
	Own               *state    `json:"own,omitempty"`    // of whoever assumed the profile that this one is of
}

// freshFor is how long an access token must still be good for to be used.
const freshFor = time.Minute

var errLoggedOut = errors.New("you are not logged in. Log in with: tabard login -a URL --apikey @FILE")

func (s *state) who() string {
	if s.User != "" {
		return s.User
	}
	return s.IAMID
}

func statePath() (string, error) {
	dir := os.Getenv("TABARD_HOME")
	if dir == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			return "", fmt.Errorf("find the home directory (set TABARD_HOME to do without): %w", err)
		}
		dir = filepath.Join(home, ".tabard")
	}
	return filepath.Join(dir, "config.json"), nil
}

// errDamaged is what a saved session that cannot be read ends with.
var errDamaged = errors.New("the saved session is damaged")

// loadState returns the saved state, or an empty one before the first login and
// beside errDamaged.
func loadState() (*state, error) {
	path, err := statePath()
	if err != nil {
		return nil, err
	}
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return &state{}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the session: %w", err)
	}
	st := &state{}
	if err := json.Unmarshal(b, st); err != nil {
		return &state{}, fmt.Errorf("%w: log in again with tabard login, which replaces %s: %w", errDamaged, path, err)
	}
	return st, nil
}

func (s *state) save() error {
	path, err := statePath()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("save the session: %w", err)
	}
	b, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return fmt.Errorf("encode the session: %w", err)
	}
	if err := writeSecret(path, append(b, '\n')); err != nil {
		return fmt.Errorf("save the session: %w", err)
	}
	return nil
}

// writeSecret replaces a file by one that only its owner can read, in one step,
// so that a reader beside it sees the old one or the new one.
func writeSecret(path string, b []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-*") // mode 0600
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	err = errors.Join(err, f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		_ = os.Remove(f.Name())
	}
	return err
}

// session is one command under way in the name of who is logged in.
type session struct {
	*state
	cmd    *cobra.Command
	out    io.Writer
	client *client

	json, quiet, idOnly bool
}

// offline returns a session whose token may be missing or old. Beside errDamaged
// it has nothing in it.
func offline(cmd *cobra.Command) (*session, error) {
	st, err := loadState()
	if err != nil && !errors.Is(err, errDamaged) {
		return nil, err
	}
	s := &session{state: st, cmd: cmd, out: cmd.OutOrStdout()}
	s.json = cmd.Flag("output").Value.String() != ""
	s.quiet = cmd.Flag("quiet").Value.String() == "true"
	if f := cmd.Flag("id"); f != nil && f.Value.Type() == "bool" {
		s.idOnly = f.Value.String() == "true"
	}
	return s, err
}

// open returns a session with an access token that is good for a while yet.
func open(cmd *cobra.Command) (*session, error) {
	s, err := offline(cmd)
	if err != nil {
		return nil, err
	}
	if s.URL == "" || s.AccessToken == "" {
		return nil, errLoggedOut
	}
	s.warnPlain()
	if time.Until(s.Expires) < freshFor {
		if err := s.refresh(); err != nil {
			return nil, err
		}
	}
	s.client = newClient(s.URL, s.AccessToken)
	return s, nil
}

func (s *session) warnPlain() {
	if remotePlain(s.URL) {
		fmt.Fprintf(s.cmd.ErrOrStderr(), "Warning: %s is not encrypted; whoever is on the way can read and use your tokens. Use https.\n", s.URL)
	}
}

// refresh replaces the access token, while the session lasts.
func (s *session) refresh() error {
	if s.RefreshToken == "" {
		if time.Until(s.Expires) > 0 {
			return nil
		}
		if s.Own != nil {
			return errors.New("the trusted profile's token has ended. Go on as yourself with: tabard iam trusted-profile-leave")
		}
		return errors.New("the session has ended. Log in again with: tabard login")
	}
	err := s.exchange(url.Values{"grant_type": {"refresh_token"}, "refresh_token": {s.RefreshToken}})
	var refused *apiError
	if errors.As(err, &refused) && refused.Status < http.StatusInternalServerError {
		return fmt.Errorf("the session has ended, log in again with tabard login: %w", err)
	}
	if err != nil {
		return fmt.Errorf("renew the session: %w", err)
	}
	return s.save()
}

// exchange asks the token endpoint for tokens as the client bx, which is the
// one that gets a refresh token (reference/iam-identity.md section 1.3), and
// keeps them.
func (s *session) exchange(form url.Values) error {
	var answer struct {
		AccessToken  string `json:"access_token"`
		RefreshToken string `json:"refresh_token"`
		Expiration   int64  `json:"expiration"`
	}
	_, err := newClient(s.URL, "").do(s.ctx(), request{
		method: http.MethodPost, path: "/identity/token", body: form,
		header: map[string]string{"Authorization": "Basic " + base64.StdEncoding.EncodeToString([]byte("bx:bx"))},
	}, &answer)
	if err != nil {
		return err
	}
	return s.adopt(answer.AccessToken, answer.RefreshToken, time.Unix(answer.Expiration, 0))
}

// claims are what the client shows of an access token.
type claims struct {
	Issuer  string `json:"iss"`
	IAMID   string `json:"iam_id"`
	Name    string `json:"name"`
	Email   string `json:"email"`
	Subject string `json:"sub"`
	Expires int64  `json:"exp"`
	Account struct {
		BSS string `json:"bss"`
	} `json:"account"`
}

// readClaims decodes a token. The signature is not looked at: the server judges
// the token, the client only displays it.
func readClaims(access string) (c claims, err error) {
	parts := strings.Split(access, ".")
	if len(parts) != 3 {
		return c, errors.New("it is not a JWT")
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return c, err
	}
	return c, json.Unmarshal(payload, &c)
}

// issuerOf returns the server that issued a token: by default the issuer is its
// URL and /identity. It returns "" for an issuer of another form.
func issuerOf(access string) string {
	c, err := readClaims(access)
	if err != nil {
		return ""
	}
	base, ok := strings.CutSuffix(c.Issuer, "/identity")
	if !ok {
		return ""
	}
	return base
}

// adopt takes tokens over into the state, with who they are for.
func (s *session) adopt(access, refresh string, expires time.Time) error {
	claims, err := readClaims(access)
	if err != nil {
		return fmt.Errorf("the access token that came cannot be read: %w", err)
	}
	if refresh == "not_supported" {
		refresh = ""
	}
	if expires.Unix() <= 0 {
		expires = time.Unix(claims.Expires, 0)
	}
	s.AccessToken, s.RefreshToken, s.Expires = access, refresh, expires.UTC()
	s.AccountID, s.IAMID, s.User, s.Email = claims.Account.BSS, claims.IAMID, claims.Name, claims.Email
	if s.User == "" {
		s.User = claims.Subject
	}
	return nil
}

func (s *session) ctx() context.Context { return s.cmd.Context() }

func (s *session) get(path string, query url.Values) (object, http.Header, error) {
	var o object
	h, err := s.client.do(s.ctx(), request{method: http.MethodGet, path: path, query: query}, &o)
	return o, h, err
}

func (s *session) send(r request) (object, error) {
	var o object
	_, err := s.client.do(s.ctx(), r, &o)
	return o, err
}

// confirm asks before something is destroyed. Without a terminal there is
// nobody to ask, and a script says -f.
func (s *session) confirm(force bool, format string, args ...any) error {
	if force {
		return nil
	}
	what := fmt.Sprintf(format, args...)
	if !terminal(s.cmd.InOrStdin()) {
		return fmt.Errorf("%s needs a confirmation, and there is no terminal to ask on: use -f to go ahead without", what)
	}
	return s.ask(what)
}

func (s *session) ask(what string) error {
	fmt.Fprintf(s.cmd.ErrOrStderr(), "%s? [y/N] ", plain(capital(what)))
	answer, err := bufio.NewReader(s.cmd.InOrStdin()).ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("read the confirmation: %w", err)
	}
	switch strings.ToLower(strings.TrimSpace(answer)) {
	case "y", "yes":
		return nil
	}
	return errors.New("not confirmed, nothing was done")
}

func terminal(r io.Reader) bool {
	f, ok := r.(*os.File)
	return ok && isatty.IsTerminal(f.Fd())
}

// fileOrText returns the value of an argument that may name a file as @FILE,
// with @- for standard input.
func fileOrText(cmd *cobra.Command, arg string) (string, error) {
	path, ok := strings.CutPrefix(arg, "@")
	switch {
	case !ok:
		return arg, nil
	case path == "-":
		b, err := io.ReadAll(io.LimitReader(cmd.InOrStdin(), maxFile))
		return string(b), err
	}
	return readFile(path)
}

// maxFile bounds a file that an argument names, in bytes.
const maxFile = 1 << 20

func readFile(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return "", fmt.Errorf("read %s: %w", path, err)
	}
	if len(b) > maxFile {
		return "", fmt.Errorf("%s is larger than %d bytes", path, maxFile)
	}
	return string(b), nil
}
