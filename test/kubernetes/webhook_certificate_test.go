package kubernetes

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/base64"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"tabard.dev/tabard/test/kubetest"
)

func TestTheWebhooksCertificateIsReplacedWhilePodsAreCreated(t *testing.T) {
	t.Parallel() // it waits more than it works
	s := newWebhookSite(t, kubetest.Options{})
	s.Namespace("strict", map[string]string{identityLabel: "required"}, nil)
	s.ServiceAccount("strict", "web", map[string]string{profileAnnotation: "p"})
	const life = "24s"
	a, b := s.start("--certificate-life", life), s.start("--certificate-life", life)

	secret := func() *corev1.Secret {
		got, err := s.Client().CoreV1().Secrets(webhookNamespace).Get(context.Background(), "tabard-webhook-certificate", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	first := secret().Data["tls.crt"]
	serves := func(r *replica, certificate []byte) bool {
		conn, err := tls.Dial("tcp", r.address, &tls.Config{InsecureSkipVerify: true})
		if err != nil {
			return false
		}
		defer conn.Close()
		return strings.Contains(strings.ReplaceAll(string(certificate), "\n", ""), base64.StdEncoding.EncodeToString(conn.ConnectionState().PeerCertificates[0].Raw))
	}
	if !serves(a, first) || !serves(b, first) {
		t.Fatal("the replicas do not share a certificate")
	}

	stop := make(chan struct{})
	var created atomic.Int64
	var creating sync.WaitGroup
	for range 2 {
		creating.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				p, err := s.Client().CoreV1().Pods("strict").Create(context.Background(), simple("web"), metav1.CreateOptions{DryRun: []string{"All"}})
				if err != nil || !injected(p) {
					t.Errorf("pod %d: %v", created.Load(), err)
					return
				}
				created.Add(1)
				time.Sleep(20 * time.Millisecond)
			}
		})
	}
	authorities := func() int { return strings.Count(string(secret().Data["ca.crt"]), "BEGIN CERTIFICATE") }
	await(t, "the next authority is announced", func() bool { return authorities() == 2 })
	if got := secret(); !bytes.Equal(got.Data["tls.crt"], first) || len(got.Data["next.crt"]) == 0 {
		t.Error("the next certificate is served before its authority is known")
	}
	var second []byte
	await(t, "both serve another certificate", func() bool {
		second = secret().Data["tls.crt"]
		return !bytes.Equal(second, first) && serves(a, second) && serves(b, second)
	})
	await(t, "the old authority is gone", func() bool { return authorities() == 1 })
	if a.metric("tabard_webhook_upkeep_errors_total") != "0" || b.metric("tabard_webhook_upkeep_errors_total") != "0" {
		t.Error("keeping the certificate met errors")
	}
	if ends, err := strconv.ParseFloat(a.metric("tabard_webhook_certificate_expiry_timestamp_seconds"), 64); err != nil || ends < float64(time.Now().Add(-time.Hour).Unix()) {
		t.Errorf("the metric says that the certificate ends at %v, %v", ends, err)
	}
	close(stop)
	creating.Wait()
	if created.Load() < 20 {
		t.Errorf("only %d pods came in meanwhile", created.Load())
	}
}

