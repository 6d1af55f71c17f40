package webhook

import (
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

var testInjector = injector{iamURL: "https://iam.example.com", audience: "iam", seconds: 3600, services: DefaultServices}

func parsePod(t interface {
	Helper()
	Fatal(...any)
}, text []byte) *pod {
	t.Helper()
	var p *pod
	if err := json.Unmarshal(text, &p); err != nil {
		t.Fatal(err)
	}
	return p
}

// apply applies a patch of "add" operations as RFC 6902 says, and nothing more:
// another operation or a path that is not there is an error.
func apply(doc any, ops []operation) (any, error) {
	b, err := json.Marshal(ops)
	if err != nil {
		return nil, err
	}
	var plain []struct {
		Op, Path string
		Value    any
	}
	if err := json.Unmarshal(b, &plain); err != nil {
		return nil, err
	}
	for _, op := range plain {
		if op.Op != "add" {
			return nil, fmt.Errorf("operation %s", op.Op)
		}
		if doc, err = add(doc, strings.Split(op.Path, "/")[1:], op.Value); err != nil {
			return nil, fmt.Errorf("%s: %w", op.Path, err)
		}
	}
	return doc, nil
}

func add(at any, path []string, value any) (any, error) {
	switch v := at.(type) {
	case map[string]any:
		if len(path) == 1 {
			v[path[0]] = value
			return v, nil
		}
		child, err := add(v[path[0]], path[1:], value)
		v[path[0]] = child
		return v, err
	case []any:
		if len(path) == 1 && path[0] == "-" {
			return append(v, value), nil
		}
		i, err := strconv.Atoi(path[0])
		if err != nil || i >= len(v) || len(path) == 1 {
			return nil, fmt.Errorf("no entry %q to go into", path[0])
		}
		v[i], err = add(v[i], path[1:], value)
		return v, err
	}
	return nil, fmt.Errorf("%T has no %q", at, path[0])
}

func decodeAny(t interface{ Fatal(...any) }, text []byte) any {
	var v any
	if err := json.Unmarshal(text, &v); err != nil {
		t.Fatal(err)
	}
	return v
}

// without removes what the injection may have added, and complains about
// additions that are not it.
func without(t *rapid.T, before, after any) any {
	spec := after.(map[string]any)["spec"].(map[string]any)
	old := before.(map[string]any)["spec"].(map[string]any)
	drop := func(was, is map[string]any, list string, ours func(map[string]any) bool) {
		now, _ := is[list].([]any)
		then, had := was[list]
		n := len(asList(then))
		for _, e := range now[min(n, len(now)):] {
			if !ours(e.(map[string]any)) {
				t.Fatalf("%s got %v", list, e)
			}
		}
		switch {
		case len(now) > n && !had:
			delete(is, list)
		case len(now) > n && n == 0:
			is[list] = then
		case len(now) > n:
			is[list] = now[:n]
		}
	}
	drop(old, spec, "volumes", func(v map[string]any) bool { return v["name"] == VolumeName })
	for _, list := range []string{"containers", "initContainers"} {
		was, is := asList(old[list]), asList(spec[list])
		if len(was) != len(is) {
			t.Fatalf("%s: %d became %d", list, len(was), len(is))
		}
		for i := range was {
			a, ok := was[i].(map[string]any)
			if !ok {
				continue
			}
			b := is[i].(map[string]any)
			drop(a, b, "volumeMounts", func(v map[string]any) bool { return v["name"] == VolumeName && v["mountPath"] == mountPath })
			drop(a, b, "env", func(v map[string]any) bool {
				name := v["name"].(string)
				return slices.ContainsFunc(DefaultServices, func(s string) bool { return strings.HasPrefix(name, strings.ToUpper(s)+"_") })
			})
		}
	}
	return after
}

func asList(v any) []any {
	l, _ := v.([]any)
	return l
}

// pods draws pods in all the shapes that the lists can have.
func pods(t *rapid.T) map[string]any {
	object := func(name string, more ...any) map[string]any {
		m := map[string]any{"name": name}
		for i := 0; i+1 < len(more); i += 2 {
			m[more[i].(string)] = more[i+1]
		}
		return m
	}
	list := func(label string, one func(int) any) any {
		n := rapid.IntRange(-2, 3).Draw(t, label)
		switch n {
		case -2:
			return nil
		case -1:
			return "absent"
		}
		out := []any{}
		for i := range n {
			out = append(out, one(i))
		}
		return out
	}
	set := func(m map[string]any, key string, v any) {
		if v != "absent" {
			m[key] = v
		}
	}
	containers := func(label string) any {
		return list(label, func(i int) any {
			if rapid.IntRange(0, 20).Draw(t, "null") == 0 {
				return nil
			}
			c := object(fmt.Sprintf("%s-%d", label, i), "image", "x", "resources", map[string]any{"limits": map[string]any{"cpu": "1"}})
			set(c, "env", list("env", func(int) any {
				name := rapid.SampledFrom([]string{"PATH", "VPC_AUTH_TYPE", "VPC_URL", "IAM_IDENTITY_APIKEY", "IAM_IDENTITY_AUTH_URL", "RESOURCE_CONTROLLER_IAM_PROFILE_NAME"}).Draw(t, "name")
				if rapid.Bool().Draw(t, "from") {
					return object(name, "valueFrom", map[string]any{"secretKeyRef": map[string]any{"name": "s", "key": "k"}})
				}
				return object(name, "value", "own")
			}))
			set(c, "volumeMounts", list("mounts", func(int) any {
				at := rapid.SampledFrom([]string{"/data", "/var/run/secrets/tokens", "/var/run/secrets/tokens/", "/var/run/secrets/tokens/sub", "/var/run/secrets/tokensother", "/var/run", "/", "var/run/secrets"}).Draw(t, "path")
				return object(rapid.SampledFrom([]string{"data", "config", VolumeName}).Draw(t, "volume"), "mountPath", at, "readOnly", rapid.Bool().Draw(t, "readonly"))
			}))
			return c
		})
	}
	spec := map[string]any{"serviceAccountName": "web", "hostNetwork": true, "containers": []any{}}
	set(spec, "volumes", list("volumes", func(int) any {
		return rapid.SampledFrom([]any{
			object("data", "emptyDir", map[string]any{}), object("config", "configMap", map[string]any{"name": "c"}),
			object(VolumeName, "emptyDir", map[string]any{}), nil,
		}).Draw(t, "volume")
	}))
	set(spec, "containers", containers("containers"))
	set(spec, "initContainers", containers("initContainers"))
	return map[string]any{"apiVersion": "v1", "kind": "Pod", "metadata": map[string]any{"name": "p", "labels": map[string]any{"a": "b"}}, "spec": spec, "status": map[string]any{}}
}

func TestAnyPodKeepsAllThatItHadAndGetsOnlyItsIdentity(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		text, err := json.Marshal(pods(t))
		if err != nil {
			t.Fatal(err)
		}
		i := testInjector
		i.serviceURLs = rapid.Bool().Draw(t, "urls")
		w := &wish{profile: rapid.SampledFrom([]string{"shop", "Profile-0f0f0f0f-0000-4000-8000-0123456789ab", "$(HOME)"}).Draw(t, "profile")}
		ops, _, err := i.patch(parsePod(t, text), w)
		if err != nil {
			return
		}
		after, err := apply(decodeAny(t, text), ops)
		if err != nil {
			t.Fatalf("%s\ncannot be patched: %v", text, err)
		}
		done, err := json.Marshal(after)
		if err != nil {
			t.Fatal(err)
		}
		again, _, err := i.patch(parsePod(t, done), w)
		if err != nil || len(again) > 0 {
			t.Fatalf("the patched pod\n%s\nis patched again: %v %v", done, again, err)
		}
		if diff := cmp.Diff(decodeAny(t, text), without(t, decodeAny(t, text), after)); diff != "" {
			t.Fatalf("something else changed (-was +is):\n%s", diff)
		}
	})
}

