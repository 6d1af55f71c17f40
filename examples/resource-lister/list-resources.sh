#!/bin/sh
# Lists cloud resources from inside a pod with nothing but a shell, sed and curl:
# exchanges the pod's service-account token for an access token of a trusted
# profile, and reads the list with that. No API key is stored anywhere.
#
# Settings: IAM_URL, PROFILE_NAME, and TOKEN_FILE if the token is elsewhere; or
# else what the published SDKs read, which an admission webhook may have put there.
# Ends with 0 when the list was read, 1 when it was refused or nobody answered,
# and 2 when the pod is set up wrongly.
set -eu
iam=${IAM_URL:-${RESOURCE_CONTROLLER_AUTH_URL-}} profile=${PROFILE_NAME:-${RESOURCE_CONTROLLER_IAM_PROFILE_NAME-}}
token_file=${TOKEN_FILE:-${RESOURCE_CONTROLLER_CR_TOKEN_FILENAME:-/var/run/secrets/tokens/sa-token}}
iam=${iam%/}

fail() { # status, then what happened and what to do about it
    status=$1
    shift
    printf '%s\n' "$@" >&2
    exit "$status"
}

# field prints a text of the answer: the first of these names that it has.
field() {
    for name in "$@"; do
        value=$(printf %s "$body" | tr -d '\n' | sed -n 's/.*"'"$name"'" *: *"\([^"]*\)".*/\1/p')
        [ -z "$value" ] || break
    done
    printf %s "$value"
}

# call asks with curl; afterwards $code is the HTTP status and $body the answer.
# What stands in $header goes by standard input, so that no token is on a command
# line. A server that is busy is asked again; curl's own --retry would leave the
# busy answer before the good one.
header=
call() {
    for wait in 1 2 4 8 0; do
        answer=$(printf %s "$header" | curl --silent --show-error --max-time 15 --header @- --write-out '\n%{http_code}' "$@") ||
            fail 1 "$iam does not answer." "Check IAM_URL, name resolution, network policies, and for https whose certificate it is."
        code=${answer##*
} body=${answer%
*}
        case $code in
        429 | 502 | 503 | 504) sleep "$wait" ;;
        *) break ;;
        esac
    done
}

refused() { # what was asked for
    error=$(field errorCode code)
    case $error in
    BXNIM0102E) hint="The account that the cluster belongs to has no trusted profile of this name." ;;
    BXNIM0398E) hint="The profile exists, but none of its links or claim rules matches this pod's namespace and service account." ;;
    BXNIM0401E) hint="The token file does not hold the token of a projected serviceAccountToken volume." ;;
    BXNIM0405E) hint="The token is of no registered cluster, not signed with the cluster's keys of today, or its audience is not 'iam'." ;;
    BXNIM0407E) hint="The token has ended or is good for longer than an hour: expirationSeconds must be 3600, and the clocks must agree." ;;
    *) hint="See the server's message." ;;
    esac
    fail 1 "$1 was refused: HTTP $code $error" \
        "$(field errorMessage message) $(field errorDetails)" "$hint" \
        "An administrator sees every check with: tabard activity explain $(field requestId trace transaction_id)"
}

[ -n "$iam" ] && [ -n "$profile" ] || fail 2 "IAM_URL and PROFILE_NAME must be set."
[ -r "$token_file" ] || fail 2 "$token_file cannot be read." \
    "The pod needs a projected volume with a serviceAccountToken of audience 'iam', as in shell.yaml."

# 1. The file is read for every exchange, because the kubelet replaces it. It goes
#    to curl by name, so that the token is on no command line.
call "$iam/identity/token" --data-urlencode "cr_token@$token_file" --data-urlencode "profile_name=$profile" \
    --data-urlencode grant_type=urn:ibm:params:oauth:grant-type:cr-token
[ "$code" = 200 ] || refused "The profile '$profile'"
access_token=$(field access_token)
[ -n "$access_token" ] || fail 1 "$iam does not speak like IAM." "Check IAM_URL and any proxy in between."
echo "This pod acts as the trusted profile '$profile' now."

# 2. The list, page by page, with the access token.
header="Authorization: Bearer $access_token"
page=/v2/resource_instances?limit=100
while [ -n "$page" ]; do
    call "$iam$page"
    [ "$code" = 200 ] || refused "The list"
    printf %s "$body" | grep -o '"crn" *: *"[^"]*"' | sed 's/.*"\(crn:.*\)"/\1/' || true
    # The token goes to this server alone: what is another's is no path here.
    page=$(field next_url | sed 's/\\u0026/\&/g')
    page=${page#"$iam"}
    case $page in
    /* | "") ;;
    *) fail 1 "The next page is said to be at $page, which is another server." ;;
    esac
done
echo "That is all it may see."
