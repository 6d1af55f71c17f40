// Command documents is a small service protected by Tabard: it serves the
// files of a folder, and who may read or write which of them is decided by the
// account's policies. README.md beside it shows the whole walk.
package main

import (
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"tabard.dev/tabard/authz"
)

func main() {
	guard, err := authz.New(authz.Config{
		URL: os.Getenv("TABARD_URL"), Service: "documents", Token: authz.APIKey(os.Getenv("DOCUMENTS_APIKEY")),
	})
	if err != nil {
		log.Fatal(err)
	}
	root, err := os.OpenRoot(os.Getenv("DOCUMENTS_DIR")) // no name leads out of it
	if err != nil {
		log.Fatal(err)
	}
	// What is asked about and what is opened must be the same name.
	name := func(r *http.Request) string { return filepath.Base(r.PathValue("name")) }
	document := func(r *http.Request) authz.Resource { return authz.Resource{Type: "document", ID: name(r)} }

	mux := http.NewServeMux()
	mux.Handle("GET /documents/{name}", guard.Require("documents.document.read", document)(
		http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { http.ServeFileFS(w, r, root.FS(), name(r)) })))
	mux.Handle("PUT /documents/{name}", guard.Require("documents.document.write", document)(
		http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			caller, _ := authz.CallerOf(r.Context())
			body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, 1<<20))
			if err == nil {
				err = root.WriteFile(name(r), body, 0o600)
			}
			if err != nil {
				http.Error(w, "The document could not be written.", http.StatusBadRequest)
				return
			}
			fmt.Fprintf(w, "written by %s (%s)\n", caller.Name, caller.AuthnID)
		})))
	srv := &http.Server{Addr: os.Getenv("LISTEN"), Handler: mux, ReadTimeout: 10 * time.Second, WriteTimeout: 10 * time.Second}
	log.Fatal(srv.ListenAndServe())
}