func inject(t *testing.T, i injector, w wish, spec string) (env map[string]string, mounts []string, warnings []string) {
	t.Helper()
	text := []byte(`{"spec":` + spec + `}`)
	ops, warnings, err := i.patch(parsePod(t, text), &w)
	if err != nil {
		t.Fatal(err)
	}
	after, err := apply(decodeAny(t, text), ops)
	if err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(after)
	if err != nil {
		t.Fatal(err)
	}
	env = map[string]string{}
	p := parsePod(t, b)
	for _, c := range slices.Concat(p.Spec.InitContainers, p.Spec.Containers) {
		for _, v := range c.Env {
			env[c.Name+" "+v.Name] = v.Value
		}
		for _, m := range c.VolumeMounts {
			mounts = append(mounts, c.Name+" "+m.Name+" "+m.MountPath)
		}
	}
	return env, mounts, warnings
}

func TestEachContainerGetsWhatTheSDKsRead(t *testing.T) {
	env, mounts, warnings := inject(t, testInjector, wish{profile: "shop", services: []string{"vpc"}},
		`{"initContainers":[{"name":"i"}],"containers":[{"name":"c","env":[{"name":"A","value":"b"}]}]}`)
	want := map[string]string{"c A": "b"}
	for _, c := range []string{"i", "c"} {
		want[c+" VPC_AUTH_TYPE"] = "container"
		want[c+" VPC_AUTH_URL"] = "https://iam.example.com"
		want[c+" VPC_IAM_PROFILE_NAME"] = "shop"
		want[c+" VPC_CR_TOKEN_FILENAME"] = "/var/run/secrets/tokens/sa-token"
	}
	if diff := cmp.Diff(want, env); diff != "" {
		t.Error(diff)
	}
	if want := []string{"i tabard-identity-token /var/run/secrets/tokens", "c tabard-identity-token /var/run/secrets/tokens"}; !slices.Equal(mounts, want) {
		t.Error(mounts)
	}
	if len(warnings) > 0 {
		t.Error(warnings)
	}
}

