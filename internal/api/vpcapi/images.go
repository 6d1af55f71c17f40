package vpcapi

import (
	"cmp"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"

	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/vpc"
)

// checksumHeader carries the hexadecimal SHA256 of an uploaded file.
const checksumHeader = "X-Content-SHA256"

// imageRoutes are the stock images, which every account sees, and those that an
// account has registered. Beside the field's own way, a file at a URL, an image
// can be made without a file, which is then uploaded to /file.
func (s *service) imageRoutes() {
	const one = "/v1/images/{id}"
	read, update := nounImage.action("read"), nounImage.action("update")

	s.list(nounImage, []string{"resource_group.id", "name", "status", "visibility", "user_data_format", "remote.account.id"}, s.imageRows)
	api.Read(s.Family, "GET "+one, read, s.loadImage,
		func(c *api.Call, i *vpc.Image) (api.Reply, error) { return api.Reply{Body: s.imageShape(c, i)}, nil })
	api.Change(s.Family, "POST /v1/images", nounImage.action("create"), nounImage.action("create"),
		forCreate(s, nounImage, func(b *imageBody) (*identityRef, *string) { return b.ResourceGroup, b.Name }), s.createImage)
	api.Change(s.Family, "PATCH "+one, update, update,
		func(c *api.Call, _ *imagePatch) (*vpc.Image, api.Target, error) { return s.loadImage(c) }, s.updateImage)
	api.Change(s.Family, "DELETE "+one, nounImage.action("delete"), nounImage.action("delete"),
		func(c *api.Call, _ *api.None) (*vpc.Image, api.Target, error) { return s.loadImage(c) }, s.deleteImage)
	api.Upload(s.Family, "PUT "+one+"/file", update, "is.image.file.upload", s.loadImage, s.receiveFile, s.takeFile)

	api.List(s.Family, "GET /v1/operating_systems", nounImage.action("list"), s.listSystems)
	api.Read(s.Family, "GET /v1/operating_systems/{name}", read, s.loadSystem,
		func(_ *api.Call, o vpc.System) (api.Reply, error) { return api.Reply{Body: s.systemShape(o)}, nil })
}

func (s *service) stockImage(id string) (*vpc.Image, bool) {
	for _, i := range vpc.StockImages(s.region) {
		if i.ID == id {
			return &i, true
		}
	}
	return nil, false
}

// findImage returns a stock image or one of the caller's account.
func (s *service) findImage(c *api.Call, id, field string) (*vpc.Image, error) {
	if i, ok := s.stockImage(id); ok {
		return i, nil
	}
	return s.images.find(c, id, field)
}

// imageOf returns the image that an instance was made of. It may be gone, and a
// machine that somebody else made never had one.
func (s *service) imageOf(i *vpc.Instance) (vpc.Image, bool) {
	if stock, ok := s.stockImage(i.ImageID); ok {
		return *stock, true
	}
	image, ok := s.d.Images.Get(i.ImageID)
	if !ok || image.AccountID != i.AccountID {
		return vpc.Image{}, false
	}
	return *image, true
}

func stock(i *vpc.Image) bool { return i.AccountID == "" }

// imageAttributes are what access to an image is decided on. A stock image is in
// no resource group of its own, so it counts as one of the group that it is used
// in; else nobody with access to one group could use an image at all.
func (s *service) imageAttributes(c *api.Call, i *vpc.Image, groupID string) map[string]string {
	if !stock(i) {
		groupID = i.ResourceGroupID
	}
	return s.attributes(c, nounImage, i.ID, groupID)
}

func (s *service) imageTarget(c *api.Call, i *vpc.Image) api.Target {
	return api.Target{
		Resource: s.imageAttributes(c, i, s.groupID(c, nil)),
		CRN:      s.imageRef(*i).CRN, Name: i.Name, TypeURI: nounImage.typeURI(),
	}
}

func (s *service) loadImage(c *api.Call) (*vpc.Image, api.Target, error) {
	i, err := s.findImage(c, c.R.PathValue("id"), "")
	if err != nil {
		return nil, api.Target{TypeURI: nounImage.typeURI()}, err
	}
	return i, s.imageTarget(c, i), nil
}

