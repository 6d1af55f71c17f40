package webhook

import (
	"fmt"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"tabard.dev/tabard/internal/iamclient"
)

// What people write on their objects.
const (
	AnnotationProfile  = "iam.tabard.dev/trusted-profile" // service account: the profile's name or id
	AnnotationServices = "iam.tabard.dev/services"        // service account: SDK services, with commas
	AnnotationInject   = "iam.tabard.dev/inject"          // pod: "false" leaves it alone where no identity is demanded
	LabelIdentity      = "iam.tabard.dev/identity"        // namespace: "required" demands one of every pod
)

// annotationMirror marks what a kubelet shows of a pod that it runs from a file.
// Such a pod has no service account, and the API server takes no token volume
// for it.
const annotationMirror = "kubernetes.io/config.mirror"

// Where a pod finds its token: the second place that the published SDKs look at
// by themselves (reference/iam-identity.md section 1.3).
const (
	VolumeName = "tabard-identity-token"
	mountPath  = "/var/run/secrets/tokens"
	tokenName  = "sa-token"
)

// Bounds on what an annotation may hold.
const (
	maxProfileName = 300
	maxServices    = 32
)

// DefaultServices are the services of the published SDKs that Tabard speaks
// for, by their DefaultServiceName: the names under which SDKs look for
// variables, in capitals.
var DefaultServices = []string{
	"iam_identity", "iam_policy_management", "iam_access_groups", "resource_controller", "resource_manager",
	"user_management", "account_management", "vpc",
}

// servicePaths are what follows the server's URL in the URLs that the SDKs of
// services expect.
var servicePaths = map[string]string{
	"iam_identity": "", "iam_policy_management": "", "iam_access_groups": "", "resource_controller": "", "resource_manager": "",
	"user_management": "", "account_management": "", "vpc": "/v1",
}

// pod is what the webhook reads of a pod.
type pod struct {
	Metadata struct {
		Name         string            `json:"name"`
		GenerateName string            `json:"generateName"`
		Annotations  map[string]string `json:"annotations"`
	} `json:"metadata"`
	Spec struct {
		ServiceAccountName string       `json:"serviceAccountName"`
		Volumes            []*volume    `json:"volumes"`
		InitContainers     []*container `json:"initContainers"`
		Containers         []*container `json:"containers"`
	} `json:"spec"`
}

type volume struct {
	Name        string     `json:"name"`
	Projected   *projected `json:"projected,omitempty"`
	ConfigMap   *struct{}  `json:"configMap,omitempty"`
	Secret      *struct{}  `json:"secret,omitempty"`
	DownwardAPI *struct{}  `json:"downwardAPI,omitempty"`
}

type projected struct {
	Sources []source `json:"sources"`
}

type source struct {
	ServiceAccountToken *tokenSource `json:"serviceAccountToken,omitempty"`
}

type tokenSource struct {
	Audience          string `json:"audience,omitempty"`
	ExpirationSeconds int64  `json:"expirationSeconds,omitempty"`
	Path              string `json:"path"`
}

type container struct {
	Name         string     `json:"name"`
	Env          []variable `json:"env"`
	VolumeMounts []mount    `json:"volumeMounts"`
}

type variable struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

type mount struct {
	Name        string `json:"name"`
	MountPath   string `json:"mountPath"`
	ReadOnly    bool   `json:"readOnly"`
	SubPath     string `json:"subPath,omitempty"`
	SubPathExpr string `json:"subPathExpr,omitempty"`
}

// operation is one step of a JSON Patch (RFC 6902).
type operation struct {
	Op    string `json:"op"`
	Path  string `json:"path"`
	Value any    `json:"value"`
}

// wish is what a service account asks for its pods.
type wish struct {
	profile  string
	services []string // nil means the webhook's
}

// readWish reads a service account's annotations. The wish is nil when it names
// no profile; the error says what is wrong with what it names.
func readWish(annotations map[string]string) (*wish, error) {
	profile := strings.TrimSpace(annotations[AnnotationProfile])
	if profile == "" {
		return nil, nil
	}
	if len(profile) > maxProfileName || !utf8.ValidString(profile) || strings.ContainsFunc(profile, unicode.IsControl) {
		return nil, fmt.Errorf("its annotation %s is not the name of a trusted profile: it must have at most %d bytes and no control characters",
			AnnotationProfile, maxProfileName)
	}
	w := &wish{profile: profile}
	list, ok := annotations[AnnotationServices]
	if !ok {
		return w, nil
	}
	services, err := ParseServices(list)
	if err != nil {
		return nil, fmt.Errorf("its annotation %s is wrong: %w", AnnotationServices, err)
	}
	w.services = services
	return w, nil
}

