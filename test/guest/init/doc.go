//go:build linux

// Command init is the first and only service manager of the test guest
// (package guest): it makes a Debian kernel, busybox, dropbear and curl behave
// like a cloud image that follows cloud-init.
//
// All that it knows of the instance comes from a NoCloud seed, a volume
// labelled cidata, as with a stock cloud image: what an installation forgets to
// put there is missing in the guest. It understands the part of cloud-init that
// its tests need and says on the console what it leaves out. It is not for
// production: it asks no metadata service, does no DHCP and runs everything as
// root.
package main