func (s *service) imageRows(c *api.Call) []row {
	groupID := s.groupID(c, nil)
	var rows []row
	for _, i := range vpc.StockImages(s.region) {
		rows = append(rows, s.imageRow(c, &i, groupID))
	}
	for _, i := range s.d.ImagesByAccount.Get(c.Account()) {
		rows = append(rows, s.imageRow(c, i, i.ResourceGroupID))
	}
	return rows
}

func (s *service) imageRow(c *api.Call, i *vpc.Image, groupID string) row {
	shape := s.imageShape(c, i)
	r := row{
		resource: s.imageAttributes(c, i, groupID), created: i.CreatedAt, id: i.ID,
		filters: map[string]string{
			"resource_group.id": groupID, "name": i.Name,
			"status": shape.Status, "visibility": shape.Visibility, "user_data_format": cloudInit,
		},
		body: func() any { return shape },
	}
	if stock(i) {
		r.created = stockSince
	}
	return r
}

type imageBody struct {
	Name          *string       `json:"name"`
	ResourceGroup *identityRef  `json:"resource_group"`
	System        *identityRef  `json:"operating_system"`
	File          imageFileBody `json:"file"`

	all properties
}

// imageFileBody says where the file is, and, which is ours, its checksum.
type imageFileBody struct {
	Href      string `json:"href"`
	Checksums struct {
		SHA256 string `json:"sha256"`
	} `json:"checksums"`
}

// UnmarshalJSON keeps the names of all properties beside the known ones.
func (b *imageBody) UnmarshalJSON(raw []byte) error {
	type plain imageBody
	if err := json.Unmarshal(raw, (*plain)(b)); err != nil {
		return err
	}
	return json.Unmarshal(raw, &b.all)
}

// fixedImage are the properties of images that this server does not know.
var fixedImage = map[string]string{
	"allowed_use": "", "deprecation_at": "", "obsolescence_at": "", "encrypted_data_key": "", "encryption_key": "", "source_volume": "",
}

func (s *service) createImage(c *api.Call, tx *directory.Tx, b *imageBody, groupID string) (api.Reply, api.Target, error) {
	i, err := s.newImage(c, b, groupID)
	if err != nil {
		return api.Reply{}, api.Target{}, err
	}
	s.d.Images.Put(tx, i)
	r := api.Reply{Status: http.StatusCreated, Body: s.imageShape(c, i), ResponseData: map[string]any{"operating_system": i.OSName, "source": publicPart(i.Source)}}
	return r, s.imageTarget(c, i), nil
}

func (s *service) newImage(c *api.Call, b *imageBody, groupID string) (*vpc.Image, error) {
	if s.opts.Images == nil {
		return nil, fault.New(fault.Invalid, "bad_request", "This server keeps no images.")
	}
	if err := s.checkGroup(c, groupID); err != nil {
		return nil, err
	}
	if err := b.all.refuse(fixedImage); err != nil {
		return nil, err
	}
	system := vpc.AnySystem
	if b.System != nil {
		name, err := nameOf(b.System, "operating_systems", "operating_system")
		if err != nil {
			return nil, err
		}
		var ok bool
		if system, ok = vpc.SystemNamed(name); !ok {
			return nil, api.NotFound("operating system for images", name).On("operating_system.name")
		}
	}
	expect, err := checksum(b.File.Checksums.SHA256)
	if err != nil {
		return nil, err.On("file.checksums.sha256")
	}
	if b.File.Href != "" {
		if err := validSource(b.File.Href, expect != ""); err != nil {
			return nil, badField("file.href", "The property file.href cannot be used: %v.", err)
		}
	}
	name, nameErr := s.images.newName(c, b.Name)
	if nameErr != nil {
		return nil, nameErr
	}
	for _, i := range vpc.StockImages(s.region) {
		if i.Name == name {
			return nil, fault.New(fault.Conflict, s.images.taken, "An image with the name %q already exists.", name).On("name")
		}
	}
	if err := quota(s.d.ImagesByAccount.Len(c.Account()), vpc.MaxImages, "The account", "images"); err != nil {
		return nil, err
	}
	return &vpc.Image{
		ID: s.regionalID(), AccountID: c.Account(), Name: name, ResourceGroupID: groupID,
		OS: system.Family, OSName: system.Name, Version: system.Version, Architecture: system.Architecture, Vendor: system.Vendor,
		Status: vpc.Pending, Source: b.File.Href, Expect: expect,
	}, nil
}

