//go:build !race

package directory_test

// modelRuns is how many random histories the directory and its model share,
// each on a database of its own.
const modelRuns = "100"
