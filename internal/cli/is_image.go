package cli

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/mattn/go-isatty"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

var images = &kind{
	noun: "image", plural: "images", listed: "is images", path: "/v1/images", array: "images", id: "id", form: regional, vpc: true, byName: nameFilter,
	columns: columns("ID", "id", "Name", "name", "Status", "status", "Arch", "operating_system.architecture", "OS name", "operating_system.display_name|operating_system.name",
		"OS version", "operating_system.version", "File size(GB)", "file.size", "Visibility", "visibility", "Resource group", "resource_group.name"),
	details: columns("ID", "id", "Name", "name", "CRN", "crn", "Status", "status", "Status reasons", "status_reasons.message",
		"Arch", "operating_system.architecture", "OS name", "operating_system.name", "File size(GB)", "file.size", "SHA256", "file.checksums.sha256",
		"Boot volume(GB)", "minimum_provisioned_size", "Visibility", "visibility", "Resource group", "resource_group.name", "Created", "created_at"),
}

var operatingSystems = &kind{
	noun: "operating system", plural: "operating systems", listed: "is operating-systems", path: "/v1/operating_systems", array: "operating_systems", id: "name", vpc: true,
	columns: columns("Name", "name", "Display name", "display_name", "Family", "family", "Version", "version", "Arch", "architecture", "Vendor", "vendor", "For images", "allow_user_image_creation"),
	details: columns("Name", "name", "Display name", "display_name", "Family", "family", "Version", "version", "Arch", "architecture", "Vendor", "vendor", "For images", "allow_user_image_creation"),
}

func imageCommands() []*cobra.Command {
	imagePlace := place{kind: images, family: "is", word: "image", args: "IMAGE", sample: "my-image"}
	return []*cobra.Command{
		listCommand(images, "images", "tabard is images", append([]filter{
			{"visibility", "", "visibility", "all, public or private", nil}, {"status", "", "status", "only in this status", nil},
		}, inGroup...)...),
		getCommand(images, "image IMAGE", "tabard is image IMAGE"),
		imageCreateCommand(),
		imagePlace.update(change{method: http.MethodPatch, options: newName, example: "--name my-other-image"}),
		deleteCommand(images, "image-delete IMAGE...", "delete", "tabard is image-delete my-image -f", nil, nil),
		listCommand(operatingSystems, "operating-systems", "tabard is operating-systems"),
		getCommand(operatingSystems, "operating-system NAME", "tabard is operating-system debian-12-amd64"),
	}
}

// imageOptions are the flags of image-create.
type imageOptions struct {
	groupFlags
	file, system, checksum string
	noWait                 bool
}

func imageCreateCommand() *cobra.Command {
	var o imageOptions
	return spec{
		use: "image-create IMAGE_NAME --file (FILE|URL)", short: "Register an image that instances can boot", args: cobra.ExactArgs(1),
		more: "The file is a qcow2 or raw disk. A FILE of this machine is uploaded; the file at an http or https URL is fetched by\n" +
			"the server, over plain http only with its checksum. Waits until the image is available; with --no-wait not for a fetch.",
		example: "tabard is image-create my-debian --file debian-12-genericcloud-amd64.qcow2 --os-name debian-12-amd64",
		flags: func(f *pflag.FlagSet) {
			f.StringVar(&o.file, "file", "", "disk to upload, or URL of one, as `FILE` or URL")
			f.StringVar(&o.system, "os-name", "", "operating system; tabard is operating-systems lists them")
			f.StringVar(&o.checksum, "checksum", "", "`SHA256` that the file must have")
			f.BoolVar(&o.noWait, "no-wait", false, "do not wait for the server to fetch the file")
			o.add(f)
			idFlag(f)
		},
		run: func(s *session, args []string) error {
			if o.file == "" {
				return Usage("missing --file")
			}
			if strings.HasPrefix(o.file, "http://") || strings.HasPrefix(o.file, "https://") {
				return o.fetched(s, args[0])
			}
			return o.uploaded(s, args[0])
		},
	}.command()
}

func (o *imageOptions) create(s *session, name string, file map[string]any) (object, error) {
	body := map[string]any{"name": name}
	if o.checksum != "" {
		file["checksums"] = map[string]string{"sha256": o.checksum}
	}
	if len(file) > 0 {
		body["file"] = file
	}
	if o.system != "" {
		body["operating_system"] = byName(o.system)
	}
	if err := o.set(s, body); err != nil {
		return object{}, err
	}
	return s.send(request{method: http.MethodPost, path: images.path, query: images.one(), body: body})
}

