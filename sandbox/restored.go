package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"time"

	"soulbox.dev/soulbox/agent"
)

// HookDir is the directory in a sandbox with programs that are run as root, in the order of their names, after the sandbox was restored: as
// a fork, from a snapshot, or from disk.
const HookDir = "/etc/soulbox/after-restore.d"

// HookTag is the tag of the process that runs the hooks.
const HookTag = "after-restore"

const (
	hookTime   = 10 * time.Second // for all together
	hookOutput = 2000             // bytes of their output in the log
)

// hookScript runs the hooks that root owns, as cron does. They get the generation in their environment, and their output is joined.
const hookScript = `for f in ` + HookDir + `/*; do
	[ -f "$f" ] && [ -x "$f" ] && [ -O "$f" ] || continue
	"$f" </dev/null
	code=$?
	[ $code = 0 ] || { echo "${f##*/} has ended with exit code $code" >&2; failed=1; }
done
exit ${failed:-0}`

// afterRestore makes a restored machine distinct from the one that was saved: if it has the saved memory, it gets another boot_id and the
// next generation (a machine that boots needs neither); then its hooks run. A failure does not stop the sandbox; it is noted in
// the sandbox's log.
func afterRestore(ctx context.Context, client *agent.Client, whole bool, log *journal) {
	env := map[string]string{}
	if whole {
		told, err := client.Restored(ctx)
		switch {
		case errors.Is(err, agent.ErrVersion): // an older version saved it
		case err != nil:
			log.note(LevelWarn, "it has the same boot_id as the sandbox that was saved: %v", err)
		default:
			env["SOULBOX_GENERATION"] = strconv.FormatInt(told.Generation, 10)
		}
	}
	if err := runHooks(ctx, client, env, log); err != nil {
		log.note(LevelWarn, "the hooks of %s: %v", HookDir, err)
	}
}

// runHooks runs the sandbox's hooks, if it has any, and waits for them.
func runHooks(ctx context.Context, client *agent.Client, env map[string]string, log *journal) error {
	if _, err := client.Stat(ctx, HookDir); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	}
	got, err := client.Start(ctx, agent.StartRequest{Args: []string{"/bin/sh", "-c", hookScript}, User: "root", Cwd: "/", Env: env,
		Tag:       HookTag,
		TimeoutMS: hookTime.Milliseconds(), WaitMS: (hookTime + tellTime).Milliseconds(), Window: agent.Window{Tail: hookOutput}})
	if err != nil {
		return err
	}
	p := got.Process
	switch {
	case p.State != agent.StateExited:
		err = errors.New("they still run")
	case p.Cause == agent.CauseTimeout:
		err = fmt.Errorf("they took longer than %s and were killed", hookTime)
	case p.ExitCode != 0 || p.Cause != "":
		err = fmt.Errorf("they have failed, with exit code %d", p.ExitCode)
	default:
		log.note(LevelInfo, "the hooks of %s have run", HookDir)
		return nil
	}
	if out := append(got.Output.Head, got.Output.Tail...); len(out) > 0 {
		err = fmt.Errorf("%w; their output ends with:\n%s", err, agent.Inert(out))
	}
	return err
}
