//go:build race

package access_test

// underRace makes the properties run a tenth of their checks: the race
// detector slows them down and has little to find in pure functions.
const underRace = true
