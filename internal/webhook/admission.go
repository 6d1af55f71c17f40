package webhook

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"strings"
	"time"
)

// Paths that the API server calls. Which one, the webhook's configuration says
// by the namespace's label, so that the two can fail differently.
const (
	PathInject  = "/inject"  // failure lets the pod in without an identity
	PathRequire = "/require" // failure keeps the pod out
)

// Bounds on an admission.
const (
	maxBody     = 2 << 20  // bytes; etcd holds objects of 1.5 MB
	maxBodies   = 96 << 20 // bytes of all bodies that are held at once
	maxReading  = 256      // callers whose bodies are read at once
	maxRunning  = 32       // admissions at once, of those that were read
	bodyTimeout = 2 * time.Second
	firstBuffer = 8 << 10 // bytes
	readTimeout = 3 * time.Second
	maxWarning  = 250 // bytes; the API server cuts what is longer than 4096 in all
	maxWarnings = 10
	maxDenial   = 2000 // bytes of what containers lack
)

// review is an AdmissionReview of admission.k8s.io/v1.
type review struct {
	APIVersion string    `json:"apiVersion"`
	Kind       string    `json:"kind"`
	Request    *request  `json:"request,omitempty"`
	Response   *response `json:"response,omitempty"`
}

type request struct {
	UID      string `json:"uid"`
	Resource struct {
		Group    string `json:"group"`
		Version  string `json:"version"`
		Resource string `json:"resource"`
	} `json:"resource"`
	SubResource string `json:"subResource"`
	Namespace   string `json:"namespace"`
	Operation   string `json:"operation"`
	Object      *pod   `json:"object"`
}

type response struct {
	UID              string            `json:"uid"`
	Allowed          bool              `json:"allowed"`
	Status           *status           `json:"status,omitempty"`
	Patch            []byte            `json:"patch,omitempty"`
	PatchType        string            `json:"patchType,omitempty"`
	Warnings         []string          `json:"warnings,omitempty"`
	AuditAnnotations map[string]string `json:"auditAnnotations,omitempty"`
}

type status struct {
	Code    int    `json:"code"`
	Reason  string `json:"reason"`
	Message string `json:"message"`
}

const (
	reviewVersion = "admission.k8s.io/v1"
	reviewKind    = "AdmissionReview"
)

// decode reads what the API server sends: a review of one pod that is being
// created. Anything else is an error, which the API server treats after the
// failure policy of the webhook that it called.
func decode(body []byte) (*request, *pod, error) {
	var r review
	if err := json.Unmarshal(body, &r); err != nil {
		return nil, nil, fmt.Errorf("the body is not an AdmissionReview: %w", err)
	}
	if r.APIVersion != reviewVersion || r.Kind != reviewKind {
		return nil, nil, fmt.Errorf("the body is a %.100q of %.100q, want an %s of %s", r.Kind, r.APIVersion, reviewKind, reviewVersion)
	}
	q := r.Request
	if q == nil || q.UID == "" {
		return nil, nil, errors.New("the AdmissionReview has no request, or its request no uid")
	}
	if q.Resource.Group != "" || q.Resource.Version != "v1" || q.Resource.Resource != "pods" || q.SubResource != "" || q.Operation != "CREATE" {
		return nil, nil, fmt.Errorf("the request is to %.20s %.60s %.60s: this webhook takes pods that are being created, correct the rules of its configuration",
			q.Operation, q.Resource.Resource, q.SubResource)
	}
	if q.Object == nil {
		return nil, nil, errors.New("the request's object is not a pod")
	}
	return q, q.Object, nil
}

// verdict is what becomes of a pod.
type verdict struct {
	denied   string // why it is kept out, or ""
	patch    []operation
	warnings []string
	profile  string // that the pod may put on
}

func (v verdict) outcome() string {
	switch {
	case v.denied != "":
		return outcomeDenied
	case len(v.patch) > 0:
		return outcomeInjected
	default:
		return outcomeUnchanged
	}
}

// nameForm is how Kubernetes spells names of service accounts and namespaces.
// A pod's have not been looked at yet when it comes here.
var nameForm = regexp.MustCompile(`^[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?$`)

