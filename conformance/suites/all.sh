# Runs all suites that are beside it, and prints a line for each test: SUITE TEST PASS, FAIL or SKIP.
cd "$(dirname "$0")" || exit 1
ulimit -Sn 4096 # as a sandbox has: tests that go over all descriptors are as slow as the limit is high
for name in pty fsnotify console; do
	(cd $name && timeout 200 ./suite -test.v -test.timeout 180s 2>&1) | sed -n "s/^ *--- \([A-Z]*\): \([^ ]*\).*/$name \2 \1/p"
done
cd python || exit 1
for name in test_pty test_fcntl test_logging test_subprocess test_socket test_resource test_posix; do
	PYTHONPATH=. timeout 500 python3 results.py $name 2>/dev/null || echo "$name the-end FAIL"
done
