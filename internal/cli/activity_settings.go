package cli

import (
	"net/http"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"tabard.dev/tabard/internal/activity"
)

const logSettingsPath = "/v1/events/settings"

func logSettingsCommand() *cobra.Command {
	var decisions string
	return spec{
		use: "settings", short: "Show or change what the account asks of its activity log",
		more: "Without a flag it shows the settings. With --decisions all, each access decision has an event of its own before\n" +
			"its answer leaves: those about requests to this server, and those that services ask for. With denied only those that\n" +
			"deny have, also of single objects that a list leaves out. A refused request has its event in any case.",
		example: "tabard activity settings --decisions all",
		flags: func(f *pflag.FlagSet) {
			choice(f, &decisions, "decisions", "", "access decisions that have an event of their own", "off", activity.DecisionsDenied, activity.DecisionsAll)
		},
		run: func(s *session, _ []string) error {
			r := request{method: http.MethodGet, path: logSettingsPath}
			if decisions == "" {
				s.announce("Getting the settings of the activity log")
			} else {
				s.announce("Changing the settings of the activity log")
				r.method, r.body = http.MethodPatch, map[string]string{"decisions": decisions}
			}
			o, err := s.send(r)
			if err != nil {
				return err
			}
			s.ok("")
			return s.show(o, "account_id", columns("Account", "account_id", "Decisions", "decisions"))
		},
	}.command()
}