// decide looks at the pod's service account and says what becomes of the pod.
func (w *Webhook) decide(ctx context.Context, namespace string, p *pod, required bool) verdict {
	if p.Metadata.Annotations[annotationMirror] != "" && p.Spec.ServiceAccountName == "" {
		return verdict{}
	}
	account := p.Spec.ServiceAccountName
	if account == "" {
		account = "default" // as the API server fills in
	}
	optedOut := p.Metadata.Annotations[AnnotationInject] == "false"
	if optedOut && !required {
		return verdict{}
	}

	// without is the verdict on a pod that gets no identity although somebody
	// wanted it to have one.
	without := func(format string, args ...any) verdict {
		why := fmt.Sprintf(format, args...)
		if required {
			return verdict{denied: fmt.Sprintf("namespace %s demands an identity of its pods (label %s=required), and %s", namespace, LabelIdentity, why)}
		}
		return verdict{warnings: []string{"the pod got no Tabard identity: " + why}}
	}

	if !nameForm.MatchString(namespace) || !nameForm.MatchString(account) {
		return without("the pod's service account %.100q has no name that Kubernetes allows", account)
	}
	annotations, err := w.serviceAccount(ctx, namespace, account)
	if err != nil {
		w.cfg.Log.Warn("a service account cannot be read", "namespace", namespace, "serviceaccount", account, "error", err)
		return without("service account %s could not be read: try again; if it stays so, ask the operators to look into the log of the webhook", account)
	}
	wanted, err := readWish(annotations)
	if err != nil {
		return without("service account %s cannot be followed: %v", account, err)
	}
	if wanted == nil {
		if !required {
			return verdict{}
		}
		return without("service account %s names no trusted profile. Name one: kubectl annotate serviceaccount %s -n %s %s=PROFILE; or run the pod as another service account",
			account, account, namespace, AnnotationProfile)
	}

	var v verdict
	if optedOut {
		v.warnings = append(v.warnings, fmt.Sprintf("the annotation %s counts for nothing in a namespace that demands an identity", AnnotationInject))
	}
	if w.profiles != nil {
		exists, err := w.profiles.exist(ctx, wanted.profile)
		switch {
		case err != nil:
			w.cfg.Log.Warn("Tabard cannot be asked for a profile", "profile", wanted.profile, "error", err)
			v.warnings = append(v.warnings, fmt.Sprintf("whether the trusted profile %q exists could not be checked: Tabard did not answer", wanted.profile))
		case !exists && required:
			return without("Tabard has no trusted profile %q, which service account %s names: create it, or correct the annotation %s", wanted.profile, account, AnnotationProfile)
		case !exists:
			v.warnings = append(v.warnings, fmt.Sprintf("Tabard has no trusted profile %q, which service account %s names", wanted.profile, account))
		}
	}
	patch, lacking, err := w.injector.patch(p, wanted)
	if err != nil {
		return without("%v", err)
	}
	// A container that goes without would make the demand one that a mount gets
	// around.
	if required && len(lacking) > 0 {
		return without("%s", clip(strings.Join(lacking, "; "), maxDenial))
	}
	v.patch, v.profile = patch, wanted.profile
	v.warnings = append(v.warnings, lacking...)
	return v
}

// serviceAccount returns a service account's annotations as they are now.
func (w *Webhook) serviceAccount(ctx context.Context, namespace, name string) (map[string]string, error) {
	ctx, cancel := context.WithTimeout(ctx, readTimeout)
	defer cancel()
	var account struct {
		Metadata struct {
			Annotations map[string]string `json:"annotations"`
		} `json:"metadata"`
	}
	err := w.cfg.Kube.Do(ctx, http.MethodGet, "/api/v1/namespaces/"+url.PathEscape(namespace)+"/serviceaccounts/"+url.PathEscape(name), nil, &account)
	if err != nil {
		return nil, err
	}
	return account.Metadata.Annotations, nil
}

