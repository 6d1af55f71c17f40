//go:build !unix

package datadir

// Sync makes the names in a directory durable, where the system has that.
func Sync(string) error { return nil }
