//go:build !race

package server

// share is how many steps of a long walk there are for each one that is taken.
const share = 1
