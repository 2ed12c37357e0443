package main

import (
	"strings"
	"testing"
)

// TestUsage: a wrong command line gives an error that names the mistake and what is wanted, and the exit code of wrong usage.
func TestUsage(t *testing.T) {
	me := user{home: t.TempDir()}
	for args, want := range map[string]struct {
		code int
		text string
	}{
		"sandbox lst":   {exitUsage, `no command "soulbox sandbox lst"; did you mean 'soulbox sandbox list'?`},
		"template bild": {exitUsage, "did you mean 'soulbox template build'?"},
		"port foo": {exitUsage,
			`no command "soulbox port foo"; those of "soulbox port" are close, expose, list`},
		"--owner x auth foo bar":            {exitUsage, "are info, login, logout, use"},
		"sandox list":                       {exitUsage, "did you mean 'soulbox sandbox'?"},
		"sandbox":                           {0, "soulbox sandbox [command]"},
		"":                                  {0, "soulbox [command]"},
		"completion fsh":                    {exitUsage, "'soulbox completion fish'?"},
		"completion":                        {0, "soulbox completion [command]"},
		"help sandbox lst":                  {exitUsage, "did you mean 'soulbox sandbox list'?"},
		"help foobar":                       {exitUsage, `no command "soulbox foobar"`},
		"help sandbox list":                 {0, "soulbox sandbox list [flags]"},
		"help":                              {0, "soulbox [command]"},
		"sandbox snapshot":                  {exitUsage, "ID is missing"},
		"sandbox snapshot a b c":            {exitUsage, `one argument too many: "c"`},
		"sandbox connect":                   {exitUsage, "ID is missing"},
		"sandbox connect a b c":             {exitUsage, `one argument too many: "c"`},
		"auth logout a b":                   {exitUsage, `one argument too many: "b"`},
		"sandbox create --memory lots":      {exitUsage, `--memory is a size in MB, or such as 512M or 4G, not "lots"`},
		"sandbox create --timeout 5":        {exitUsage, `--timeout is a time such as 90s, 5m or 2h, not "5"`},
		"sandbox fork x --count two":        {exitUsage, `--count is a number, not "two"`},
		"sandbox create --on-timeout sleep": {exitUsage, `--on-timeout is pause or kill, not "sleep"`},
		"sandbox create --network some":     {exitUsage, `--network is none, full or allowlist, not "some"`},
		"sandbox create --network full --allow a.example": {exitUsage, "--allow goes with"},
		"sandbox create --cpu NaN":                        {exitUsage, "--cpu is a number"},
		"sandbox create --cpu -1":                         {exitUsage, "--cpu is a number"},
		"sandbox list --state running,gone":               {exitUsage, `is creating, running, paused, killed or failed, not "gone"`},
		"sandbox list -o xml":                             {exitUsage, "the formats are"},
		"sandbox logs x --source nope":                    {exitUsage, `--source is system, process or build, not "nope"`},
		"sandbox logs x --level loud":                     {exitUsage, `--level is debug, info, warn or error, not "loud"`},
		"sandbox logs x --tail 0":                         {exitUsage, "--tail from 1"},
		"sandbox metrics x --since -5m":                   {exitUsage, "--since is a time"},
		"sandbox pause x --in-memory --files-only":        {exitUsage, "does not go with it"},
		"sandbox fork x --count 0":                        {exitUsage, "--count is a number from 1 to 100"},
		"sandbox fork x --count 101":                      {exitUsage, "--count is a number from 1 to 100"},
		"sandbox fork x --timeout -1s":                    {exitUsage, "--timeout is a second or more"},
		"sandbox extend x soon":                           {exitUsage, "is not a time"},
		"url x /f --expires 0s":                           {exitUsage, "--expires is a time"},
		"url x /f --expires 200h":                         {exitUsage, "--expires is a time"},
		"kill x 1 -s NOPE":                                {exitUsage, "there is no signal"},
		"template build --cpu=-1":                         {exitUsage, "--cpu is a number"},
		"port close x 0":                                  {exitUsage, "a port is a number"},
		"auth login":                                      {exitUsage, "--url"},
		"port expose x 80 --wait 2h":                      {exitUsage, "--wait is a time up to"},
		"sandbox create --nosuch":                         {exitUsage, "unknown flag: --nosuch"},
		"exec":                                            {exitExec, "ID is missing"},
		"exec x":                                          {exitExec, "give a command after the ID"},
		"exec x --":                                       {exitExec, "give a command after the ID"},
		"exec --nosuch x ls":                              {exitExec, "unknown flag: --nosuch"},
		"exec x --nosuch ls":                              {exitExec, "unknown flag: --nosuch"},
		"exec x -d -i ls":                                 {exitExec, "--detach has no stdin"},
		"exec -- x ls":                                    {exitExec, "ID is missing"},
		"cp sb1: .":                                       {exitUsage, "name a path: sb1:. is the home directory"},
		"template build /nonexist":                        {exitFailed, "there is no directory /nonexist"},
		"template build /nonexist --memory 1":             {exitFailed, "there is no directory /nonexist"},
	} {
		code, said := me.run(t, "", strings.Fields(args)...)
		if code != want.code || !strings.Contains(said, want.text) {
			t.Errorf("%s: %d %s, want %d %s", args, code, said, want.code, want.text)
		}
	}
}

// TestSize: sizes are in MB, or have a unit.
func TestSize(t *testing.T) {
	for text, want := range map[string]int64{"1024": 1024, "512M": 512, "1g": 1024, "1.5G": 1536, "2GiB": 2048, "2GB": 2048, "1T": 1 << 20,
		"100MB": 100, "0": 0, "": -1, "1K": -1, "G": -1, "B": -1, "12B": -1, "0.5": -1, "1e3": -1, "-1": -1, "0x10": -1, "inf": -1,
		"NaN": -1, "99999999999999999999": -1, "1 G": -1, ".": -1} {
		got := int64(-1)
		if err := (size{&got}).Set(text); (err != nil) != (want < 0) || got != want {
			t.Errorf("%q: %d %v, want %d", text, got, err, want)
		}
	}
}