// fetchPatience is how long the client waits for the server to fetch a file.
const fetchPatience = time.Hour

func (o *imageOptions) fetched(s *session, name string) error {
	s.announce("Creating image %s", name)
	made, err := o.create(s, name, map[string]any{"href": o.file})
	if err != nil {
		return err
	}
	if o.noWait {
		return s.made(images, made, "The image %s was created; its file is being fetched.", name)
	}
	ctx, cancel := context.WithTimeout(s.ctx(), fetchPatience)
	defer cancel()
	for told := s.quiet; ; told = true {
		var now object
		if _, err := s.client.do(ctx, request{method: http.MethodGet, path: images.at(made.text("id")), query: images.one()}, &now); err != nil {
			return during(err, "wait for image "+name)
		}
		switch status := now.text("status"); status {
		case "available":
			return s.made(images, now, "The image %s was created.", name)
		case "pending":
		default:
			return fmt.Errorf("image %s is %s: %s", name, status, now.text("status_reasons.message"))
		}
		if !told {
			fmt.Fprintf(s.cmd.ErrOrStderr(), "The server is fetching the file of image %s.\n", plain(name))
		}
		select {
		case <-ctx.Done():
		case <-time.After(pollEvery):
		}
	}
}

func (o *imageOptions) uploaded(s *session, name string) error {
	path := strings.TrimPrefix(o.file, "@")
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() || info.Size() == 0 {
		return fmt.Errorf("%s is not a file with something in it", path)
	}
	s.announce("Creating image %s", name)
	made, err := o.create(s, name, map[string]any{})
	if err != nil {
		return err
	}
	id := made.text("id")
	done, err := s.upload(images.at(id, "file"), f, info.Size())
	if err == nil {
		return s.made(images, done, "The image %s was created.", name)
	}
	// An image that waits for its file for ever is of no use, and its name is
	// taken. The user may have interrupted, so this has a time of its own.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(s.ctx()), requestTimeout)
	defer cancel()
	if _, undo := s.client.do(ctx, request{method: http.MethodDelete, path: images.at(id), query: images.one()}, nil); undo != nil {
		s.warn("the image %s stays without its file; delete it with: tabard is image-delete %s", name, id)
	}
	return during(err, "upload "+path)
}

// upload sends a file and tells on a terminal how far it is. The server is told
// the checksum of what this machine has sent, so it is read twice.
func (s *session) upload(path string, f *os.File, size int64) (object, error) {
	hash := sha256.New()
	if _, err := io.Copy(hash, f); err != nil {
		return object{}, fmt.Errorf("read the file: %w", err)
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return object{}, fmt.Errorf("read the file: %w", err)
	}
	p := &progress{r: f, size: size}
	if w := s.cmd.ErrOrStderr(); !s.quiet && !s.json && terminalOut(w) {
		p.out = w
		defer fmt.Fprint(w, "\r\x1b[K")
	}
	var o object
	_, err := s.client.do(s.ctx(), request{
		method: http.MethodPut, path: path, query: images.one(), body: rawBody{p, size},
		header: map[string]string{"X-Content-SHA256": hex.EncodeToString(hash.Sum(nil)), "Expect": "100-continue"},
	}, &o)
	return o, err
}

// terminalOut reports whether text goes to a terminal.
func terminalOut(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && isatty.IsTerminal(f.Fd())
}

// progress tells how much of a file was read.
type progress struct {
	r    io.Reader
	out  io.Writer // nil tells nothing
	size int64
	read int64
	told int64 // percent
}

func (p *progress) Read(b []byte) (int, error) {
	n, err := p.r.Read(b)
	p.read += int64(n)
	if percent := p.read * 100 / p.size; p.out != nil && percent != p.told {
		p.told = percent
		fmt.Fprintf(p.out, "\rUploading: %d%% of %d MiB", percent, p.size>>20)
	}
	if errors.Is(err, io.EOF) && p.read != p.size {
		return n, fmt.Errorf("the file has changed while it was read: %d bytes instead of %d", p.read, p.size)
	}
	return n, err
}
