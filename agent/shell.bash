# What bash does around a command that a remembering shell runs (shell.go). The name of the file to write is put in place of @FILE@.
# Aliases are expanded when a line is read, and none exist yet; functions of the user's that are named like a builtin are got around
# by "builtin", and one named "builtin" by POSIX mode, in which special builtins are found before functions.
__soulbox_save() {
	__soulbox_status=$? __soulbox_o=$SHELLOPTS __soulbox_b=$BASHOPTS POSIXLY_CORRECT=1
	unset -f builtin
	unset POSIXLY_CORRECT
	builtin set +eux
	builtin trap - DEBUG ERR RETURN
	builtin unset -f __soulbox_save
	__soulbox_saved=1
	{
		builtin printf '%s\0' "$__soulbox_fo" "$__soulbox_o" "$__soulbox_fb" "$__soulbox_b"
		builtin pwd
		builtin printf '\0'
		builtin umask -p
		builtin printf '\0'
		builtin alias -p
		builtin printf '\0'
		builtin declare -F
		builtin printf '\0'
		builtin declare -f
		builtin printf '\0'
		builtin declare -p
		builtin printf '%s\0' '' "$@" end
	} >|@FILE@
	builtin return "$__soulbox_status"
}
trap '[[ -n ${__soulbox_saved-} ]] || { __soulbox_save "$@"; } 2>/dev/null' EXIT
