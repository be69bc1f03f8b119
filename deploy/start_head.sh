#!/bin/sh
# Start a Ray head for this machine only: all ports on loopback, token authentication enabled.
# Run: deploy/start_head.sh [options of `ray start`]. Ctrl-C stops this head and no other.
set -eu

# Jobs run `python`, which must be the project's.
PATH="$(cd "$(dirname "$0")/.." && pwd)/.venv/bin:$PATH"
export PATH RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0

token="$HOME/.ray/auth_token"
umask 077
[ -s "$token" ] || ray get-auth-token --generate > /dev/null
# Ray creates it readable by every user of this machine.
chmod 600 "$token"

cat << END
When Ray is running, submit jobs from another terminal:
  export RAY_AUTH_MODE=token RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265
  ray job submit --working-dir . --runtime-env runtime_env.yaml -- python -m ray_jobs.train SPEC.yaml
END
exec ray start --head --block --node-ip-address=127.0.0.1 --dashboard-host=127.0.0.1 "$@"
