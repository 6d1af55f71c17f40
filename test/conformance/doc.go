// Package conformance runs the integration suites that ship inside the
// published Go module github.com/IBM/platform-services-go-sdk against the
// built binary, and holds their outcome against exclusions.txt.
//
//	make conformance                                              all suites
//	make conformance ARGS='-run TestPublishedSuites/iamidentityv1' one suite
//	make compatibility                                            all suites, and docs/compatibility.md anew
//
// The suites are used as they are: the runner fetches the module through the
// Go proxy, checks its sum, compiles each suite once with the versions that
// the module itself asks for (the binaries are kept in .cache/conformance) and
// gives it a server of its own and the settings it reads from its env file.
// What is not copied are the module's unit tests, which talk to no server.
//
// A spec that fails is shown with its assertion and with every request that it
// made: a recording proxy stands between suite and server. The run fails when
//
//   - a spec that is not excluded fails or is skipped,
//   - an excluded spec passes, or is not in the suite,
//   - the number of required specs is not the one in the table of suites.
//
// Environment:
//
//	TABARD_BIN           the binary under test (default: built on the spot)
//	CONFORMANCE_RESULTS  a file to write results to: one JSON object per spec
//	CONFORMANCE_DEBUG    1 shows what failing specs wrote, with the full requests
//	COMPATIBILITY        "write" makes docs/compatibility.md from the run
package conformance
