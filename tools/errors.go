package tools

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"syscall"

	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/sandbox"
)

// advice is the next call to make for each class of error. Errors become advice only here. The first entry that matches is used.
var advice = []struct {
	class error
	text  string
}{
	{sandbox.ErrNotFound, "Call sandbox_list to see the sandboxes there are, or leave sandbox_id out to use this session's own."},
	{sandbox.ErrNoTemplate, "Call template_list to see the templates and snapshots there are."},
	{sandbox.ErrNoSnapshot, "Call template_list to see the snapshots there are."},
	{sandbox.ErrSnapshot, "Use another name, or delete that one with template_delete."},
	{sandbox.ErrBusySnapshot, "Try again in a moment."},
	{sandbox.ErrNoDisk, "Delete a snapshot with template_delete, or kill a paused sandbox with sandbox_kill."},
	{sandbox.ErrTooMany, "Kill one you no longer need with sandbox_kill; sandbox_list shows them."},
	{sandbox.ErrTooMuch, "Ask for less memory_mb."},
	{sandbox.ErrNoRoom, "Kill a sandbox you no longer need with sandbox_kill, or pause one to disk with sandbox_pause."},
	{sandbox.ErrClosed, "The server is shutting down; try again when it is back."},
	{agent.ErrNoProcess, "Call process_list to see the processes there are."},
	{agent.ErrTagInUse, "Use another tag, or end that process with process_signal."},
	{agent.ErrEnded, "Its output is still there: call process_wait."},
	{sandbox.ErrNotExposed, "Call sandbox_get to see the exposed ports."},
	{agent.ErrNoWatch, "Start again with file_watch and a path: a watch ends with close, and when it is not read while " +
		"others are needed."},
	{agent.ErrWatches, "End one with file_watch, its cursor and close."},
	{sandbox.ErrUnfit, "It keeps running, sandbox_get and sandbox_kill work; make a new one with sandbox_create, or start the version " +
		"that made it."},
	{agent.ErrVersion, "Commands and files still work in it; for this, make a new one with sandbox_create."},
	{agent.ErrNoTerminal, "Start it with tty to give it one."},
	{agent.ErrNoUser, "Leave user out to run as \"user\", or use \"root\"."},
	{agent.ErrNoSignal, "Use a name such as SIGINT, SIGTERM or SIGKILL."},
	{agent.ErrStdin, "Start it with background true to keep its stdin open for process_write."},
	{agent.ErrCwd, "Make it with exec (mkdir -p), or leave cwd out to use the home directory."},
	{agent.ErrNoMatch, "Read the file with file_read and copy old_str exactly, with its white space."},
	{agent.ErrAmbiguous, "Add lines around it to old_str until it is unique, or set replace_all."},
	{agent.ErrChanging, "Wait until the program that writes it is done, then edit it."},
	{agent.ErrNotText, "Use exec to change it."},
	{agent.ErrNotRegular, "Use exec to work with it."},
	{agent.ErrCommand, "Write it to a file with file_write and run that."},
	{agent.ErrTooLarge, "Use exec to work with it in parts."},
	{agent.ErrLimit, "End some processes with process_signal; process_list shows them."},
	{agent.ErrSilent, "Try again: a sandbox that never answers is paused with its files within some minutes; the next call says so."},
	{sandbox.ErrPutOff, "Nothing is lost: try again in a minute, or report this error to the operator of this server."},
	{sandbox.ErrDamaged, "Call sandbox_resume with files_only, or sandbox_create with a snapshot of it."},
	{agent.ErrLost, "The sandbox has ended. Call sandbox_create for a new one."},
	{syscall.ENOSPC, "The sandbox's disk is full: remove files with file_remove or exec; sandbox_get shows how much is used."},
	{syscall.EISDIR, "Use file_list to see what is in it, or give the path of a file."},
	{syscall.ENOTDIR, "A part of the path is not a directory: check it with file_list."},
	{syscall.ENOTEMPTY, "Set recursive to remove it and everything in it."},
	{syscall.EROFS, "This part of the sandbox is read-only; use a path in /home/user, /tmp or /opt."},
	{syscall.ELOOP, "Its symlinks lead in a circle: look at them with file_list."},
	{syscall.EINVAL, "Correct the arguments and call it again."},
	{syscall.ENAMETOOLONG, "Use a shorter path."},
	{fs.ErrNotExist, "Check the path with file_list."},
	{fs.ErrExist, "Use another path, or mode replace."},
	{fs.ErrPermission, "If it has to be done, run a command as user root with exec."},
	{context.DeadlineExceeded, "Try again, or do it in smaller steps."},
}

// explain turns any error into one sentence on what is wrong and one on what to do.
func explain(tool string, err error) string {
	var argument argumentError
	if errors.As(err, &argument) {
		return string(argument)
	}
	what := sentence(err)
	var state *sandbox.StateError
	if errors.As(err, &state) {
		if errors.Is(err, errDefaultEnded) {
			return fmt.Sprintf("%s (sandbox %s: %s).", strings.TrimSuffix(sentence(errDefaultEnded), "."), state.ID, state.Cause)
		}
		if state.Saved {
			return what + " Call sandbox_resume to start it from what was saved of it, or sandbox_create for a new one."
		}
		if state.State.Ended() {
			return what + " Call sandbox_create for a new one."
		}
		if state.Wakes {
			return what + " Try again: any call resumes it."
		}
		if state.State == sandbox.Paused {
			return what + " Call sandbox_resume to resume it."
		}
		return what + " Call sandbox_get to see what it does."
	}
	if errors.Is(err, agent.ErrInvalid) && strings.Contains(what, "path") {
		return what + " Give an absolute path without \"..\", such as /home/user/file.txt."
	}
	for _, a := range advice {
		if errors.Is(err, a.class) {
			return what + " " + a.text
		}
	}
	if errors.Is(err, agent.ErrInvalid) || errors.Is(err, sandbox.ErrInvalid) {
		return what + " Correct the arguments of " + tool + " and call it again."
	}
	return what
}

// sentence turns an error's text into a sentence. Text from the guest is made inert.
func sentence(err error) string {
	text := render([]byte(err.Error()))
	for _, plain := range []error{agent.ErrInvalid, sandbox.ErrInvalid} {
		text = strings.TrimSuffix(text, ": "+plain.Error())
	}
	if text == "" {
		return "It failed."
	}
	text = strings.ToUpper(text[:1]) + text[1:]
	return strings.TrimSuffix(text, ".") + "."
}