func TestVandalismIsRepaired(t *testing.T) {
	t.Parallel() // it waits more than it works
	s := newWebhookSite(t, kubetest.Options{})
	s.Namespace("strict", map[string]string{identityLabel: "required"}, nil)
	s.ServiceAccount("strict", "web", map[string]string{profileAnnotation: "p"})
	// Its Secret and its configuration are then looked at every 2.5 s.
	r := s.start("--certificate-life", "5m")
	comesIn := func() bool { p, err := s.create("strict", simple("web")); return err == nil && injected(p) }
	if !comesIn() {
		t.Fatal("the webhook does not work")
	}
	t.Run("of the authorities in the configuration", func(t *testing.T) {
		s.Kubectl("patch", "mutatingwebhookconfiguration", "tabard-webhook", "--type=json", "-p",
			`[{"op":"remove","path":"/webhooks/0/clientConfig/caBundle"},{"op":"replace","path":"/webhooks/1/clientConfig/caBundle","value":"`+
				base64.StdEncoding.EncodeToString(s.JWKS())+`"}]`)
		if comesIn() {
			t.Fatal("a webhook that nobody can trust is called")
		}
		await(t, "the authorities are back", comesIn)
	})
	t.Run("but what operators decide is only told of", func(t *testing.T) {
		drift := func(hook string) string {
			return r.metric(`tabard_webhook_configuration_drift{webhook="` + hook + `"}`)
		}
		for name, patch := range map[string]string{
			"failurePolicy":     `{"op":"replace","path":"/webhooks/0/failurePolicy","value":"Ignore"}`,
			"rules":             `{"op":"replace","path":"/webhooks/0/rules/0/resources","value":["services"]}`,
			"namespaceSelector": `{"op":"add","path":"/webhooks/0/namespaceSelector/matchLabels","value":{"team":"a"}}`,
			"objectSelector":    `{"op":"add","path":"/webhooks/0/objectSelector","value":{"matchLabels":{"a":"b"}}}`,
			"matchConditions":   `{"op":"add","path":"/webhooks/0/matchConditions","value":[{"name":"none","expression":"false"}]}`,
		} {
			await(t, "all is as it should be", func() bool {
				return drift("require.iam.tabard.dev") == "0" && drift("inject.iam.tabard.dev") == "0"
			})
			s.Kubectl("patch", "mutatingwebhookconfiguration", "tabard-webhook", "--type=json", "-p", "["+patch+"]")
			await(t, name+" is noticed", func() bool {
				return drift("require.iam.tabard.dev") == "1" && strings.Contains(r.log.String(), name)
			})
			if drift("inject.iam.tabard.dev") != "0" {
				t.Errorf("%s: the other webhook counts as changed, too", name)
			}
			// To apply the manifests does not take away what they do not have.
			s.Kubectl("delete", "mutatingwebhookconfiguration", "tabard-webhook")
			s.install()
		}
		await(t, "all is as it should be", func() bool { return drift("require.iam.tabard.dev") == "0" })
		s.Kubectl("patch", "mutatingwebhookconfiguration", "tabard-webhook", "--type=json", "-p", `[{"op":"remove","path":"/webhooks/0"}]`)
		await(t, "a webhook that is gone is noticed", func() bool { return drift("require.iam.tabard.dev") == "1" })
		s.install()
		await(t, "the webhook works again", comesIn)
	})
	t.Run("of the Secret", func(t *testing.T) {
		secrets := s.Client().CoreV1().Secrets(webhookNamespace)
		before, err := secrets.Get(t.Context(), "tabard-webhook-certificate", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		s.Kubectl("patch", "secret", "tabard-webhook-certificate", "-n", webhookNamespace, "--type=merge", "-p", `{"data":{"tls.key":"bm90IGEga2V5"}}`)
		await(t, "a next certificate is announced", func() bool {
			now, err := secrets.Get(t.Context(), "tabard-webhook-certificate", metav1.GetOptions{})
			return err == nil && len(now.Data["next.crt"]) > 0 && bytes.Equal(now.Data["tls.crt"], before.Data["tls.crt"]) && bytes.Equal(now.Data["tls.key"], before.Data["tls.key"])
		})
		if !comesIn() {
			t.Error("no pod comes in meanwhile")
		}
	})
	t.Run("but not by making Secrets, which the webhook may not", func(t *testing.T) {
		s.Kubectl("delete", "secret", "tabard-webhook-certificate", "-n", webhookNamespace)
		await(t, "the webhook says so", func() bool {
			return strings.Contains(r.log.String(), "apply its manifests again") && r.metric("tabard_webhook_upkeep_errors_total") != "0"
		})
		if !comesIn() {
			t.Error("no pod comes in meanwhile")
		}
		s.install()
		await(t, "the webhook works again", func() bool {
			now, err := s.Client().CoreV1().Secrets(webhookNamespace).Get(t.Context(), "tabard-webhook-certificate", metav1.GetOptions{})
			return err == nil && len(now.Data["tls.crt"]) > 0 && comesIn()
		})
	})
}
