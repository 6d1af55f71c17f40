// Package demo plays both scenes of Tabard on this machine, with a line of
// explanation for each step and the command or request that it stands for.
package demo

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/crypto/ssh"

	"tabard.dev/tabard/internal/cli"
	"tabard.dev/tabard/internal/server"
)

// Command returns the demo command.
func Command() *cobra.Command {
	var exit bool
	var driver, listen string
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Play both scenes on this machine: a virtual server and a pod get a token without a key",
		Long: `Play both scenes on this machine.

The demo starts a server with an embedded store in a temporary directory, plays
the two scenes, shows one explained denial and the activity events, and leaves
the server running until Ctrl-C. As root on Linux the virtual server is a
network namespace with 169.254.169.254 inside; otherwise it is a loopback
listener. The Kubernetes cluster is a small local issuer that makes tokens in
exactly the form of a Kubernetes API server.`,
		Example: `  tabard demo
  tabard demo --exit`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			d := &demo{out: cmd.OutOrStdout(), errOut: cmd.ErrOrStderr()}
			return d.run(cmd.Context(), driver, listen, exit)
		},
	}
	cmd.Flags().BoolVar(&exit, "exit", false, "end after the last step instead of waiting for Ctrl-C")
	cmd.Flags().StringVar(&driver, "driver", server.DriverAuto, "what the virtual server is: auto, netns or local")
	cmd.Flags().StringVar(&listen, "listen", "127.0.0.1:0", "`ADDRESS` of the server; port 0 takes a free one")
	return cmd
}

type demo struct {
	out, errOut io.Writer
	dir, url    string
	step        int
}

func (d *demo) run(ctx context.Context, driver, listen string, exit bool) (err error) {
	if _, err := exec.LookPath("curl"); err != nil {
		return errors.New("the demo plays curl calls and there is no curl; install it first")
	}
	if d.dir, err = os.MkdirTemp("", "tabard-demo-"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(d.dir)) }()
	if err := os.Setenv("TABARD_HOME", filepath.Join(d.dir, "cli")); err != nil {
		return err
	}
	logFile, err := os.Create(filepath.Join(d.dir, "server.log"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, logFile.Close()) }()

	s, err := server.Open(ctx, server.Config{
		DataDir: filepath.Join(d.dir, "data"), Listen: []string{listen}, Driver: driver,
		Account: "Demo", Log: slog.New(slog.NewTextHandler(logFile, nil)),
	})
	if err != nil {
		return err
	}
	d.url = s.URL()
	serving, stop := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() { done <- s.Run(serving) }()
	defer func() {
		stop()
		err = errors.Join(err, <-done)
	}()

	d.title("Tabard: identity for workloads, without keys")
	d.say("A server runs at %s with an embedded store in %s.", d.url, d.dir)
	if err := errors.Join(d.login(ctx)); err != nil {
		return err
	}
	if err := d.virtualServer(ctx); err != nil {
		return fmt.Errorf("scene A: %w", err)
	}
	if err := d.pod(ctx); err != nil {
		return fmt.Errorf("scene B: %w", err)
	}
	d.title("What the security engineer sees")
	d.say("Every token and every refusal above stands in the activity log; the log was written before the token went out.")
	if err := d.tabard(ctx, "activity", "events", "--limit", "12"); err != nil {
		return err
	}
	d.title("Done")
	if exit {
		return nil
	}
	fmt.Fprintf(d.out, "The server goes on at %s until Ctrl-C. In another shell:\n\n  tabard login -a %s --apikey @%s\n\n",
		d.url, d.url, filepath.Join(d.dir, "data", "owner.json"))
	select {
	case <-ctx.Done():
		return nil
	case err := <-done:
		done <- nil
		return err
	}
}

func (d *demo) login(ctx context.Context) error {
	d.say("The first start made an account and its owner. The operator logs in with the owner's key; it is the last key in this demo.")
	return d.tabard(ctx, "login", "-a", d.url, "--apikey", "@"+filepath.Join(d.dir, "data", "owner.json"))
}

const (
	metadataURL = "http://169.254.169.254"
	apiVersion  = "version=2022-03-31"
)