// checksum checks the form of a hexadecimal SHA256, which may be missing.
func checksum(text string) (string, *fault.Error) {
	if text == "" {
		return "", nil
	}
	if b, err := hex.DecodeString(text); err != nil || len(b) != 32 {
		return "", fault.New(fault.Invalid, "bad_field", "The SHA256 of a file has 64 hexadecimal digits.")
	}
	return strings.ToLower(text), nil
}

type imagePatch struct {
	Name *string `json:"name"`

	all properties
}

// UnmarshalJSON keeps the names of all properties beside the known ones.
func (b *imagePatch) UnmarshalJSON(raw []byte) error {
	type plain imagePatch
	if err := json.Unmarshal(raw, (*plain)(b)); err != nil {
		return err
	}
	return json.Unmarshal(raw, &b.all)
}

// ofAccount refuses to change an image that is not the account's to change.
func ofAccount(i *vpc.Image) error {
	if stock(i) {
		return invalidState("The image %s is part of the server.", i.ID)
	}
	return nil
}

func (s *service) updateImage(c *api.Call, tx *directory.Tx, b *imagePatch, i *vpc.Image) (api.Reply, api.Target, error) {
	fail := func(err error) (api.Reply, api.Target, error) { return api.Reply{}, api.Target{}, err }
	if err := ofAccount(i); err != nil {
		return fail(err)
	}
	if err := b.all.refuse(fixedImage); err != nil {
		return fail(err)
	}
	changed := *i
	if b.Name != nil {
		if err := s.images.checkName(c, *b.Name, i.ID); err != nil {
			return fail(err)
		}
		changed.Name = *b.Name
	}
	s.d.Images.Put(tx, &changed)
	return api.Reply{Body: s.imageShape(c, &changed)}, s.imageTarget(c, &changed), nil
}

// deleteImage deletes an image; its file is removed after. An image that
// instances were made of stays: their disks are overlays over it, and an
// instance that starts again needs it.
func (s *service) deleteImage(c *api.Call, tx *directory.Tx, _ *api.None, i *vpc.Image) (api.Reply, api.Target, error) {
	t := s.imageTarget(c, i)
	if err := ofAccount(i); err != nil {
		return api.Reply{}, t, err
	}
	used := 0
	for _, instance := range s.d.InstancesByAccount.Get(c.Account()) {
		if instance.ImageID == i.ID {
			used++
		}
	}
	if used > 0 {
		return api.Reply{}, t, fault.New(fault.Conflict, "image_in_use", "The image %s is that of %d instances; delete them first.", i.ID, used)
	}
	s.d.Images.Delete(tx, i)
	return api.Reply{Status: http.StatusAccepted}, t, nil
}

// waiting refuses a file for an image that does not wait for one.
func waiting(i *vpc.Image) error {
	if err := ofAccount(i); err != nil {
		return err
	}
	switch {
	case i.Status != vpc.Pending:
		return invalidState("The image %s is %s; only a pending one takes a file.", i.ID, i.Status)
	case i.Source != "":
		return invalidState("The file of the image %s is fetched from its URL.", i.ID)
	}
	return nil
}

func (s *service) receiveFile(c *api.Call, body io.Reader, i *vpc.Image) (*imageFile, error) {
	if err := waiting(i); err != nil {
		return nil, err
	}
	expect, f := checksum(c.R.Header.Get(checksumHeader))
	if f != nil {
		return nil, f.OnHeader(checksumHeader)
	}
	if expect != "" && i.Expect != "" && expect != i.Expect {
		return nil, fault.New(fault.Invalid, "bad_field", "The image was created for a file with the SHA256 %s.", i.Expect).OnHeader(checksumHeader)
	}
	if c.R.ContentLength == 0 {
		return nil, fault.New(fault.Invalid, "bad_request", "The request has no body; send the file as application/octet-stream.")
	}
	if n := s.opts.Images.maxBytes(); c.R.ContentLength > n {
		return nil, tooLarge(n)
	}
	return s.opts.Images.receive(i, body, c.R.ContentLength, cmp.Or(expect, i.Expect))
}

