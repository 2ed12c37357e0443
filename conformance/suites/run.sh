#!/usr/bin/env bash
# Test suites of well-known programs, outside and in a sandbox of this checkout. Prints each test that passes outside and does not inside,
# and exits 1 for one that differences.txt does not know. Needs what the suites come from: Go's module proxy and Debian's archive.
set -euo pipefail
cd "$(dirname "$0")"
here=$PWD bin=$(cd ../../bin && pwd) work=$(mktemp -d)
server=
finish() {
	[ -z "$server" ] || { kill "$server" 2>/dev/null || true; wait "$server" 2>/dev/null || true; }
	rm -rf "$work"
}
trap finish EXIT
mkdir "$work/suites" "$work/state"
chmod 755 "$work"

# Go's: their tests as one program each, with the directory that they run in.
for module in github.com/creack/pty@v1.1.24 github.com/fsnotify/fsnotify@v1.10.1 github.com/containerd/console@v1.0.5; do
	name=$(basename "${module%@*}")
	dir=$(go mod download -json "$module" | sed -n 's/.*"Dir": "\(.*\)".*/\1/p')
	cp -r --no-preserve=mode "$dir" "$work/suites/$name"
	(cd "$work/suites/$name" && CGO_ENABLED=0 GOFLAGS=-mod=mod go test -c -o suite .)
done
# Python's: Debian's package has the tests alone; what they share is the interpreter's.
version=$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
(cd "$work" && apt-get download -qq "libpython$version-testsuite" 2>/dev/null && dpkg-deb -x libpython*.deb deb)
mkdir "$work/suites/python"
cp -r "/usr/lib/python$version/test" "$work/suites/python/test"
cp -r "$work/deb/usr/lib/python$version/test/." "$work/suites/python/test"
cp results.py "$work/suites/python/"
cp all.sh "$work/suites/"

timeout 3600 "$bin/soulbox-mcp" http --listen 127.0.0.1:0 --state-dir "$work/state" --on-exit kill --log-level error \
	>"$work/url" 2>"$work/log" </dev/null &
server=$!
for _ in $(seq 200); do [ -s "$work/url" ] && break; sleep 0.05; done
SOULBOX_URL=$(sed 's|/mcp$||' "$work/url")
export SOULBOX_URL SOULBOX_API_KEY=e2b_0000000000000000000000000000000000000000
sandbox=$("$bin/soulbox" sandbox create)
tar -C "$work" -cf - suites | "$bin/soulbox" exec -i "$sandbox" -- tar -C /tmp --no-same-owner -xf -
results() { grep -E '^[a-z_]+ [^ ]+ (PASS|FAIL|SKIP)$' | sort -u; }
echo "inside ..."
"$bin/soulbox" exec "$sandbox" -- sh /tmp/suites/all.sh </dev/null | results >"$work/inside"
echo "outside ..."
sh "$work/suites/all.sh" </dev/null | results >"$work/outside"

# A test that passes outside; its result inside, or nothing.
awk 'NR == FNR {got[$1 " " $2] = $3; next} $3 == "PASS" && got[$1 " " $2] != "PASS" {print $1, $2, got[$1 " " $2]}' \
	"$work/inside" "$work/outside" >"$work/differ"
grep -v '^#' "$here/differences.txt" | awk 'NF {print "^" $1 " " $2 " "}' >"$work/known"
echo "$(grep -c PASS "$work/outside") pass outside, $(grep -c PASS "$work/inside") inside, $(wc -l <"$work/differ") of the first not inside"
cat "$work/differ"
[ "$(grep -c PASS "$work/outside")" -gt 1000 ] || { echo "too few results outside: the suites did not run"; exit 1; }
new=$(grep -vE -f "$work/known" "$work/differ" || true)
[ -z "$new" ] || { echo "not known to differ (differences.txt):"; echo "$new"; exit 1; }
echo "all differences are known"