var serviceForm = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9_-]{0,62}$`)

// ParseServices reads names of SDK services with commas between. None is a list
// too: the token without variables.
func ParseServices(list string) ([]string, error) {
	out := []string{}
	for name := range strings.SplitSeq(list, ",") {
		if name = strings.TrimSpace(name); name == "" {
			continue
		}
		if !serviceForm.MatchString(name) {
			return nil, fmt.Errorf("%q is not the name of an SDK's service, such as iam_identity", name)
		}
		name = strings.ReplaceAll(strings.ToLower(name), "-", "_") // as the SDKs do
		if !slices.Contains(out, name) {
			out = append(out, name)
		}
	}
	if len(out) > maxServices {
		return nil, fmt.Errorf("it names %d services, more than %d", len(out), maxServices)
	}
	return out, nil
}

// injector makes patches. It computes only.
type injector struct {
	iamURL      string // without a slash at its end
	audience    string
	seconds     int64 // of a token's life
	services    []string
	serviceURLs bool
}

// patch returns what gives a pod the identity that its service account wishes,
// and why some of its containers are to go without. The error says why the pod
// cannot have it. A pod that has all of it needs no operation.
func (i *injector) patch(p *pod, w *wish) (ops []operation, without []string, err error) {
	present := false
	for _, v := range p.Spec.Volumes {
		if v == nil || v.Name != VolumeName {
			continue
		}
		if !i.ours(v) {
			return nil, nil, fmt.Errorf("the pod has a volume %s of its own, which is the name of the identity token's: rename it", VolumeName)
		}
		present = true
	}
	mounted := false
	for _, list := range []struct {
		field string
		items []*container
	}{{"initContainers", p.Spec.InitContainers}, {"containers", p.Spec.Containers}} {
		for n, c := range list.items {
			if c == nil {
				continue
			}
			at := "/spec/" + list.field + "/" + strconv.Itoa(n)
			has, taken := i.mounts(p, c)
			if taken != "" {
				without = append(without, fmt.Sprintf("container %q got no Tabard identity: it mounts a volume of its own at %q, and the token's place is %s: mount it elsewhere", c.Name, taken, mountPath))
				continue
			}
			if !has {
				ops = append(ops, appendTo(at+"/volumeMounts", len(c.VolumeMounts), mount{Name: VolumeName, MountPath: mountPath, ReadOnly: true})...)
			}
			mounted = true
			ops = append(ops, appendTo(at+"/env", len(c.Env), i.variables(c, w)...)...)
		}
	}
	if mounted && !present {
		v := volume{Name: VolumeName, Projected: &projected{Sources: []source{{&tokenSource{i.audience, i.seconds, tokenName}}}}}
		ops = append(appendTo("/spec/volumes", len(p.Spec.Volumes), v), ops...)
	}
	return ops, without, nil
}

// ours reports whether a volume of the token's name is the token's.
func (i *injector) ours(v *volume) bool {
	if v.Projected == nil || len(v.Projected.Sources) != 1 {
		return false
	}
	t := v.Projected.Sources[0].ServiceAccountToken
	return t != nil && t.Audience == i.audience && t.Path == tokenName
}

// mounts reports whether a container mounts the token already, or else which of
// its own mounts is in the way: one at the place, one below it, or one above in
// which no folder can be made for it.
func (i *injector) mounts(p *pod, c *container) (has bool, taken string) {
	for _, m := range c.VolumeMounts {
		at := path.Clean("/" + m.MountPath)
		switch {
		case m.Name == VolumeName && at == mountPath && m.SubPath == "" && m.SubPathExpr == "":
			has = true
		case at == mountPath || strings.HasPrefix(at, mountPath+"/"):
			return false, m.MountPath
		case strings.HasPrefix(mountPath, strings.TrimSuffix(at, "/")+"/") && (m.ReadOnly || written(p, m.Name)):
			return false, m.MountPath
		}
	}
	return has, ""
}

// written reports whether a volume is one that the kubelet writes and nobody
// else can.
func written(p *pod, name string) bool {
	return slices.ContainsFunc(p.Spec.Volumes, func(v *volume) bool {
		return v != nil && v.Name == name && (v.Projected != nil || v.ConfigMap != nil || v.Secret != nil || v.DownwardAPI != nil)
	})
}

// credentials are the properties by which a container says itself how it
// authenticates to a service. Where it sets one, its choice stands.
var credentials = []string{
	"AUTH_TYPE", "APIKEY", "BEARER_TOKEN", "USERNAME", "PASSWORD", "REFRESH_TOKEN", "CLIENT_ID", "CLIENT_SECRET",
	"CR_TOKEN_FILENAME", "IAM_PROFILE_NAME", "IAM_PROFILE_ID", "IAM_PROFILE_CRN",
}

// variables returns those that a container lacks.
func (i *injector) variables(c *container, w *wish) []any {
	set := make(map[string]bool, len(c.Env))
	for _, v := range c.Env {
		set[v.Name] = true
	}
	services := w.services
	if services == nil {
		services = i.services
	}
	var out []any
	for _, service := range services {
		prefix := strings.ToUpper(service) + "_"
		add := func(name, value string) {
			if !set[prefix+name] {
				out = append(out, variable{prefix + name, literal(value)})
			}
		}
		if !slices.ContainsFunc(credentials, func(name string) bool { return set[prefix+name] }) {
			add("AUTH_TYPE", "container")
			add("AUTH_URL", i.iamURL)
			if id, ok := iamclient.ProfileID(w.profile); ok {
				add("IAM_PROFILE_ID", id)
			} else {
				add("IAM_PROFILE_NAME", w.profile)
			}
			add("CR_TOKEN_FILENAME", mountPath+"/"+tokenName)
			if suffix, known := servicePaths[service]; known && i.serviceURLs {
				add("URL", i.iamURL+suffix)
			}
		}
	}
	return out
}

// literal writes a value so that Kubernetes expands nothing in it.
func literal(value string) string { return strings.ReplaceAll(value, "$", "$$") }

// appendTo appends values to the list at a path that has n entries. A list
// without entries may be absent, which only the first form can fill.
func appendTo[T any](at string, n int, values ...T) []operation {
	if len(values) == 0 {
		return nil
	}
	if n == 0 {
		return []operation{{"add", at, values}}
	}
	out := make([]operation, 0, len(values))
	for _, v := range values {
		out = append(out, operation{"add", at + "/-", v})
	}
	return out
}
