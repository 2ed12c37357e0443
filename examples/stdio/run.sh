#!/usr/bin/env bash
# Runs a command in a sandbox by MCP over stdio, in plain bash: examples/stdio/run.sh 'uname -a'
# Each message is one line of JSON. A real client uses a library; this shows what goes over the pipe.
set -euo pipefail
server=${SOULBOX_MCP:-$(cd "$(dirname "$0")/../.." && pwd)/bin/soulbox-mcp}
command=${1:?give a command}

# The server is a child process: what it writes is read from OUT, what it reads is written to IN.
coproc SERVER { exec "$server" stdio --on-exit kill --log-level error; }
OUT=${SERVER[0]} IN=${SERVER[1]} PID=$SERVER_PID

# A text as a JSON string.
quoted() {
	local s=$1
	s=${s//\\/\\\\} s=${s//\"/\\\"} s=${s//$'\n'/\\n} s=${s//$'\t'/\\t}
	printf '"%s"' "$s"
}

# Sends a request, and prints the answer with its id. Notifications that come before it are passed over.
ask() { # id, method, params
	printf '{"jsonrpc":"2.0","id":%s,"method":"%s","params":%s}\n' "$1" "$2" "$3" >&"$IN"
	local line
	while IFS= read -r line <&"$OUT"; do
		case $line in *'"id":'"$1"[,}]*) printf '%s\n' "$line"; return ;; esac
	done
	echo "the server has ended" >&2
	return 1
}

ask 1 initialize '{"protocolVersion":"2025-11-25","capabilities":{},"clientInfo":{"name":"example","version":"1"}}' >/dev/null
printf '{"jsonrpc":"2.0","method":"notifications/initialized"}\n' >&"$IN"
answer=$(ask 2 tools/call '{"name":"exec","arguments":{"command":'"$(quoted "$command")"'}}')

# The text of the result, for people; its structuredContent has the same for programs.
text=$(sed -E 's/.*"type":"text","text":"(([^"\\]|\\.)*)".*/\1/' <<<"$answer")
printf '%b\n' "$text"

exec {IN}>&- # the end of its stdin ends the server, and with it the sandbox
wait "$PID"
