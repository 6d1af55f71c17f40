// Package datadir is the directory that a server or an agent keeps its data in:
// one process at a time.
package datadir