func (d *demo) virtualServer(ctx context.Context) error {
	d.title("Scene A: a virtual server")
	keyFile := filepath.Join(d.dir, "id_ed25519.pub")
	if err := writeSSHKey(keyFile); err != nil {
		return err
	}
	steps := []struct {
		why  string
		args []string
	}{
		{"A trusted profile is an identity without a credential.", []string{"iam", "trusted-profile-create", "my-trusted-profile", "--description", "My trusted profile"}},
		{"It may operate the virtual server infrastructure: list, read, start and stop, but not create.", []string{"iam", "trusted-profile-policy-create", "my-trusted-profile", "--roles", "Operator", "--service-name", "is"}},
		{"A network for the instance.", []string{"is", "vpc-create", "my-vpc"}},
		{"", []string{"is", "subnet-create", "my-subnet", "my-vpc", "--zone", "us-south-3", "--ipv4-address-count", "256"}},
		{"", []string{"is", "key-create", "my-key", "@" + keyFile, "--key-type", "ed25519"}},
		{"The instance has the metadata service on and takes on the profile by default.", []string{
			"is", "instance-create", "my-instance", "my-vpc", "us-south-3", "bx2-2x8", "my-subnet", "--image", "tabard-local-1",
			"--primary-network-interface", `{"name":"primary-nic","subnet":{"name":"my-subnet"}}`, "--keys", "my-key",
			"--metadata-service", "true", "--default-trusted-profile", "my-trusted-profile",
		}},
		{"", []string{"is", "floating-ip-reserve", "my-fip1", "--zone", "us-south-3"}},
		{"", []string{"is", "instance-network-interface-floating-ip-add", "my-instance", "primary-nic", "my-fip1"}},
	}
	for _, s := range steps {
		d.say("%s", s.why)
		if err := d.tabard(ctx, s.args...); err != nil {
			return err
		}
	}

	d.say("Inside the instance: ask the metadata service for an instance identity token. The service knows the instance by the interface that the request came in on.")
	identity, err := d.inside(ctx, "-X", "PUT", metadataURL+"/instance_identity/v1/token?"+apiVersion,
		"-H", "Metadata-Flavor: ibm", "-d", `{"expires_in": 600}`)
	if err != nil {
		return err
	}
	identityToken, err := d.token(identity)
	if err != nil {
		return err
	}
	d.say("Exchange it for an IAM token of the default profile.")
	iam, err := d.inside(ctx, "-X", "POST", metadataURL+"/instance_identity/v1/iam_token?"+apiVersion, "-H", "Authorization: Bearer "+identityToken)
	if err != nil {
		return err
	}
	iamToken, err := d.token(iam)
	if err != nil {
		return err
	}
	d.say("With it, list the instances, still from inside.")
	list, err := d.inside(ctx, d.url+"/v1/instances?"+apiVersion+"&generation=2", "-H", "Authorization: Bearer "+iamToken)
	if err != nil {
		return err
	}
	var instances struct {
		Instances []struct{ Name, Status, CRN string } `json:"instances"`
	}
	if err := json.Unmarshal(list, &instances); err != nil || len(instances.Instances) != 1 {
		return fmt.Errorf("want a list with one instance, got %s", list)
	}
	fmt.Fprintf(d.out, "    one instance: %s (%s)\n", instances.Instances[0].Name, instances.Instances[0].Status)

	d.say("Operator may not create: the same token is refused.")
	refusal, err := d.inside(ctx, "-X", "POST", d.url+"/v1/instances?"+apiVersion+"&generation=2", "-H", "Authorization: Bearer "+iamToken,
		"-d", `{"zone":{"name":"us-south-3"}}`)
	if err != nil {
		return err
	}
	d.show(refusal)
	if !bytes.Contains(refusal, []byte("not_authorized")) {
		return errors.New("creating an instance was not refused")
	}
	return nil
}

// inside runs curl in the instance, printing the command with tokens left out.
func (d *demo) inside(ctx context.Context, args ...string) ([]byte, error) {
	full := append([]string{"is", "instance-exec", "my-instance", "--", "curl", "-sS"}, args...)
	d.command(full)
	var out, errOut bytes.Buffer
	if code := cli.Execute(ctx, full, strings.NewReader(""), &out, &errOut); code != 0 {
		return nil, fmt.Errorf("curl inside the instance ended with %d: %s", code, errOut.String())
	}
	return out.Bytes(), nil
}