// handle returns the handler of one of the paths.
func (w *Webhook) handle(required bool) http.HandlerFunc {
	return func(rw http.ResponseWriter, r *http.Request) {
		fail := func(code int, text string) {
			w.metrics.admissions.WithLabelValues(outcomeFailed).Inc()
			w.cfg.Log.Warn("a request is no admission", "status", code, "from", r.RemoteAddr, "error", text)
			http.Error(rw, text, code)
		}
		if media, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || media != "application/json" {
			fail(http.StatusUnsupportedMediaType, "the body must be application/json")
			return
		}
		// Whoever reaches the port can call. What one call may cost is bounded,
		// and so is how many there are; one that sends its body slowly takes no
		// place of those that have sent theirs.
		body, release, code, err := w.receive(rw, r)
		defer release()
		if err != nil {
			fail(code, err.Error())
			return
		}
		select {
		case w.running <- struct{}{}:
			defer func() { <-w.running }()
		case <-r.Context().Done():
			fail(http.StatusServiceUnavailable, "the caller went away")
			return
		}
		q, p, err := decode(body)
		if err != nil {
			fail(http.StatusBadRequest, err.Error())
			return
		}
		v := w.decide(r.Context(), q.Namespace, p, required)
		answer, err := v.answer(q.UID)
		if err != nil {
			fail(http.StatusInternalServerError, err.Error())
			return
		}
		w.metrics.admissions.WithLabelValues(v.outcome()).Inc()
		w.cfg.Log.Debug("admission", "outcome", v.outcome(), "namespace", q.Namespace, "pod", p.Metadata.Name+p.Metadata.GenerateName,
			"serviceaccount", p.Spec.ServiceAccountName, "profile", v.profile, "denied", v.denied, "warnings", v.warnings)
		rw.Header().Set("Content-Type", "application/json")
		_, _ = rw.Write(answer) // the API server may be gone, and treats that by its failure policy
	}
}

// receive reads a body. The caller must call release when it needs the body no
// more, also after an error, of which code is the status.
func (w *Webhook) receive(rw http.ResponseWriter, r *http.Request) (body []byte, release func(), code int, err error) {
	var held int64
	release = func() { w.held.Add(-held) }
	select {
	case w.reading <- struct{}{}:
		defer func() { <-w.reading }()
	case <-r.Context().Done():
		return nil, release, http.StatusServiceUnavailable, errors.New("the caller went away")
	}
	// Real time, as the network knows no other. Where a connection has no
	// deadlines, the server's own for the whole request stands.
	control := http.NewResponseController(rw)
	_ = control.SetReadDeadline(time.Now().Add(bodyTimeout))
	from := http.MaxBytesReader(rw, r.Body, maxBody)
	for {
		if len(body) == cap(body) {
			// A buffer is counted before it is made: what has come is what
			// costs, and not what a caller says that will come.
			more := int64(max(cap(body), firstBuffer))
			held += more
			if w.held.Add(more) > maxBodies {
				return nil, release, http.StatusServiceUnavailable, errors.New("too many large bodies at once: try again")
			}
			larger := make([]byte, len(body), held)
			copy(larger, body)
			body = larger
		}
		n, err := from.Read(body[len(body):cap(body)])
		body = body[:len(body)+n]
		tooLong := new(http.MaxBytesError)
		switch {
		case errors.Is(err, io.EOF):
			_ = control.SetReadDeadline(time.Time{}) // a look whether the caller is there must not end by it
			return body, release, 0, nil
		case errors.As(err, &tooLong):
			return nil, release, http.StatusRequestEntityTooLarge, fmt.Errorf("read the body: %w", err)
		case errors.Is(err, os.ErrDeadlineExceeded):
			return nil, release, http.StatusRequestTimeout, fmt.Errorf("the body did not come within %s", bodyTimeout)
		case err != nil:
			return nil, release, http.StatusBadRequest, fmt.Errorf("read the body: %w", err)
		}
	}
}

// answer encodes a verdict as the review's answer.
func (v verdict) answer(uid string) ([]byte, error) {
	r := &response{UID: uid, Allowed: v.denied == "", AuditAnnotations: map[string]string{"outcome": v.outcome()}}
	if v.denied != "" {
		r.Status = &status{Code: http.StatusForbidden, Reason: "Forbidden", Message: v.denied}
	}
	if v.profile != "" {
		r.AuditAnnotations["trusted-profile"] = v.profile
	}
	for _, text := range v.warnings[:min(len(v.warnings), maxWarnings)] {
		r.Warnings = append(r.Warnings, clip(text, maxWarning))
	}
	if len(v.patch) > 0 {
		patch, err := json.Marshal(v.patch)
		if err != nil {
			return nil, fmt.Errorf("encode the patch: %w", err)
		}
		r.Patch, r.PatchType = patch, "JSONPatch"
	}
	return json.Marshal(review{APIVersion: reviewVersion, Kind: reviewKind, Response: r})
}

// clip shortens a text to a number of bytes, at a letter's border.
func clip(s string, most int) string {
	if len(s) <= most {
		return s
	}
	return strings.ToValidUTF8(s[:most], "") + "…"
}
