#!/bin/sh
# Start a Ray head on this machine alone: dashboard and every other port on loopback, token on.
# Run: deploy/start_head.sh [options of `ray start`]. Ctrl-C stops it, and no other Ray.
set -eu

# Jobs call `python`: that of the project, not of the system.
PATH="$(cd "$(dirname "$0")/.." && pwd)/.venv/bin:$PATH"
export PATH RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0

token="$HOME/.ray/auth_token"
umask 077
[ -s "$token" ] || ray get-auth-token --generate > /dev/null
# Ray leaves it readable for everyone on this machine.
chmod 600 "$token"

cat << END
Once it says that Ray runs, submit from another terminal:
  export RAY_AUTH_MODE=token RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265
  ray job submit --working-dir . --runtime-env runtime_env.yaml -- python -m ray_jobs.train SPEC.yaml
END
exec ray start --head --block --node-ip-address=127.0.0.1 --dashboard-host=127.0.0.1 "$@"
