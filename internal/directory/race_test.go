//go:build race

package directory_test

// modelRuns is fewer under the race detector: the model test has one goroutine.
const modelRuns = "20"