func (s *service) takeFile(c *api.Call, tx *directory.Tx, file *imageFile, i *vpc.Image) (api.Reply, api.Target, error) {
	if err := waiting(i); err != nil { // somebody else may have been faster
		return api.Reply{}, api.Target{}, err
	}
	changed, err := s.opts.Images.take(tx, file, i)
	if err != nil {
		return api.Reply{}, api.Target{}, err
	}
	return api.Reply{Body: s.imageShape(c, changed), ResponseData: map[string]any{"sha256": changed.SHA256, "bytes": changed.Bytes}}, s.imageTarget(c, changed), nil
}

func (s *service) imageRef(i vpc.Image) reference {
	return reference{
		CRN: s.crn(nounImage, s.region.Name, i.AccountID, i.ID), Href: s.href("images", i.ID),
		ID: i.ID, Name: i.Name, ResourceType: "image",
	}
}

func (s *service) imageShape(c *api.Call, i *vpc.Image) imageShape {
	ref := s.imageRef(*i)
	shape := imageShape{
		AllowedUse: allowedUse{APIVersion: "2024-06-23", BareMetalServer: "false", Instance: "true"},
		CreatedAt:  stamp(i.CreatedAt), CRN: ref.CRN, Encryption: "none", Href: ref.Href, ID: i.ID,
		MinimumProvisionedSize: provisionedGB(*i), Name: i.Name, OperatingSystem: s.systemShape(systemOf(*i)),
		ResourceGroup: s.groupRef(i.ResourceGroupID), ResourceType: ref.ResourceType, Status: i.Status,
		StatusReasons: []statusReason{}, UserDataFormat: cloudInit, Visibility: "private",
	}
	if stock(i) {
		shape.CreatedAt, shape.Visibility = stamp(stockSince), "public"
		shape.ResourceGroup, shape.Status = s.groupRef(s.groupID(c, nil)), available
		return shape
	}
	if i.SHA256 != "" {
		shape.File = fileShape{&checksums{i.SHA256}, vpc.GB(i.Bytes)}
	}
	switch {
	case i.Status == vpc.Failed:
		shape.StatusReasons = append(shape.StatusReasons, statusReason{"image_data_corrupted", i.Reason})
	case i.Status == vpc.Pending && i.Source == "":
		shape.StatusReasons = append(shape.StatusReasons, statusReason{"image_request_queued", fmt.Sprintf("The image waits for its file: PUT %s/file.", ref.Href)})
	case i.Status == vpc.Pending:
		shape.StatusReasons = append(shape.StatusReasons, statusReason{"image_request_in_progress", "The file is being fetched."})
	}
	return shape
}

func (s *service) systemShape(o vpc.System) systemShape {
	return systemShape{
		AllowUserImageCreation: o.Name != vpc.LocalSystem.Name,
		Architecture:           o.Architecture, DisplayName: o.Display, Family: o.Family,
		Href: s.href("operating_systems", o.Name), Name: o.Name,
		UserDataFormat: cloudInit, Vendor: o.Vendor, Version: o.Version,
	}
}

// systemOf returns the operating system of an image.
func systemOf(i vpc.Image) vpc.System {
	if i.OSName == vpc.LocalSystem.Name {
		return vpc.LocalSystem
	}
	if o, ok := vpc.SystemNamed(i.OSName); ok {
		return o
	}
	return vpc.System{Name: i.OSName, Display: i.OSName + " " + i.Version, Family: i.OS, Version: i.Version, Architecture: i.Architecture, Vendor: i.Vendor}
}

func systems() []vpc.System { return append([]vpc.System{vpc.LocalSystem}, vpc.Systems...) }

// systemTarget is what access to operating systems is decided on: the stock
// image, which has one and is as public as all of them.
func (s *service) systemTarget(c *api.Call) api.Target {
	return s.imageTarget(c, &vpc.StockImages(s.region)[0])
}

func (s *service) loadSystem(c *api.Call) (vpc.System, api.Target, error) {
	name := c.R.PathValue("name")
	for _, o := range systems() {
		if o.Name == name {
			return o, s.systemTarget(c), nil
		}
	}
	return vpc.System{}, api.Target{}, api.NotFound("operating system", name).OnParameter("name", name)
}

func (s *service) listSystems(c *api.Call, may func(map[string]string) bool) (api.Reply, error) {
	var rows []row
	for _, o := range systems() {
		rows = append(rows, row{resource: s.systemTarget(c).Resource, created: stockSince, id: o.Name, body: func() any { return s.systemShape(o) }})
	}
	return s.page(c, "operating_systems", nil, rows, may)
}
