//go:build race

package server

// share is how many steps of a long walk there are for each one that is taken.
// The race detector is for what happens at once, which the walks do not.
const share = 12