func TestAProfileCanBeNamedByItsID(t *testing.T) {
	for _, name := range []string{"Profile-0f0f0f0f-0000-4000-8000-0123456789ab", "iam-Profile-0f0f0f0f-0000-4000-8000-0123456789ab"} {
		env, _, _ := inject(t, testInjector, wish{profile: name, services: []string{"vpc"}}, `{"containers":[{"name":"c"}]}`)
		if env["c VPC_IAM_PROFILE_ID"] != "Profile-0f0f0f0f-0000-4000-8000-0123456789ab" || env["c VPC_IAM_PROFILE_NAME"] != "" {
			t.Errorf("%s: %v", name, env)
		}
	}
}

func TestServicesCanBeSentToTabard(t *testing.T) {
	i := testInjector
	i.serviceURLs = true
	env, _, _ := inject(t, i, wish{profile: "p", services: []string{"vpc", "iam_identity", "cloudant"}}, `{"containers":[{"name":"c"}]}`)
	if env["c VPC_URL"] != "https://iam.example.com/v1" || env["c IAM_IDENTITY_URL"] != "https://iam.example.com" {
		t.Error(env)
	}
	if _, ok := env["c CLOUDANT_URL"]; ok || env["c CLOUDANT_AUTH_TYPE"] != "container" {
		t.Error("a service that Tabard is not was sent to it")
	}
}

func TestNothingInAValueIsExpandedByKubernetes(t *testing.T) {
	env, _, _ := inject(t, testInjector, wish{profile: "$(SECRET) $5", services: []string{"vpc"}}, `{"containers":[{"name":"c"}]}`)
	if got := env["c VPC_IAM_PROFILE_NAME"]; got != "$$(SECRET) $$5" {
		t.Error(got)
	}
}

func TestAContainersOwnChoiceStands(t *testing.T) {
	for _, own := range []string{"AUTH_TYPE", "APIKEY", "BEARER_TOKEN", "IAM_PROFILE_ID", "CR_TOKEN_FILENAME"} {
		env, mounts, _ := inject(t, testInjector, wish{profile: "p", services: []string{"vpc", "iam_identity"}},
			`{"containers":[{"name":"c","env":[{"name":"VPC_`+own+`","value":"own"}]}]}`)
		if env["c VPC_"+own] != "own" || len(env) != 5 || env["c IAM_IDENTITY_AUTH_TYPE"] != "container" || len(mounts) != 1 {
			t.Errorf("%s: %v %v", own, env, mounts)
		}
	}
	env, _, _ := inject(t, testInjector, wish{profile: "p", services: []string{"vpc"}}, `{"containers":[{"name":"c","env":[{"name":"VPC_AUTH_URL","value":"own"}]}]}`)
	if env["c VPC_AUTH_URL"] != "own" || env["c VPC_AUTH_TYPE"] != "container" {
		t.Error(env)
	}
}

