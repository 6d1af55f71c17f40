package cli

import (
	"errors"
	"net/url"
	"time"

	"github.com/spf13/cobra"
)

func assumeCommands() []*cobra.Command {
	return []*cobra.Command{assumeCommand(), leaveCommand()}
}

// assumeCommand puts a profile on for the commands that follow. The session
// that it was put on with is kept beside.
func assumeCommand() *cobra.Command {
	return spec{
		use: "trusted-profile-assume (NAME|ID)", short: "Act as a trusted profile", args: cobra.ExactArgs(1),
		more: "You must be an identity of the profile: tabard iam trusted-profile-identities lists them. Commands act as the profile\n" +
			"until its token ends, at most an hour later, or tabard iam trusted-profile-leave. A profile of another account is\n" +
			"named by its ID or CRN.",
		example: "tabard iam trusted-profile-assume my-trusted-profile",
		run: func(s *session, args []string) error {
			if s.Own != nil {
				return errors.New("you act as a trusted profile already. Leave it first with: tabard iam trusted-profile-leave")
			}
			s.announce("Assuming trusted profile %s", args[0])
			form := url.Values{
				"grant_type": {"urn:ibm:params:oauth:grant-type:assume"}, "access_token": {s.AccessToken},
				"profile_" + selector(args[0]): {args[0]},
			}
			if selector(args[0]) == "name" {
				form.Set("account", s.AccountID)
			}
			own := *s.state
			if err := s.exchange(form); err != nil {
				return during(err, "assume trusted profile "+args[0])
			}
			s.Own = &own
			if s.AccountID != own.AccountID {
				s.ResourceGroupID, s.ResourceGroupName = "", ""
			}
			if err := s.save(); err != nil {
				return err
			}
			return s.nowActing()
		},
	}.command()
}

func leaveCommand() *cobra.Command {
	return spec{
		use: "trusted-profile-leave", short: "Stop acting as a trusted profile", example: "tabard iam trusted-profile-leave",
		more: "Commands act again as whoever assumed the profile.",
	}.bare(func(cmd *cobra.Command, _ []string) error {
		// The profile's token may have ended: nothing here needs it.
		s, err := offline(cmd)
		if err != nil {
			return err
		}
		if s.Own == nil {
			return errors.New("you do not act as a trusted profile")
		}
		*s.state = *s.Own
		if err := s.save(); err != nil {
			return err
		}
		return s.nowActing()
	})
}

func (s *session) nowActing() error {
	if !s.json {
		s.ok("You act as %s now, until %s.", s.who(), s.Expires.Truncate(time.Second).Format(timeForm))
		return nil
	}
	return s.showTarget()
}
