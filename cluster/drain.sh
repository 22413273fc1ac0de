#!/usr/bin/env bash
# Tell Ray that this machine will be taken away, so that a run on it saves at once.
#
#   drain.sh aws|gcp     waits until the cloud says so of this spot machine
#   drain.sh now [S]     says it at once; then waits while a run's worker is here, for S seconds at most
#
# With a token, RAY_AUTH_MODE and what Ray needs to find it have to be set.
set -euo pipefail

PROC=${PROC:-/proc}
METADATA=${METADATA:-http://169.254.169.254} # on AWS and on Google Cloud
declare -A LEFT_S=([aws]=110 [gcp]=25 [now]=${2:-60}) # AWS gives two minutes, Google 30 s

announced() {
  case $1 in
    aws) # 404 until there is something to say
      local token
      token=$(curl -sf -m 5 -X PUT -H "X-aws-ec2-metadata-token-ttl-seconds: 60" "$METADATA/latest/api/token") &&
        curl -sf -m 5 -o /dev/null -H "X-aws-ec2-metadata-token: $token" \
          "$METADATA/latest/meta-data/spot/instance-action" ;;
    gcp) [[ $(curl -sf -m 5 -H "Metadata-Flavor: Google" \
      "$METADATA/computeMetadata/v1/instance/preempted") == TRUE ]] ;;
    now) return 0 ;;
  esac
}

# The command line of this machine's raylet has its number and the cluster's address.
option() {
  tr '\0' '\n' < "$raylet" | sed -n "s/^--$1=//p" | head -n 1
}

[[ -v LEFT_S[${1:-}] ]] || { echo "drain.sh: aws, gcp or now" >&2; exit 2; }
until announced "$1"; do sleep 3; done
raylet=$(grep -als '^[^ ]*/raylet/raylet.--raylet_socket_name' "$PROC"/[0-9]*/cmdline | head -n 1) || true
[[ -n $raylet ]] || { echo "drain.sh: no raylet runs here" >&2; exit 1; }
timeout 20 ray drain-node --address "$(option gcs-address)" --node-id "$(option node_id)" \
  --reason DRAIN_NODE_REASON_PREEMPTION --reason-message "the machine will be taken away" \
  --deadline-remaining-seconds "${LEFT_S[$1]}"
[[ $1 == now ]] || exit 0
for ((s = 0; s < LEFT_S[now]; s++)); do
  grep -aqs '^ray::RayTrainWorker' "$PROC"/[0-9]*/cmdline || exit 0
  sleep 1
done