// token takes the access token out of an answer and shows the rest of it.
func (d *demo) token(answer []byte) (string, error) {
	var m map[string]any
	if err := json.Unmarshal(answer, &m); err != nil {
		return "", fmt.Errorf("the answer is not JSON: %s", answer)
	}
	raw, ok := m["access_token"].(string)
	if !ok || raw == "" {
		return "", fmt.Errorf("the answer has no token: %s", answer)
	}
	m["access_token"] = "(not shown)"
	b, err := json.Marshal(m)
	if err != nil {
		return "", err
	}
	d.show(b)
	fmt.Fprintf(d.out, "    the token's claims: %s\n", claims(raw))
	return raw, nil
}

func (d *demo) pod(ctx context.Context) error {
	d.title("Scene B: a pod")
	d.say("No Kubernetes runs here: a small local issuer stands in for a cluster's API server and makes service-account tokens in exactly its form.")
	cluster, err := newIssuer(ctx)
	if err != nil {
		return err
	}
	defer cluster.close()
	fmt.Fprintf(d.out, "    issuer: %s\n", cluster.url)

	d.say("Register the cluster once; its published keys are what Tabard believes from then on.")
	if err := d.tabard(ctx, "ks", "cluster-register", "my-cluster", "--issuer", cluster.url); err != nil {
		return err
	}
	crn, err := d.field(ctx, "crn", "ks", "cluster-get", "my-cluster")
	if err != nil {
		return err
	}
	d.say("Some resources, and a profile that may see only those of Cloud Object Storage.")
	for _, args := range [][]string{
		{"resource", "service-instance-create", "my-bucket-store", "cloud-object-storage", "standard", "us-south"},
		{"resource", "service-instance-create", "my-keys", "kms", "tiered-pricing", "us-south"},
		{"iam", "trusted-profile-create", "my-pod-profile"},
		{"iam", "trusted-profile-policy-create", "my-pod-profile", "--roles", "Viewer", "--service-name", "cloud-object-storage"},
	} {
		if err := d.tabard(ctx, args...); err != nil {
			return err
		}
	}
	d.say("Link the profile to one service account: cluster, namespace and name.")
	if err := d.tabard(ctx, "iam", "trusted-profile-link-create", "my-pod-profile", "--name", "web", "--cr-type", "IKS_SA",
		"--link-crn", crn, "--link-namespace", "shop", "--link-name", "web"); err != nil {
		return err
	}

	d.say("The pod posts its projected token and the profile's name.")
	saToken, err := cluster.token("shop", "web", "web-7d4b9")
	if err != nil {
		return err
	}
	fmt.Fprintf(d.out, "    the pod's token says: %s\n", claims(saToken))
	status, answer, err := d.exchange(ctx, saToken, "")
	if err != nil {
		return err
	}
	if status != http.StatusOK {
		return fmt.Errorf("the exchange was refused: %s", answer)
	}
	iamToken, err := d.token(answer)
	if err != nil {
		return err
	}
	d.say("With the IAM token it lists the account's resources and sees what the profile may see: one of the two.")
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, d.url+"/v2/resource_instances?limit=100", nil)
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "Bearer "+iamToken)
	fmt.Fprintf(d.out, "  > curl '%s/v2/resource_instances?limit=100' -H \"Authorization: Bearer $IAM_TOKEN\"\n", d.url)
	_, list, err := do(req)
	if err != nil {
		return err
	}
	var resources struct {
		Resources []struct{ Name string } `json:"resources"`
	}
	if err := json.Unmarshal(list, &resources); err != nil || len(resources.Resources) != 1 {
		return fmt.Errorf("want one visible resource, got %s", list)
	}
	fmt.Fprintf(d.out, "    resources: %s\n", resources.Resources[0].Name)

	d.say("A pod of another namespace asks for the same profile and is refused.")
	stranger, err := cluster.token("billing", "web", "web-1")
	if err != nil {
		return err
	}
	transaction := fmt.Sprintf("demo-%d", time.Now().Unix())
	status, answer, err = d.exchange(ctx, stranger, transaction)
	if err != nil {
		return err
	}
	if status != http.StatusBadRequest {
		return fmt.Errorf("the stranger was not refused: %s", answer)
	}
	d.show(answer)
	d.say("The caller learns no more than the protocol says. The administrator asks why, with the transaction id.")
	return d.tabard(ctx, "activity", "explain", transaction)
}