func TestAContainerThatMountsSomethingAtThePlaceIsLeftAlone(t *testing.T) {
	for at, taken := range map[string]bool{
		"/var/run/secrets/tokens": true, "/var/run/secrets/tokens/": true, "/var/run/secrets//tokens/sub": true, "/var/run/secrets/tokens2": false,
		"/var/run/secrets": true, "/var/run/secrets/kubernetes.io/serviceaccount": false, "/": true, "/data": false,
	} {
		env, mounts, warnings := inject(t, testInjector, wish{profile: "p"},
			`{"volumes":[{"name":"v","secret":{"secretName":"s"}}],"containers":[{"name":"c","volumeMounts":[{"name":"v","mountPath":"`+at+`"}]},{"name":"d"}]}`)
		if got := env["c VPC_AUTH_TYPE"] == ""; got != taken || taken != (len(warnings) == 1) {
			t.Errorf("%s: %v, warnings %v", at, mounts, warnings)
		}
		if env["d VPC_AUTH_TYPE"] == "" {
			t.Errorf("%s: the other container got nothing", at)
		}
	}
	_, mounts, warnings := inject(t, testInjector, wish{profile: "p"},
		`{"volumes":[{"name":"v","emptyDir":{}}],"containers":[{"name":"c","volumeMounts":[{"name":"v","mountPath":"/var/run"}]}]}`)
	if len(mounts) != 2 || len(warnings) != 0 {
		t.Error("a folder can be made in an emptyDir, but: ", warnings)
	}
}

func TestAPodInWhichNoContainerTakesTheTokenGetsNoVolume(t *testing.T) {
	ops, warnings, err := testInjector.patch(parsePod(t, []byte(
		`{"spec":{"containers":[{"name":"c","volumeMounts":[{"name":"v","mountPath":"/var/run/secrets/tokens"}]}]}}`)), &wish{profile: "p"})
	if len(ops) != 0 || len(warnings) != 1 || err != nil {
		t.Error(ops, warnings, err)
	}
}

func TestAMountOfAnotherPartOfTheTokensVolumeIsNotTheTokens(t *testing.T) {
	for _, part := range []string{"subPath", "subPathExpr"} {
		_, without, err := testInjector.patch(parsePod(t, []byte(`{"spec":{"containers":[{"name":"c","volumeMounts":[`+
			`{"name":"tabard-identity-token","mountPath":"/var/run/secrets/tokens","readOnly":true,"`+part+`":"nothing"}]}]}}`)), &wish{profile: "p"})
		if len(without) != 1 || err != nil {
			t.Errorf("%s: %v, %v", part, without, err)
		}
	}
}

func TestAPodsOwnVolumeOfTheTokensNameIsNotTakenForIt(t *testing.T) {
	for _, v := range []string{
		`{"hostPath":{"path":"/"}}`, `{"projected":{"sources":[]}}`,
		`{"projected":{"sources":[{"serviceAccountToken":{"audience":"other","path":"sa-token"}}]}}`,
	} {
		text := `{"spec":{"volumes":[` + strings.Replace(v, "{", `{"name":"tabard-identity-token",`, 1) + `],"containers":[{"name":"c"}]}}`
		if _, _, err := testInjector.patch(parsePod(t, []byte(text)), &wish{profile: "p"}); err == nil {
			t.Errorf("%s is taken for the token's", v)
		}
	}
}

func TestAWishIsReadFromAnnotations(t *testing.T) {
	for name, c := range map[string]struct {
		annotations map[string]string
		want        *wish
		wrong       bool
	}{
		"none":          {nil, nil, false},
		"blank":         {map[string]string{AnnotationProfile: "  "}, nil, false},
		"name":          {map[string]string{AnnotationProfile: " my shop "}, &wish{profile: "my shop"}, false},
		"services":      {map[string]string{AnnotationProfile: "p", AnnotationServices: "VPC, my-service,vpc"}, &wish{"p", []string{"vpc", "my_service"}}, false},
		"no services":   {map[string]string{AnnotationProfile: "p", AnnotationServices: ""}, &wish{"p", []string{}}, false},
		"only services": {map[string]string{AnnotationServices: "!"}, nil, false},
		"newline":       {map[string]string{AnnotationProfile: "a\nb"}, nil, true},
		"too long":      {map[string]string{AnnotationProfile: strings.Repeat("n", maxProfileName+1)}, nil, true},
		"bad service":   {map[string]string{AnnotationProfile: "p", AnnotationServices: "a b"}, nil, true},
		"many services": {map[string]string{AnnotationProfile: "p", AnnotationServices: strings.Repeat("a,", 3) + manyServices()}, nil, true},
	} {
		got, err := readWish(c.annotations)
		if (err != nil) != c.wrong || !cmp.Equal(got, c.want, cmp.AllowUnexported(wish{})) {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
}

func manyServices() string {
	var names []string
	for i := range maxServices {
		names = append(names, fmt.Sprintf("s%d", i))
	}
	return strings.Join(names, ",")
}
