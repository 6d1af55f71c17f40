//go:build linux

package cli

import (
	"fmt"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// openTerminal returns the program's side of a terminal on which the user types
// text.
func openTerminal(t *testing.T, text string) *os.File {
	t.Helper()
	user, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Skipf("no terminals here: %v", err)
	}
	t.Cleanup(func() { user.Close() })
	if err := unix.IoctlSetPointerInt(int(user.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Skipf("unlock the terminal: %v", err)
	}
	n, err := unix.IoctlGetInt(int(user.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Skipf("number of the terminal: %v", err)
	}
	program, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skipf("open the terminal: %v", err)
	}
	t.Cleanup(func() { program.Close() })
	if _, err := user.WriteString(text); err != nil {
		t.Fatal(err)
	}
	return program
}

func TestADeletionAsksOnATerminal(t *testing.T) {
	s := newServer(t)
	s.login()
	s.answer("DELETE /v1/profiles/"+profileID, reply{status: 204})

	r := runWith(t, openTerminal(t, "n\n"), "iam", "trusted-profile-delete", profileID).want(1, "Delete trusted profile "+profileID+"? [y/N]", "not confirmed")
	if sent := s.requests(); len(sent) != 0 {
		t.Errorf("a deletion that was not confirmed sent requests: %v\n%s", sent, r.stderr)
	}
	runWith(t, openTerminal(t, "\n"), "iam", "trusted-profile-delete", profileID).want(1)
	runWith(t, openTerminal(t, "y\n"), "iam", "trusted-profile-delete", profileID).want(0, "was deleted")
	s.sent("DELETE /v1/profiles/" + profileID)

	vm := "/v1/instances/" + vmID + "/actions"
	s.answer("POST "+vm, reply{status: 201, body: item("id", "a", "type", "stop")})
	s.answer("GET /v1/instances/"+vmID, item("id", vmID, "status", "stopped"))
	runWith(t, openTerminal(t, "no\n"), "is", "instance-stop", vmID).want(1, "Stop instance "+vmID+"?")
	runWith(t, openTerminal(t, "yes\n"), "is", "instance-stop", vmID, "--no-wait").want(0)
	wantBody(t, s.sent("POST "+vm), item("type", "stop", "force", true))
	run(t, "is", "instance-stop", vmID).want(0)
}

func TestADeletionWithoutATerminalNeedsForce(t *testing.T) {
	s := newServer(t)
	s.login()
	s.answer("DELETE /v1/vpcs/"+vpcID, reply{status: 204})
	s.answer("DELETE /v1/vpcs/r006-"+uuidB, reply{status: 409, body: list("errors", item("code", "vpc_not_empty", "message", "the VPC is not empty"))})

	run(t, "is", "vpc-delete", vpcID).want(1, "no terminal to ask on: use -f")
	if sent := s.requests(); len(sent) != 0 {
		t.Errorf("requests were sent: %v", sent)
	}
	run(t, "is", "vpc-delete", vpcID, "-f").want(0, "VPC "+vpcID+" was deleted.")
	s.requests()

	// One that fails does not hold up the others.
	r := run(t, "is", "vpc-delete", "r006-"+uuidB, vpcID, "-f", "--output", "json").want(1, "delete VPC r006-"+uuidB+": the VPC is not empty.", "Transaction ID: ")
	want := "[\n  {\n    \"id\": \"r006-" + uuidB + "\",\n    \"name\": \"r006-" + uuidB + "\",\n    \"result\": false\n  },\n" +
		"  {\n    \"id\": \"" + vpcID + "\",\n    \"name\": \"" + vpcID + "\",\n    \"result\": true\n  }\n]\n"
	if r.stdout != want {
		t.Errorf("JSON is\n%s\nwant\n%s", r.stdout, want)
	}
}