func (d *demo) exchange(ctx context.Context, saToken, transaction string) (int, []byte, error) {
	const grantType = "urn:ibm:params:oauth:grant-type:cr-token"
	form := url.Values{"grant_type": {grantType}, "cr_token": {saToken}, "profile_name": {"my-pod-profile"}}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, d.url+"/identity/token", strings.NewReader(form.Encode()))
	if err != nil {
		return 0, nil, err
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	header := ""
	if transaction != "" {
		req.Header.Set("Transaction-Id", transaction)
		header = " -H 'Transaction-Id: " + transaction + "'"
	}
	fmt.Fprintf(d.out, "  > curl %s/identity/token%s -d grant_type=%s \\\n         --data-urlencode cr_token@/var/run/secrets/tokens/sa-token -d profile_name=my-pod-profile\n",
		d.url, header, grantType)
	return do(req)
}

func do(req *http.Request) (int, []byte, error) {
	client := &http.Client{Timeout: 30 * time.Second}
	resp, err := client.Do(req)
	if err != nil {
		return 0, nil, err
	}
	b, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	return resp.StatusCode, b, errors.Join(err, resp.Body.Close())
}

// tabard runs a command of the command line as a user would.
func (d *demo) tabard(ctx context.Context, args ...string) error {
	d.command(args)
	var out bytes.Buffer
	code := cli.Execute(ctx, args, strings.NewReader(""), &out, &out)
	for line := range strings.Lines(out.String()) {
		fmt.Fprint(d.out, "    ", line)
	}
	if code != 0 {
		return fmt.Errorf("tabard %s ended with %d", strings.Join(args, " "), code)
	}
	return nil
}

// field runs a command for one field of its JSON output.
func (d *demo) field(ctx context.Context, name string, args ...string) (string, error) {
	var out, errOut bytes.Buffer
	if code := cli.Execute(ctx, append(args, "--output", "json"), strings.NewReader(""), &out, &errOut); code != 0 {
		return "", fmt.Errorf("tabard %s ended with %d: %s", strings.Join(args, " "), code, errOut.String())
	}
	var m map[string]any
	if err := json.Unmarshal(out.Bytes(), &m); err != nil {
		return "", fmt.Errorf("tabard %s did not print JSON: %w", strings.Join(args, " "), err)
	}
	value, _ := m[name].(string)
	return value, nil
}

func (d *demo) title(s string) { fmt.Fprintf(d.out, "\n== %s\n", s) }

func (d *demo) say(format string, args ...any) {
	if text := fmt.Sprintf(format, args...); text != "" {
		d.step++
		fmt.Fprintf(d.out, "\n%2d. %s\n", d.step, text)
	}
}

func (d *demo) command(args []string) {
	shown := make([]string, len(args))
	for i, a := range args {
		if _, raw, ok := strings.Cut(a, "Authorization: Bearer "); ok && raw != "" {
			a = "Authorization: Bearer $TOKEN"
		}
		if strings.ContainsAny(a, " {}\"$&?") {
			a = "'" + a + "'"
		}
		shown[i] = a
	}
	fmt.Fprintf(d.out, "  > tabard %s\n", strings.Join(shown, " "))
}

func (d *demo) show(answer []byte) { fmt.Fprintf(d.out, "    %s\n", bytes.TrimSpace(answer)) }

func writeSSHKey(file string) error {
	public, _, err := ed25519.GenerateKey(nil)
	if err != nil {
		return err
	}
	key, err := ssh.NewPublicKey(public)
	if err != nil {
		return err
	}
	return os.WriteFile(file, ssh.MarshalAuthorizedKey(key), 0o600)
}
