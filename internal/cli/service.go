package cli

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"

	"github.com/goccy/go-yaml"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"tabard.dev/tabard/internal/access"
)

var services = &kind{
	noun: "service", plural: "services", listed: "iam services", path: "/v1/services", array: "services", id: "name",
	form:    regexp.MustCompile(`^[a-z][a-z0-9-]*$`),
	columns: columns("Name", "name", "Display name", "display_name", "Kind", "kind", "Own", "custom"),
	details: append(columns("Name", "name", "Display name", "display_name", "Kind", "kind", "Description", "description", "Own", "custom",
		"Actions", "actions.id", "Attributes", "attributes.name", "Plans", "plans.name", "Modified", "modified_at"),
		column{title: "Roles", of: func(o object) string { return joinedKeys(o.fields["roles"], o.fields["service_roles"]) }}),
}

// joinedKeys joins the keys of objects, sorted.
func joinedKeys(objects ...any) string {
	all := map[string]any{}
	for _, o := range objects {
		if m, ok := o.(map[string]any); ok {
			maps.Copy(all, m)
		}
	}
	return strings.Join(slices.Sorted(maps.Keys(all)), ", ")
}

func serviceCommands() []*cobra.Command {
	return []*cobra.Command{
		listCommand(services, "services", "tabard iam services"),
		getCommand(services, "service-get NAME", "tabard iam service-get library"),
		serviceRegisterCommand(),
		deleteCommand(services, "service-unregister NAME...", "unregister", "tabard iam service-unregister library -f", nil, nil),
	}
}

// serviceFile is shown by service-register as an example of a definition.
const serviceFile = `name: library
display_name: Library
kind: service
actions:
  - {id: library.book.read, display_name: Read a book}
  - {id: library.book.write, display_name: Write a book}
attributes:
  - {name: shelf}
service_roles:
  Reader: {actions: [library.book.read]}
  Writer: {extends: [Reader], actions: [library.book.write]}
plans:
  - {id: 0a9d7a26-0d39-4a53-8a8d-0d5a7a0d0a01, name: free, reclamation: true}
`

func serviceRegisterCommand() *cobra.Command {
	var file string
	var replace bool
	c := spec{
		use: "service-register -f FILE", short: "Register a service of your own", example: "tabard iam service-register -f library.yaml",
		more: "Policies, custom roles and decisions of the account know it from then on. The file is YAML or JSON, with\n" +
			"actions that begin with the service's name; kind is service or platform_service:\n\n" + indent(strings.TrimSuffix(serviceFile, "\n")),
		flags: func(f *pflag.FlagSet) {
			f.StringVarP(&file, "file", "f", "", "definition as a YAML or JSON `FILE`; - is standard input")
			f.BoolVar(&replace, "replace", false, "replace the definition of a service that is registered already")
			idFlag(f)
		},
		run: func(s *session, _ []string) error {
			text, err := fileOrText(s.cmd, "@"+file)
			if err != nil {
				return during(err, "read the definition")
			}
			d, err := parseService(text)
			if err != nil {
				return fmt.Errorf("%s is not the definition of a service: %w", file, err)
			}
			s.announce("Registering service %s", d.Name)
			r := request{method: http.MethodPost, path: services.path, body: d}
			if replace {
				old, header, err := s.get(services.path+"/"+url.PathEscape(d.Name), nil)
				if err != nil {
					return err
				}
				r.method, r.path, r.header = http.MethodPut, services.at(d.Name), map[string]string{"If-Match": entityTag(old, header)}
			}
			o, err := s.send(r)
			var refused *apiError
			if errors.As(err, &refused) && refused.Status == http.StatusConflict && !replace {
				return &noted{error: err, note: "A service of your own is changed with: tabard iam service-register -f " + file + " --replace"}
			}
			if err != nil {
				return err
			}
			return s.made(services, o, "The service %s was registered.", d.Name)
		},
	}.command()
	must(c.MarkFlagRequired("file"))
	return c
}

// parseService reads a definition. A key that it does not have is an error, as
// it is for the server: a role that was meant and not made would go unnoticed.
func parseService(text string) (access.Definition, error) {
	var d access.Definition
	dec := yaml.NewDecoder(bytes.NewReader([]byte(text)), yaml.Strict())
	if err := dec.Decode(&d); err != nil {
		if errors.Is(err, io.EOF) {
			return d, errors.New("it is empty")
		}
		return d, err
	}
	if err := dec.Decode(new(any)); !errors.Is(err, io.EOF) {
		return d, errors.New("it has more than one document")
	}
	if d.Name == "" {
		return d, errors.New("it has no name")
	}
	return d, nil
}
